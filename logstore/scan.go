package logstore

import (
	"errors"
	"fmt"
	"io"

	"github.com/diurnalog/diurna/logstore/vfs"
)

const scanBuffer = 1 << 20

// scanner reads the frames of one segment in order and checks each of them
// fully, against itself and against the one before.
type scanner struct {
	f    vfs.File
	s    *segment
	size int64
	tail tail

	// Of the frame that next returned last.
	header frameHeader
	frame  []byte // valid until the next call of next
	entry  indexEntry

	buf     []byte
	bufFrom int64 // file position of buf[0]
	bufLen  int
}

func newScanner(f vfs.File, s *segment) (*scanner, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	return &scanner{f: f, s: s, size: size, tail: s.start(), buf: make([]byte, min(scanBuffer, size))}, nil
}

// next moves to the next frame. A *CorruptError means that there is none at
// tail.pos, for whatever reason; other errors come from the file.
func (sc *scanner) next() error {
	pos := sc.tail.pos
	b, err := sc.bytes(pos, HeaderSize)
	if err != nil {
		return err
	}
	if h, err := checkHeader(b, sc.s.seed); err == nil {
		if b, err = sc.bytes(pos, h.size()); err != nil {
			return err
		}
	}
	h, err := parseFrame(b, sc.s.seed)
	if err != nil {
		return sc.s.corrupt(pos, "%v", err)
	}
	if err := sc.tail.check(&h); err != nil {
		return sc.s.corrupt(pos, "%v", err)
	}
	sc.header, sc.frame = h, b[:h.size()]
	sc.entry = sc.s.indexEntry(pos, &h)
	sc.tail.advance(&h)
	return nil
}

// indexEntry makes the index entry of a frame at pos.
func (s *segment) indexEntry(pos int64, h *frameHeader) indexEntry {
	return indexEntry{
		pos:    uint32(pos),
		offset: uint32(h.base - s.firstOffset),
		time:   uint64(h.time - s.prevTime),
	}
}

// bytes returns n bytes from pos, or as many as the file has.
func (sc *scanner) bytes(pos, n int64) ([]byte, error) {
	n = min(n, sc.size-pos)
	if n <= 0 {
		return nil, nil
	}
	if pos < sc.bufFrom || pos+n > sc.bufFrom+int64(sc.bufLen) {
		if n > int64(len(sc.buf)) {
			sc.buf = make([]byte, n)
		}
		got, err := sc.f.ReadAt(sc.buf[:min(int64(len(sc.buf)), sc.size-pos)], pos)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read %s: %w", sc.s.file, err)
		}
		sc.bufFrom, sc.bufLen = pos, got
		n = min(n, int64(got))
	}
	at := pos - sc.bufFrom
	return sc.buf[at : at+n], nil
}

// remains looks at what stands behind the last good frame, where next failed.
// zero: nothing but zeros, as preallocation leaves. later: the greatest synced
// mark of any frame header there, whatever became of its payload; the frame
// was written behind bytes that are now bad, and says up to where those before
// it were durable.
func (sc *scanner) remains() (zero bool, later uint64, err error) {
	zero = true
	for pos := sc.tail.pos; pos < sc.size; {
		b, err := sc.bytes(pos, scanBuffer/2)
		if err != nil {
			return false, 0, err
		}
		if len(b) == 0 {
			break
		}
		if allZero(b) {
			pos += int64(len(b))
			continue
		}
		zero = false
		at := 0
		for ; at+HeaderSize <= len(b); at += frameAlign {
			// The version first: a checksum of every eighth byte's sixty would
			// take its time.
			if b[at+12] != frameVersion {
				continue
			}
			if h, err := checkHeader(b[at:], sc.s.seed); err == nil && h.synced < h.index {
				later = max(later, h.synced)
			}
		}
		if at == 0 {
			break // too little for a header, at the end of the file
		}
		pos += int64(at)
	}
	return zero, later, nil
}
