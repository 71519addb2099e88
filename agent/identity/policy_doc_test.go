package identity

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestPolicyInTheDocs: the policy that docs/security*.md shows is one, and
// decides as is said there; the model shown is the built-in one.
func TestPolicyInTheDocs(t *testing.T) {
	pages, err := filepath.Glob("../../docs/security*.md")
	if err != nil {
		t.Fatal(err)
	}
	var text string
	for _, page := range pages {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		text += string(b)
	}
	block := func(kind string) string {
		t.Helper()
		found := regexp.MustCompile("(?ms)^```"+kind+"\n(.*?)^```$").FindAllStringSubmatch(text, -1)
		if len(found) != 1 {
			t.Fatalf("there are %d blocks of %s", len(found), kind)
		}
		return found[0][1]
	}
	if got := block("ini"); got != BuiltinModel {
		t.Errorf("the model is told as\n%s", got)
	}
	p := openPolicy(t, block("csv"))
	rows := regexp.MustCompile("(?m)^\\| `(spiffe:[^`]+)` \\| `([^`]+)` \\| `([^`]+)` \\| (allowed|denied) \\|$").FindAllStringSubmatch(text, -1)
	if len(rows) < 10 {
		t.Fatalf("%d decisions are told", len(rows))
	}
	for _, r := range rows {
		if d := p.Explain(r[1], r[2], r[3]); d.Allowed != (r[4] == "allowed") {
			t.Errorf("%s: %s", strings.Join(r[1:], " "), d.Text)
		}
	}
	told := regexp.MustCompile("(?m)^\\| `([a-z]+)` \\| [^|`]+").FindAllStringSubmatch(text, -1)
	seen := map[string]bool{}
	for _, r := range told {
		seen[r[1]] = true
	}
	for _, a := range actions {
		if !seen[a] {
			t.Errorf("the action %s is not explained", a)
		}
	}
}
