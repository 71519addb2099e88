// Command diurna is Diurna: the node, and the command line to work with it.
package main

import (
	"os"

	"github.com/diurnalog/diurna/agent"
	"github.com/diurnalog/diurna/rpc/cli"
)

// Set by the build, see Makefile.
var version, revision string

func main() {
	if version != "" {
		cli.Version, cli.Revision = version, revision
	}
	os.Exit(cli.Run(os.Args[1:], agent.Commands(cli.VersionString())))
}
