package vfstest

import (
	"fmt"
	"io"
	"io/fs"
	"slices"

	"github.com/diurnalog/diurna/logstore/vfs"
)

type file struct {
	m      *Mem
	n      *node
	name   string
	write  bool
	closed bool
}

func (f *file) check(op string, needWrite bool) error {
	switch {
	case f.closed:
		return &fs.PathError{Op: op, Path: f.name, Err: fs.ErrClosed}
	case needWrite && !f.write:
		return &fs.PathError{Op: op, Path: f.name, Err: fs.ErrPermission}
	}
	return nil
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.check("read", false); err != nil {
		return 0, err
	}
	if off >= int64(len(f.n.data)) {
		return 0, io.EOF
	}
	n := copy(p, f.n.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	if err := f.m.before("write", f.name); err != nil {
		return 0, err
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.check("write", true); err != nil {
		return 0, err
	}
	end := off + int64(len(p))
	full := false
	if got := f.m.take(f.n, end); got < end {
		full = true
		p = p[:max(got-off, 0)]
		end = off + int64(len(p))
	}
	if len(p) > 0 {
		f.n.resize(max(end, int64(len(f.n.data))))
		copy(f.n.data[off:], p)
		f.n.touch(off, end)
	}
	if full {
		return len(p), noSpace("write", f.name)
	}
	return len(p), nil
}

func (f *file) Size() (int64, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return int64(len(f.n.data)), f.check("stat", false)
}

func (f *file) Sync() error {
	err := f.m.before("sync", f.name)
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err != nil {
		// As Linux does it: what could not be written counts as written from
		// now on, though only memory has it, and the next sync succeeds.
		clear(f.n.dirty)
		return err
	}
	if err := f.check("sync", false); err != nil {
		return err
	}
	n := f.n
	size := len(n.data)
	if len(n.synced) > size {
		n.synced = n.synced[:size]
	}
	n.synced = slices.Grow(n.synced, size-len(n.synced))
	was := len(n.synced)
	n.synced = n.synced[:size]
	clear(n.synced[was:])
	for s := range n.dirty {
		if from, to := s*sector, min((s+1)*sector, int64(size)); from < to {
			copy(n.synced[from:to], n.data[from:to])
		}
	}
	clear(n.dirty)
	return nil
}

func (f *file) Truncate(size int64) error {
	if err := f.m.before("truncate", f.name); err != nil {
		return err
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.check("truncate", true); err != nil {
		return err
	}
	f.n.resize(size)
	f.n.space = min(f.n.space, size)
	return nil
}

func (f *file) Preallocate(size int64) error {
	if err := f.m.before("preallocate", f.name); err != nil {
		return err
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.check("preallocate", true); err != nil {
		return err
	}
	got := f.m.take(f.n, size)
	f.n.resize(max(min(got, size), int64(len(f.n.data))))
	if got < size {
		return noSpace("preallocate", f.name)
	}
	return nil
}

func (f *file) Map(size int64) (vfs.Mapping, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.check("mmap", false); err != nil {
		return nil, err
	}
	if size <= 0 || size > int64(len(f.n.data)) {
		return nil, &fs.PathError{Op: "mmap", Path: f.name, Err: fmt.Errorf("cannot map %d of %d bytes", size, len(f.n.data))}
	}
	return mapping(slices.Clone(f.n.data[:size])), nil
}

func (f *file) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return &fs.PathError{Op: "close", Path: f.name, Err: fs.ErrClosed}
	}
	f.closed = true
	f.n.opens--
	if f.n.opens == 0 {
		delete(f.m.removed, f.n)
	}
	return nil
}

type mapping []byte

func (m mapping) Bytes() []byte { return m }
func (m mapping) Close() error  { return nil }

func (n *node) touch(from, to int64) {
	for s := from / sector; s*sector < to; s++ {
		n.dirty[s] = true
	}
}

// resize marks what it cuts off, so that growing again over it is seen as a
// change to zeros.
func (n *node) resize(size int64) {
	old := int64(len(n.data))
	switch {
	case size < old:
		n.touch(size, max(old, int64(len(n.synced))))
		n.data = n.data[:size]
	case size > old:
		n.data = slices.Grow(n.data, int(size-old))[:size]
		clear(n.data[old:])
		if int64(len(n.synced)) > old {
			n.touch(old, int64(len(n.synced)))
		}
	}
}
