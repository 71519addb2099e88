// Package flags is how Diurna's verbs take their options: the standard flag
// package, plus help texts in one layout, in the order of declaration, and
// errors that say which option was probably meant.
//
//	f := flags.New()
//	f.Bool(&json, "json", "Print a JSON object.")
//	if err := f.Parse(args); err != nil { ... }
//	help := f.Help("diurna status [options]", "Tells how the node is.", "Examples: ...")
package flags

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
)

// Set is a flag.FlagSet that remembers the order and the wording of its
// flags for the help text, and knows what an unknown flag may have meant.
type Set struct {
	set  *flag.FlagSet
	docs []flagDoc
}

type flagDoc struct{ name, arg, usage string }

// New returns an empty set.
func New() *Set {
	f := &Set{set: flag.NewFlagSet("", flag.ContinueOnError)}
	f.set.SetOutput(io.Discard) // errors are told by us, once
	return f
}

func (f *Set) doc(name, arg, usage string) {
	f.docs = append(f.docs, flagDoc{name, arg, usage})
}

// Text is an option with any text.
func (f *Set) Text(p *string, name, arg, def, usage string) {
	f.set.StringVar(p, name, def, "")
	f.doc(name, arg, usage)
}

// Bool is an option without a value.
func (f *Set) Bool(p *bool, name, usage string) {
	f.set.BoolVar(p, name, false, "")
	f.doc(name, "", usage)
}

// Count is a number from 0; 0 is its default.
func (f *Set) Count(p *uint64, name, arg, usage string) {
	f.set.Uint64Var(p, name, 0, "")
	f.doc(name, arg, usage)
}

// Duration is one in Go's notation, not below 0.
func (f *Set) Duration(p *time.Duration, name string, def time.Duration, usage string) {
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

// Size is a number of bytes, with or without a unit.
func (f *Set) Size(p *uint64, name string, def uint64, usage string) {
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

// Offset is a flag that may be left out, which is not the same as 0.
func (f *Set) Offset(p **uint64, name, usage string) {
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

// Each calls add for every time the flag is given.
func (f *Set) Each(add func(string) error, name, arg, usage string) {
	f.set.Func(name, "", add)
	f.doc(name, arg, usage)
}

// Given tells whether an option was on the command line.
func (f *Set) Given(name string) bool {
	found := false
	f.set.Visit(func(fl *flag.Flag) { found = found || fl.Name == name })
	return found
}

// Exclusive refuses more than one of the named flags.
func (f *Set) Exclusive(names ...string) error {
	var given []string
	for _, name := range names {
		if f.Given(name) {
			given = append(given, "-"+name)
		}
	}
	if len(given) > 1 {
		return fmt.Errorf("%s cannot be used together", strings.Join(given, " and "))
	}
	return nil
}

// Parse takes args, of which none may be left over.
func (f *Set) Parse(args []string) error {
	rest, err := f.ParseArgs(args)
	switch {
	case err != nil:
		return err
	case len(rest) == 0:
		return nil
	case f.set.Lookup(rest[0]) != nil:
		return fmt.Errorf("unexpected argument %q. Did you mean -%s?", rest[0], rest[0])
	default:
		return fmt.Errorf("unexpected argument %q: everything is said with options here", rest[0])
	}
}

// ParseArgs takes args and returns those behind the options.
func (f *Set) ParseArgs(args []string) ([]string, error) {
	if err := f.checkNames(args); err != nil {
		return nil, err
	}
	if err := f.set.Parse(args); err != nil {
		return nil, err
	}
	return f.set.Args(), nil
}

// Adopt adds the flags that register puts into a standard flag set, with their
// usage texts, whose `quoted` word is the name of the value.
func (f *Set) Adopt(register func(*flag.FlagSet)) {
	other := flag.NewFlagSet("", flag.ContinueOnError)
	register(other)
	other.VisitAll(func(fl *flag.Flag) {
		f.set.Var(fl.Value, fl.Name, fl.Usage)
		arg, usage := flag.UnquoteUsage(fl)
		if b, ok := fl.Value.(interface{ IsBoolFlag() bool }); ok && b.IsBoolFlag() {
			arg = ""
		}
		f.doc(fl.Name, arg, strings.ToUpper(usage[:1])+usage[1:]+".")
	})
}

// checkNames finds flags that do not exist, which the flag package reports
// only as text. It walks args as that does.
func (f *Set) checkNames(args []string) error {
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
			return fmt.Errorf("unknown option -%s.%s", name, DidYouMean(name, names, "-"))
		}
		b, ok := known.Value.(interface{ IsBoolFlag() bool })
		if !valued && (!ok || !b.IsBoolFlag()) {
			i++ // its value
		}
	}
	return nil
}

// Help renders the help text of a verb.
func (f *Set) Help(usage, what, more string) string {
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

// DidYouMean is a sentence with the candidate that is nearest to name, or
// nothing when none is near.
func DidYouMean(name string, candidates []string, prefix string) string {
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
