package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	hcli "github.com/hashicorp/cli"
	"golang.org/x/term"

	"github.com/diurnalog/diurna/rpc/cli/flags"
	"github.com/diurnalog/diurna/rpc/client"
)

// Exit codes of every verb.
const (
	ExitOK     = 0
	ExitUsage  = 1 // a wrong argument, or something local such as a file
	ExitServer = 2 // the server said no, is unhealthy or unreachable
)

// Meta is what verbs touch of the process they run in.
type Meta struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// LookupEnv reads the environment; nil is an empty one.
	LookupEnv func(name string) (string, bool)
	// Interrupts starts the delivery of requests to stop, for the verbs that
	// can; stop ends it. nil means there are none.
	Interrupts func() (requests <-chan os.Signal, stop func())
	// IsTerminal tells whether progress may be drawn on w; nil means never.
	IsTerminal func(w io.Writer) bool
	// DialOptions are given to the client besides what flags ask for.
	DialOptions []client.Option
}

// OS is the process itself.
func OS() *Meta {
	return &Meta{
		Stdin:     os.Stdin,
		Stdout:    os.Stdout,
		Stderr:    os.Stderr,
		LookupEnv: os.LookupEnv,
		Interrupts: func() (<-chan os.Signal, func()) {
			requests := make(chan os.Signal, 2)
			signal.Notify(requests, os.Interrupt, syscall.SIGTERM)
			return requests, func() { signal.Stop(requests) }
		},
		IsTerminal: func(w io.Writer) bool {
			f, ok := w.(*os.File)
			return ok && term.IsTerminal(int(f.Fd()))
		},
	}
}

// Commands are the verbs of this package.
func Commands(m *Meta) map[string]hcli.CommandFactory {
	verb := func(c hcli.Command) hcli.CommandFactory {
		return func() (hcli.Command, error) { return c, nil }
	}
	return map[string]hcli.CommandFactory{
		"consume": verb(&consumeCommand{node: node{Meta: m}}),
		"produce": verb(&produceCommand{node: node{Meta: m}}),
		"leave":   verb(&leaveCommand{question: question{node: node{Meta: m}}}),
		"servers": verb(&serversCommand{question: question{node: node{Meta: m}}}),
		"status":  verb(&statusCommand{question: question{node: node{Meta: m}}}),
		"version": verb(&versionCommand{Meta: m}),

		"operator raft list-peers":          verb(&listPeersCommand{question: question{node: node{Meta: m}}}),
		"operator raft add-peer":            verb(&addPeerCommand{question: question{node: node{Meta: m}}}),
		"operator raft remove-peer":         verb(&removePeerCommand{question: question{node: node{Meta: m}}}),
		"operator snapshot save":            verb(&saveCommand{node: node{Meta: m}}),
		"operator raft transfer-leadership": verb(&transferCommand{question: question{node: node{Meta: m}}}),
	}
}

// Run runs the verb that args name, one of this package's or of more, in this
// process, and returns its exit code. From then on the process gets an error,
// and not a signal, when it writes to a closed pipe.
func Run(args []string, more map[string]hcli.CommandFactory) int {
	// Else the runtime ends the process when standard output is closed, before
	// a verb can end well: `consume | head` is no failure.
	signal.Ignore(syscall.SIGPIPE)
	return OS().Run(args, more)
}

// Run is Run within m.
func (m *Meta) Run(args []string, more map[string]hcli.CommandFactory) int {
	commands := Commands(m)
	maps.Copy(commands, more)

	c := hcli.NewCLI("diurna", "diurna "+VersionString())
	c.Args = args
	c.Commands = commands
	// The library would list "debug" without a word, and not "debug segment".
	c.HelpFunc = func(map[string]hcli.CommandFactory) string { return help(commands) }
	c.HelpWriter, c.ErrorWriter = m.Stdout, m.Stderr

	verb := c.Subcommand()
	switch {
	case len(args) > 0 && strings.HasPrefix(args[0], "-") && !known(commands, verb) && !topLevel(c, args[0]):
		m.errorf("unknown option %s. The options of a command come after it: diurna <command> [options].", args[0])
		return ExitUsage
	case verb != "" && !known(commands, verb):
		m.errorf("unknown command %q.%s Run `diurna -help` for the list.", verb, flags.DidYouMean(verb, firstWords(commands), ""))
		return ExitUsage
	}
	code, err := c.Run()
	if err != nil {
		m.errorf("%s", err)
		return ExitUsage
	}
	if c.Subcommand() == "" && code != ExitOK {
		return ExitUsage // the library says 127 when no command is given
	}
	return code
}

// topLevel reports whether option is one that stands without a command.
func topLevel(c *hcli.CLI, option string) bool {
	return c.IsHelp() || c.IsVersion() || strings.HasPrefix(strings.TrimLeft(option, "-"), "autocomplete-")
}

// known reports whether verb is a command or begins one.
func known(commands map[string]hcli.CommandFactory, verb string) bool {
	for name := range commands {
		if name == verb || strings.HasPrefix(name, verb+" ") {
			return true
		}
	}
	return false
}

func firstWords(commands map[string]hcli.CommandFactory) []string {
	var words []string
	for name := range commands {
		word, _, _ := strings.Cut(name, " ")
		words = append(words, word)
	}
	slices.Sort(words)
	return slices.Compact(words)
}

func help(commands map[string]hcli.CommandFactory) string {
	var b strings.Builder
	b.WriteString("Usage: diurna [-version] [-help] <command> [options]\n\nCommands:\n")
	width := 0
	for name := range commands {
		width = max(width, len(name))
	}
	for _, name := range slices.Sorted(maps.Keys(commands)) {
		command, err := commands[name]()
		if err != nil {
			fmt.Fprintf(&b, "  %-*s  (%s)\n", width, name, err)
			continue
		}
		fmt.Fprintf(&b, "  %-*s  %s\n", width, name, command.Synopsis())
	}
	b.WriteString("\nRun `diurna <command> -help` for the options of one.")
	return b.String()
}

// errorf tells what went wrong. Standard error is the last resort: what cannot
// be written there cannot be told.
func (m *Meta) errorf(format string, args ...any) {
	_, _ = fmt.Fprintf(m.Stderr, "Error: "+format+"\n", args...)
}

// notef says something that is not an error.
func (m *Meta) notef(format string, args ...any) {
	_, _ = fmt.Fprintf(m.Stderr, format+"\n", args...)
}

func (m *Meta) stderrIsTerminal() bool { return m.IsTerminal != nil && m.IsTerminal(m.Stderr) }

// stdinIsTerminal tells whether records are typed.
func (m *Meta) stdinIsTerminal() bool {
	f, ok := m.Stdin.(*os.File)
	return ok && m.IsTerminal != nil && m.IsTerminal(f)
}

func (m *Meta) interrupts() (<-chan os.Signal, func()) {
	if m.Interrupts == nil {
		return nil, func() {}
	}
	return m.Interrupts()
}

// untilInterrupted is a context that ends with the first request to stop.
func (m *Meta) untilInterrupted() (context.Context, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	requests, stop := m.interrupts()
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-requests:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		stop()
		cancel()
		<-done
	}
}
