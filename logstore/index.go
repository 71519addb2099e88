package logstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sort"
)

const (
	indexMagic      = "DIURNIDX"
	indexHeaderSize = 64
	indexEntrySize  = 16

	// maxSegmentRecords keeps relative offsets in 32 bits.
	maxSegmentRecords = 1<<32 - 1
)

// indexEntry finds one frame of a segment. There is one per frame, in order,
// so that the entry of Raft index i is number i - firstIndex.
type indexEntry struct {
	pos    uint32 // of the frame, from the start of the segment file
	offset uint32 // base offset, relative to the segment's first offset
	time   uint64 // append time, relative to the segment's prevTime
}

// frameIndex looks frames up. It is either a slice in memory (the active segment,
// and sealed ones until their file is written) or a mapped file's entries.
type frameIndex struct {
	mem    []indexEntry
	mapped []byte // entries only
	end    int64  // where the last frame ends
}

func (x *frameIndex) len() int {
	if x.mapped != nil {
		return len(x.mapped) / indexEntrySize
	}
	return len(x.mem)
}

func (x *frameIndex) at(i int) indexEntry {
	if x.mapped != nil {
		return parseIndexEntry(x.mapped[i*indexEntrySize:])
	}
	return x.mem[i]
}

// span returns where frame i stands.
func (x *frameIndex) span(i int) (from, to int64) {
	from = int64(x.at(i).pos)
	if i+1 < x.len() {
		return from, int64(x.at(i + 1).pos)
	}
	return from, x.end
}

// byOffset returns the last frame whose base offset is rel or lower; -1 if
// there is none. Frames without records share their base offset with the frame
// with records behind them, so the frame found is the one that holds rel
// whenever a frame of the segment does.
func (x *frameIndex) byOffset(rel uint32) int {
	return sort.Search(x.len(), func(i int) bool { return x.at(i).offset > rel }) - 1
}

// byTime returns the first frame with that append time or a later one; len if
// there is none.
func (x *frameIndex) byTime(rel uint64) int {
	return sort.Search(x.len(), func(i int) bool { return x.at(i).time >= rel })
}

func parseIndexEntry(b []byte) indexEntry {
	le := binary.LittleEndian
	return indexEntry{pos: le.Uint32(b), offset: le.Uint32(b[4:]), time: le.Uint64(b[8:])}
}

// encodeIndex makes the content of an .idx file. lastCRC, the checksum of the
// segment's last frame, binds it to exactly this chain of frames.
func encodeIndex(s *segmentHeader, lastCRC uint32, x *frameIndex) []byte {
	b := make([]byte, indexHeaderSize, indexHeaderSize+x.len()*indexEntrySize)
	le := binary.LittleEndian
	copy(b[preambleSize:], s.id[:])
	le.PutUint64(b[32:], s.firstIndex)
	le.PutUint64(b[40:], uint64(x.len()))
	le.PutUint64(b[48:], uint64(x.end))
	le.PutUint32(b[56:], lastCRC)
	// b[60:64] is reserved and zero.
	for i := range x.len() {
		e := x.at(i)
		b = le.AppendUint32(b, e.pos)
		b = le.AppendUint32(b, e.offset)
		b = le.AppendUint64(b, e.time)
	}
	return sealPreamble(b, indexMagic)
}

// parseIndex checks an .idx file's content against the segment it must
// describe and returns an index over b, which it keeps. Any error means that
// the index has to be rebuilt from the segment.
func parseIndex(b []byte, s *segmentHeader, count int, lastCRC uint32) (*frameIndex, error) {
	if len(b) < indexHeaderSize {
		return nil, fmt.Errorf("%d bytes are too few for an index", len(b))
	}
	if err := checkPreamble("", b, indexMagic, "an index"); err != nil {
		var damage *CorruptError
		if errors.As(err, &damage) {
			err = errors.New(damage.Detail) // it is derived data, so no damage
		}
		return nil, err
	}
	le := binary.LittleEndian
	entries := b[indexHeaderSize:]
	switch {
	case logID(b[16:32]) != s.id:
		return nil, fmt.Errorf("it belongs to another log")
	case le.Uint64(b[32:]) != s.firstIndex:
		return nil, fmt.Errorf("it belongs to another segment")
	case le.Uint64(b[40:]) != uint64(count), len(entries) != count*indexEntrySize:
		return nil, fmt.Errorf("it has %d entries, the segment %d", len(entries)/indexEntrySize, count)
	case le.Uint32(b[56:]) != lastCRC:
		return nil, fmt.Errorf("it describes other frames")
	}
	x := &frameIndex{mapped: entries, end: int64(le.Uint64(b[48:]))}
	if count == 0 {
		x.mapped = nil
	}
	// A good checksum over a wrong index would be a writer's mistake, but what
	// is built on positions that do not rise is a crash.
	pos := int64(segmentHeaderSize)
	for i := range count {
		from, to := x.span(i)
		if from != pos || to < from+HeaderSize || to-from > frameSize(MaxPayload) {
			return nil, fmt.Errorf("entry %d is at %d to %d", i, from, to)
		}
		pos = to
	}
	return x, nil
}

// indexCloses tells from an index file's header alone whether the file was
// written for the whole of a sealed segment.
func indexCloses(header []byte, s *segment) bool {
	le := binary.LittleEndian
	return string(header[:8]) == indexMagic &&
		logID(header[16:32]) == s.id &&
		le.Uint64(header[32:]) == s.firstIndex &&
		le.Uint64(header[40:]) == uint64(s.count()) &&
		le.Uint32(header[56:]) == s.lastCRC
}
