package cli

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/diurnalog/diurna/rpc/client"
)

// DefaultAddr is where verbs look for a node when told nothing else.
const DefaultAddr = "127.0.0.1:8400"

// envAddr overrides DefaultAddr.
const envAddr = "DIURNA_ADDR"

// flagSet is a flag.FlagSet that remembers the order and the wording of its
// flags for the help text, and knows what an unknown flag may have meant.
type flagSet struct {
	set  *flag.FlagSet
	docs []flagDoc
}

type flagDoc struct{ name, arg, usage string }

func newFlagSet() *flagSet {
	f := &flagSet{set: flag.NewFlagSet("", flag.ContinueOnError)}
	f.set.SetOutput(io.Discard) // errors are told by us, once
	return f
}

func (f *flagSet) doc(name, arg, usage string) {
	f.docs = append(f.docs, flagDoc{name, arg, usage})
}

func (f *flagSet) text(p *string, name, arg, def, usage string) {
	f.set.StringVar(p, name, def, "")
	f.doc(name, arg, usage)
}

func (f *flagSet) boolean(p *bool, name, usage string) {
	f.set.BoolVar(p, name, false, "")
	f.doc(name, "", usage)
}

func (f *flagSet) count(p *uint64, name, arg, usage string) {
	f.set.Uint64Var(p, name, 0, "")
	f.doc(name, arg, usage)
}

func (f *flagSet) duration(p *time.Duration, name string, def time.Duration, usage string) {
	*p = def
	f.set.Func(name, "", func(s string) error {
		d, err := time.ParseDuration(s)
		if err != nil || d < 0 {
			return errors.New(`want a duration like "500ms" or "1m"`)
		}
		*p = d
		return nil
	})
	f.doc(name, "duration", usage)
}

func (f *flagSet) size(p *uint64, name string, def uint64, usage string) {
	*p = def
	f.set.Func(name, "", func(s string) error {
		n, err := humanize.ParseBytes(s)
		if err != nil || n == 0 || n > 1<<40 {
			return errors.New(`want a size like "512KiB" or "1MB"`)
		}
		*p = n
		return nil
	})
	f.doc(name, "size", usage)
}

// offset is a flag that may be left out, which is not the same as 0.
func (f *flagSet) offset(p **uint64, name, usage string) {
	*p = nil
	f.set.Func(name, "", func(s string) error {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return errors.New("want an offset, a number from 0")
		}
		*p = &n
		return nil
	})
	f.doc(name, "offset", usage)
}

// each calls add for every time the flag is given.
func (f *flagSet) each(add func(string) error, name, arg, usage string) {
	f.set.Func(name, "", add)
	f.doc(name, arg, usage)
}

func (f *flagSet) addr(m *Meta, p *string) {
	def := DefaultAddr
	if m.LookupEnv != nil {
		if v, ok := m.LookupEnv(envAddr); ok && v != "" {
			def = v
		}
	}
	f.text(p, "addr", "host:port", def,
		"Address of any node of the cluster. Default "+DefaultAddr+", or what "+envAddr+" says; the port may be left out when it is "+client.DefaultPort+".")
}

func (f *flagSet) log(p *string) {
	f.text(p, "log", "name", "", "Name of the log. Default: the default log.")
}

func (f *flagSet) given(name string) bool {
	found := false
	f.set.Visit(func(fl *flag.Flag) { found = found || fl.Name == name })
	return found
}

// exclusive refuses more than one of the named flags.
func (f *flagSet) exclusive(names ...string) error {
	var given []string
	for _, name := range names {
		if f.given(name) {
			given = append(given, "-"+name)
		}
	}
	if len(given) > 1 {
		return fmt.Errorf("%s cannot be used together", strings.Join(given, " and "))
	}
	return nil
}

// parse takes args, of which none may be left over.
func (f *flagSet) parse(args []string) error {
	if err := f.checkNames(args); err != nil {
		return err
	}
	if err := f.set.Parse(args); err != nil {
		return err
	}
	if f.set.NArg() == 0 {
		return nil
	}
	arg := f.set.Arg(0)
	if f.set.Lookup(arg) != nil {
		return fmt.Errorf("unexpected argument %q. Did you mean -%s?", arg, arg)
	}
	return fmt.Errorf("unexpected argument %q: everything is said with options here", arg)
}

// checkNames finds flags that do not exist, which the flag package reports
// only as text. It walks args as that does.
func (f *flagSet) checkNames(args []string) error {
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if len(arg) < 2 || arg[0] != '-' || arg == "--" {
			return nil
		}
		name := strings.TrimPrefix(strings.TrimPrefix(arg, "-"), "-")
		name, _, valued := strings.Cut(name, "=")
		known := f.set.Lookup(name)
		if known == nil {
			var names []string
			for _, d := range f.docs {
				names = append(names, d.name)
			}
			return fmt.Errorf("unknown option -%s.%s", name, didYouMean(name, names, "-"))
		}
		b, ok := known.Value.(interface{ IsBoolFlag() bool })
		if !valued && (!ok || !b.IsBoolFlag()) {
			i++ // its value
		}
	}
	return nil
}

// help renders the help text of a verb.
func (f *flagSet) help(usage, what, more string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: %s\n\n%s\n\nOptions:\n", usage, indent(strings.TrimSpace(what), "  "))
	for _, d := range f.docs {
		b.WriteString("\n  -" + d.name)
		if d.arg != "" {
			b.WriteString("=<" + d.arg + ">")
		}
		b.WriteString("\n" + indent(wrap(d.usage, 72), "      ") + "\n")
	}
	if more = strings.TrimSpace(more); more != "" {
		b.WriteString("\n" + more + "\n")
	}
	return strings.TrimRight(b.String(), "\n")
}

func indent(s, by string) string {
	lines := strings.Split(s, "\n")
	for i, line := range lines {
		if line != "" {
			lines[i] = by + line
		}
	}
	return strings.Join(lines, "\n")
}

func wrap(s string, width int) string {
	var b strings.Builder
	column := 0
	for word := range strings.FieldsSeq(s) {
		if column > 0 && column+1+len(word) > width {
			b.WriteByte('\n')
			column = 0
		} else if column > 0 {
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += len(word)
	}
	return b.String()
}

// didYouMean is a sentence with the candidate that is nearest to name, or
// nothing when none is near.
func didYouMean(name string, candidates []string, prefix string) string {
	best, distance := "", 1+max(1, len(name)/3)
	for _, c := range candidates {
		d := editDistance(name, c)
		if strings.HasPrefix(c, name) && len(name) > 1 {
			d = 0
		}
		if d < distance {
			best, distance = c, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" Did you mean %s%s?", prefix, best)
}

// editDistance counts the insertions, deletions, replacements and swaps of
// neighbours that turn a into b.
func editDistance(a, b string) int {
	before, previous := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range previous {
		previous[j] = j
	}
	for i := range len(a) {
		current := slices.Repeat([]int{i + 1}, len(b)+1)
		for j := range len(b) {
			change := previous[j]
			if a[i] != b[j] {
				change++
			}
			current[j+1] = min(previous[j+1]+1, current[j]+1, change)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				current[j+1] = min(current[j+1], before[j-1]+1)
			}
		}
		before, previous = previous, current
	}
	return previous[len(b)]
}
