package logstore_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// docReadStream reads an export stream as the document describes it.
func docReadStream(b []byte) (entries []docEntry, err error) {
	if err := docHead(b, "DIURNEXP"); err != nil {
		return nil, err
	}
	h := docHeader{id: b[16:32], index: le.Uint64(b[32:]), offset: le.Uint64(b[40:]), term: le.Uint64(b[48:]), time: int64(le.Uint64(b[56:])), previous: le.Uint32(b[64:])}
	last, next, lastTerm, lastTime, lastSum := le.Uint64(b[72:]), le.Uint64(b[80:]), le.Uint64(b[88:]), int64(le.Uint64(b[96:])), le.Uint32(b[68:])
	if le.Uint64(b[104:]) != uint64(len(b)) {
		return nil, damaged("%d bytes, not %d", len(b), le.Uint64(b[104:]))
	}
	b = b[128:]
	for h.index <= last {
		if len(b) < 64 || string(b[:8]) != "DIURNSEC" || le.Uint32(b[8:]) != checksum(b[12:64]) || le.Uint32(b[12:]) != 1 {
			return nil, damaged("no section")
		}
		end, size := le.Uint64(b[40:]), int(le.Uint64(b[48:]))
		if !bytes.Equal(b[16:32], h.id) || le.Uint64(b[32:]) != h.index || size > len(b)-64 {
			return nil, damaged("section %x", b[:64])
		}
		// docFrames begins behind a segment's header.
		got, checks := docFrames(h, append(make([]byte, 128), b[64:64+size]...), 1<<64-1)
		if uint64(len(got)) != end+1-h.index || got[len(got)-1].end != 128+size {
			return nil, damaged("a section of %d entries", len(got))
		}
		e := got[len(got)-1]
		h.index, h.offset, h.term, h.time, h.previous = end+1, e.base+uint64(e.count), e.term, e.time, checks[len(got)]
		entries = append(entries, got...)
		b = b[64+size:]
	}
	if len(b) > 0 || h.index != last+1 || h.offset != next || h.term != lastTerm || h.time != lastTime || h.previous != lastSum {
		return nil, damaged("the stream's end")
	}
	return entries, nil
}

// TestFormatStream: the reader made from the document reads what Export makes.
func TestFormatStream(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed: %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 30 {
		fsys := vfstest.New()
		opts := logstore.Options{FS: fsys, SegmentSize: logstore.MinSegmentSize, FirstIndex: 1 + rng.Uint64N(9), FirstOffset: rng.Uint64N(1000)}
		l, err := logstore.Open("log", opts)
		if err != nil {
			t.Fatal(err)
		}
		for range rng.IntN(40) {
			e := logstore.Entry{Index: l.LastIndex() + 1, Term: l.LastTerm() + rng.Uint64N(2), Type: uint8(rng.IntN(2)), BaseOffset: l.NextOffset(),
				AppendTime: l.LastAppendTime() + rng.Int64N(9), Payload: make([]byte, rng.IntN(900))}
			if e.Type == 0 {
				e.Count = 1 + rng.Uint32N(3)
			}
			for i := range e.Payload {
				e.Payload[i] = byte(rng.Uint32())
			}
			if err := l.Append([]logstore.Entry{e}); err != nil {
				t.Fatal(err)
			}
			if rng.IntN(20) == 0 {
				if _, err := l.DeletePrefix(l.LastIndex()); err != nil {
					t.Fatal(err)
				}
			}
		}
		through := l.FirstIndex() - 1 + rng.Uint64N(l.LastIndex()-l.FirstIndex()+2)
		x, err := l.Export(through)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(x)
		if err != nil {
			t.Fatal(err)
		}
		if err := x.Close(); err != nil {
			t.Fatal(err)
		}
		entries, err := docReadStream(b)
		if err != nil {
			t.Fatal(err)
		}
		if uint64(len(entries)) != through+1-l.FirstIndex() {
			t.Fatalf("%d entries from %d through %d", len(entries), l.FirstIndex(), through)
		}
		for _, got := range entries {
			want, _, err := l.Entry(got.index, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got.term != want.Term || got.typ != want.Type || got.count != want.Count || got.base != want.BaseOffset || got.time != want.AppendTime || !bytes.Equal(got.payload, want.Payload) {
				t.Fatalf("the document's reader finds %+v, the log has %+v", got, want)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}

		// What is made of it is a log to the document's other reader.
		to := vfstest.New()
		if _, err := logstore.Import("log", logstore.Options{FS: to, SegmentSize: logstore.MinSegmentSize}, bytes.NewReader(b)); err != nil {
			t.Fatal(err)
		}
		compareReaders(t, to, map[string]int{})

		// And neither takes it with a flipped bit.
		bit := rng.IntN(8 * len(b))
		b[bit/8] ^= 1 << (bit % 8)
		if _, err := docReadStream(b); err == nil {
			t.Fatalf("read with bit %d flipped", bit)
		}
		if _, err := logstore.Import("log", logstore.Options{FS: vfstest.New()}, bytes.NewReader(b)); err == nil {
			t.Fatalf("imported with bit %d flipped", bit)
		}
	}
}
