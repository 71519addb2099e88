package logstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// surroundings are what the files beside a segment say about where it ends.
type surroundings struct {
	checkpoint    checkpoint
	hasCheckpoint bool
	// next is the header of the segment that follows this one.
	next    segmentHeader
	hasNext bool
}

func (a *surroundings) sealed(s *segment) bool {
	return a.hasNext || a.hasCheckpoint && a.checkpoint.segment > s.firstIndex
}

// lookAround reads the checkpoint and finds the next segment. Files of other
// logs are as good as none.
func (i *inspection) lookAround() (a surroundings, err error) {
	dir := filepath.Dir(i.r.File)
	c, err := readCheckpoint(i.fs, dir)
	var bad *CorruptError
	var version *VersionError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		i.r.Checkpoint, i.r.CheckpointDetail = Missing, ""
	case errors.As(err, &bad), errors.As(err, &version):
		i.r.Checkpoint, i.r.CheckpointDetail = Wrong, err.Error()
	case err != nil:
		return a, err
	case c.id != i.s.id:
		i.r.Checkpoint, i.r.CheckpointDetail = Wrong, "it belongs to another log"
	default:
		i.r.Checkpoint, i.r.CheckpointDetail = OK, ""
		a.checkpoint, a.hasCheckpoint = c, true
	}

	names, err := i.fs.List(dir)
	if err != nil {
		return a, err
	}
	for _, name := range names { // sorted, and so are their numbers
		first, ok := parseSegmentName(name)
		if !ok || first <= i.s.firstIndex {
			continue
		}
		if a.hasCheckpoint && c.cut && first > c.segment {
			break // left over from a truncation
		}
		h, ok, err := i.neighbour(filepath.Join(dir, name), first)
		if err != nil {
			return a, err
		}
		if ok {
			a.next, a.hasNext = h, true
			break
		}
	}
	return a, nil
}

// neighbour reads the header of another segment. One that is gone, damaged or
// of another log says nothing about this one.
func (i *inspection) neighbour(file string, first uint64) (h segmentHeader, ok bool, err error) {
	f, err := i.fs.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return h, false, nil
	} else if err != nil {
		return h, false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h, err = readSegmentHeader(f, file, first)
	var bad *CorruptError
	var version *VersionError
	if errors.As(err, &bad) || errors.As(err, &version) {
		return h, false, nil
	}
	return h, err == nil && h.id == i.s.id, err
}

// indexCheck compares an index file with the frames, one by one.
type indexCheck struct {
	b       []byte // nil: there is no file
	detail  string // what is wrong with it
	count   int    // entries it claims to have
	seen    int
	crc     uint32 // of frame number count
	end     int64  // where that ends
	differs int    // number of the first entry that is not its frame's, from 1
}

// load reads the index of a segment file of size bytes.
func (x *indexCheck) load(fsys vfs.FS, s *segment, size int64) (err error) {
	f, err := fsys.Open(s.idx)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	n, err := f.Size()
	if err != nil {
		return err
	}
	x.b = []byte{}
	// Bounded, since anything may lie there under that name; but the segment may
	// have lost its end.
	most := indexHeaderSize + max(size, DefaultSegmentSize)/HeaderSize*indexEntrySize
	if n < indexHeaderSize || n > most || (n-indexHeaderSize)%indexEntrySize != 0 {
		x.detail = fmt.Sprintf("it has %d bytes, which no index of this segment can have", n)
		return nil
	}
	x.b = make([]byte, n)
	if _, err := f.ReadAt(x.b, 0); err != nil {
		return err
	}
	x.count = int(n-indexHeaderSize) / indexEntrySize
	x.crc, x.end = s.prevCRC, segmentHeaderSize
	return nil
}

func (x *indexCheck) add(e indexEntry, crc uint32, end int64) {
	x.seen++
	if x.seen > x.count {
		return
	}
	if x.differs == 0 && parseIndexEntry(x.b[indexHeaderSize+(x.seen-1)*indexEntrySize:]) != e {
		x.differs = x.seen
	}
	x.crc, x.end = crc, end
}

// replaced tells whether the index is not any more what load found: then the
// log was truncated, and what differs may be the frames.
func (x *indexCheck) replaced(fsys vfs.FS, s *segment, size int64) (bool, error) {
	var now indexCheck
	err := now.load(fsys, s, size)
	return now.detail != x.detail || !bytes.Equal(now.b, x.b), err
}

func (x *indexCheck) result(s *segment, r *Report) (Beside, string) {
	switch {
	case x.b == nil:
		return Missing, ""
	case x.detail != "":
		return Wrong, x.detail
	case x.count > x.seen && r.Ending == EndDamaged && x.differs == 0:
		// It was made when more of the segment could be read.
		if _, err := parseIndex(x.b, &s.segmentHeader, x.count, binary.LittleEndian.Uint32(x.b[56:])); err != nil {
			return Wrong, err.Error()
		}
		return OK, fmt.Sprintf("compared up to the damage: %d of %d entries", x.seen, x.count)
	case x.count > x.seen:
		return Wrong, fmt.Sprintf("it has %d entries, the segment %d", x.count, x.seen)
	}
	parsed, err := parseIndex(x.b, &s.segmentHeader, x.count, x.crc)
	switch {
	case err != nil:
		return Wrong, err.Error()
	case x.differs > 0:
		return Wrong, fmt.Sprintf("its entry of index %d is not what the segment has", s.firstIndex+uint64(x.differs-1))
	case parsed.end != x.end:
		return Wrong, fmt.Sprintf("it says that the last frame ends at byte %d, it ends at %d", parsed.end, x.end)
	case x.count < x.seen && r.Sealed:
		return Wrong, fmt.Sprintf("it has %d entries, the segment %d", x.count, x.seen)
	case x.count < x.seen:
		return Stale, fmt.Sprintf("it has %d entries, the segment %d by now", x.count, x.seen)
	}
	return OK, ""
}
