// Compiles OPA's published conformance cases to policy.wasm: `rego-cases DIRECTORY CAPABILITIES`, one JSON line a case.
//
// What a case wants is passed on as it is; what the compiler refuses under CAPABILITIES is said with its code and text.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/test/cases"
)

type compiled struct {
	cases.TestCase
	File    string `json:"file"`
	Wasm    []byte `json:"wasm,omitempty"`
	Refused string `json:"refused,omitempty"`
	Code    string `json:"code,omitempty"`
}

func main() {
	file, err := os.Open(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	capabilities, err := ast.LoadCapabilitiesJSON(file)
	if err != nil {
		log.Fatal(err)
	}
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	lines := json.NewEncoder(out)
	for _, each := range cases.MustLoad(os.Args[1]).Sorted().Cases {
		if err := lines.Encode(compile(each, capabilities)); err != nil {
			log.Fatal(err)
		}
	}
}

// Returns what OPA itself answers when errors of built-in functions are not strict, as WebAssembly's never are.
func lenient(each cases.TestCase, options []func(*rego.Rego)) *[]map[string]any {
	if each.Data != nil {
		options = append(options, rego.Data(*each.Data))
	}
	if each.Input != nil {
		options = append(options, rego.Input(*each.Input))
	}
	found, err := rego.New(options...).Eval(context.Background())
	if err != nil {
		log.Fatal(each.Note, ": ", err)
	}
	results := []map[string]any{}
	for _, one := range found {
		results = append(results, one.Bindings)
	}
	return &results
}

func compile(each cases.TestCase, capabilities *ast.Capabilities) compiled {
	result := compiled{TestCase: each, File: filepath.Base(filepath.Dir(each.Filename))}
	for name, value := range each.Env {
		os.Setenv(name, value)
	}
	options := []func(*rego.Rego){
		rego.Query(each.Query), rego.SetRegoVersion(ast.RegoV1), rego.Capabilities(capabilities),
	}
	for index, module := range each.Modules {
		options = append(options, rego.Module(fmt.Sprintf("module-%d.rego", index), module))
	}
	policy, err := rego.New(options...).Compile(context.Background())
	var problems ast.Errors
	switch {
	case err == nil:
		result.Wasm = policy.Bytes
		if each.StrictError {
			result.WantResult, result.WantError, result.WantErrorCode = lenient(each, options), nil, nil
		}
	case errors.As(err, &problems):
		result.Refused, result.Code = problems[0].Error(), problems[0].Code
	default:
		result.Refused = err.Error()
	}
	return result
}
