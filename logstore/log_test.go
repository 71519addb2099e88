package logstore

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestModel runs random operations on a log and on a model of it and compares
// everything that can be read, across clean restarts.
func TestModel(t *testing.T) {
	rng := vfstest.Rand(t)
	for range 60 {
		fs := vfstest.New()
		opts := smallOptions(fs)
		opts.MaxOpenSegments = 1 + rng.IntN(3)
		l := mustOpen(t, opts)
		m := model{first: 1}
		for range 40 {
			step(t, l, &m, rng)
			if rng.IntN(8) == 0 {
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				l = mustOpen(t, opts)
				if !l.Recovery().Clean {
					t.Fatal("not opened as cleanly closed")
				}
			}
			if err := checkReads(l, &m, rng); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// step does one random operation on both.
func step(t testing.TB, l *Log, m *model, rng *rand.Rand) {
	t.Helper()
	switch op := rng.IntN(12); {
	case op == 0 && len(m.entries) > 0:
		from := m.first + rng.Uint64N(uint64(len(m.entries)))
		if err := l.TruncateSuffix(from); err != nil {
			t.Fatal(err)
		}
		m.truncate(from)
	case op == 1 && len(m.entries) > 0:
		below := m.first + rng.Uint64N(uint64(len(m.entries))+1)
		first, err := l.DeletePrefix(below)
		if err != nil || first > max(below, m.first) {
			t.Fatalf("delete below %d: first index %d, %v", below, first, err)
		}
		m.deletePrefix(first)
	default:
		entries := m.generate(rng, 1+rng.IntN(6), 1500)
		if err := l.Append(entries); err != nil {
			t.Fatal(err)
		}
		m.append(entries)
	}
}

func TestRejected(t *testing.T) {
	good := []Entry{{Index: 1, Term: 3, Count: 2, AppendTime: 10}, {Index: 2, Term: 3}}
	after := func(e Entry) []Entry { return []Entry{e} }
	tests := map[string]struct {
		entries []Entry
		want    error
	}{
		"gap":              {after(Entry{Index: 4, Term: 3}), ErrRejected},
		"repeated":         {after(Entry{Index: 2, Term: 3}), ErrRejected},
		"lower term":       {after(Entry{Index: 3, Term: 2}), ErrRejected},
		"offset gap":       {after(Entry{Index: 3, Term: 3, Count: 1, BaseOffset: 3, AppendTime: 10}), ErrRejected},
		"offset repeated":  {after(Entry{Index: 3, Term: 3, Count: 1, BaseOffset: 1, AppendTime: 10}), ErrRejected},
		"earlier":          {after(Entry{Index: 3, Term: 3, Count: 1, BaseOffset: 2, AppendTime: 9}), ErrRejected},
		"second is wrong":  {[]Entry{{Index: 3, Term: 3}, {Index: 5, Term: 3}}, ErrRejected},
		"too large":        {after(Entry{Index: 3, Term: 3, Payload: make([]byte, MaxPayload+1)}), ErrTooLarge},
		"earlier, no data": {after(Entry{Index: 3, Term: 3, AppendTime: 1}), nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			fsys := vfstest.New()
			l := mustOpen(t, smallOptions(fsys))
			defer l.Close()
			if err := l.Append(good); err != nil {
				t.Fatal(err)
			}
			before := fsys.Snapshot()
			err := l.Append(tt.entries)
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if tt.want == nil {
				return
			}
			if l.LastIndex() != 2 || l.NextOffset() != 2 {
				t.Fatalf("log moved to index %d, offset %d", l.LastIndex(), l.NextOffset())
			}
			mustEqualFiles(t, before, fsys.Snapshot())
			if err := l.Append([]Entry{{Index: 3, Term: 3}}); err != nil {
				t.Fatalf("a rejected append ended writing: %v", err)
			}
		})
	}
}

func mustEqualFiles(t testing.TB, a, b map[string][]byte) {
	t.Helper()
	for name := range a {
		if !slices.Equal(a[name], b[name]) {
			t.Fatalf("%s changed", name)
		}
	}
	for name := range b {
		if _, ok := a[name]; !ok {
			t.Fatalf("%s is new", name)
		}
	}
}

// TestRefused opens directories that must be refused, and left alone.
func TestRefused(t *testing.T) {
	segment := testDir + "/" + segmentName(1)
	tests := map[string]struct {
		damage func(t *testing.T, fsys *vfstest.Mem)
		want   string
		as     any
	}{
		"foreign file": {func(t *testing.T, fsys *vfstest.Mem) {
			removeAll(t, fsys)
			create(t, fsys, testDir+"/photos.zip")
		}, "photos.zip", ErrNotALog},
		"checkpoint missing": {func(t *testing.T, fsys *vfstest.Mem) {
			must(t, fsys.Remove(testDir+"/checkpoint"))
		}, "checkpoint", new(*CorruptError)},
		"checkpoint damaged": {func(t *testing.T, fsys *vfstest.Mem) {
			must(t, fsys.Mutate(testDir+"/checkpoint", func(b []byte) []byte { b[20]++; b[checkpointDistance+20]++; return b }))
		}, "checkpoint", new(*CorruptError)},
		"checkpoint short": {func(t *testing.T, fsys *vfstest.Mem) {
			must(t, fsys.Mutate(testDir+"/checkpoint", func(b []byte) []byte { return b[:100] }))
		}, "checkpoint", new(*CorruptError)},
		"all segments missing": {func(t *testing.T, fsys *vfstest.Mem) {
			for _, name := range fsys.Names() {
				if strings.HasSuffix(name, segmentSuffix) {
					must(t, fsys.Remove(name))
				}
			}
		}, ".log", new(*CorruptError)},
		"first segment missing": {func(t *testing.T, fsys *vfstest.Mem) {
			must(t, fsys.Remove(segment))
		}, segmentName(1), new(*CorruptError)},
		"middle segment missing": {func(t *testing.T, fsys *vfstest.Mem) {
			must(t, fsys.Remove(segments(fsys)[1]))
		}, segmentName(1), new(*CorruptError)},
		"last segment missing": {func(t *testing.T, fsys *vfstest.Mem) {
			s := segments(fsys)
			must(t, fsys.Remove(s[len(s)-1]))
		}, ".log", new(*CorruptError)},
		"header damaged": {func(t *testing.T, fsys *vfstest.Mem) {
			must(t, fsys.Mutate(segment, func(b []byte) []byte { b[40]++; return b }))
		}, segmentName(1), new(*CorruptError)},
		"not a segment": {func(t *testing.T, fsys *vfstest.Mem) {
			must(t, fsys.Mutate(segment, func(b []byte) []byte { return b[:50] }))
		}, segmentName(1), new(*CorruptError)},
		"segment of another log": {func(t *testing.T, fsys *vfstest.Mem) {
			other := vfstest.New()
			l := mustOpen(t, smallOptions(other))
			must(t, l.Close())
			b, err := other.ReadFile(segment)
			must(t, err)
			must(t, fsys.Mutate(segment, func([]byte) []byte { return b }))
		}, "another log", new(*CorruptError)},
		"segments swapped": {func(t *testing.T, fsys *vfstest.Mem) {
			s := segments(fsys)
			must(t, fsys.Rename(s[1], testDir+"/x.tmp"))
			must(t, fsys.Rename(s[0], s[1]))
			must(t, fsys.Rename(testDir+"/x.tmp", s[0]))
		}, "the name says", new(*CorruptError)},
		"newer format": {func(t *testing.T, fsys *vfstest.Mem) {
			must(t, fsys.Mutate(segment, func(b []byte) []byte {
				h, err := parseSegmentHeader(segment, b)
				must(t, err)
				return append(encodeWithVersion(&h, 7), b[segmentHeaderSize:]...)
			}))
		}, "version 7", new(*VersionError)},
		"last segment cut short": {func(t *testing.T, fsys *vfstest.Mem) {
			s := segments(fsys)
			must(t, fsys.Mutate(s[len(s)-1], func(b []byte) []byte { return b[:segmentHeaderSize+40] }))
		}, "durable", new(*CorruptError)},
		"last segment zeroed": {func(t *testing.T, fsys *vfstest.Mem) {
			s := segments(fsys)
			must(t, fsys.Mutate(s[len(s)-1], func(b []byte) []byte { clear(b[segmentHeaderSize:]); return b }))
		}, "durable", new(*CorruptError)},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			fsys := vfstest.New()
			l := mustOpen(t, smallOptions(fsys))
			m := model{first: 1}
			rng := rand.New(rand.NewPCG(1, 2))
			for len(segments(fsys)) < 4 {
				entries := m.generate(rng, 3, 900)
				must(t, l.Append(entries))
				m.append(entries)
			}
			must(t, l.Append(m.generate(rng, 1, 50)))
			must(t, l.Close())
			tt.damage(t, fsys)
			before := fsys.Snapshot()
			_, err := Open(testDir, smallOptions(fsys))
			if err == nil {
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q does not name %q", err, tt.want)
			}
			if target, ok := tt.as.(error); ok && !errors.Is(err, target) || !ok && !errors.As(err, tt.as) {
				t.Errorf("error %q is not a %T", err, tt.as)
			}
			mustEqualFiles(t, before, fsys.Snapshot())
		})
	}
}

func encodeWithVersion(h *segmentHeader, version uint32) []byte {
	b := h.encode()
	b[12] = byte(version)
	return resum(b)
}

func segments(fsys *vfstest.Mem) []string {
	var out []string
	for _, name := range fsys.Names() {
		if strings.HasSuffix(name, segmentSuffix) {
			out = append(out, name)
		}
	}
	return out
}

func removeAll(t testing.TB, fsys *vfstest.Mem) {
	t.Helper()
	for _, name := range fsys.Names() {
		must(t, fsys.Remove(name))
	}
}

func create(t testing.TB, fsys vfs.FS, name string) {
	t.Helper()
	f, err := fsys.Create(name)
	must(t, err)
	must(t, f.Close())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestFailStop: after one failed write, sync, truncation or rename nothing is
// written any more, even if the disk says that it works again.
func TestFailStop(t *testing.T) {
	boom := errors.New("input/output error")
	for _, kind := range []string{"write", "sync", "rename", "syncdir", "truncate"} {
		t.Run(kind, func(t *testing.T) {
			fsys := vfstest.New()
			l := mustOpen(t, smallOptions(fsys))
			m := model{first: 1}
			rng := rand.New(rand.NewPCG(3, 4))
			entries := m.generate(rng, 5, 100)
			must(t, l.Append(entries))
			m.append(entries)

			armed := true
			var later []vfstest.Op
			fsys.SetHook(func(op vfstest.Op) error {
				if armed && op.Kind == kind {
					armed = false
					return boom
				}
				if !armed {
					later = append(later, op)
				}
				return nil
			})
			var err error
			switch kind {
			case "truncate":
				err = l.TruncateSuffix(4)
			default:
				for err == nil {
					entries := m.generate(rng, 3, 900)
					if err = l.Append(entries); err == nil {
						m.append(entries)
					}
				}
			}
			if !errors.Is(err, ErrFailed) || !errors.Is(err, boom) {
				t.Fatalf("got %v", err)
			}
			select {
			case <-l.Failed():
			default:
				t.Fatal("Failed is not closed")
			}
			for _, again := range []error{l.Append(m.generate(rng, 1, 10)), l.TruncateSuffix(2), func() error { _, err := l.DeletePrefix(9); return err }()} {
				if !errors.Is(again, ErrFailed) {
					t.Fatalf("a later call: %v", again)
				}
			}
			if kind != "truncate" {
				// What was acknowledged is there; a part of the failed append
				// may be, where a segment ended inside of it.
				for _, want := range m.entries {
					got, _, err := l.Entry(want.Index, nil)
					if err != nil || !equalEntries(got, want) {
						t.Fatalf("entry %d: %v", want.Index, err)
					}
				}
			}
			if err := l.Close(); !errors.Is(err, ErrFailed) {
				t.Fatalf("close: %v", err)
			}
			for _, op := range later {
				if op.Kind == "write" || op.Kind == "sync" {
					t.Fatalf("%v after the failure", op)
				}
			}
		})
	}
}

func TestClosed(t *testing.T) {
	l := mustOpen(t, smallOptions(vfstest.New()))
	must(t, l.Append([]Entry{{Index: 1, Term: 1, Count: 1}}))
	must(t, l.Close())
	must(t, l.Close())
	_, _, readErr := l.Entry(1, nil)
	_, deleteErr := l.DeletePrefix(1)
	for i, err := range []error{l.Append([]Entry{{Index: 2, Term: 1}}), l.TruncateSuffix(1), deleteErr, readErr} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("call %d: %v", i, err)
		}
	}
}

func TestStartsWhereTold(t *testing.T) {
	fsys := vfstest.New()
	opts := smallOptions(fsys)
	opts.FirstIndex, opts.FirstOffset = 100, 5000
	l := mustOpen(t, opts)
	if l.FirstIndex() != 100 || l.LastIndex() != 99 || l.NextOffset() != 5000 {
		t.Fatalf("%+v", l.Stats())
	}
	must(t, l.Append([]Entry{{Index: 100, Term: 9, Count: 2, BaseOffset: 5000}}))
	must(t, l.Close())
	l = mustOpen(t, smallOptions(fsys))
	defer l.Close()
	if l.FirstIndex() != 100 || l.LastIndex() != 100 || l.NextOffset() != 5002 {
		t.Fatalf("%+v", l.Stats())
	}
}

func TestBadOptions(t *testing.T) {
	for _, opts := range []Options{{SegmentSize: 1}, {SegmentSize: MaxSegmentSize + 1}, {MaxOpenSegments: -1}} {
		opts.FS = vfstest.New()
		if _, err := Open(testDir, opts); err == nil {
			t.Errorf("%+v was taken", opts)
		}
		if _, err := opts.FS.List(testDir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%+v left something behind", opts)
		}
	}
}

// TestRealFiles is the model on a real disk, with the real background work.
func TestRealFiles(t *testing.T) {
	rng := vfstest.Rand(t)
	dir := t.TempDir()
	opts := Options{SegmentSize: 64 << 10, MaxOpenSegments: 2}
	open := func() *Log {
		l, err := Open(dir, opts)
		must(t, err)
		return l
	}
	l := open()
	m := model{first: 1}
	for i := range 60 {
		if rng.IntN(10) == 0 && len(m.entries) > 3 {
			step(t, l, &m, rng)
		} else {
			entries := m.generate(rng, 20, 1500)
			must(t, l.Append(entries))
			m.append(entries)
		}
		if i%20 == 19 {
			must(t, l.Close())
			l = open()
			if !l.Recovery().Clean {
				t.Fatal("not clean")
			}
		}
		if i%5 == 4 {
			must(t, checkReads(l, &m, rng))
		}
	}
	must(t, l.Close())
}
