// The client. Arguments: the URL, and `legacy` or `modern`.
package main

import (
	"os"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"sidegate.test/mcp-sdk/steps"
)

func main() {
	if os.Args[2] == "legacy" {
		steps.Run(os.Args[1], &mcp.ClientSessionOptions{ProtocolVersion: "2025-11-25"})
		return
	}
	steps.Run(os.Args[1], nil)
}
