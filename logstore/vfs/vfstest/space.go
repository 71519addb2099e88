package vfstest

import (
	"io/fs"
	"path"
	"syscall"
)

// plenty is what Free tells of a filesystem without a limit.
const plenty = 1 << 40

// SetCapacity limits how many bytes all files together may take; a negative
// number is no limit. It may be less than they take already: then nothing new
// finds space.
func (m *Mem) SetCapacity(bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.capacity = bytes
}

// Used returns how many bytes all files take.
func (m *Mem) Used() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.used()
}

// Free implements vfs.FS.
func (m *Mem) Free(dir string) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.dirs[path.Clean(dir)] {
		return 0, notExist("statfs", dir)
	}
	return uint64(max(m.free(), 0)), nil
}

// used is called with mu held, as are all below.
func (m *Mem) used() int64 {
	var sum int64
	for _, n := range m.live {
		sum += n.space
	}
	for n := range m.removed {
		sum += n.space
	}
	return sum
}

func (m *Mem) free() int64 {
	if m.capacity < 0 {
		return plenty
	}
	return m.capacity - m.used()
}

// take gives a file space up to a size, or up to as much as there is, and
// returns up to where it has space.
func (m *Mem) take(n *node, size int64) int64 {
	if size > n.space {
		n.space += max(0, min(size-n.space, m.free()))
	}
	return n.space
}

// drop takes a name away from the file that has it.
func (m *Mem) drop(name string) {
	if n := m.live[name]; n != nil && n.opens > 0 {
		m.removed[n] = true
	}
	delete(m.live, name)
}

func noSpace(op, name string) error {
	return &fs.PathError{Op: op, Path: name, Err: syscall.ENOSPC}
}
