// Package steps is the matrix's client on the Go SDK: it goes through every step, whatever the one before came to, and
// prints a line of JSON for each.
package steps

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"
)

const patience = 10 * time.Second

type outcome map[string]any

func failed(err error) outcome {
	var wire *jsonrpc.Error
	switch {
	case errors.As(err, &wire):
		return outcome{"outcome": "error", "code": wire.Code, "text": wire.Message}
	case errors.Is(err, context.DeadlineExceeded):
		return outcome{"outcome": "hang"}
	case errors.Is(err, context.Canceled):
		return outcome{"outcome": "cancelled"}
	}
	return outcome{"outcome": "exception", "text": err.Error()}
}

// Run goes through the steps at the server with this URL; options are nil for the SDK's own choices.
func Run(url string, options *mcp.ClientSessionOptions) {
	var waiting sync.Once
	var progress []string
	var lock sync.Mutex
	begun := make(chan struct{})
	client := mcp.NewClient(&mcp.Implementation{Name: "matrix", Version: "1"}, &mcp.ClientOptions{
		ProgressNotificationHandler: func(_ context.Context, request *mcp.ProgressNotificationClientRequest) {
			if request.Params.Message == "waiting" {
				waiting.Do(func() { close(begun) })
				return
			}
			lock.Lock()
			defer lock.Unlock()
			progress = append(progress, request.Params.Message)
		},
	})
	step := func(name string, do func(context.Context) (outcome, error)) {
		ctx, done := context.WithTimeout(context.Background(), patience)
		defer done()
		result, err := do(ctx)
		if err != nil {
			result = failed(err)
		}
		result["step"] = name
		if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
			panic(err)
		}
	}

	var session *mcp.ClientSession
	step("connect", func(ctx context.Context) (outcome, error) {
		var err error
		transport := &mcp.StreamableClientTransport{Endpoint: url}
		session, err = client.Connect(context.Background(), transport, options)
		if err != nil {
			return nil, err
		}
		return outcome{"outcome": "result", "text": session.InitializeResult().ProtocolVersion}, nil
	})
	if session == nil {
		os.Exit(1)
	}
	list := func(ctx context.Context) (outcome, error) {
		listed, err := session.ListTools(ctx, nil)
		if err != nil {
			return nil, err
		}
		names := []string{}
		for _, tool := range listed.Tools {
			names = append(names, tool.Name)
		}
		return outcome{"outcome": "result", "names": names}, nil
	}
	call := func(name string, arguments map[string]any, token any) func(context.Context) (outcome, error) {
		return func(ctx context.Context) (outcome, error) {
			params := &mcp.CallToolParams{Name: name, Arguments: arguments}
			if token != nil {
				params.SetProgressToken(token)
			}
			result, err := session.CallTool(ctx, params)
			if err != nil {
				return nil, err
			}
			text := ""
			if len(result.Content) > 0 {
				if content, ok := result.Content[0].(*mcp.TextContent); ok {
					text = content.Text
				}
			}
			return outcome{"outcome": "result", "is_error": result.IsError, "text": text}, nil
		}
	}
	add := call("add", map[string]any{"a": 1, "b": 2}, nil)
	step("list", list)
	step("call", add)
	step("stream", func(ctx context.Context) (outcome, error) {
		result, err := call("count", map[string]any{"to": 3}, "count")(ctx)
		if err == nil {
			time.Sleep(200 * time.Millisecond) // handlers of notifications run beside the call
			lock.Lock()
			defer lock.Unlock()
			result["progress"] = progress
		}
		return result, err
	})
	step("cancel", func(ctx context.Context) (outcome, error) {
		inner, cancel := context.WithCancel(ctx)
		defer cancel()
		go func() {
			select {
			case <-begun:
				cancel()
			case <-inner.Done():
			}
		}()
		return call("wait", map[string]any{}, "wait")(inner)
	})
	step("call after cancel", add)
	step("denied", call("drop", map[string]any{"table": "t"}, nil))
	step("call after denial", add)
	step("within limit", call("paced", map[string]any{}, nil))
	step("limited", call("paced", map[string]any{}, nil))
	step("call after limit", add)
	step("list again", list)
	step("close", func(context.Context) (outcome, error) {
		return outcome{"outcome": "result"}, session.Close()
	})
}
