package agent_test

import (
	"errors"
	"fmt"
	"go/ast"
	"go/build/constraint"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/diurnalog/diurna"

// A room is a folder of Go and what it may import from this module. Whatever
// is not said is forbidden: a new arrow is drawn here and in docs/DESIGN.md
// first.
type room struct {
	dir string
	may []string
	// testsMay is what its tests may import besides: a client's tests need a
	// server. Tests may always import helper packages, see isHelper.
	testsMay []string
}

var rooms = []room{
	{dir: ".", may: []string{"agent", "rpc/cli"}},
	{dir: "agent", may: []string{"agent/config", "agent/identity", "agent/peer", "logstore", "logstore/vfs", "logstore/replica", "rpc", "rpc/v1", "rpc/client", "discovery", "discovery/consul", "rpc/cli/flags"},
		testsMay: []string{"rpc/cli"}},
	{dir: "agent/config"},
	{dir: "agent/identity", may: []string{"agent/config"}},
	{dir: "agent/peer", may: []string{"logstore/vfs"}},
	{dir: "logstore", may: []string{"logstore/vfs"}},
	{dir: "logstore/vfs"},
	{dir: "logstore/replica", may: []string{"logstore", "logstore/vfs"}},
	{dir: "rpc", may: []string{"rpc/v1"}, testsMay: []string{"rpc/client", "agent/peer"}},
	{dir: "rpc/v1"},
	{dir: "rpc/client", may: []string{"rpc/v1"}, testsMay: []string{"rpc", "agent/peer"}},
	{dir: "rpc/cli", may: []string{"rpc/client", "rpc/cli/flags"}, testsMay: []string{"rpc", "rpc/v1", "agent/peer"}},
	{dir: "rpc/cli/flags"},
	{dir: "discovery"},
	{dir: "discovery/consul", may: []string{"discovery"}},
}

// topLevel is everything that may lie beside main.go, and whether it has to.
// Files that begin with a dot or are ignored by git do not count.
var topLevel = map[string]bool{
	"agent": true, "logstore": true, "rpc": true, "discovery": false, "jobs": false, "compose": false, "scripts": false, "docs": true,
	"config.hcl": true, "Makefile": true, "go.mod": true, "go.sum": true, "main.go": true, "README.md": true, "LICENSE": true,
}

// fences keep modules of others where they belong, in tests too, so that
// replacing one is work in one room.
var fences = []struct {
	module string
	rooms  []string
}{
	{"github.com/hashicorp/raft", []string{"logstore/replica"}},
	{"github.com/hashicorp/raft-autopilot", []string{"logstore/replica"}},
	{"github.com/tysonmote/gommap", []string{"logstore/vfs"}},
	{"google.golang.org/grpc", []string{"agent", "agent/identity", "agent/peer", "rpc", "rpc/v1", "rpc/client", "rpc/cli"}},
	{"github.com/hashicorp/hcl", []string{"agent/config"}},
	{"github.com/zclconf/go-cty", []string{"agent/config"}},
	{"github.com/hashicorp/cli", []string{".", "agent", "rpc/cli"}},
	{"github.com/hashicorp/vault", []string{"agent/identity"}},
	{"github.com/casbin/casbin", []string{"agent/identity"}},
	{"go.opentelemetry.io", []string{"agent"}},
	{"github.com/prometheus", []string{"agent"}},
	{"github.com/hashicorp/go-metrics", []string{"agent"}},
	{"github.com/hashicorp/consul", []string{"discovery/consul", "rpc/client"}},
}

// fileAccess are the packages that reach files past logstore/vfs, where no
// test could crash, tear or fill them.
var fileAccess = []string{"os", "os/exec", "io/ioutil", "syscall", "golang.org/x/sys/unix"}

// fileAccessAllowed names the files that may all the same, each with its why.
var fileAccessAllowed = map[string]string{}

// ownClock are the calls that read or wait on the machine's clock. logstore
// takes time as an argument; its default clock is the value time.Now, not a
// call of it.
var ownClock = []string{"Now", "Since", "Until", "Sleep"}

// maxLines is where a hand-written file has to be split.
const maxLines = 800

// TestLayout holds the whole repository to the rules above.
func TestLayout(t *testing.T) {
	problems, err := layoutProblems("..")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Error(p)
	}
}

// TestLayoutTable keeps the table that people read the same as the one above.
func TestLayoutTable(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "docs", "DESIGN.md"))
	if err != nil {
		t.Fatal(err)
	}
	said := make(map[string]string)
	for line := range strings.Lines(string(text)) {
		if cells := strings.Split(line, "|"); len(cells) == 5 {
			said[strings.TrimSpace(cells[1])] = strings.TrimSpace(cells[3])
		}
	}
	for _, r := range rooms {
		name, may := "`"+r.dir+"`", strings.Join(r.may, ", ")
		switch r.dir {
		case ".":
			name = "`main.go`"
		case "agent":
			may = "everything but rpc/cli"
		}
		if may == "" {
			may = "—"
		}
		if got, ok := said[name]; !ok {
			t.Errorf("docs/DESIGN.md has no row for %s", name)
		} else if got != may {
			t.Errorf("docs/DESIGN.md lets %s import %q, the test lets it import %q", name, got, may)
		}
	}
}

// layoutProblems lists what breaks the rules below root.
func layoutProblems(root string) ([]string, error) {
	problems, err := topLevelProblems(root)
	if err != nil {
		return nil, err
	}
	err = filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base := d.Name()
		if d.IsDir() {
			if name != root && (strings.HasPrefix(base, ".") || strings.HasPrefix(base, "_") || base == "testdata" || base == "bin") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(base, ".go") {
			return nil
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		found, err := fileProblems(name, filepath.ToSlash(rel))
		problems = append(problems, found...)
		return err
	})
	return problems, err
}

func topLevelProblems(root string) ([]string, error) {
	var ignored []string
	text, err := os.ReadFile(filepath.Join(root, ".gitignore"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		ignored = append(ignored, strings.Trim(strings.TrimSpace(line), "/"))
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	var problems []string
	there := make(map[string]bool)
	for _, e := range entries {
		there[e.Name()] = true
		_, listed := topLevel[e.Name()]
		skip := strings.HasPrefix(e.Name(), ".") || slices.ContainsFunc(ignored, func(pattern string) bool {
			ok, err := path.Match(pattern, e.Name())
			return err == nil && ok
		})
		if !listed && !skip {
			problems = append(problems, fmt.Sprintf("top level: %s does not belong there", e.Name()))
		}
	}
	for name, required := range topLevel {
		if required && !there[name] {
			problems = append(problems, fmt.Sprintf("top level: %s is missing", name))
		}
	}
	slices.Sort(problems)
	return problems, nil
}

// fileProblems checks one Go file, at name on disk and rel in the repository.
func fileProblems(name, rel string) ([]string, error) {
	src, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, rel, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return []string{err.Error()}, nil
	}
	if ast.IsGenerated(file) || neverBuilt(file) {
		return nil, nil
	}
	var problems []string
	fail := func(format string, args ...any) {
		problems = append(problems, fmt.Sprintf(format, args...))
	}

	if lines := fset.File(file.Pos()).LineCount(); lines > maxLines {
		fail("%s: %d lines, more than %d: split it", rel, lines, maxLines)
	}
	dir := path.Dir(rel)
	test := strings.HasSuffix(rel, "_test.go") || isHelper(dir)
	r, ok := roomOf(dir)
	if !ok {
		fail("%s: there is no room %s", rel, dir)
	}
	for _, imp := range file.Imports {
		target, err := strconv.Unquote(imp.Path.Value)
		if err != nil {
			return problems, err
		}
		if ok && !mayImport(r, dir, target, test) {
			fail("%s: %s must not import %s", rel, dir, strings.TrimPrefix(target, module+"/"))
		}
		for _, f := range fences {
			if inModule(target, f.module) && !slices.Contains(f.rooms, r.dir) {
				fail("%s: %s must not import %s, which is for %s", rel, dir, target, strings.Join(f.rooms, ", "))
			}
		}
		stored := r.dir == "logstore" || r.dir == "logstore/replica"
		if stored && !test && slices.Contains(fileAccess, target) && fileAccessAllowed[rel] == "" {
			fail("%s: imports %s: files are reached through logstore/vfs only", rel, target)
		}
	}
	if r.dir == "logstore" && !test {
		for _, call := range clockCalls(file) {
			fail("%s: calls time.%s: logstore takes the clock as an argument", fset.Position(call.Pos()), call.Sel.Name)
		}
	}
	return problems, nil
}

// isHelper tells a package of test helpers: logstore/vfs/vfstest. It belongs
// to the room it lies in, and only tests and other helpers import it.
func isHelper(dir string) bool {
	base, parent := path.Base(dir), path.Base(path.Dir(dir))
	return base == parent+"test"
}

func roomOf(dir string) (room, bool) {
	if isHelper(dir) {
		dir = path.Dir(dir)
	}
	i := slices.IndexFunc(rooms, func(r room) bool { return r.dir == dir })
	if i < 0 {
		return room{}, false
	}
	return rooms[i], true
}

func mayImport(r room, dir, target string, test bool) bool {
	rel, first := strings.CutPrefix(target, module+"/")
	if !first {
		return target != module
	}
	switch {
	case rel == r.dir:
		return test // A room's tests and helpers; nothing else can.
	case slices.Contains(r.may, rel):
		return true
	case isHelper(rel):
		// A helper stands for the room it lies in.
		of := path.Dir(rel)
		return test && rel != dir && (of == r.dir || slices.Contains(r.may, of) || slices.Contains(r.testsMay, of))
	}
	return test && slices.Contains(r.testsMay, rel)
}

// inModule tells whether an import is of a module, of any major version or of
// a module below it.
func inModule(imported, mod string) bool {
	return imported == mod || strings.HasPrefix(imported, mod+"/")
}

// neverBuilt tells a file that no build of ours includes, which names modules
// only to keep them in go.mod.
func neverBuilt(file *ast.File) bool {
	for _, group := range file.Comments {
		for _, c := range group.List {
			if c.Pos() < file.Package && constraint.IsGoBuild(c.Text) {
				expr, err := constraint.Parse(c.Text)
				return err == nil && expr.String() == "deps"
			}
		}
	}
	return false
}

// clockCalls finds calls of the ownClock functions of package time.
func clockCalls(file *ast.File) []*ast.SelectorExpr {
	name := ""
	for _, imp := range file.Imports {
		if imp.Path.Value == `"time"` {
			name = "time"
			if imp.Name != nil {
				name = imp.Name.Name
			}
		}
	}
	var calls []*ast.SelectorExpr
	ast.Inspect(file, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		if x, ok := sel.X.(*ast.Ident); ok && name != "" && x.Name == name && slices.Contains(ownClock, sel.Sel.Name) {
			calls = append(calls, sel)
		}
		return true
	})
	return calls
}
