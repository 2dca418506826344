// The client for releases that know no choice of versions. Arguments: the URL, and `legacy`.
package main

import (
	"os"

	"sidegate.test/mcp-sdk/steps"
)

func main() {
	steps.Run(os.Args[1], nil)
}
