package logstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// FuzzFrame: whatever the bytes, parsing them does not panic and does not look
// past them, and what is taken for a frame is what encoding it gives. forge
// gives the bytes a good checksum first, which random ones would never have.
func FuzzFrame(f *testing.F) {
	fsys, _ := fuzzLog(f, true)
	for _, name := range segments(fsys) {
		b, err := fsys.ReadFile(name)
		must(f, err)
		h, err := parseSegmentHeader(name, b)
		must(f, err)
		for pos := int64(segmentHeaderSize); pos < int64(len(b)); {
			frame, err := parseFrame(b[pos:], h.seed())
			if err != nil {
				break
			}
			f.Add(bytes.Clone(b[pos:pos+frame.size()]), h.seed(), false)
			f.Add(bytes.Clone(b[pos:pos+frame.size()]), uint32(0), true)
			pos += frame.size()
		}
	}
	f.Add([]byte{}, uint32(0), false)
	f.Fuzz(func(t *testing.T, b []byte, seed uint32, forge bool) {
		b = b[:len(b):len(b)] // a read past the end panics
		if forge && len(b) >= HeaderSize {
			if size := frameSize(int(binary.LittleEndian.Uint32(b[8:]))); size <= int64(len(b)) {
				b[12] = frameVersion
				forgeFrame(b[:size], seed)
			}
		}
		h, err := parseFrame(b, seed)
		if err != nil {
			return
		}
		if h.size() > int64(len(b)) || h.size()%frameAlign != 0 || h.length > MaxPayload {
			t.Fatalf("a frame of %d bytes, payload %d, in %d bytes", h.size(), h.length, len(b))
		}
		e := h.entry(b)
		again, crc := appendFrame(nil, seed, h.prevCRC, h.synced, &e)
		back, err := parseFrame(again, seed)
		if err != nil {
			t.Fatal(err)
		}
		// Nobody reads what is reserved, or padding, but it is in the checksum.
		reserved := !allZero(b[14:16]) || !allZero(b[60:64]) || !allZero(b[HeaderSize+int(h.length):h.size()])
		if !reserved && (crc != h.crc || !bytes.Equal(again, b[:h.size()])) {
			t.Fatalf("encoded again it is\n%x, not\n%x", again, b[:h.size()])
		}
		back.crc = h.crc
		if back != h || !bytes.Equal(back.entry(again).Payload, e.Payload) {
			t.Fatalf("%+v became %+v", h, back)
		}
	})
}

// FuzzSegmentOpen writes arbitrary bytes into a segment of a log, or cuts it,
// or both. Opening the log either is refused with a typed error, nothing
// changed, or gives a log of which every entry can be read or is reported as
// damaged.
func FuzzSegmentOpen(f *testing.F) {
	const (
		crashed = 1 << iota // not closed
		sealed              // the first segment, not the last
		forge               // give what was written the checksums it needs
		cut                 // end the file behind what was written
	)
	base := [2]*vfstest.Mem{}
	base[0], _ = fuzzLog(f, true)
	base[1], _ = fuzzLog(f, false)
	for _, name := range segments(base[1]) {
		b, err := base[1].ReadFile(name)
		must(f, err)
		for flags := range uint8(16) {
			f.Add(uint16(segmentHeaderSize), bytes.Clone(b[segmentHeaderSize:segmentHeaderSize+200]), flags)
			f.Add(uint16(0), bytes.Clone(b[:segmentHeaderSize]), flags)
			f.Add(uint16(700), []byte{0}, flags)
			f.Add(uint16(700), make([]byte, 64), flags)
			// The beginning of a frame whose payload goes past the end.
			f.Add(uint16(segmentHeaderSize), append(append(make([]byte, 8), 0xff, 0xff, 0xff, 0, frameVersion), b[141:192]...), flags)
		}
	}
	f.Fuzz(func(t *testing.T, at uint16, patch []byte, flags uint8) {
		if len(patch) > 8192 {
			return
		}
		fsys := base[flags&crashed].CrashClone(nil, vfstest.All)
		names := segments(fsys)
		name := names[len(names)-1]
		if flags&sealed != 0 {
			name = names[0]
		}
		must(t, fsys.Mutate(name, func(b []byte) []byte {
			from := min(int(at), len(b))
			old := bytes.Clone(b)
			b = append(b[:from:from], patch...)
			if flags&cut == 0 && len(b) < len(old) {
				b = append(b, old[len(b):]...)
			}
			if flags&forge != 0 {
				forgeChecksums(old, b)
			}
			return b
		}))
		readFuzzed(t, fsys, flags&forge == 0)
	})
}

// forgeChecksums gives every frame of a segment a checksum that fits, in a
// chain, as nobody can who does not know the log's id.
func forgeChecksums(old, b []byte) {
	if len(b) < segmentHeaderSize {
		return
	}
	copy(b, old[:segmentHeaderSize])
	h, err := parseSegmentHeader("", b)
	if err != nil {
		return
	}
	le := binary.LittleEndian
	prev := h.prevCRC
	for pos := int64(segmentHeaderSize); pos+HeaderSize <= int64(len(b)); {
		frame := b[pos:]
		length := le.Uint32(frame[8:])
		size := frameSize(int(length))
		if length > MaxPayload || size > int64(len(frame)) || allZero(frame[:HeaderSize]) {
			return
		}
		frame[12] = frameVersion
		le.PutUint32(frame[4:], prev)
		prev = forgeFrame(frame[:size], h.seed())
		pos += size
	}
}

// forgeFrame gives a frame the checksums that fit.
func forgeFrame(f []byte, seed uint32) uint32 {
	sum := headerSum(f, seed)
	binary.LittleEndian.PutUint32(f[60:], sum)
	crc := frameSum(f, sum)
	binary.LittleEndian.PutUint32(f, crc)
	return crc
}

// TestFrameSumCoversAll: any two frames that differ anywhere have different
// checksums, so that a chain of them names every byte of all.
func TestFrameSumCoversAll(t *testing.T) {
	for _, payload := range [][]byte{nil, []byte("acta")} {
		f, crc := appendFrame(nil, 7, 8, 9, &Entry{Index: 10, Term: 11, Payload: payload})
		for bit := 4 * 8; bit < 8*len(f); bit++ {
			if bit/8 >= 60 && bit/8 < HeaderSize || bit/8 >= 8 && bit/8 < 12 {
				continue // the header's sum, and the length
			}
			f[bit/8] ^= 1 << (bit % 8)
			if forgeFrame(bytes.Clone(f), 7) == crc {
				t.Fatalf("bit %d of byte %d changes nothing", bit%8, bit/8)
			}
			f[bit/8] ^= 1 << (bit % 8)
		}
		if forgeFrame(bytes.Clone(f), 6) == crc {
			t.Fatal("the seed changes nothing")
		}
	}
}

// FuzzIndexOpen puts arbitrary bytes into an index, or in its place: all reads
// give what was appended all the same.
func FuzzIndexOpen(f *testing.F) {
	fsys, m := fuzzLog(f, true)
	var names []string
	for _, name := range fsys.Names() {
		if strings.HasSuffix(name, indexSuffix) {
			names = append(names, name)
		}
	}
	for i, name := range names {
		b, err := fsys.ReadFile(name)
		must(f, err)
		f.Add(uint8(i), uint16(0), bytes.Clone(b), true)                      // as it is, or another segment's
		f.Add(uint8(i+1), uint16(0), bytes.Clone(b), true)                    //
		f.Add(uint8(i), uint16(indexHeaderSize), make([]byte, 16), false)     // an entry of zeros
		f.Add(uint8(i), uint16(40), []byte{0xff, 0xff, 0xff, 0xff, 1}, false) // very many entries
		f.Add(uint8(i), uint16(len(b)), []byte{1}, false)
		f.Add(uint8(i), uint16(0), []byte{}, true)
	}
	f.Fuzz(func(t *testing.T, which uint8, at uint16, patch []byte, cut bool) {
		if len(patch) > 8192 {
			return
		}
		fsys := fsys.CrashClone(nil, vfstest.All)
		must(t, fsys.Mutate(names[int(which)%len(names)], func(b []byte) []byte {
			from := min(int(at), len(b))
			out := append(b[:from:from], patch...)
			if !cut && len(out) < len(b) {
				out = append(out, b[len(out):]...)
			}
			return out
		}))
		l := mustOpen(t, smallOptions(fsys))
		must(t, checkReads(l, &m, rand.New(rand.NewPCG(1, 2))))
		must(t, l.Close())
	})
}

// FuzzCheckpoint puts arbitrary bytes into the checkpoint of a log. Unless they
// have been given a good checksum, the log is refused or whole.
func FuzzCheckpoint(f *testing.F) {
	base := [2]*vfstest.Mem{}
	models := [2]model{}
	base[0], models[0] = fuzzLog(f, true)
	base[1], models[1] = fuzzLog(f, false)
	name := testDir + "/" + checkpointName
	for _, fsys := range base {
		b, err := fsys.ReadFile(name)
		must(f, err)
		for _, slot := range []int{0, checkpointDistance} {
			for _, clean := range []bool{false, true} {
				for _, forge := range []bool{false, true} {
					f.Add(uint16(slot), bytes.Clone(b[:checkpointSize]), clean, forge)
					f.Add(uint16(slot), bytes.Clone(b[checkpointDistance:checkpointDistance+checkpointSize]), clean, forge)
					f.Add(uint16(slot+40), []byte{1, 1}, clean, forge)                   // the flags
					f.Add(uint16(slot+48), []byte{9}, clean, forge)                      // the segment
					f.Add(uint16(slot+56), bytes.Repeat([]byte{0xff}, 56), clean, forge) // the tail
					f.Add(uint16(slot+12), []byte{2}, clean, forge)                      // the version
				}
			}
		}
	}
	f.Fuzz(func(t *testing.T, at uint16, patch []byte, clean, forge bool) {
		which := 0
		if !clean {
			which = 1
		}
		fsys := base[which].CrashClone(nil, vfstest.All)
		must(t, fsys.Mutate(name, func(b []byte) []byte {
			copy(b[min(int(at), len(b)):], patch)
			if forge {
				for i := range checkpointSlots {
					if slot := b[i*checkpointDistance:]; !allZero(slot[:checkpointSize]) {
						copy(slot, checkpointMagic)
						resumHead(slot, checkpointSize)
					}
				}
			}
			return b
		}))
		l := readFuzzed(t, fsys, !forge)
		if l != nil && !forge && l.LastIndex() != models[which].last() {
			t.Fatalf("log ends at index %d, %d was appended", l.LastIndex(), models[which].last())
		}
	})
}

// fuzzLog makes a small log of three segments, closed or as a crash leaves it.
func fuzzLog(t testing.TB, clean bool) (*vfstest.Mem, model) {
	t.Helper()
	fsys := vfstest.New()
	l := mustOpen(t, smallOptions(fsys))
	m := model{first: 1}
	rng := rand.New(rand.NewPCG(7, 8))
	for l.Stats().Segments < 3 {
		entries := m.generate(rng, 3, 700)
		must(t, l.Append(entries))
		m.append(entries)
	}
	must(t, l.keeper.recordDurable(false))
	for range 2 {
		entries := m.generate(rng, 2, 200)
		must(t, l.Append(entries))
		m.append(entries)
	}
	crashed := fsys.CrashClone(nil, vfstest.All)
	must(t, l.Close())
	if clean {
		return fsys, m
	}
	return crashed, m
}

// resumHead is resum of only the first size bytes.
func resumHead(b []byte, size int) { resum(b[:size:size]) }

// readFuzzed opens a log and reads all of it, by index and by offset. It
// returns the log, closed, or nil if it was refused. With forged checksums a
// log may contradict itself, which no rot can make it do; not strict is content
// with reads that end.
func readFuzzed(t *testing.T, fsys *vfstest.Mem, strict bool) *Log {
	t.Helper()
	// Twice a scanner's buffer for each of the three segments, and change.
	const most = 16 << 20
	before := fsys.Snapshot()
	var started, ended runtime.MemStats
	runtime.ReadMemStats(&started)
	l, err := Open(testDir, smallOptions(fsys))
	runtime.ReadMemStats(&ended)
	if got := ended.TotalAlloc - started.TotalAlloc; got > most {
		t.Fatalf("opening allocated %d bytes", got)
	}
	var corrupt *CorruptError
	var version *VersionError
	if err != nil {
		if !errors.As(err, &corrupt) && !errors.As(err, &version) {
			t.Fatalf("refused without a typed error: %v", err)
		}
		mustEqualFiles(t, before, fsys.Snapshot())
		return nil
	}
	defer func() { must(t, l.Close()) }()
	if n := l.LastIndex() - l.FirstIndex() + 1; n > 4*MinSegmentSize {
		t.Fatalf("the log claims %d entries: %+v", n, l.Stats())
	}
	var buf []byte
	for index := l.FirstIndex(); index <= l.LastIndex(); index++ {
		var e Entry
		if e, buf, err = l.Entry(index, buf); err == nil && e.Index != index {
			t.Fatalf("entry %d has index %d", index, e.Index)
		}
		if err != nil && !errors.As(err, &corrupt) {
			t.Fatalf("entry %d: %v", index, err)
		}
	}
	chunk := make([]byte, 16<<10)
	for offset, reads := l.FirstOffset(), 0; offset < l.NextOffset() && reads < 1000; reads++ {
		batches, err := l.ReadBatches(offset, l.NextOffset(), chunk, nil)
		switch {
		case err == nil && len(batches) > 0:
			last := batches[len(batches)-1]
			next := last.BaseOffset + uint64(last.Count)
			if next <= offset && strict {
				t.Fatalf("read of offset %d ends at %d", offset, next)
			}
			offset = max(offset+1, next)
		case errors.As(err, &corrupt), !strict:
			offset++
		default:
			t.Fatalf("read of offset %d: %d batches, %v", offset, len(batches), err)
		}
	}
	return l
}
