package logstore

import (
	"context"
	"errors"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// Verify reads the log from the disk, from the segment that holds the entry at
// index from to what is the last durable entry when it begins, or some way
// beyond, and checks every frame against its checksums and against the frame
// before. It comes to an end while others append. An index below the log's
// first one means that, one above the last one nothing.
//
// It returns the index to go on from: that of the entry behind the last one
// that is known to be good. An error ends it: a *CorruptError for damage (from
// then on next is the damaged entry), the context's or pace's, one from the
// disk, ErrClosed.
//
// pace is called before each read with its size in bytes, and sets the rate by
// taking its time; an error from it ends the run. nil does not limit it. Reads
// are of at most 1 MiB, or an entry's size.
//
// What the kernel has in its memory is checked there, as readers would get it.
// Appends, truncations and deletions go on meanwhile. Indexes are derived, and
// not checked. Several may run at once.
func (l *Log) Verify(ctx context.Context, from uint64, pace func(bytes int) error) (next uint64, err error) {
	next = from
	last := l.state.Load().tail.index
	for {
		if err := ctx.Err(); err != nil {
			return next, err
		}
		st := l.state.Load()
		next = max(next, st.segs[0].firstIndex)
		if next > min(last, st.tail.index) {
			return next, nil
		}
		good, err := l.verifySegment(ctx, st, st.segmentOf(next), pace)
		if err != nil && (errors.Is(err, ErrClosed) || l.state.Load().cuts == st.cuts) {
			return max(next, good), err
		}
		if err == nil {
			next = max(next, good)
		} // else it stumbled over a truncation or deletion: look again
	}
}

// verifySegment checks the k-th segment of st and returns the index behind the
// last good entry.
func (l *Log) verifySegment(ctx context.Context, st *state, k int, pace func(int) error) (next uint64, err error) {
	s := st.segs[k]
	end := st.tail
	if k < len(st.segs)-1 {
		after := st.segs[k+1].start()
		end.index, end.crc = after.index, after.crc
	}
	err = l.withIndex(st, k, func(o *openSegment, _ *frameIndex) error {
		f := pacedFile{File: o.file, ctx: ctx, pace: pace}
		h, err := readSegmentHeader(f, s.file, s.firstIndex)
		if err != nil {
			return err
		}
		if h != s.segmentHeader {
			return s.corrupt(0, "the header is not the one that the log was opened with")
		}
		sc, err := newScanner(f, s)
		if err != nil {
			return err
		}
		next = s.firstIndex
		for sc.tail.index < end.index {
			if err := sc.next(); err != nil {
				return err
			}
			next = sc.tail.index + 1
		}
		if sc.tail.crc != end.crc {
			next-- // whichever of the two is wrong
			return s.corrupt(sc.tail.pos, "the last frame has checksum %08x, what follows it goes on from %08x", sc.tail.crc, end.crc)
		}
		return nil
	})
	return next, err
}

// pacedFile asks before it reads.
type pacedFile struct {
	vfs.File
	ctx  context.Context
	pace func(bytes int) error
}

func (f pacedFile) ReadAt(b []byte, off int64) (int, error) {
	if err := f.ctx.Err(); err != nil {
		return 0, err
	}
	if f.pace != nil {
		if err := f.pace(len(b)); err != nil {
			return 0, err
		}
	}
	return f.File.ReadAt(b, off)
}
