package agent

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// simTeeth are ways to break a node, each with a test that has to notice. A
// simulation in which nothing ever fails shows nothing.
var simTeeth = []struct {
	what     string
	file     string // from the top of the repository
	old, new string
	test     string
}{
	{
		"entries are not synced", "logstore/append.go",
		"if err := l.active.Sync(); err != nil {", "if err := error(nil); err != nil {",
		"TestSimPowerOfOne",
	},
	{
		"votes are not synced", "logstore/replica/stable.go",
		"return s.f.Sync()", "return nil",
		"TestSimPowerOfAll",
	},
	{
		"checksums of frames are not looked at", "logstore/frame.go",
		"got != h.crc {", "got != h.crc && false {",
		"TestSimRot",
	},
	{
		"a linearizable read does not ask whether this node still leads", "logstore/replica/readindex.go",
		"if err := r.confirm(ctx); err != nil {", "if err := error(nil); err != nil {",
		"TestSimZombie",
	},
	{
		"the watchdog sleeps", "logstore/replica/watchdog.go",
		"if what := w.tick(); what != \"\" {", "if what := w.tick(); what != \"\" && false {",
		"TestSimDisk",
	},
	{
		"tombstones are ignored", "agent/membership.go",
		"_, ok := m.group.Tombstones()[id]\n\treturn ok", "_, ok := m.group.Tombstones()[id]\n\treturn ok && false",
		"TestSimMembers",
	},
	{
		"what is not committed can be read", "logstore/replica/read.go",
		"r.watermark.load()", "r.gens.Stats().NextOffset",
		"TestSimUncommitted",
	},
	{
		"damage that is found at the start is not healed", "agent/heal.go",
		"errors.Is(err, replica.ErrDamaged) && !cfg.Alone()", "false && errors.Is(err, replica.ErrDamaged) && !cfg.Alone()",
		"TestSimRot",
	},
	{
		"a condition is not checked", "logstore/replica/sequencer.go",
		"case p.p.Expected != nil && *p.p.Expected != *next:", "case p.p.Expected != nil && *p.p.Expected != *next && false:",
		"TestSim",
	},
	{
		"a full leader keeps leading", "logstore/replica/space.go",
		"r.space.full.Load() && wait == 0", "r.space.full.Load() && wait < 0",
		"TestSimDisk",
	},
}

// TestSimTeeth breaks the node in every one of these ways, and runs the tests
// on what comes of it. It takes minutes: `make soak` does it.
func TestSimTeeth(t *testing.T) {
	if vfstest.Env(t, "DIURNA_SOAK", 0) == 0 {
		t.Skip("set DIURNA_SOAK=1 to see the simulation fail where it should")
	}
	for _, tooth := range simTeeth {
		t.Run(tooth.what, func(t *testing.T) {
			file, err := filepath.Abs(filepath.Join("..", tooth.file))
			if err != nil {
				t.Fatal(err)
			}
			source, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(source), tooth.old) {
				t.Fatalf("%s does not hold %q: this list is out of date", tooth.file, tooth.old)
			}
			dir := t.TempDir()
			broken := filepath.Join(dir, filepath.Base(file))
			if err := os.WriteFile(broken, []byte(strings.ReplaceAll(string(source), tooth.old, tooth.new)), 0o600); err != nil {
				t.Fatal(err)
			}
			overlay, err := json.Marshal(map[string]map[string]string{"Replace": {file: broken}})
			if err != nil {
				t.Fatal(err)
			}
			list := filepath.Join(dir, "overlay.json")
			if err := os.WriteFile(list, overlay, 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-timeout=10m", "-overlay", list, "-run", "^("+tooth.test+")$", ".")
			cmd.Env = append(os.Environ(), "DIURNA_SOAK=0", "DIURNA_HISTORIES=20", "DIURNA_ROUNDS=", "TMPDIR="+dir)
			out, err := cmd.CombinedOutput()
			switch failed := strings.Contains(string(out), "--- FAIL: TestSim"); {
			case err == nil:
				t.Errorf("%s notices nothing", tooth.test)
			case !failed:
				t.Errorf("it failed otherwise than by a test: %v\n%.4000s", err, out)
			default:
				for line := range strings.Lines(string(out)) {
					if strings.Contains(line, "_test.go:") && !strings.Contains(line, "seed") {
						t.Logf("noticed: %.300s", strings.TrimSpace(line))
						break
					}
				}
			}
		})
	}
}
