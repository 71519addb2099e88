package cli

import (
	"encoding/json"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/diurnalog/diurna/rpc/cli/flags"
)

// Set by the build:
//
//	-ldflags "-X github.com/diurnalog/diurna/rpc/cli.Version=1.2.3
//	          -X github.com/diurnalog/diurna/rpc/cli.Revision=abcdef0"
var (
	// Version is the release, without a leading v.
	Version = "0.1.0-dev"
	// Revision is the commit that was built; where the build did not set it,
	// it is what the Go tool recorded.
	Revision = ""
)

// VersionString is the version and, if known, the revision: "1.2.3 (abcdef0)".
func VersionString() string {
	if r := revision(); r != "" {
		return fmt.Sprintf("%s (%s)", Version, r)
	}
	return Version
}

func revision() string {
	if Revision != "" {
		return Revision
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	var commit, dirty string
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			commit = s.Value[:min(len(s.Value), 12)]
		case "vcs.modified":
			if s.Value == "true" {
				dirty = "+dirty"
			}
		}
	}
	if commit == "" {
		return ""
	}
	return commit + dirty
}

type versionCommand struct {
	*Meta
	json bool
}

func (c *versionCommand) options() *flags.Set {
	f := flags.New()
	f.Bool(&c.json, "json", "Print a JSON object.")
	return f
}

func (c *versionCommand) Synopsis() string { return "Print the version of this program" }

func (c *versionCommand) Help() string {
	return c.options().Help("diurna version [options]",
		"Prints the version of this program, the revision it was built from and the\nGo version it was built with. It asks no server: `diurna servers` does.", "")
}

func (c *versionCommand) Run(args []string) int {
	if err := c.options().Parse(args); err != nil {
		return c.usage("version", err)
	}
	if c.json {
		return c.printJSON(struct {
			Version  string `json:"version"`
			Revision string `json:"revision"`
			Go       string `json:"go"`
			Platform string `json:"platform"`
		}{Version, revision(), runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH})
	}
	return c.print(fmt.Sprintf("diurna %s\n%s %s/%s\n", VersionString(), runtime.Version(), runtime.GOOS, runtime.GOARCH))
}

// print writes an answer to standard output.
func (m *Meta) print(s string) int {
	if _, err := m.Stdout.Write([]byte(s)); err != nil && !isClosedPipe(err) {
		m.errorf("write to standard output: %s", err)
		return ExitUsage
	}
	return ExitOK
}

func (m *Meta) printJSON(v any) int {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		m.errorf("%s", err)
		return ExitUsage
	}
	return m.print(string(b) + "\n")
}
