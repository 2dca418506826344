// The matrix's server on the Go SDK. Prints its port; every tool that runs leaves a line in the ledger. With the argument
// `stateless` it speaks both eras, without only the older one, with sessions: the SDK's handlers can do no more.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

type numbers struct {
	A int `json:"a"`
	B int `json:"b"`
}

type table struct {
	Table string `json:"table"`
}

type mark struct {
	Text string `json:"text"`
}

type count struct {
	To int `json:"to"`
}

type nothing struct{}

func enter(tool string, arguments any) {
	line, err := json.Marshal(map[string]any{"tool": tool, "arguments": arguments})
	if err != nil {
		log.Fatal(err)
	}
	file, err := os.OpenFile(os.Getenv("LEDGER"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	if _, err := file.Write(append(line, '\n')); err != nil {
		log.Fatal(err)
	}
}

func text(said string) (*mcp.CallToolResult, any, error) {
	return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: said}}}, nil, nil
}

func report(ctx context.Context, request *mcp.CallToolRequest, progress, total float64, message string) {
	token := request.Params.GetProgressToken()
	if token == nil {
		return
	}
	params := &mcp.ProgressNotificationParams{ProgressToken: token, Progress: progress, Total: total, Message: message}
	if err := request.Session.NotifyProgress(ctx, params); err != nil {
		log.Print(err)
	}
}

func main() {
	server := mcp.NewServer(&mcp.Implementation{Name: "matrix", Version: "1"}, nil)
	mcp.AddTool(server, &mcp.Tool{Name: "add"}, func(_ context.Context, _ *mcp.CallToolRequest, in numbers) (*mcp.CallToolResult, any, error) {
		enter("add", in)
		return text(strconv.Itoa(in.A + in.B))
	})
	mcp.AddTool(server, &mcp.Tool{Name: "drop"}, func(_ context.Context, _ *mcp.CallToolRequest, in table) (*mcp.CallToolResult, any, error) {
		enter("drop", in)
		return text("dropped " + in.Table)
	})
	mcp.AddTool(server, &mcp.Tool{Name: "paced"}, func(_ context.Context, _ *mcp.CallToolRequest, in nothing) (*mcp.CallToolResult, any, error) {
		enter("paced", in)
		return text("once")
	})
	for _, name := range []string{"mark", "mark "} {
		mcp.AddTool(server, &mcp.Tool{Name: name}, func(_ context.Context, _ *mcp.CallToolRequest, in mark) (*mcp.CallToolResult, any, error) {
			enter(name, in)
			return text("marked")
		})
	}
	mcp.AddTool(server, &mcp.Tool{Name: "count"}, func(ctx context.Context, request *mcp.CallToolRequest, in count) (*mcp.CallToolResult, any, error) {
		enter("count", in)
		for step := range in.To {
			report(ctx, request, float64(step), float64(in.To), fmt.Sprintf("step %d", step))
		}
		return text("done")
	})
	mcp.AddTool(server, &mcp.Tool{Name: "wait"}, func(ctx context.Context, request *mcp.CallToolRequest, in nothing) (*mcp.CallToolResult, any, error) {
		enter("wait", in)
		report(ctx, request, 0, 1, "waiting")
		select {
		case <-ctx.Done():
			enter("cancelled", in)
			return nil, nil, ctx.Err()
		case <-time.After(20 * time.Second):
			return text("waited")
		}
	})
	stateless := len(os.Args) > 1 && os.Args[1] == "stateless"
	options := &mcp.StreamableHTTPOptions{Stateless: stateless, PropagateRequestCancellation: true}
	handler := mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, options)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	mux := http.NewServeMux()
	mux.Handle("/mcp", handler)
	log.Fatal(http.Serve(listener, mux))
}
