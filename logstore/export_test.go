package logstore

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// exportBytes reads a whole export, closes it and checks its size.
func exportBytes(t testing.TB, l *Log, through uint64) []byte {
	t.Helper()
	x, err := l.Export(through)
	must(t, err)
	defer func() { must(t, x.Close()) }()
	b, err := io.ReadAll(x)
	must(t, err)
	if int64(len(b)) != x.Size() {
		t.Fatalf("read %d bytes, the size is %d", len(b), x.Size())
	}
	return b
}

// upTo is the part of a model through an index.
func (m *model) upTo(through uint64) model {
	c := m.clone()
	c.truncate(through + 1)
	return c
}

// checkImported opens what an import made and compares everything with the
// model that was exported, and shows that it can be gone on with.
func checkImported(t testing.TB, opts Options, m model, rng *rand.Rand) {
	t.Helper()
	l := mustOpen(t, opts)
	if !l.Recovery().Clean {
		t.Errorf("not opened as cleanly closed: %+v", l.Recovery())
	}
	next, term, offset, time := m.next()
	if l.LastIndex() != next-1 || l.LastTerm() != term || l.NextOffset() != offset || l.LastAppendTime() != time || l.FirstIndex() != m.first {
		t.Fatalf("%+v, term %d, time %d; want index %d, term %d, offset %d, time %d", l.Stats(), l.LastTerm(), l.LastAppendTime(), next-1, term, offset, time)
	}
	firstOffset := offset
	if len(m.entries) > 0 {
		firstOffset = m.entries[0].BaseOffset
	}
	if l.FirstOffset() != firstOffset {
		t.Fatalf("first offset is %d, not %d", l.FirstOffset(), firstOffset)
	}
	must(t, checkReads(l, &m, rng))
	entries := m.generate(rng, 6, 900)
	must(t, l.Append(entries))
	m.append(entries)
	must(t, l.Close())
	l = mustOpen(t, opts)
	must(t, checkReads(l, &m, rng))
	must(t, l.Close())
}

// TestExportImport takes random logs through a stream, from any first index,
// through any last one, into segments of another size.
func TestExportImport(t *testing.T) {
	rng := vfstest.Rand(t)
	for range 40 {
		l := mustOpen(t, smallOptions(vfstest.New()))
		m := model{first: 1}
		for range 15 + rng.IntN(30) {
			step(t, l, &m, rng)
		}
		for range 4 {
			through := m.first - 1 + rng.Uint64N(uint64(len(m.entries))+1)
			want := m.upTo(through)
			x, err := l.Export(through)
			must(t, err)
			if x.FirstIndex() != l.FirstIndex() || x.FirstOffset() != l.FirstOffset() || x.LastIndex() != through {
				t.Fatalf("export of %d to %d, %d", x.FirstIndex(), x.LastIndex(), x.FirstOffset())
			}
			next, term, offset, time := want.next()
			if x.LastIndex() != next-1 || x.LastTerm() != term || x.NextOffset() != offset || x.LastAppendTime() != time {
				t.Fatalf("export ends at index %d, term %d, offset %d, time %d", x.LastIndex(), x.LastTerm(), x.NextOffset(), x.LastAppendTime())
			}
			opts := smallOptions(vfstest.New())
			opts.SegmentSize = MinSegmentSize << rng.IntN(4)
			opts.inline = rng.IntN(2) == 0
			var r io.Reader = x
			switch rng.IntN(3) {
			case 0:
				r = iotest.OneByteReader(x)
			case 1:
				r = iotest.DataErrReader(x)
			}
			stats, err := Import(testDir, opts, r)
			must(t, err)
			must(t, x.Close())
			want2 := ImportStats{FirstIndex: x.FirstIndex(), LastIndex: x.LastIndex(), FirstOffset: x.FirstOffset(), NextOffset: x.NextOffset(),
				LastTerm: x.LastTerm(), LastAppendTime: x.LastAppendTime(), Bytes: x.Size()}
			if stats != want2 {
				t.Fatalf("%+v, want %+v", stats, want2)
			}
			checkImported(t, opts, want, rng)
		}
		must(t, l.Close())
	}
}

// TestExportWriteTo: WriteTo and Read give the same, also in turns.
func TestExportWriteTo(t *testing.T) {
	fsys, m := fuzzLog(t, true)
	l := mustOpen(t, smallOptions(fsys))
	defer l.Close()
	want := exportBytes(t, l, m.last())
	for _, first := range []int{0, 1, exportHeaderSize, exportHeaderSize + sectionHeaderSize, 1000} {
		x, err := l.Export(m.last())
		must(t, err)
		b := make([]byte, first)
		_, err = io.ReadFull(x, b)
		must(t, err)
		got := bytes.NewBuffer(b)
		n, err := x.WriteTo(got)
		must(t, err)
		if n != x.Size()-int64(first) || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("after %d bytes, %d more: not the same", first, n)
		}
		if n, err := x.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("behind the end: %d, %v", n, err)
		}
		must(t, x.Close())
		must(t, x.Close())
	}
}

func TestExportRange(t *testing.T) {
	l := mustOpen(t, smallOptions(vfstest.New()))
	m := model{first: 1}
	rng := rand.New(rand.NewPCG(1, 2))
	for l.Stats().Segments < 4 {
		entries := m.generate(rng, 3, 900)
		must(t, l.Append(entries))
		m.append(entries)
	}
	first, err := l.DeletePrefix(m.last())
	must(t, err)
	m.deletePrefix(first)
	for _, through := range []uint64{0, first - 2, m.last() + 1, 1<<64 - 1} {
		var out *RangeError
		if _, err := l.Export(through); !errors.As(err, &out) || !errors.Is(err, ErrNotFound) || out.First != first || out.Last != m.last() {
			t.Errorf("through %d: %v", through, err)
		}
	}
	for _, through := range []uint64{first - 1, first, m.last()} {
		if b := exportBytes(t, l, through); through == first-1 && len(b) != exportHeaderSize {
			t.Errorf("of nothing: %d bytes", len(b))
		}
	}
	must(t, l.Close())
	if _, err := l.Export(m.last()); !errors.Is(err, ErrClosed) {
		t.Errorf("of a closed log: %v", err)
	}
	if len(l.exports.open) != 0 {
		t.Errorf("%d are held", len(l.exports.open))
	}
}

// TestExportHolds: what happens to the log while it is exported does not change
// the stream, whenever that is.
func TestExportHolds(t *testing.T) {
	rng := vfstest.Rand(t)
	for round := range 120 {
		fsys := vfstest.New()
		l := mustOpen(t, smallOptions(fsys))
		m := model{first: 1}
		for l.Stats().Segments < 5 {
			entries := m.generate(rng, 1+rng.IntN(5), 900)
			must(t, l.Append(entries))
			m.append(entries)
		}
		through := m.first - 1 + rng.Uint64N(uint64(len(m.entries))+1)
		want := m.upTo(through)
		x, err := l.Export(through)
		must(t, err)
		var b []byte
		for {
			chunk := make([]byte, 1+rng.IntN(4000))
			n, err := x.Read(chunk)
			b = append(b, chunk[:n]...)
			if errors.Is(err, io.EOF) {
				break
			}
			must(t, err)
			switch rng.IntN(4) {
			case 0, 1:
				step(t, l, &m, rng)
			case 2:
				first, err := l.DeletePrefix(m.last())
				must(t, err)
				m.deletePrefix(first)
			}
		}
		must(t, checkEntriesEqual(l, &m))
		must(t, x.Close())
		must(t, l.Close())
		opts := smallOptions(vfstest.New())
		_, err = Import(testDir, opts, bytes.NewReader(b))
		if err != nil {
			t.Fatal(fmt.Errorf("round %d: %w", round, err))
		}
		checkImported(t, opts, want, rng)
		// What was done to the log meanwhile is as durable as ever.
		l, err = Open(testDir, smallOptions(fsys.CrashClone(rng, vfstest.None)))
		must(t, err)
		must(t, checkEntriesEqual(l, &m))
		must(t, l.Close())
	}
}
