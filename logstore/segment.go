package logstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/diurnalog/diurna/logstore/vfs"
)

const (
	segmentMagic = "DIURNSEG"
	// formatVersion covers all files of a log directory.
	formatVersion     = 1
	segmentHeaderSize = 128

	segmentSuffix = ".log"
	indexSuffix   = ".idx"
	tempSuffix    = vfs.TempSuffix
	nameDigits    = 20
)

// logID tells the files of one log copy from those of any other.
type logID [16]byte

// segmentHeader is the first thing in a segment file. It is durable before the
// file gets its name, and never changes.
type segmentHeader struct {
	id          logID
	firstIndex  uint64
	firstOffset uint64
	// What the first frame continues: see tail.
	prevTerm uint64
	prevCRC  uint32
	prevTime int64
}

func (h *segmentHeader) encode() []byte {
	b := make([]byte, segmentHeaderSize)
	le := binary.LittleEndian
	copy(b[preambleSize:], h.id[:])
	le.PutUint64(b[32:], h.firstIndex)
	le.PutUint64(b[40:], h.firstOffset)
	le.PutUint64(b[48:], h.prevTerm)
	le.PutUint64(b[56:], uint64(h.prevTime))
	le.PutUint32(b[64:], h.prevCRC)
	// The rest is reserved and zero.
	return sealPreamble(b, segmentMagic)
}

// parseSegmentHeader checks everything but that the header belongs to the file
// it stands in.
func parseSegmentHeader(file string, b []byte) (h segmentHeader, err error) {
	if len(b) < segmentHeaderSize {
		return h, &CorruptError{file, 0, fmt.Sprintf("the segment header has %d bytes, not %d", len(b), segmentHeaderSize)}
	}
	if err := checkPreamble(file, b[:segmentHeaderSize], segmentMagic, "a segment header"); err != nil {
		return h, err
	}
	le := binary.LittleEndian
	copy(h.id[:], b[preambleSize:])
	h.firstIndex = le.Uint64(b[32:])
	h.firstOffset = le.Uint64(b[40:])
	h.prevTerm = le.Uint64(b[48:])
	h.prevTime = int64(le.Uint64(b[56:]))
	h.prevCRC = le.Uint32(b[64:])
	return h, nil
}

// seed starts every frame's checksum, so that a frame of another log, or of
// another segment of this one, is never taken for one of this segment's: not a
// stale one in reused space, and not a record whose value imitates a frame,
// since no client knows the log's id.
func (h *segmentHeader) seed() uint32 {
	var b [24]byte
	copy(b[:], h.id[:])
	binary.LittleEndian.PutUint64(b[16:], h.firstIndex)
	return crc32.Checksum(b[:], castagnoli)
}

func (h *segmentHeader) start() tail {
	return tail{
		index:  h.firstIndex - 1,
		term:   h.prevTerm,
		crc:    h.prevCRC,
		offset: h.firstOffset,
		time:   h.prevTime,
		pos:    segmentHeaderSize,
	}
}

// header makes the header of a segment that continues t.
func (t *tail) header(id logID) segmentHeader {
	return segmentHeader{
		id:          id,
		firstIndex:  t.index + 1,
		firstOffset: t.offset,
		prevTerm:    t.term,
		prevCRC:     t.crc,
		prevTime:    t.time,
	}
}

func segmentName(firstIndex uint64) string {
	return fmt.Sprintf("%0*d%s", nameDigits, firstIndex, segmentSuffix)
}

// parseSegmentName returns false for names that segmentName does not make.
func parseSegmentName(name string) (firstIndex uint64, ok bool) {
	digits, ok := strings.CutSuffix(name, segmentSuffix)
	if !ok || len(digits) != nameDigits {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, err == nil && n > 0 && segmentName(n) == name
}

// segment is one segment file of a log. Its fields do not change after it is
// published in a state, except through its handle.
type segment struct {
	segmentHeader
	file string // path of the .log
	idx  string // path of the .idx
	seed uint32

	// Of sealed segments only; the active one's are in state.
	last     uint64 // index of the last entry
	lastCRC  uint32
	nextOff  uint64
	lastTime int64
	size     int64 // of the file, in bytes

	handle handle
}

func newSegment(dir string, h segmentHeader) *segment {
	name := segmentName(h.firstIndex)
	return &segment{
		segmentHeader: h,
		file:          filepath.Join(dir, name),
		idx:           filepath.Join(dir, strings.TrimSuffix(name, segmentSuffix)+indexSuffix),
		seed:          h.seed(),
	}
}

func (s *segment) count() int { return int(s.last - s.firstIndex + 1) }

// seal gives a segment what is known once no frame can follow t.
func (s *segment) seal(t *tail, size int64) {
	s.last, s.lastCRC, s.nextOff, s.lastTime, s.size = t.index, t.crc, t.offset, t.time, size
}

func (s *segment) corrupt(pos int64, format string, args ...any) error {
	return &CorruptError{File: s.file, Position: pos, Detail: fmt.Sprintf(format, args...)}
}

// readSegmentHeader reads and checks the header of a segment file whose name
// says that it starts at firstIndex.
func readSegmentHeader(f vfs.File, file string, firstIndex uint64) (segmentHeader, error) {
	b := make([]byte, segmentHeaderSize)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return segmentHeader{}, err
	}
	h, err := parseSegmentHeader(file, b[:n])
	if err != nil {
		return h, err
	}
	if h.firstIndex != firstIndex {
		return h, &CorruptError{file, 32, fmt.Sprintf("the header says that the segment starts at index %d, the name says %d", h.firstIndex, firstIndex)}
	}
	return h, nil
}
