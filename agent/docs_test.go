package agent_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/diurnalog/diurna/agent/config"
)

// TestReasonsAreDocumented: the reasons that docs/GUARANTEES.md explains are
// those that the server can send.
func TestReasonsAreDocumented(t *testing.T) {
	files, err := filepath.Glob("../rpc/*.go")
	if err != nil {
		t.Fatal(err)
	}
	sent := make(map[string]bool)
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.ValueSpec)
			if !ok || !strings.HasPrefix(spec.Names[0].Name, "Reason") || len(spec.Values) != 1 {
				return true
			}
			if lit, ok := spec.Values[0].(*ast.BasicLit); ok {
				reason, err := strconv.Unquote(lit.Value)
				if err != nil {
					t.Fatal(err)
				}
				sent[reason] = true
			}
			return true
		})
	}
	// Named after gRPC's own codes, without a constant.
	sent["DEADLINE_EXCEEDED"], sent["CANCELED"] = true, true
	if len(sent) < 10 {
		t.Fatalf("found only %v: are the constants elsewhere now?", sent)
	}

	text, err := os.ReadFile("../docs/GUARANTEES.md")
	if err != nil {
		t.Fatal(err)
	}
	told := make(map[string]bool)
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		told[m[1]] = true
	}
	for reason := range sent {
		if !told[reason] {
			t.Errorf("docs/GUARANTEES.md does not explain %s", reason)
		}
	}
	for reason := range told {
		if !sent[reason] {
			t.Errorf("docs/GUARANTEES.md explains %s, which is never sent", reason)
		}
	}
}

// TestLinks: pages point only to files, and to headings, that are there.
func TestLinks(t *testing.T) {
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	link := regexp.MustCompile(`\]\(([^)#:]*)(?:#([^)]*))?\)`)
	for _, page := range append(pages, "../README.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			target := page
			if m[1] != "" {
				target = filepath.Join(filepath.Dir(page), m[1])
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %v", page, err)
			} else if m[2] != "" && !slices.Contains(anchors(t, target), m[2]) {
				t.Errorf("%s: %s has no heading #%s", page, target, m[2])
			}
		}
	}
}

// anchors are how links name the headings of a page, as GitHub has it.
func anchors(t *testing.T, page string) (names []string) {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	heading := regexp.MustCompile("(?m)^#+ (.*)$")
	dropped := regexp.MustCompile("[^a-z0-9 _-]")
	for _, m := range heading.FindAllStringSubmatch(string(text), -1) {
		names = append(names, strings.ReplaceAll(dropped.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-"))
	}
	return names
}

// TestConfigurationsInTheDocs: a configuration that a page shows is one that a
// node takes. What is shown in part, and what is Consul's, is not looked at.
func TestConfigurationsInTheDocs(t *testing.T) {
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?ms)^```hcl\n(.*?)^```$")
	whole := regexp.MustCompile(`(?m)^(data_dir\s*=|cluster \{)`)
	tried := 0
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for i, m := range block.FindAllStringSubmatch(string(text), -1) {
			if !whole.MatchString(m[1]) {
				continue
			}
			tried++
			file := filepath.Join(t.TempDir(), "node.hcl")
			if err := os.WriteFile(file, []byte(m[1]), 0o600); err != nil {
				t.Fatal(err)
			}
			// Which address of a machine is private is not the page's matter.
			over := []config.Override{{Flag: "-data-dir", Key: "data_dir", Value: t.TempDir()}}
			if strings.Contains(m[1], `"0.0.0.0:`) {
				over = append(over, config.Override{Flag: "-advertise", Key: "listener.advertise", Value: "10.0.0.1:8400"})
			}
			if _, err := config.Load(config.Sources{Files: []string{file}, Overrides: over}); err != nil {
				t.Errorf("%s, block %d of hcl: %v\n%s", page, i+1, err, m[1])
			}
		}
	}
	if tried < 4 {
		t.Errorf("%d configurations were found: are they written otherwise now?", tried)
	}
}
