package logstore

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// TruncateSuffix deletes the entries from index on, durably, so that the next
// append continues from there. Raft asks for it when entries that were never
// committed conflict with the leader's. An index behind the last entry is no
// error and does nothing; one before the first is ErrRejected.
//
// A crash on the way leaves a log that ends at the old or at the new end.
func (l *Log) TruncateSuffix(from uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.writable(); err != nil {
		return err
	}
	st := l.state.Load()
	if from > st.tail.index {
		return nil
	}
	if from < st.segs[0].firstIndex {
		return fmt.Errorf("%w: cannot cut from index %d, the log starts at %d", ErrRejected, from, st.segs[0].firstIndex)
	}
	l.keeper.mu.Lock()
	defer l.keeper.mu.Unlock()

	k := st.segmentOf(from)
	cut := st.segs[k]
	var t tail
	var kept []indexEntry
	if err := l.withIndex(st, k, func(o *openSegment, x *frameIndex) (err error) {
		t, kept, err = endBefore(o, x, cut, from)
		return err
	}); err != nil {
		return err // nothing was changed
	}

	file, err := l.fs.OpenReadWrite(cut.file)
	if err != nil {
		return err
	}
	dropped := slices.Clone(st.segs[k+1:])
	// A segment that is to be written again is a new one to readers: those that
	// hold the old one see what it was, or retry.
	again := newSegment(l.dir, cut.segmentHeader)
	segs := append(st.segs[:k:k], again)
	next := &state{segs: segs, active: frameIndex{mem: kept, end: t.pos}, tail: t, cuts: st.cuts + 1}
	publish := func() {
		l.handles.pin(again, file)
		l.state.Store(next)
		l.active, l.space = file, t.pos
	}
	replace := !l.exports.unlessHeld(from, publish)
	if replace {
		// An export goes on reading the file as it is.
		old := file
		file, err = l.copyStart(old, t.pos)
		if err := errors.Join(err, old.Close()); err != nil {
			return full(err) // nothing was changed
		}
		publish()
	}
	l.keeper.forget(func(s *segment) bool { return s.last >= from })

	if err := l.cutFiles(next, cut, dropped, replace); err != nil {
		return l.fail(fmt.Errorf("truncate at index %d: %w", from, err))
	}
	return nil
}

// cutName is the file that takes the place of a segment which is cut but must
// not be changed.
const cutName = "cut" + tempSuffix

// copyStart makes a durable copy of the first size bytes of a segment.
func (l *Log) copyStart(from vfs.File, size int64) (vfs.File, error) {
	name := filepath.Join(l.dir, cutName)
	f, err := vfs.CreateOver(l.fs, name)
	if err != nil {
		return nil, err
	}
	if err := copyTo(f, from, size, l.opts.SegmentSize); err != nil {
		return nil, errors.Join(err, f.Close(), l.fs.Remove(name))
	}
	return f, nil
}

func copyTo(f, from vfs.File, size, space int64) error {
	if err := f.Preallocate(max(size, space)); err != nil {
		return err
	}
	buf := make([]byte, min(size, scanBuffer))
	for pos := int64(0); pos < size; {
		b := buf[:min(int64(len(buf)), size-pos)]
		if _, err := from.ReadAt(b, pos); err != nil {
			return err
		}
		if _, err := f.WriteAt(b, pos); err != nil {
			return err
		}
		pos += int64(len(b))
	}
	return f.Sync()
}

// cutFiles brings the files to where next says the log ends. replace: the
// segment's new file is prepared. Called with the keeper's mu held.
func (l *Log) cutFiles(next *state, cut *segment, dropped []*segment, replace bool) error {
	// First, or a crash behind one of the next steps would look like damage.
	c := next.checkpoint(l.id)
	c.cut = true
	if err := l.keeper.write(c); err != nil {
		return err
	}
	// Newest first and one by one, so that a crash leaves no hole.
	for _, s := range slices.Backward(dropped) {
		if err := vfs.RemoveIfThere(l.fs, s.file); err != nil {
			return err
		}
		if err := l.fs.SyncDir(l.dir); err != nil {
			return err
		}
		if err := vfs.RemoveIfThere(l.fs, s.idx); err != nil {
			return err
		}
		l.handles.doom(s)
	}
	if err := vfs.RemoveIfThere(l.fs, cut.idx); err != nil {
		return err
	}
	if err := l.cutActive(next, cut, replace); err != nil {
		return err
	}
	l.handles.doom(cut)
	// Last, before anything is appended that must not be removed.
	return l.keeper.record(next, false)
}

func (l *Log) cutActive(next *state, cut *segment, replace bool) error {
	if replace {
		if err := l.fs.Rename(filepath.Join(l.dir, cutName), cut.file); err != nil {
			return err
		}
		if err := l.fs.SyncDir(l.dir); err != nil {
			return err
		}
		return l.measureActive(next)
	}
	if err := l.active.Truncate(next.tail.pos); err != nil {
		return err
	}
	// Before anything is written behind the cut: zeros must be what a crash
	// leaves there, not frames of the history that was cut off.
	if err := l.active.Sync(); err != nil {
		return err
	}
	return l.measureActive(next)
}

// measureActive gives the active segment its space, if there is any.
func (l *Log) measureActive(st *state) (err error) {
	if l.space, err = preallocateIfRoom(l.active, l.opts.SegmentSize); err != nil {
		return err
	}
	sized := *st
	sized.size = l.space
	l.state.Store(&sized)
	return nil
}

// endBefore returns the end of a segment as it was before the entry at index
// from was appended.
func endBefore(o *openSegment, x *frameIndex, s *segment, from uint64) (tail, []indexEntry, error) {
	n := int(from - s.firstIndex)
	if err := x.covers(n, o); err != nil {
		return tail{}, nil, err
	}
	t, err := tailBefore(o, x, s, from)
	if err != nil || n == 0 {
		return t, nil, err
	}
	kept := make([]indexEntry, n)
	for i := range kept {
		kept[i] = x.at(i)
	}
	return t, kept, nil
}

// tailBefore returns the end of a segment as it was before an entry was
// appended to it: the one at index from, which may be the next to come.
func tailBefore(o *openSegment, x *frameIndex, s *segment, from uint64) (tail, error) {
	t := s.start()
	n := int(from - s.firstIndex)
	if n == 0 {
		t.synced = t.index
		return t, nil
	}
	if err := x.covers(n-1, o); err != nil {
		return t, err
	}
	at, to := x.span(n - 1)
	frame := make([]byte, to-at)
	if err := readAt(o, s, frame, at); err != nil {
		return t, err
	}
	h, err := checkFrame(s, frame, at, from-1, x.at(n-1))
	if err != nil {
		return t, err
	}
	return tail{
		index:  h.index,
		term:   h.term,
		crc:    h.crc,
		offset: h.base + uint64(h.count),
		time:   h.time,
		synced: h.index,
		pos:    to,
	}, nil
}

// DeletePrefix deletes whole segments all of whose entries are below index,
// and returns the log's first index afterwards. The active segment always
// stays. Readers of a deleted segment finish what they have begun.
func (l *Log) DeletePrefix(below uint64) (first uint64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	st := l.state.Load()
	if err := l.writable(); err != nil {
		return st.segs[0].firstIndex, err
	}
	n := 0
	for n < len(st.segs)-1 && st.segs[n].last < below {
		n++
	}
	if n == 0 {
		return st.segs[0].firstIndex, nil
	}
	l.keeper.mu.Lock()
	defer l.keeper.mu.Unlock()
	dropped := st.segs[:n]
	next := &state{segs: slices.Clone(st.segs[n:]), active: st.active, tail: st.tail, size: st.size, cuts: st.cuts + 1}
	first = next.segs[0].firstIndex
	l.state.Store(next)
	l.keeper.forget(func(s *segment) bool { return s.firstIndex < first })

	// The new start first: from then on, files below it are leftovers, whatever
	// a crash makes of their removal.
	if err := l.keeper.record(next, false); err != nil {
		return first, l.fail(fmt.Errorf("delete below index %d: %w", below, err))
	}
	for _, s := range dropped {
		l.handles.doom(s)
		if err := errors.Join(vfs.RemoveIfThere(l.fs, s.file), vfs.RemoveIfThere(l.fs, s.idx)); err != nil {
			return first, l.fail(fmt.Errorf("delete below index %d: %w", below, err))
		}
	}
	return first, nil
}
