package logstore

import (
	"container/list"
	"errors"
	"fmt"
	"io/fs"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// handle is the open file and index of one segment. Its fields are guarded by
// handles.mu; what it points to may be used by whoever holds a reference.
type handle struct {
	open *openSegment
	refs int
	// pinned handles (the active segment's) stay open without references.
	pinned bool
	// doomed handles (of deleted segments) close with the last reference.
	doomed bool
	lru    *list.Element // in handles.idle, while open and neither used nor pinned
}

// openSegment is what a reference gives access to.
type openSegment struct {
	file vfs.File
	// index is nil for the active segment, whose index is in state.
	index *frameIndex
	// damage is why the index ends early: bytes of the segment that could not
	// be read when the index was rebuilt from it.
	damage  error
	mapping vfs.Mapping
}

func (o *openSegment) close() error {
	if o == nil {
		return nil
	}
	var err error
	if o.mapping != nil {
		err = o.mapping.Close()
	}
	return errors.Join(err, o.file.Close())
}

// handles keeps a bounded number of sealed segments open. References are held
// for the time of one read, so that the bound is exceeded by no more than the
// number of concurrent reads.
type handles struct {
	fs  vfs.FS
	max int

	mu     vfs.Mutex
	opened int
	idle   list.List // of *segment, least recently used first
	closed bool
}

// acquire opens the segment if it is not and takes a reference on it. The
// caller gives it back with release.
func (hs *handles) acquire(s *segment) (*openSegment, error) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	h := &s.handle
	if hs.closed {
		return nil, ErrClosed
	}
	if h.open == nil && h.doomed {
		return nil, ErrNotFound // the caller's state is old; it will try again
	}
	if h.open == nil {
		// Under the lock: opening is rare and quick (an index of a few pages is
		// checked), and two readers must not do it twice. Rebuilding an index
		// takes longer, and happens once after damage.
		o, err := hs.openSealed(s)
		if err != nil {
			return nil, err
		}
		h.open = o
		hs.opened++
	}
	if h.lru != nil {
		hs.idle.Remove(h.lru)
		h.lru = nil
	}
	h.refs++
	return h.open, nil
}

// release gives a reference back. The error of closing a file that was only
// read says nothing about any data and is dropped.
func (hs *handles) release(s *segment) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	h := &s.handle
	h.refs--
	hs.settle(s)
	for hs.opened > hs.max && hs.idle.Len() > 0 {
		old := hs.idle.Front().Value.(*segment)
		_ = hs.shut(old)
	}
}

// settle files an unused handle where it belongs. Called with mu held.
func (hs *handles) settle(s *segment) {
	h := &s.handle
	switch {
	case h.refs > 0 || h.pinned || h.open == nil:
	case h.doomed || hs.closed:
		_ = hs.shut(s)
	case h.lru == nil:
		h.lru = hs.idle.PushBack(s)
	}
}

func (hs *handles) shut(s *segment) error {
	h := &s.handle
	if h.lru != nil {
		hs.idle.Remove(h.lru)
		h.lru = nil
	}
	err := h.open.close()
	h.open = nil
	hs.opened--
	return err
}

// pin installs the open file of the active segment.
func (hs *handles) pin(s *segment, f vfs.File) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	s.handle = handle{open: &openSegment{file: f}, pinned: true}
	hs.opened++
}

// unpin lets a segment that is no longer active become an ordinary one. Its
// index stays in memory until the handle is closed for want of use.
func (hs *handles) unpin(s *segment, x *frameIndex) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	h := &s.handle
	// A fresh openSegment: readers of the old state hold the old one, without
	// an index, and must go on seeing it so.
	h.open = &openSegment{file: h.open.file, index: x}
	h.pinned = false
	hs.settle(s)
}

// doom closes a deleted segment's handle once nobody uses it.
func (hs *handles) doom(s *segment) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	s.handle.doomed = true
	s.handle.pinned = false
	hs.settle(s)
}

// close closes what is not in use; the rest follows with its last reference.
func (hs *handles) close(segs []*segment) error {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	hs.closed = true
	var err error
	for _, s := range segs {
		s.handle.pinned = false
		if s.handle.open != nil && s.handle.refs == 0 {
			err = errors.Join(err, hs.shut(s))
		}
	}
	return err
}

// openSealed opens a sealed segment with its index, rebuilding that in memory
// when its file is missing or not this segment's.
func (hs *handles) openSealed(s *segment) (o *openSegment, err error) {
	f, err := hs.fs.Open(s.file)
	if errors.Is(err, fs.ErrNotExist) {
		// Or deleted meanwhile: then the caller finds its state to be old.
		return nil, s.corrupt(0, "the file is missing")
	}
	if err != nil {
		return nil, err
	}
	o = &openSegment{file: f}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.close())
		}
	}()
	if err := hs.mapIndex(s, o); err == nil {
		return o, nil
	}
	if o.index, o.damage, err = rebuildIndex(f, s); err != nil || o.damage != nil {
		return o, err
	}
	// Best effort: without the file the next opening rebuilds again.
	if err := writeIndex(hs.fs, s, s.lastCRC, o.index); err == nil {
		_ = hs.mapIndex(s, o)
	}
	return o, nil
}

// useIndexFile maps the index that a segment has had in memory since it was
// active, now that there is a file: what many sealed segments' indexes take is
// then the page cache's and not the heap's.
func (hs *handles) useIndexFile(s *segment) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	h := &s.handle
	if h.open == nil || h.pinned || h.open.mapping != nil {
		return
	}
	// A fresh one, as in unpin: readers hold the other and its index.
	o := &openSegment{file: h.open.file}
	if err := hs.mapIndex(s, o); err == nil {
		h.open = o
	}
}

// writeIndex makes the index file of a segment whose last frame is known.
func writeIndex(fs vfs.FS, s *segment, lastCRC uint32, x *frameIndex) error {
	return vfs.WriteFile(fs, s.idx, encodeIndex(&s.segmentHeader, lastCRC, x))
}

func (hs *handles) mapIndex(s *segment, o *openSegment) (err error) {
	f, err := hs.fs.Open(s.idx)
	if err != nil {
		return err
	}
	// The mapping outlives the descriptor.
	defer func() { err = errors.Join(err, f.Close()) }()
	size := int64(indexHeaderSize + s.count()*indexEntrySize)
	if have, err := f.Size(); err != nil || have != size {
		return errors.Join(err, fmt.Errorf("index has %d bytes, not %d", have, size))
	}
	m, err := f.Map(size)
	if err != nil {
		return err
	}
	x, err := parseIndex(m.Bytes(), &s.segmentHeader, s.count(), s.lastCRC)
	if err != nil {
		return errors.Join(err, m.Close())
	}
	o.mapping, o.index = m, x
	return nil
}

// rebuildIndex reads a whole sealed segment. What it cannot read is not an
// error of its own: it ends the index, so that the entries before stay
// readable, and is returned as damage.
func rebuildIndex(f vfs.File, s *segment) (x *frameIndex, damage, err error) {
	sc, err := newScanner(f, s)
	if err != nil {
		return nil, nil, err
	}
	x = &frameIndex{}
	for sc.tail.index < s.last {
		if err := sc.next(); err != nil {
			var bad *CorruptError
			if !errors.As(err, &bad) {
				return nil, nil, err
			}
			damage = err
			break
		}
		x.mem = append(x.mem, sc.entry)
	}
	x.end = sc.tail.pos
	if damage == nil && sc.tail.crc != s.lastCRC {
		damage = s.corrupt(x.end, "the last frame has checksum %08x, the next segment follows %08x", sc.tail.crc, s.lastCRC)
	}
	return x, damage, nil
}
