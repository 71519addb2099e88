package config

import (
	"cmp"
	"errors"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclparse"
)

// Load reads, merges and checks a configuration. An error is an *Error that
// holds every problem found, not only the first.
func Load(src Sources) (*Config, error) { return load(src, thisHost) }

func load(src Sources, h host) (*Config, error) {
	l := loader{
		host:   h,
		parser: hclparse.NewParser(),
		given:  make(map[string]given),
		bad:    make(map[string]bool),
	}
	paths, diags := src.paths(h)
	l.add(diags...)
	l.unread = diags.HasErrors()
	for _, path := range paths {
		l.read(path)
	}
	for _, o := range src.Overrides {
		if !slices.ContainsFunc(keys, func(k key) bool { return k.name == o.Key }) {
			l.add(problem(nil, "Unknown key", "%s sets %q, and there is no such key.", o.Flag, o.Key))
			continue
		}
		l.given[o.Key] = given{literal: o.Value, flag: o.Flag}
	}

	cfg := defaults(h)
	if src.Dev {
		cfg.forDev()
	}
	cfg.Listener.Advertise = "" // Follows listener.rpc where not given.
	for _, k := range keys {
		l.set(cfg, k)
	}
	l.check(cfg)
	if l.diags.HasErrors() {
		slices.SortStableFunc(l.diags, byPlace)
		return nil, &Error{Diagnostics: l.diags, files: l.parser.Files()}
	}
	return cfg, nil
}

// given is a value that was given for a key: by a file or by a flag.
type given struct {
	attr    *hcl.Attribute // nil for a flag
	literal string
	flag    string
}

type loader struct {
	host   host
	parser *hclparse.Parser
	diags  hcl.Diagnostics
	// given is what counts for a key: the last value read.
	given map[string]given
	// bad holds the keys with a problem, which no further check looks at.
	bad map[string]bool
	// unread says that a file could not be read whole: that a key is missing
	// says nothing then.
	unread bool
}

func (l *loader) add(d ...*hcl.Diagnostic) { l.diags = append(l.diags, d...) }

// fail reports a problem with k's value.
func (l *loader) fail(name, summary, detail string, args ...any) {
	l.bad[name] = true
	d := problem(l.place(name), summary, detail, args...)
	if f := l.given[name].flag; f != "" {
		d.Detail += " It was given by " + f + "."
	}
	l.add(d)
}

// place is where k's value is written; nil if not in a file.
func (l *loader) place(name string) *hcl.Range {
	if a := l.given[name].attr; a != nil {
		return a.Expr.Range().Ptr()
	}
	return nil
}

// read adds what one file says.
func (l *loader) read(path string) {
	parse := l.parser.ParseHCL
	switch filepath.Ext(path) {
	case ".hcl":
	case ".json":
		parse = l.parser.ParseJSON
	default:
		hint := "A configuration file's name ends in .hcl or .json."
		if isDir, err := l.host.isDir(path); err == nil && isDir {
			hint = "It is a folder: did you mean -config-dir?"
		}
		l.add(problem(nil, "Cannot read "+path, "%s", hint))
		l.unread = true
		return
	}
	src, err := l.host.readFile(path)
	if err != nil {
		l.add(problem(nil, "Cannot read "+path, "%v.", err))
		l.unread = true
		return
	}
	file, diags := parse(src, path)
	l.add(diags...)
	l.unread = l.unread || diags.HasErrors()
	if file == nil || file.Body == nil {
		return
	}
	l.body(file.Body)
}

// body takes over the keys of a whole file.
func (l *loader) body(body hcl.Body) {
	content, diags := body.Content(schemaOf(""))
	l.add(diags...)
	for name, attr := range content.Attributes {
		l.given[name] = given{attr: attr}
	}
	first := make(map[string]*hcl.Block)
	for _, block := range content.Blocks {
		if was := first[block.Type]; was != nil {
			l.add(problem(block.DefRange.Ptr(), "Duplicate "+block.Type+" block",
				"There is one at %s:%d already. A file has one block of a kind: put all of it there.",
				was.DefRange.Filename, was.DefRange.Start.Line))
		} else {
			first[block.Type] = block
		}
		inner, diags := block.Body.Content(schemaOf(block.Type))
		l.add(diags...)
		for name, attr := range inner.Attributes {
			l.given[block.Type+"."+name] = given{attr: attr}
		}
	}
}

// schemaOf derives from keys what a file ("") or one of its blocks may hold.
// It is strict, which is what makes HCL ask "did you mean".
func schemaOf(block string) *hcl.BodySchema {
	var s hcl.BodySchema
	for _, k := range keys {
		in, name, nested := strings.Cut(k.name, ".")
		switch {
		case !nested && block == "":
			s.Attributes = append(s.Attributes, hcl.AttributeSchema{Name: k.name})
		case nested && block == in:
			s.Attributes = append(s.Attributes, hcl.AttributeSchema{Name: name})
		case nested && block == "":
			if !slices.ContainsFunc(s.Blocks, func(b hcl.BlockHeaderSchema) bool { return b.Type == in }) {
				s.Blocks = append(s.Blocks, hcl.BlockHeaderSchema{Type: in})
			}
		}
	}
	return &s
}

// set evaluates what was given for k, if anything, and puts it into cfg.
func (l *loader) set(cfg *Config, k key) {
	g, ok := l.given[k.name]
	if !ok {
		return
	}
	v, diags := g.value(l.host)
	// What could not be parsed is unknown, and has been reported.
	if diags.HasErrors() || !v.IsWhollyKnown() {
		l.bad[k.name] = true
		l.add(diags...)
		return
	}
	if v.IsNull() {
		delete(l.given, k.name)
		return
	}
	if err := k.put(cfg, v, l.host); err != nil {
		var bad *valueError
		if !errors.As(err, &bad) {
			bad = &valueError{summary: "Unsuitable value", detail: err.Error()}
		}
		l.fail(k.name, bad.summary+" for "+k.name, "%s", bad.detail)
	}
}

// byPlace orders problems as a reader meets them; those without a place in a
// file are last.
func byPlace(a, b *hcl.Diagnostic) int {
	switch {
	case a.Subject == nil && b.Subject == nil:
		return 0
	case a.Subject == nil:
		return 1
	case b.Subject == nil:
		return -1
	}
	return cmp.Or(strings.Compare(a.Subject.Filename, b.Subject.Filename), cmp.Compare(a.Subject.Start.Byte, b.Subject.Start.Byte))
}
