package logstore

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// TestBitFlips flips one bit of a log's files at a time, anywhere below the
// mark up to which the log is known to be durable. Whatever the bit: no read
// returns anything but what was written or a *CorruptError, and the log opens
// with all of its entries or is refused with a typed error and left alone.
func TestBitFlips(t *testing.T) {
	rng := vfstest.Rand(t)
	want := vfstest.Env(t, "DIURNA_FLIPS", 10000)
	refused, unread, harmless := 0, 0, 0
	for flips := 0; flips < want; {
		clean := rng.IntN(2) == 0
		base, m := flippable(t, rng, clean)
		for range 200 {
			flips++
			fsys := base.CrashClone(rng, vfstest.All)
			where := flip(t, fsys, rng, &m)
			outcome, err := readFlipped(fsys, &m, rng)
			if err != nil {
				t.Fatalf("after %d flips, clean %v: %s: %v", flips, clean, where, err)
			}
			switch outcome {
			case "refused":
				refused++
			case "unread":
				unread++
			default:
				harmless++
			}
		}
	}
	t.Logf("refused to open: %d, opened with a typed error on reading: %d, all read (derived data, or a second copy): %d", refused, unread, harmless)
	if refused == 0 || unread == 0 || harmless == 0 {
		t.Error("the flips did not reach all kinds of files")
	}
}

func flippable(t *testing.T, rng *rand.Rand, clean bool) (*vfstest.Mem, model) {
	fsys := vfstest.New()
	l := mustOpen(t, smallOptions(fsys))
	m := model{first: 1}
	for l.Stats().Segments < 4 {
		entries := m.generate(rng, 1+rng.IntN(5), 700)
		must(t, l.Append(entries))
		m.append(entries)
		// What leaves marks in the checkpoint that must not be believed later.
		switch rng.IntN(8) {
		case 0:
			must(t, l.Close())
			l = mustOpen(t, smallOptions(fsys))
		case 1:
			from := m.last() - min(uint64(rng.IntN(4)), m.last()-m.first)
			must(t, l.TruncateSuffix(from))
			m.truncate(from)
		}
	}
	entries := m.generate(rng, 3, 300)
	must(t, l.Append(entries))
	m.append(entries)
	must(t, l.keeper.recordDurable(false))
	crashed := fsys.CrashClone(rng, vfstest.All)
	must(t, l.Close())
	if clean {
		return fsys, m
	}
	return crashed, m
}

// flip flips a bit of a file, of a segment only where frames are.
func flip(t *testing.T, fsys *vfstest.Mem, rng *rand.Rand, m *model) string {
	names := fsys.Names()
	name := names[rng.IntN(len(names))]
	var where string
	must(t, fsys.Mutate(name, func(b []byte) []byte {
		n := len(b)
		if strings.HasSuffix(name, segmentSuffix) {
			for n > 0 && b[n-1] == 0 {
				n-- // preallocated
			}
		}
		at, bit := rng.IntN(n), rng.IntN(8)
		if rng.IntN(4) == 0 {
			at = rng.IntN(min(n, segmentHeaderSize+HeaderSize))
		}
		b[at] ^= 1 << bit
		where = fmt.Sprintf("bit %d of byte %d of %s", bit, at, name)
		return b
	}))
	return where
}

func readFlipped(fsys *vfstest.Mem, m *model, rng *rand.Rand) (outcome string, err error) {
	before := fsys.Snapshot()
	l, err := Open(testDir, smallOptions(fsys))
	var corrupt *CorruptError
	if err != nil {
		if !errors.As(err, &corrupt) {
			return "", fmt.Errorf("refused without a typed error: %w", err)
		}
		for name, b := range fsys.Snapshot() {
			if string(before[name]) != string(b) {
				return "", fmt.Errorf("refused, but changed %s", name)
			}
		}
		return "refused", nil
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	if l.FirstIndex() != m.first || l.LastIndex() != m.last() {
		return "", fmt.Errorf("log holds %d–%d, want %d–%d", l.FirstIndex(), l.LastIndex(), m.first, m.last())
	}
	_, _, next, _ := m.next()
	if l.NextOffset() != next {
		return "", fmt.Errorf("next offset is %d, want %d", l.NextOffset(), next)
	}
	outcome = "harmless"
	var buf []byte
	chunk := make([]byte, 8<<10)
	for _, want := range m.entries {
		got, b, err := l.Entry(want.Index, buf)
		buf = b
		switch {
		case errors.As(err, &corrupt):
			outcome = "unread"
		case err != nil:
			return "", fmt.Errorf("entry %d: %w", want.Index, err)
		case !equalEntries(got, want):
			return "", fmt.Errorf("entry %d has other content", want.Index)
		}
		if want.Count == 0 {
			continue
		}
		if index, err := l.IndexOfOffset(want.BaseOffset); err == nil && index != want.Index {
			return "", fmt.Errorf("offset %d is in entry %d, want %d", want.BaseOffset, index, want.Index)
		}
		batches, err := l.ReadBatches(want.BaseOffset, next, chunk, nil)
		if err != nil {
			if !errors.As(err, &corrupt) {
				return "", fmt.Errorf("read of offset %d: %w", want.BaseOffset, err)
			}
			continue
		}
		for _, b := range batches {
			if e := entryAt(m, b.BaseOffset); e == nil || string(e.Payload) != string(chunk[b.Start:b.End]) || e.Count != b.Count || e.AppendTime != b.AppendTime {
				return "", fmt.Errorf("read of offset %d returned other content at %d", want.BaseOffset, b.BaseOffset)
			}
		}
	}
	return outcome, nil
}

func entryAt(m *model, base uint64) *Entry {
	for i := range m.entries {
		if e := &m.entries[i]; e.BaseOffset == base && e.Count > 0 {
			return e
		}
	}
	return nil
}

// TestTornTails puts random bytes where a crash may leave them, behind the
// last synced entry, and opens the log: it always opens, with all it had.
func TestTornTails(t *testing.T) {
	rng := vfstest.Rand(t)
	for range 3000 {
		fsys := vfstest.New()
		l := mustOpen(t, smallOptions(fsys))
		m := model{first: 1}
		must(t, l.Append(m.generate(rng, 2, 300)))
		acked := l.LastIndex()
		end := l.state.Load().tail.pos
		entries := (&model{first: acked + 1, prev: lastEntry(t, l)}).generate(rng, 3, 300)
		must(t, l.Append(entries))
		crashed := fsys.CrashClone(rng, vfstest.All)
		must(t, l.Close())
		// The checkpoint in the clone is that of the opening.
		must(t, crashed.Mutate(segments(crashed)[0], func(b []byte) []byte {
			tail := b[end:]
			switch rng.IntN(5) {
			case 0: // cut short
				return b[:end+rng.Int64N(int64(len(tail)))]
			case 1: // garbage
				for i := range tail {
					tail[i] = byte(rng.Uint32())
				}
			case 2: // zeros from somewhere
				clear(tail[rng.IntN(len(tail)):])
			case 3: // a hole
				at := rng.IntN(1000)
				clear(tail[at : at+1+rng.IntN(len(tail)-at-1)])
			case 4: // one wrong bit
				tail[rng.IntN(1000)] ^= 1 << rng.IntN(8)
			}
			return b
		}))
		l, err := Open(testDir, smallOptions(crashed))
		if err != nil {
			t.Fatal(err)
		}
		if l.LastIndex() < acked {
			t.Fatalf("ends at %d, %d was acknowledged", l.LastIndex(), acked)
		}
		must(t, l.Close())
	}
}

func lastEntry(t *testing.T, l *Log) Entry {
	e, _, err := l.Entry(l.LastIndex(), nil)
	must(t, err)
	return e
}

// TestSyncedMark is the one case that only the mark in later frames decides: a
// bad frame behind the last checkpoint, with a good one behind it that was
// written after the bad one had been synced.
func TestSyncedMark(t *testing.T) {
	for _, group := range []bool{false, true} {
		fsys := vfstest.New()
		l := mustOpen(t, smallOptions(fsys))
		m := model{first: 1}
		rng := rand.New(rand.NewPCG(5, 6))
		entries := m.generate(rng, 3, 200)
		var middle int64
		if group { // one write: the third frame says nothing of the second
			must(t, l.Append(entries))
			middle, _ = l.state.Load().active.span(1)
		} else {
			for i := range entries {
				if i == 1 {
					middle = l.state.Load().tail.pos
				}
				must(t, l.Append(entries[i:i+1]))
			}
		}
		crashed := fsys.CrashClone(rng, vfstest.All)
		must(t, l.Close())
		must(t, crashed.Mutate(segments(crashed)[0], func(b []byte) []byte { b[middle+20]++; return b }))
		l, err := Open(testDir, smallOptions(crashed))
		var corrupt *CorruptError
		switch {
		case group && err != nil:
			t.Fatalf("a torn group was refused: %v", err)
		case group:
			if l.LastIndex() != 1 || l.Recovery().Torn == "" {
				t.Fatalf("a torn group: %+v, %+v", l.Stats(), l.Recovery())
			}
			must(t, l.Close())
		case !errors.As(err, &corrupt) || corrupt.Position != middle:
			t.Fatalf("damage at %d: %v", middle, err)
		}
	}
}

// TestIndexRebuilt opens a log whose index files are gone, foreign or wrong.
func TestIndexRebuilt(t *testing.T) {
	rng := vfstest.Rand(t)
	mutations := map[string]func(name string, fsys *vfstest.Mem){
		"missing": func(name string, fsys *vfstest.Mem) { must(t, fsys.Remove(name)) },
		"empty":   func(name string, fsys *vfstest.Mem) { must(t, fsys.Mutate(name, func([]byte) []byte { return nil })) },
		"short": func(name string, fsys *vfstest.Mem) {
			must(t, fsys.Mutate(name, func(b []byte) []byte { return b[:len(b)-3] }))
		},
		"long": func(name string, fsys *vfstest.Mem) {
			must(t, fsys.Mutate(name, func(b []byte) []byte { return append(b, 1) }))
		},
		"wrong": func(name string, fsys *vfstest.Mem) {
			must(t, fsys.Mutate(name, func(b []byte) []byte { b[indexHeaderSize]++; return b }))
		},
		"wrong sum": func(name string, fsys *vfstest.Mem) {
			must(t, fsys.Mutate(name, func(b []byte) []byte { b[8]++; return b }))
		},
		"newer": func(name string, fsys *vfstest.Mem) {
			must(t, fsys.Mutate(name, func(b []byte) []byte { b[12] = 9; return resum(b) }))
		},
	}
	for name, mutate := range mutations {
		t.Run(name, func(t *testing.T) {
			fsys, m := flippable(t, rng, true)
			for _, file := range fsys.Names() {
				if strings.HasSuffix(file, indexSuffix) {
					mutate(file, fsys)
				}
			}
			for range 2 { // the second time with what the first one wrote
				l := mustOpen(t, smallOptions(fsys))
				must(t, checkReads(l, &m, rng))
				must(t, l.Close())
			}
		})
	}
}

// TestSealedIndexesAreMapped: the heap holds no index of a sealed segment,
// however it came to be open.
func TestSealedIndexesAreMapped(t *testing.T) {
	rng := vfstest.Rand(t)
	fsys, m := flippable(t, rng, false)
	for _, name := range fsys.Names() {
		if strings.HasSuffix(name, indexSuffix) {
			must(t, fsys.Remove(name))
		}
	}
	l := mustOpen(t, smallOptions(fsys))
	for range 20 {
		entries := m.generate(rng, 3, 700)
		must(t, l.Append(entries))
		m.append(entries)
	}
	must(t, checkReads(l, &m, rng))
	st := l.state.Load()
	for _, s := range st.segs[:len(st.segs)-1] {
		o, err := l.handles.acquire(s)
		must(t, err)
		if o.mapping == nil || o.index.mem != nil {
			t.Errorf("the index of %s is in memory", s.file)
		}
		l.handles.release(s)
	}
	must(t, l.Close())
}
