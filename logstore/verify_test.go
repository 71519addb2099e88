package logstore

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

func TestVerify(t *testing.T) {
	rng := vfstest.Rand(t)
	for range 20 {
		l := mustOpen(t, smallOptions(vfstest.New()))
		m := model{first: 1}
		for range 30 {
			step(t, l, &m, rng)
		}
		for _, from := range []uint64{0, m.first, m.first + uint64(len(m.entries))/2, m.last()} {
			read := 0
			next, err := l.Verify(t.Context(), from, func(n int) error { read += n; return nil })
			if err != nil || next != max(m.last()+1, from) || read == 0 && max(from, m.first) <= m.last() {
				t.Fatalf("from %d of %d–%d: %d, %v; %d bytes", from, m.first, m.last(), next, err, read)
			}
		}
		if next, err := l.Verify(t.Context(), m.last()+7, nil); err != nil || next != m.last()+7 {
			t.Fatalf("behind the end: %d, %v", next, err)
		}
		must(t, l.Close())
		if _, err := l.Verify(t.Context(), 0, nil); err != nil && !errors.Is(err, ErrClosed) {
			t.Fatal(err)
		}
	}
}

// TestVerifyFindsEveryFlip flips each bit of some, and one of each byte, of
// what a log rests on.
func TestVerifyFindsEveryFlip(t *testing.T) {
	fsys, _ := fuzzLog(t, true)
	l := mustOpen(t, smallOptions(fsys))
	st := l.state.Load()
	flips := 0
	for k, s := range st.segs {
		end := st.tail.pos
		if k < len(st.segs)-1 {
			must(t, l.withIndex(st, k, func(_ *openSegment, x *frameIndex) error { end = x.end; return nil }))
		}
		for at := range end {
			bits := []int{int(at % 8)}
			if at < 2*segmentHeaderSize {
				bits = []int{0, 1, 2, 3, 4, 5, 6, 7}
			}
			for _, bit := range bits {
				flips++
				flipBit := func() { must(t, fsys.Mutate(s.file, func(b []byte) []byte { b[at] ^= 1 << bit; return b })) }
				flipBit()
				next, err := l.Verify(t.Context(), 0, nil)
				flipBit()
				var damage *CorruptError
				if !errors.As(err, &damage) || damage.File != s.file || damage.Position > at {
					t.Fatalf("bit %d of byte %d of %s: next %d, %v", bit, at, s.file, next, err)
				}
				if next < s.firstIndex || next > st.tail.index {
					t.Fatalf("bit %d of byte %d of %s: next is %d", bit, at, s.file, next)
				}
				if e, _, err := l.Entry(next, nil); err != nil || e.Index != next {
					t.Fatal(err)
				}
			}
		}
	}
	t.Logf("%d flips", flips)
	must(t, l.Close())
}

// TestVerifyKnowsTheEnd: frames that are sound in themselves, but not those that
// were there, as after a copy of a segment from elsewhere.
func TestVerifyKnowsTheEnd(t *testing.T) {
	fsys, _ := fuzzLog(t, true)
	l := mustOpen(t, smallOptions(fsys))
	st := l.state.Load()
	for k, s := range st.segs {
		before, err := fsys.ReadFile(s.file)
		must(t, err)
		last := st.tail.index
		if k < len(st.segs)-1 {
			last = s.last
		}
		var at int64
		must(t, l.withIndex(st, k, func(o *openSegment, x *frameIndex) error {
			if k == len(st.segs)-1 {
				x = &st.active
			}
			at, _ = x.span(int(last - s.firstIndex))
			return nil
		}))
		must(t, fsys.Mutate(s.file, func(b []byte) []byte {
			b = append([]byte(nil), b...)
			b[at+13]++ // the type
			forgeChecksums(before, b)
			return b
		}))
		var damage *CorruptError
		if next, err := l.Verify(t.Context(), s.firstIndex, nil); !errors.As(err, &damage) || damage.File != s.file || next != last {
			t.Errorf("segment %d: %d, %v", k, next, err)
		}
		must(t, fsys.Mutate(s.file, func([]byte) []byte { return before }))
	}
	must(t, l.Close())
}

func TestVerifyEnds(t *testing.T) {
	fsys, _ := fuzzLog(t, true)
	opts := smallOptions(fsys)
	opts.MaxOpenSegments = 1
	l := mustOpen(t, opts)
	defer l.Close()
	boom := errors.New("enough")
	calls := 0
	next, err := l.Verify(t.Context(), 0, func(int) error {
		if calls++; calls > 3 {
			return boom
		}
		return nil
	})
	if !errors.Is(err, boom) || next == 0 || next > l.LastIndex() {
		t.Fatalf("%d, %v", next, err)
	}
	ctx, stop := context.WithCancel(t.Context())
	next, err = l.Verify(ctx, 0, func(int) error { stop(); return nil })
	if !errors.Is(err, context.Canceled) || next > l.LastIndex() {
		t.Fatalf("%d, %v", next, err)
	}
	// A file that is gone, and not open, is damage.
	st := l.state.Load()
	gone := st.segs[1]
	must(t, fsys.Remove(gone.file))
	var damage *CorruptError
	next, err = l.Verify(t.Context(), 0, nil)
	if !errors.As(err, &damage) || damage.File != gone.file || next != gone.firstIndex {
		t.Fatalf("%d, %v", next, err)
	}
}

func TestSegments(t *testing.T) {
	rng := vfstest.Rand(t)
	fsys := vfstest.New()
	opts := smallOptions(fsys)
	l := mustOpen(t, opts)
	m := model{first: 1}
	for range 200 {
		step(t, l, &m, rng)
		if rng.IntN(10) == 0 { // segments of other sizes
			entries := m.generate(rng, 2, 3*MinSegmentSize)
			must(t, l.Append(entries))
			m.append(entries)
		}
		if rng.IntN(20) == 0 {
			must(t, l.Close())
			l = mustOpen(t, opts)
		}
		segs := l.Segments()
		index, offset := m.first, l.FirstOffset()
		var bytes int64
		for i, s := range segs {
			if s.FirstIndex != index || s.FirstOffset != offset {
				t.Fatalf("segment %d of %+v begins at index %d, offset %d", i, segs, index, offset)
			}
			if s.LastIndex >= s.FirstIndex {
				if e := m.entries[s.LastIndex-m.first]; s.LastAppendTime != e.AppendTime || s.NextOffset != e.BaseOffset+uint64(e.Count) {
					t.Fatalf("segment %d of %+v, its last entry is %+v", i, segs, e)
				}
			} else if i < len(segs)-1 {
				t.Fatalf("segment %d of %+v is empty", i, segs)
			}
			if b, err := fsys.ReadFile(testDir + "/" + segmentName(s.FirstIndex)); err != nil || int64(len(b)) != s.Bytes {
				t.Fatalf("segment %d of %+v: its file has %d bytes, %v", i, segs, len(b), err)
			}
			index, offset, bytes = s.LastIndex+1, s.NextOffset, bytes+s.Bytes
		}
		if index != m.last()+1 || offset != l.NextOffset() || bytes == 0 {
			t.Fatalf("%+v end at index %d, offset %d", segs, index-1, offset)
		}
	}
	must(t, l.Close())
}

// gateFS lets one read wait.
type gateFS struct {
	vfs.FS
	mu   sync.Mutex
	gate func()
}

func (g *gateFS) set(gate func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.gate = gate
}

func (g *gateFS) Open(name string) (vfs.File, error) { return g.wrap(g.FS.Open(name)) }

func (g *gateFS) OpenReadWrite(name string) (vfs.File, error) {
	return g.wrap(g.FS.OpenReadWrite(name))
}

func (g *gateFS) wrap(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return gateFile{f, g}, nil
}

type gateFile struct {
	vfs.File
	g *gateFS
}

func (f gateFile) ReadAt(b []byte, off int64) (int, error) {
	f.g.mu.Lock()
	gate := f.g.gate
	f.g.gate = nil
	f.g.mu.Unlock()
	if gate != nil {
		gate()
	}
	return f.File.ReadAt(b, off)
}

// TestDeletePrefixCutsNoRead: a read, a verification and an export that have
// begun on a segment end on it, though it is deleted meanwhile; what begins
// later does not find it.
func TestDeletePrefixCutsNoRead(t *testing.T) {
	base, m := fuzzLog(t, true)
	first := m.entries[0]
	for first.Count == 0 {
		m.entries = m.entries[1:]
		first = m.entries[0]
	}
	reads := map[string]func(l *Log) error{
		"entry": func(l *Log) error {
			e, _, err := l.Entry(first.Index, nil)
			if err == nil && !equalEntries(e, first) {
				err = errors.New("it is another entry")
			}
			return err
		},
		"batches": func(l *Log) error {
			buf := make([]byte, 2*MinSegmentSize)
			got, err := l.ReadBatches(first.BaseOffset, l.NextOffset(), buf, nil)
			if err == nil && (got[0].BaseOffset != first.BaseOffset || string(buf[got[0].Start:got[0].End]) != string(first.Payload)) {
				err = errors.New("they are other records")
			}
			return err
		},
		"verify": func(l *Log) error {
			_, err := l.Verify(context.Background(), 1, nil)
			return err
		},
	}
	for name, read := range reads {
		t.Run(name, func(t *testing.T) {
			fsys := &gateFS{FS: base.CrashClone(rand.New(rand.NewPCG(1, 1)), vfstest.All)}
			opts := Options{FS: fsys, SegmentSize: MinSegmentSize, CheckpointInterval: -1, inline: true, MaxOpenSegments: 1}
			l := mustOpen(t, opts)
			defer l.Close()
			must(t, read(l)) // so that the next one begins by reading frames
			_, _, err := l.Entry(1, nil)
			must(t, err)
			inside, deleted, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
			fsys.set(func() { close(inside); <-deleted })
			go func() { done <- read(l) }()
			<-inside
			kept, err := l.DeletePrefix(l.LastIndex())
			must(t, err)
			if kept <= first.Index {
				t.Fatal("nothing was deleted")
			}
			close(deleted)
			if err := <-done; err != nil {
				t.Errorf("cut: %v", err)
			}
			if err := read(l); name != "verify" && !errors.Is(err, ErrNotFound) {
				t.Errorf("later: %v", err)
			}
			names, err := fsys.List(testDir)
			must(t, err)
			for _, n := range names {
				if index, ok := parseSegmentName(n); ok && index < kept {
					t.Errorf("%s is still there", n)
				}
			}
		})
	}
}

// TestVerifyLooksAgain: what is truncated under a verification is not damage.
func TestVerifyLooksAgain(t *testing.T) {
	base, m := fuzzLog(t, true)
	fsys := &gateFS{FS: base}
	l := mustOpen(t, Options{FS: fsys, SegmentSize: MinSegmentSize, CheckpointInterval: -1, inline: true})
	defer l.Close()
	active := l.state.Load().last().firstIndex
	inside, cut, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	fsys.set(func() { close(inside); <-cut })
	var next uint64
	go func() {
		var err error
		next, err = l.Verify(context.Background(), active, nil)
		done <- err
	}()
	<-inside
	must(t, l.TruncateSuffix(active+1))
	m.truncate(active + 1)
	close(cut)
	if err := <-done; err != nil || next != active+1 {
		t.Errorf("%d, %v", next, err)
	}
}

// TestVerifyComesToAnEnd: although before every read something is appended.
func TestVerifyComesToAnEnd(t *testing.T) {
	l := mustOpen(t, Options{FS: vfstest.New(), SegmentSize: MinSegmentSize})
	next, offset := uint64(1), uint64(0)
	appendOne := func() {
		must(t, l.Append([]Entry{{Index: next, Term: 1, Count: 1, BaseOffset: offset, Payload: make([]byte, 1000)}}))
		next, offset = next+1, offset+1
	}
	for range 10 {
		appendOne()
	}
	reads := 0
	got, err := l.Verify(t.Context(), 0, func(int) error {
		if reads++; reads > 1000 {
			return errors.New("it runs after the end")
		}
		appendOne()
		return nil
	})
	if err != nil || got < 11 {
		t.Errorf("%d, %v after %d reads", got, err, reads)
	}
	must(t, l.Close())
}
