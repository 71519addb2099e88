package config

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"golang.org/x/term"
)

// Error is everything that is wrong with a configuration, all at once.
type Error struct {
	// Diagnostics holds at least one problem. Those with a place in a file
	// have a Subject.
	Diagnostics hcl.Diagnostics
	files       map[string]*hcl.File
}

// Error lists the problems, one per line, as file:line: summary: detail.
func (e *Error) Error() string {
	lines := make([]string, 0, len(e.Diagnostics))
	for _, d := range e.Diagnostics {
		line := d.Summary
		if d.Detail != "" {
			line += ": " + strings.Join(strings.Fields(d.Detail), " ")
		}
		if d.Subject != nil {
			line = fmt.Sprintf("%s:%d: %s", d.Subject.Filename, d.Subject.Start.Line, line)
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

// Print writes the problems for a person to read, each with its line of
// source: as wide as the terminal, and in colour, where w is one and NO_COLOR
// is not set.
func (e *Error) Print(w io.Writer) error {
	width, colour := uint(0), false
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		if cols, _, err := term.GetSize(int(f.Fd())); err == nil && cols > 0 {
			width = uint(cols)
		}
		colour = os.Getenv("NO_COLOR") == ""
	}
	return e.print(w, width, colour)
}

func (e *Error) print(w io.Writer, width uint, colour bool) error {
	// One write, so that a log line cannot come between.
	var buf bytes.Buffer
	if err := hcl.NewDiagnosticTextWriter(&buf, e.files, width, colour).WriteDiagnostics(e.Diagnostics); err != nil {
		return fmt.Errorf("write diagnostics: %w", err)
	}
	if _, err := w.Write(buf.Bytes()); err != nil {
		return fmt.Errorf("write diagnostics: %w", err)
	}
	return nil
}

func problem(at *hcl.Range, summary, detail string, args ...any) *hcl.Diagnostic {
	return &hcl.Diagnostic{Severity: hcl.DiagError, Summary: summary, Detail: fmt.Sprintf(detail, args...), Subject: at}
}
