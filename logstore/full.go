package logstore

import (
	"errors"
	"fmt"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// A full disk must not end writing for good, and must not leave half of an
// Append behind. So an Append first gets the space for all of its entries, and
// only then writes the first of them: files are preallocated, and where that
// reserves space (as on any usual filesystem) no later write can run out of it.

// full makes an ErrFull of an error that says that the disk is full.
func full(err error) error {
	if err == nil || errors.Is(err, ErrFull) || !vfs.IsFull(err) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrFull, err)
}

// layout lays entries out: where the active segment ends with them, and where
// each of the segments does that have to follow it.
func (l *Log) layout(entries []Entry, st *state) (end int64, more []int64) {
	pos, first, offset := st.tail.pos, st.last().firstOffset, st.tail.offset
	ends := &end
	for i := range entries {
		e := &entries[i]
		size := frameSize(len(e.Payload))
		if l.rolls(pos, size, first, offset, e.Count) {
			*ends = pos
			more = append(more, 0)
			ends = &more[len(more)-1]
			pos, first = segmentHeaderSize, offset
		}
		pos += size
		offset += uint64(e.Count)
	}
	*ends = pos
	return end, more
}

// rolls tells whether a segment that begins with an offset and ends at pos,
// with the next offset, has no place for a frame and its records. One that is
// empty has for any.
func (l *Log) rolls(pos, size int64, first, offset uint64, count uint32) bool {
	return pos > segmentHeaderSize &&
		(pos+size > l.opts.SegmentSize || offset+uint64(count)-first > maxSegmentRecords)
}

// reserve gets the space for what layout returned, all of it or none.
func (l *Log) reserve(end int64, more []int64) ([]prepared, error) {
	if end > l.space {
		if err := l.growActive(end); err != nil {
			return nil, fmt.Errorf("preallocate %s: %w", l.state.Load().last().file, err)
		}
	}
	if len(more) == 0 {
		return nil, nil
	}
	next, err := l.keeper.takeNext(more)
	if err != nil {
		return nil, fmt.Errorf("prepare segment: %w", err)
	}
	return next, nil
}

// growActive reserves the active segment's space: that of a whole segment, or
// else what is needed now.
func (l *Log) growActive(end int64) error {
	size := max(end, l.opts.SegmentSize)
	err := l.active.Preallocate(size)
	if vfs.IsFull(err) {
		size = end
		err = l.active.Preallocate(size)
	}
	if err == nil {
		l.space = size
	}
	return err
}

// preallocateIfRoom reserves a segment's space if there is any, and returns what
// the file then has.
func preallocateIfRoom(f vfs.File, size int64) (int64, error) {
	if err := f.Preallocate(size); err != nil && !vfs.IsFull(err) {
		return 0, err
	}
	return f.Size()
}
