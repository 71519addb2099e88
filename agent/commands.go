package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/hashicorp/cli"
	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/rpc/cli/flags"
)

// Exit codes of this package's verbs. A node that stops because its disk
// failed has one of its own, so that whoever restarts it can tell.
const (
	exitOK      = 0
	exitUsage   = 1
	exitServer  = 2
	exitStorage = 3
)

// Commands are the verbs that run or examine a node on this machine, or prepare
// one. version is what the node says it is.
func Commands(version string) map[string]cli.CommandFactory {
	verb := func(c cli.Command) cli.CommandFactory {
		return func() (cli.Command, error) { return c, nil }
	}
	return map[string]cli.CommandFactory{
		"acl check":       verb(newACLCheckCommand(os.Stdout, os.Stderr)),
		"acl lint":        verb(newACLLintCommand(os.Stdout, os.Stderr)),
		"agent":           verb(&agentCommand{stdout: os.Stdout, stderr: os.Stderr, version: version, program: os.Args[0], signals: osSignals, exit: os.Exit, now: time.Now}),
		"debug segment":   verb(newSegmentCommand(os.Stdout, os.Stderr)),
		"tls ca create":   verb(newTLSCACommand(os.Args[0], os.Stdout, os.Stderr)),
		"tls cert create": verb(newTLSCertCommand(os.Args[0], os.Stdout, os.Stderr)),

		"operator raft recover":     verb(&recoverCommand{stdout: os.Stdout, stderr: os.Stderr}),
		"operator snapshot inspect": verb(&inspectSnapshotCommand{stdout: os.Stdout, stderr: os.Stderr}),
		"operator snapshot restore": verb(&restoreCommand{stdout: os.Stdout, stderr: os.Stderr}),

		"validate": verb(&validateCommand{stdout: os.Stdout, stderr: os.Stderr}),
	}
}

// loadConfig loads a configuration and prints what is wrong with it.
func loadConfig(src config.Sources, stderr io.Writer) (*config.Config, bool) {
	cfg, err := config.Load(src)
	if err == nil {
		return cfg, true
	}
	printConfigError(err, stderr)
	return nil, false
}

func printConfigError(err error, stderr io.Writer) {
	var diags *config.Error
	if errors.As(err, &diags) {
		if printErr := diags.Print(stderr); printErr == nil {
			return
		}
	}
	say(stderr, "Error: %v\n", err)
}

func usageError(stderr io.Writer, verb string, err error) int {
	say(stderr, "Error: %v Run `diurna %s -help` for all of it.\n", sentence(err), verb)
	return exitUsage
}

// sentence ends an error's text with a full stop.
func sentence(err error) string {
	s := err.Error()
	switch s[len(s)-1] {
	case '.', '?', '!':
		return s
	}
	return s + "."
}

func newLogger(cfg *config.Config, stderr io.Writer) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{
		Name:       "diurna",
		Level:      hclog.LevelFromString(cfg.LogLevel),
		Output:     stderr,
		JSONFormat: cfg.LogJSON,
	})
}

type validateCommand struct{ stdout, stderr io.Writer }

// Synopsis implements cli.Command.
func (c *validateCommand) Synopsis() string { return "Check configuration files" }

// Help implements cli.Command.
func (c *validateCommand) Help() string {
	return flags.New().Help("diurna validate <file or folder> ...", `
Reads configuration files as the agent would, later ones over earlier ones, and
tells everything that is wrong with them. A folder stands for the .hcl and .json
files in it, in the order of their names.

Exits 0 when a node would start with them, 1 when not.
`, `
Examples:

      $ diurna validate config.hcl
      $ diurna validate /etc/diurna.d
`)
}

// Run implements cli.Command.
func (c *validateCommand) Run(args []string) int {
	paths, err := flags.New().ParseArgs(args)
	if err != nil {
		return usageError(c.stderr, "validate", err)
	}
	if len(paths) == 0 {
		return usageError(c.stderr, "validate", fmt.Errorf("name at least one file or folder"))
	}
	var src config.Sources
	for _, path := range paths {
		info, err := os.Stat(path)
		switch {
		case err != nil:
			say(c.stderr, "Error: %v\n", err)
			return exitUsage
		case info.IsDir():
			src.Dirs = append(src.Dirs, path)
		default:
			src.Files = append(src.Files, path)
		}
	}
	if _, ok := loadConfig(src, c.stderr); !ok {
		return exitUsage
	}
	say(c.stdout, "The configuration is valid.\n")
	return exitOK
}

// say writes for people. When that fails there is nowhere left to say so.
func say(w io.Writer, format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }
