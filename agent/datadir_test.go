package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// runAgent runs the command in this process. It is told to stop once it has
// started, in case it does.
func runAgent(t testing.TB, fsys vfs.FS, args ...string) (code int, stderr string) {
	t.Helper()
	signals := make(chan os.Signal, 1)
	out := newOutput()
	c := &agentCommand{stdout: io.Discard, fs: fsys, program: "diurna",
		stderr: writerFunc(func(p []byte) (int, error) {
			if bytes.Contains(p, []byte("node started")) {
				signals <- syscall.SIGTERM
			}
			return out.Write(p)
		}),
		signals: func() (<-chan os.Signal, func()) { return signals, func() {} },
		now:     time.Now,
		exit:    func(code int) { t.Errorf("ended at once, with %d", code) },
	}
	code = c.Run(append([]string{"-dev", "-rpc-addr", "127.0.0.1:0"}, args...))
	return code, out.text()
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func writeFiles(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) { // folders before what is in them
		content := files[name]
		name = filepath.Join(dir, name)
		var err error
		if strings.HasSuffix(content, "/") {
			err = os.Mkdir(name, 0o750)
		} else {
			err = os.WriteFile(name, []byte(content), 0o640)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func nodeFileText(version int, id string) string {
	body := fmt.Sprintf("diurna-data %d\nnode_id %s\ncluster_id %s\n", version, id, someID)
	return body + nodeSum(body)
}

const someID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"

func TestDataDirTaken(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"missing":                   nil,
		"empty":                     {},
		"a new filesystem":          {"lost+found": "/"},
		"crash after the lock":      {lockFile: ""},
		"crash in the node file":    {lockFile: "", nodeFile + vfs.TempSuffix: "diurna-da"},
		"crash on a new filesystem": {"lost+found": "/", lockFile: "", nodeFile + vfs.TempSuffix: ""},
		"ours":                      {nodeFile: nodeFileText(1, someID), lockFile: "", "lost+found": "/"},
		"ours, without the lock":    {nodeFile: nodeFileText(1, someID)},
		"ours, with others' files":  {nodeFile: nodeFileText(1, someID), "notes.txt": "mine"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "new", "data")
			if files != nil {
				writeFiles(t, dir, files)
			}
			first, err := openDataDir(vfs.OS, dir)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := uuid.Parse(first.nodeID()); err != nil || (files[nodeFile] != "") != (first.nodeID() == someID) {
				t.Errorf("the id is %q, %v", first.nodeID(), err)
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			again, err := openDataDir(vfs.OS, dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := again.Close(); err != nil || again.nodeID() != first.nodeID() {
				t.Errorf("the id was %s and is %s, %v", first.nodeID(), again.nodeID(), err)
			}
			code, stderr := runAgent(t, nil, "-data-dir", dir)
			if code != exitOK || !strings.Contains(stderr, first.nodeID()) {
				t.Errorf("exit %d: %s", code, stderr)
			}
			for name, content := range files {
				if strings.HasSuffix(content, "/") || name == nodeFile+vfs.TempSuffix {
					continue
				}
				if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != content {
					t.Errorf("%s was %q and is %q, %v", name, content, b, err)
				}
			}
		})
	}
}

// TestDataDirInterrupted fails the making of a directory at every step. The
// next attempt gets through, and an id once told stays.
func TestDataDirInterrupted(t *testing.T) {
	for step := 0; ; step++ {
		dir := filepath.Join(t.TempDir(), "data")
		fsys := newFaultyFS()
		left := step
		fsys.set(func(op, name string) error {
			if left--; left < 0 && op != "open" {
				return &fs.PathError{Op: op, Path: name, Err: syscall.EIO}
			}
			return nil
		})
		d, err := openDataDir(fsys, dir)
		if err == nil {
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if step < 6 {
				t.Errorf("only %d steps could fail", step)
			}
			return
		}
		if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), dir) {
			t.Errorf("step %d: %v", step, err)
		}
		if d, err = openDataDir(vfs.OS, dir); err != nil {
			t.Fatalf("after a failure in step %d: %v", step, err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDataDirRefused: each refusal names the place and what to do, and changes
// nothing.
func TestDataDirRefused(t *testing.T) {
	type refusal struct {
		files map[string]string // below data
		path  string            // of the data directory, where it is not data
		want  []string          // %s is the data directory
	}
	damaged := []string{"%s/node is damaged", "restore the file", "empty -data-dir"}
	cases := map[string]refusal{
		"others' files":               {files: map[string]string{"notes.txt": "mine"}, want: []string{"%s: not a Diurna data directory", `"notes.txt"`, "empty -data-dir"}},
		"others' hidden file":         {files: map[string]string{".git": "/"}, want: []string{"%s: not a Diurna data directory", `".git"`}},
		"logs without a node":         {files: map[string]string{logsDir: "/", lockFile: ""}, want: []string{"%s: not a Diurna data directory", `"logs"`, `no file "node"`}},
		"newer":                       {files: map[string]string{nodeFile: nodeFileText(2, someID)}, want: []string{"%s/node", "version 2", "version 1", "newer Diurna"}},
		"much newer":                  {files: map[string]string{nodeFile: nodeFileText(4294967295, someID) /* the most */}, want: []string{"%s/node", "4294967295"}},
		"node file of no length":      {files: map[string]string{nodeFile: ""}, want: damaged},
		"node file without an id":     {files: map[string]string{nodeFile: "diurna-data 1\n" + nodeSum("diurna-data 1\n")}, want: damaged},
		"node file with a wrong id":   {files: map[string]string{nodeFile: nodeFileText(1, "17")}, want: damaged},
		"node file of something else": {files: map[string]string{nodeFile: "#!/bin/sh\necho node\n"}, want: damaged},
		"node file too large":         {files: map[string]string{nodeFile: strings.Repeat("x", nodeFileLimit+1)}, want: []string{"%s/node", "too large"}},
		"node is a directory":         {files: map[string]string{nodeFile: "/"}, want: []string{"%s/node", "is a directory"}},
		"lock is a directory":         {files: map[string]string{lockFile: "/"}, want: []string{"%s/lock", "is a directory"}},
		"a file":                      {files: map[string]string{"f": "content"}, path: "f", want: []string{"%s", "not a directory"}},
		"below a file":                {files: map[string]string{"f": "content"}, path: "f/data", want: []string{"%s", "not a directory"}},
	}
	good := nodeFileText(1, someID)
	for i := range good {
		b := []byte(good)
		b[i] ^= 1 << (i % 8)
		cases[fmt.Sprintf("byte %d damaged", i)] = refusal{files: map[string]string{nodeFile: string(b), lockFile: ""}, want: damaged}
		cases[fmt.Sprintf("cut off at %d", i)] = refusal{files: map[string]string{nodeFile: good[:i]}, want: damaged}
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			dir := filepath.Join(root, "data")
			writeFiles(t, dir, tc.files)
			dir = filepath.Join(dir, tc.path)
			before := listing(t, root)
			wantRefusal(t, nil, dir, tc.want)
			sameListing(t, before, listing(t, root))
		})
	}
}

// wantRefusal fails unless the agent refuses the directory, saying this.
func wantRefusal(t testing.TB, fsys vfs.FS, dir string, want []string) {
	t.Helper()
	code, stderr := runAgent(t, fsys, "-data-dir", dir)
	if code != exitUsage {
		t.Errorf("exit %d, want %d: %s", code, exitUsage, stderr)
	}
	if !strings.HasPrefix(stderr, "Error: cannot start: ") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("want one line of error, got %q", stderr)
	}
	for _, w := range want {
		if w = strings.ReplaceAll(w, "%s", dir); !strings.Contains(stderr, w) {
			t.Errorf("%q does not say %q", stderr, w)
		}
	}
}

// TestDataDirDamagedBits: no bit of the node file can be another.
func TestDataDirDamagedBits(t *testing.T) {
	body := fmt.Sprintf("diurna-data 1\nnode_id %s\ncluster_id %s\nformer_id %s\nlives 2\n", someID, someID, someID)
	good := body + nodeSum(body)
	if _, err := parseNodeFile("node", good); err != nil {
		t.Fatal(err)
	}
	for i := range len(good) * 8 {
		b := []byte(good)
		b[i/8] ^= 1 << (i % 8)
		if id, err := parseNodeFile("node", string(b)); err == nil {
			t.Errorf("bit %d: taken, as %+v", i, id)
		}
	}
}

// TestIdentity: what a node is told to be, it is after a restart; a cluster it
// has joined it never leaves for another.
func TestIdentity(t *testing.T) {
	fsys := vfstest.New()
	open := func() *dataDir {
		t.Helper()
		d, err := openDataDir(fsys, "/data")
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	d := open()
	first := d.identity()
	if first.lives != 1 || first.cluster != "" || d.log("default") != "/data/logs/default" {
		t.Fatalf("new: %+v, %s", first, d.log("default"))
	}
	if err := errors.Join(d.join(someID), d.join(someID)); err != nil {
		t.Fatal(err)
	}
	var foreign *foreignClusterError
	if err := d.join(first.node); !errors.As(err, &foreign) || !strings.Contains(err.Error(), someID) {
		t.Fatalf("joined another cluster: %v", err)
	}
	for i := range formerKept + 3 {
		before := d.identity()
		if err := vfs.WriteFile(fsys, mustMake(t, fsys, d.log("default"))+"/x", []byte("old")); err != nil {
			t.Fatal(err)
		}
		if err := d.renew(); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = open()
		now := d.identity()
		if now.node == before.node || now.former[0] != before.node || now.cluster != someID || now.lives != i+2 || len(now.former) > formerKept {
			t.Fatalf("renewed: %+v, was %+v", now, before)
		}
		if want := fmt.Sprintf("/data/logs-%d/default", i+2); d.log("default") != want {
			t.Fatalf("%s, want %s", d.log("default"), want)
		}
	}
	removed, err := d.discard()
	if err != nil || len(removed) != formerKept+3 || removed[0] != "/data/logs" {
		t.Fatalf("discarded %q, %v", removed, err)
	}
	if names, err := fsys.List("/data"); err != nil || !slices.Equal(names, []string{nodeFile}) {
		t.Errorf("left: %q, %v", names, err)
	}
	if removed, err := d.discard(); err != nil || len(removed) > 0 {
		t.Errorf("discarded again: %q, %v", removed, err)
	}
}

func mustMake(t testing.TB, fsys vfs.FS, dir string) string {
	t.Helper()
	if err := fsys.MkdirAll(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestDataDirLocked(t *testing.T) {
	want := []string{"%s is in use by another process", "stop that one", "-data-dir"}
	root := t.TempDir()
	dir := filepath.Join(root, "data")

	d, err := openDataDir(vfs.OS, dir)
	if err != nil {
		t.Fatal(err)
	}
	before := listing(t, root)
	wantRefusal(t, nil, dir, want)
	sameListing(t, before, listing(t, root))
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}

	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(holdEnv, filepath.Join(dir, lockFile))
	holder := startProcess(t, self)
	holder.stdout.mustAwait(t, "locked")
	wantRefusal(t, nil, dir, want)
	sameListing(t, before, listing(t, root))
	// The lock ends with the process, however that ends.
	holder.signal(t, syscall.SIGKILL)
	holder.wait(t)
	if d, err = openDataDir(vfs.OS, dir); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestDataDirReadOnly(t *testing.T) {
	for _, tc := range []struct {
		name string
		make func(t *testing.T, dir string)
		sub  string
	}{
		{"fresh", func(*testing.T, string) {}, ""},
		{"missing", func(*testing.T, string) {}, "data"},
		{"ours", func(t *testing.T, dir string) {
			if code, stderr := runAgent(t, nil, "-data-dir", dir); code != exitOK {
				t.Fatalf("exit %d: %s", code, stderr)
			}
		}, ""},
	} {
		t.Run(tc.name+", a filesystem that says so", func(t *testing.T) {
			dir := t.TempDir()
			tc.make(t, dir)
			fsys := newFaultyFS()
			fsys.set(func(op, name string) error {
				if op == "open" {
					return nil
				}
				return &fs.PathError{Op: op, Path: name, Err: syscall.EROFS}
			})
			before := listing(t, dir)
			wantRefusal(t, fsys, filepath.Join(dir, tc.sub), []string{"%s", "read-only file system", "make it writable"})
			sameListing(t, before, listing(t, dir))
		})
		t.Run(tc.name+", mounted", func(t *testing.T) {
			dir := t.TempDir()
			mountTmpfs(t, dir, "256M")
			tc.make(t, dir)
			remountReadOnly(t, dir)
			before := listing(t, dir)
			wantRefusal(t, nil, filepath.Join(dir, tc.sub), []string{"%s", "read-only file system", "make it writable"})
			sameListing(t, before, listing(t, dir))
		})
	}
}

// mountTmpfs mounts a small filesystem until the test ends, where one may.
func mountTmpfs(t testing.TB, dir, size string) {
	t.Helper()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("needs the right to mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
}

func remountReadOnly(t testing.TB, dir string) {
	t.Helper()
	if out, err := exec.Command("mount", "-o", "remount,ro", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// TestLogDamaged: bytes that were acknowledged are not what they were, and the
// node does not start over that.
func TestLogDamaged(t *testing.T) {
	rng := vfstest.Rand(t)
	root := t.TempDir()
	dir := filepath.Join(root, "data")
	n := startNode(t, dir)
	c := dial(t, n.addr)
	for i := range 50 {
		produce(t, c, numbered(fmt.Sprintf("batch %d", i), 20)...)
	}
	n.kill(t)
	segment := filepath.Join(dir, logsDir, "default", "gen-1", "log", "00000000000000000001.log")
	content, err := os.ReadFile(segment)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(content, []byte("batch 0-0"))
	until := bytes.Index(content, []byte("batch 40-0"))
	if at < 0 || until < at {
		t.Fatalf("cannot find the records: %d, %d", at, until)
	}
	for range 20 {
		place := at + rng.IntN(until-at)
		damaged := bytes.Clone(content)
		damaged[place] ^= 1 << rng.IntN(8)
		if err := os.WriteFile(segment, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		before := listing(t, root)
		code, _, stderr := runDiurna(t, "", "agent", "-dev", "-data-dir", dir, "-rpc-addr", "127.0.0.1:0")
		if code != exitUsage || !strings.Contains(stderr, "Error: cannot start: ") || !strings.Contains(stderr, segment) || !strings.Contains(stderr, "is damaged at byte ") {
			t.Fatalf("byte %d of %s damaged: exit %d: %s", place, segment, code, stderr)
		}
		sameListing(t, before, listing(t, root))
	}
	// Whole again, it starts, with everything in it.
	if err := os.WriteFile(segment, content, 0o600); err != nil {
		t.Fatal(err)
	}
	n = startNode(t, dir)
	if got := consume(t, dial(t, n.addr), 0); len(got) != 1000 || got[999] != "batch 49-19" {
		t.Errorf("%d records", len(got))
	}
}

// FuzzNodeFile: whatever is in the file, it is read or refused.
func FuzzNodeFile(f *testing.F) {
	f.Add([]byte(nodeFileText(1, someID)), false)
	f.Add([]byte(nodeFileText(2, someID)), false)
	f.Add([]byte("diurna-data 1\nnode_id "+someID+"\n"), true)
	f.Add([]byte("diurna-data 1\nname x\nnode_id "+someID+"\nnode_id 17\n"), true)
	f.Add([]byte("diurna-data 1\nnode_id 00000000-00A0-0000-0000-000000000000\n"), true)
	f.Add([]byte("diurna-data 99999999999999999999\n"), true)
	f.Add([]byte("crc32c 00000000\n"), true)
	f.Add([]byte(nil), true)
	f.Fuzz(func(t *testing.T, content []byte, seal bool) {
		text := string(content)
		if seal { // past the checksum, which no luck passes
			text += nodeSum(text)
		}
		id, err := parseNodeFile("/data/node", text)
		switch {
		case err != nil && (id.node != "" || !strings.Contains(err.Error(), "/data/node")):
			t.Errorf("%+v, %v", id, err)
		case err == nil && !strings.HasPrefix(text, "diurna-data 1\n"):
			t.Errorf("took version %q", text)
		case err == nil:
			for _, v := range append([]string{id.node}, id.former...) {
				if u, err := uuid.Parse(v); err != nil || u.String() != v {
					t.Errorf("took the id %q, %v", v, err)
				}
			}
		}
	})
}
