package logstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"runtime"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// FuzzImport writes arbitrary bytes into a stream, or ends it behind them, or
// both. It is refused with a typed error and leaves nothing, or it is imported:
// then the log is what was exported or, where the bytes were given the checksums
// they need, one that contradicts itself in nothing.
func FuzzImport(f *testing.F) {
	stream, m := smallStream(f)
	for _, at := range sections(f, stream) {
		for _, forge := range []bool{false, true} {
			for _, cut := range []bool{false, true} {
				end := min(at+sectionHeaderSize+2*HeaderSize, len(stream))
				f.Add(uint16(at), bytes.Clone(stream[at:end]), cut, forge)
				f.Add(uint16(at+32), []byte{9}, cut, forge)
				f.Add(uint16(at+48), bytes.Repeat([]byte{0xff}, 8), cut, forge)
				f.Add(uint16(at+sectionHeaderSize+8), []byte{0xff, 0xff, 0xff, 0}, cut, forge)
			}
		}
	}
	for _, forge := range []bool{false, true} {
		f.Add(uint16(0), bytes.Clone(stream[:exportHeaderSize]), true, forge)
		f.Add(uint16(12), []byte{2}, false, forge)
		f.Add(uint16(32), []byte{0}, false, forge)
		f.Add(uint16(72), bytes.Repeat([]byte{0xff}, 40), false, forge)
		f.Add(uint16(104), bytes.Repeat([]byte{0xff}, 7), false, forge)
		f.Add(uint16(len(stream)), []byte{0}, false, forge)
	}
	f.Fuzz(func(t *testing.T, at uint16, patch []byte, cut, forge bool) {
		if len(patch) > 8192 {
			return
		}
		from := min(int(at), len(stream))
		b := append(bytes.Clone(stream[:from]), patch...)
		if !cut && len(b) < len(stream) {
			b = append(b, stream[len(b):]...)
		}
		if forge {
			forgeStream(b)
		}
		importFuzzed(t, b, &m, bytes.Equal(b, stream), !forge)
	})
}

func importFuzzed(t *testing.T, b []byte, m *model, same, strict bool) {
	// A chunk, a log's own buffers, and as much for the largest entry.
	const most = 2*(importChunk+MaxPayload) + 16<<20
	fsys := vfstest.New()
	var started, ended runtime.MemStats
	runtime.ReadMemStats(&started)
	stats, err := Import(testDir, smallOptions(fsys), bytes.NewReader(b))
	runtime.ReadMemStats(&ended)
	if got := ended.TotalAlloc - started.TotalAlloc; got > most {
		t.Fatalf("importing %d bytes allocated %d", len(b), got)
	}
	var damage *StreamError
	var version *VersionError
	if err != nil {
		if same || !errors.As(err, &damage) && !errors.As(err, &version) {
			t.Fatalf("got %v", err)
		}
		if names := fsys.Names(); len(names) > 0 {
			t.Fatalf("%v, and left %v", err, names)
		}
		return
	}
	if strict && !same {
		t.Fatalf("other bytes were imported: %+v", stats)
	}
	l := mustOpen(t, smallOptions(fsys))
	defer func() { must(t, l.Close()) }()
	if s := l.Stats(); s.FirstIndex != stats.FirstIndex || s.LastIndex != stats.LastIndex || s.FirstOffset != stats.FirstOffset || s.NextOffset != stats.NextOffset ||
		l.LastTerm() != stats.LastTerm || l.LastAppendTime() != stats.LastAppendTime || stats.Bytes != int64(len(b)) {
		t.Fatalf("imported %+v, opened %+v", stats, s)
	}
	if strict {
		must(t, checkEntriesEqual(l, m))
	}
	if next, err := l.Verify(t.Context(), 0, nil); err != nil || next != l.LastIndex()+1 {
		t.Fatalf("%d, %v", next, err)
	}
}

// forgeStream gives a stream the checksums and the numbers that need no
// invention, as who knows the log's id could.
func forgeStream(b []byte) {
	le := binary.LittleEndian
	if len(b) < exportHeaderSize {
		return
	}
	copy(b, exportMagic)
	le.PutUint32(b[12:], formatVersion)
	le.PutUint64(b[104:], uint64(len(b)))
	prev := le.Uint32(b[64:])
	for at := exportHeaderSize; at+sectionHeaderSize <= len(b); {
		h := b[at : at+sectionHeaderSize]
		copy(h, sectionMagic)
		le.PutUint32(h[12:], formatVersion)
		copy(h[16:32], b[16:32])
		size := int(min(le.Uint64(h[48:]), uint64(len(b)-at-sectionHeaderSize)))
		resum(h)
		seed := (&segmentHeader{id: logID(h[16:32]), firstIndex: le.Uint64(h[32:])}).seed()
		at += sectionHeaderSize
		for frames := b[at : at+size]; len(frames) >= HeaderSize; {
			n := frameSize(int(le.Uint32(frames[8:])))
			if n > int64(len(frames)) {
				break
			}
			frames[12] = frameVersion
			le.PutUint32(frames[4:], prev)
			prev = forgeFrame(frames[:n], seed)
			frames = frames[n:]
		}
		at += size
	}
	le.PutUint32(b[68:], prev)
	resumHead(b, exportHeaderSize)
}
