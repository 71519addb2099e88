package vfstest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// disk is a filesystem with a directory d, written as a story.
type disk struct {
	*Mem
	t *testing.T
}

func newDisk(t *testing.T) disk {
	m := New()
	must(t, m.MkdirAll("d"))
	return disk{m, t}
}

func (d disk) create(name string) vfs.File {
	d.t.Helper()
	f, err := d.Create("d/" + name)
	must(d.t, err)
	return f
}

func (d disk) write(f vfs.File, content string, off int64) {
	d.t.Helper()
	_, err := f.WriteAt([]byte(content), off)
	must(d.t, err)
}

func (d disk) sync(f vfs.File) { d.t.Helper(); must(d.t, f.Sync()) }
func (d disk) syncDir()        { d.t.Helper(); must(d.t, d.SyncDir("d")) }

// durable makes a file that survives every crash.
func (d disk) durable(name, content string) vfs.File {
	d.t.Helper()
	f := d.create(name)
	d.write(f, content, 0)
	d.sync(f)
	d.syncDir()
	return f
}

// outcomes are the contents of all files after many crashes of that kind, each
// different one once: "a=hello b=".
func (d disk) outcomes(survive Survival) []string {
	d.t.Helper()
	rng := rand.New(rand.NewPCG(1, 2))
	seen := map[string]bool{}
	for range 300 {
		seen[d.CrashClone(rng, survive).story(d.t)] = true
	}
	var out []string
	for s := range seen {
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

func (m *Mem) story(t *testing.T) string {
	var parts []string
	for _, name := range m.Names() {
		b, err := m.ReadFile(name)
		must(t, err)
		parts = append(parts, strings.TrimPrefix(name, "d/")+"="+string(b))
	}
	return strings.Join(parts, " ")
}

// TestCrash tells, step by step, what may be found after a crash. Of a crash
// of kind Some every outcome listed must occur, and no other.
func TestCrash(t *testing.T) {
	tests := map[string]struct {
		story     func(d disk)
		none, all string
		some      []string
	}{
		"a new file": {
			func(d disk) { d.write(d.create("a"), "x", 0) },
			"", "a=x", []string{"", "a=", "a=\x00", "a=?", "a=x"},
		},
		"synced, its name not": {
			func(d disk) { f := d.create("a"); d.write(f, "x", 0); d.sync(f) },
			"", "a=x", []string{"", "a=x"},
		},
		"name synced, content not": {
			func(d disk) { f := d.create("a"); d.syncDir(); d.write(f, "x", 0) },
			"a=", "a=x", []string{"a=", "a=\x00", "a=?", "a=x"},
		},
		"all synced": {
			func(d disk) { d.durable("a", "x") },
			"a=x", "a=x", []string{"a=x"},
		},
		"written again with the same": {
			func(d disk) { d.write(d.durable("a", "x"), "x", 0) },
			"a=x", "a=x", []string{"a=x"},
		},
		"removed": {
			func(d disk) { d.durable("a", "x"); must(d.t, d.Remove("d/a")) },
			"a=x", "", []string{"", "a=x"},
		},
		"removed, synced": {
			func(d disk) { d.durable("a", "x"); must(d.t, d.Remove("d/a")); d.syncDir() },
			"", "", []string{""},
		},
		"renamed over": {
			func(d disk) { d.durable("a", "old"); d.durable("b", "new"); must(d.t, d.Rename("d/b", "d/a")) },
			"a=old b=new", "a=new", []string{"a=new", "a=old b=new"},
		},
		"renamed over, synced": {
			func(d disk) {
				d.durable("a", "old")
				d.durable("b", "new")
				must(d.t, d.Rename("d/b", "d/a"))
				d.syncDir()
			},
			"a=new", "a=new", []string{"a=new"},
		},
		"renamed over before its content was synced": {
			func(d disk) {
				d.durable("a", "old")
				f := d.create("b")
				d.write(f, "n", 0)
				must(d.t, d.Rename("d/b", "d/a"))
				d.syncDir()
			},
			"a=", "a=n", []string{"a=", "a=\x00", "a=?", "a=n"},
		},
		"removed and created again": {
			func(d disk) {
				d.durable("a", "old")
				must(d.t, d.Remove("d/a"))
				d.sync(d.create("a"))
			},
			"a=old", "a=", []string{"", "a=", "a=old"},
		},
		"truncated": {
			func(d disk) { must(d.t, d.durable("a", "xy").Truncate(1)) },
			"a=xy", "a=x", []string{"a=x", "a=x\x00", "a=xy"},
		},
		"truncated, synced": {
			func(d disk) { f := d.durable("a", "xy"); must(d.t, f.Truncate(1)); d.sync(f) },
			"a=x", "a=x", []string{"a=x"},
		},
		"truncated and grown": {
			func(d disk) {
				f := d.durable("a", "xy")
				must(d.t, f.Truncate(0))
				must(d.t, f.Preallocate(2))
				d.sync(f)
			},
			"a=\x00\x00", "a=\x00\x00", []string{"a=\x00\x00"},
		},
		"truncated and grown, each synced": {
			func(d disk) {
				f := d.durable("a", "xy")
				must(d.t, f.Truncate(0))
				d.sync(f)
				must(d.t, f.Preallocate(2))
				d.sync(f)
			},
			"a=\x00\x00", "a=\x00\x00", []string{"a=\x00\x00"},
		},
		"grown": {
			func(d disk) { must(d.t, d.durable("a", "x").Preallocate(2)) },
			"a=x", "a=x\x00", []string{"a=x", "a=x\x00"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			d := newDisk(t)
			tt.story(d)
			live := d.story(t)
			for kind, want := range map[Survival][]string{None: {tt.none}, All: {tt.all}, Some: tt.some} {
				if got := known(d.outcomes(kind), tt.none+tt.all); !slices.Equal(got, want) {
					t.Errorf("%v: found %q, want %q", kind, got, want)
				}
			}
			if d.story(t) != live || tt.all != live {
				t.Errorf("the running process sees %q, then %q", live, d.story(t))
			}
		})
	}
}

// known gives all that is neither zero nor one of the letters the same look:
// bytes that were being written may be anything.
func known(outcomes []string, letters string) []string {
	for i, s := range outcomes {
		b := []byte(s)
		for i, c := range b {
			if c != 0 && !strings.ContainsRune("ab= "+letters, rune(c)) {
				b[i] = '?'
			}
		}
		outcomes[i] = string(b)
	}
	slices.Sort(outcomes)
	return slices.Compact(outcomes)
}

// TestSyncedSurvives: whatever is done to other files and other sectors, and
// whatever the crash, synced bytes are there.
func TestSyncedSurvives(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		d := newDisk(t)
		want := bytes.Repeat([]byte{1}, 8*sector)
		f := d.durable("a", string(want))
		// Unsynced, over some sectors, so that they may be anything.
		at := rng.Int64N(8)
		d.write(f, strings.Repeat("\x02", sector), at*sector)
		d.write(f, "tail", int64(len(want)))
		d.write(d.create("b"), "b", 0)
		for _, kind := range []Survival{None, Some, All} {
			b, err := d.CrashClone(rng, kind).ReadFile("d/a")
			must(t, err)
			if len(b) < len(want) {
				t.Fatalf("%v: %d bytes of %d", kind, len(b), len(want))
			}
			for i, c := range b[:len(want)] {
				if int64(i)/sector != at && c != 1 {
					t.Fatalf("%v: synced byte %d is %d", kind, i, c)
				}
			}
		}
	}
}

// TestTornWrite: of one write over several sectors any of them survive, and
// bytes that were changed may be garbage; bytes that were not, never.
func TestTornWrite(t *testing.T) {
	d := newDisk(t)
	f := d.durable("a", strings.Repeat("o", 3*sector))
	d.write(f, strings.Repeat("n", 2*sector+1), 0)
	rng := rand.New(rand.NewPCG(5, 6))
	seen := map[string]bool{}
	for range 2000 {
		b, err := d.CrashClone(rng, Some).ReadFile("d/a")
		must(t, err)
		if rest := string(b[2*sector+1:]); rest != strings.Repeat("o", sector-1) {
			t.Fatalf("bytes that were not written are %q", rest)
		}
		pattern := ""
		for i := range 3 {
			switch c := b[i*sector]; {
			case strings.Trim(string(b[i*sector:i*sector+1]), "on") == "":
				pattern += string(c)
			default:
				pattern += "?"
			}
		}
		seen[pattern] = true
	}
	for _, want := range []string{"ooo", "ono", "non", "nnn", "onn", "noo", "?oo", "o?n"} {
		if !seen[want] {
			t.Errorf("never found %s", want)
		}
	}
}

// TestCrashIsACopy: the two filesystems have nothing in common afterwards.
func TestCrashIsACopy(t *testing.T) {
	d := newDisk(t)
	f := d.durable("a", "x")
	lock, err := d.Lock("d/lock")
	must(t, err)
	defer lock.Close()
	c := disk{d.CrashClone(nil, All), t}
	d.write(f, "y", 0)
	g, err := c.OpenReadWrite("d/a")
	must(t, err)
	c.write(g, "z", 0)
	if d.story(t) != "a=y" || c.story(t) != "a=z" {
		t.Errorf("%q and %q", d.story(t), c.story(t))
	}
	// A lock ends with its process.
	again, err := c.Lock("d/lock")
	must(t, err)
	must(t, again.Close())
	// And what a crash has left is on the disk.
	if got := (disk{d.CrashClone(nil, All).CrashClone(nil, None), t}).story(t); got != "a=y" {
		t.Errorf("after a second crash: %q", got)
	}
}

// TestHook sees every operation, in order and by the name it has, and can
// keep each of them from happening.
func TestHook(t *testing.T) {
	boom := errors.New("boom")
	steps := []struct {
		op Op
		do func(m *Mem, f vfs.File) error
	}{
		{Op{"create", "d/b"}, func(m *Mem, _ vfs.File) error { _, err := m.Create("d/b"); return err }},
		{Op{"write", "d/a"}, func(_ *Mem, f vfs.File) error { _, err := f.WriteAt([]byte("y"), 0); return err }},
		{Op{"sync", "d/a"}, func(_ *Mem, f vfs.File) error { return f.Sync() }},
		{Op{"truncate", "d/a"}, func(_ *Mem, f vfs.File) error { return f.Truncate(0) }},
		{Op{"preallocate", "d/a"}, func(_ *Mem, f vfs.File) error { return f.Preallocate(9) }},
		{Op{"syncdir", "d"}, func(m *Mem, _ vfs.File) error { return m.SyncDir("d") }},
		{Op{"rename", "d/c"}, func(m *Mem, _ vfs.File) error { return m.Rename("d/a", "d/c") }},
		{Op{"remove", "d/a"}, func(m *Mem, _ vfs.File) error { return m.Remove("d/a") }},
	}
	for _, step := range steps {
		d := newDisk(t)
		f := d.durable("a", "x")
		d.write(f, "unsynced", 1)
		before := fmt.Sprint(d.story(t), d.outcomes(None))
		var seen []Op
		d.SetHook(func(op Op) error { seen = append(seen, op); return boom })
		err := step.do(d.Mem, f)
		var place *fs.PathError
		if !errors.Is(err, boom) || !errors.As(err, &place) || place.Path != step.op.Name {
			t.Errorf("%v: %v", step.op, err)
		}
		if !slices.Equal(seen, []Op{step.op}) {
			t.Errorf("the hook saw %v, want %v", seen, step.op)
		}
		if after := fmt.Sprint(d.story(t), d.outcomes(None)); after != before {
			t.Errorf("%v happened: %q became %q", step.op, before, after)
		}
		d.SetHook(nil)
		must(t, step.do(d.Mem, f))
	}
}

func TestMutateIsDurable(t *testing.T) {
	d := newDisk(t)
	d.durable("a", "hello")
	must(t, d.Mutate("d/a", func(b []byte) []byte { b[0] = 'J'; return b }))
	for _, kind := range []Survival{None, Some, All} {
		if got := d.outcomes(kind); !slices.Equal(got, []string{"a=Jello"}) {
			t.Errorf("%v: %q", kind, got)
		}
	}
	if err := d.Mutate("d/none", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
