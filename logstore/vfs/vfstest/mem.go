// Package vfstest is an in-memory filesystem for tests that crash, tear, fill
// and fail what runs on it.
//
// It keeps, beside what a running process sees, what a power cut would leave:
// file content as of the last Sync of that file, names as of the last SyncDir
// of that directory. CrashClone makes a second filesystem as it might be found
// after such a cut, with none, all or a random part of what was not synced:
//
//   - a file's unsynced bytes survive by sectors of 512 bytes, in any
//     combination; those of a sector that was being written may be garbage;
//   - its length is the synced one, the latest one, or one in between;
//   - unsynced Create, Rename and Remove survive one by one, each whole.
//
// It may have a capacity, past which writes, preallocations and new names fail
// with ENOSPC, having taken what was left, as on a disk. What has its space,
// written or preallocated, can be rewritten in place; growing with Truncate
// takes none. A file that was removed takes up its space until it is closed.
//
// It assumes what SQLite calls powersafe overwrite: rewriting a byte with the
// same value never damages it.
package vfstest

import (
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/diurnalog/diurna/logstore/vfs"
)

const sector = 512

// Survival says how much of what was not synced outlives a crash.
type Survival int

// The three kinds of crash.
const (
	None Survival = iota
	Some
	All
)

func (s Survival) String() string { return [...]string{"none", "some", "all"}[s] }

// Op is one call that changes the filesystem or makes a change durable.
type Op struct {
	// Kind is create, write, sync, truncate, preallocate, rename, remove or
	// syncdir.
	Kind string
	// Name is the file or directory; for a rename the new name.
	Name string
}

// Mem is the filesystem. Make one with New.
type Mem struct {
	mu      sync.Mutex
	dirs    map[string]bool
	live    map[string]*node
	durable map[string]*node
	pending []nameOp // since the last SyncDir, in order
	locks   map[string]bool
	hook    func(Op) error

	capacity int64          // in bytes; negative: no limit
	removed  map[*node]bool // files without a name that are open
}

type nameOp struct {
	kind     string // create, rename, remove
	old, new string
	node     *node
}

type node struct {
	data   []byte
	synced []byte
	dirty  map[int64]bool // sectors of data that differ from synced
	// space is how much of data, from its start, has its place on the disk.
	space int64
	opens int // open descriptors
}

// New returns an empty filesystem.
func New() *Mem {
	return &Mem{
		dirs:    map[string]bool{".": true, "/": true},
		live:    map[string]*node{},
		durable: map[string]*node{},
		locks:   map[string]bool{},

		capacity: -1,
		removed:  map[*node]bool{},
	}
}

// SetHook installs a function that is called before every Op, without locks
// held; an error from it is returned to the caller and the Op does not happen.
func (m *Mem) SetHook(hook func(Op) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hook = hook
}

func (m *Mem) before(kind, name string) error {
	m.mu.Lock()
	hook := m.hook
	m.mu.Unlock()
	if hook == nil {
		return nil
	}
	if err := hook(Op{kind, name}); err != nil {
		return &fs.PathError{Op: kind, Path: name, Err: err}
	}
	return nil
}

// CrashClone returns the filesystem as a restarted machine might find it.
func (m *Mem) CrashClone(rng *rand.Rand, survive Survival) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := New()
	for d := range m.dirs {
		c.dirs[d] = true
	}
	names := map[string]*node{}
	for name, n := range m.durable {
		names[name] = n
	}
	for _, op := range m.pending {
		if survive == None || survive == Some && rng.IntN(2) == 0 {
			continue
		}
		switch op.kind {
		case "create":
			names[op.new] = op.node
		case "remove":
			delete(names, op.old)
		case "rename":
			// It moves this very file, not whatever else has the old name.
			if names[op.old] == op.node {
				delete(names, op.old)
			}
			names[op.new] = op.node
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		data := names[name].crash(rng, survive)
		n := &node{data: data, synced: slices.Clone(data), dirty: map[int64]bool{}, space: int64(len(data))}
		c.live[name] = n
		c.durable[name] = n
	}
	return c
}

func (n *node) crash(rng *rand.Rand, survive Survival) []byte {
	switch survive {
	case None:
		return slices.Clone(n.synced)
	case All:
		return slices.Clone(n.data)
	}
	size := int64(len(n.data))
	if was := int64(len(n.synced)); was != size {
		switch rng.IntN(3) {
		case 0:
			size = was
		case 1:
			size = min(was, size) + rng.Int64N(max(was, size)-min(was, size)+1)
		}
	}
	out := make([]byte, size)
	copy(out, n.synced)
	for _, s := range slices.Sorted(maps.Keys(n.dirty)) {
		from, to := s*sector, min((s+1)*sector, size)
		if from >= to {
			continue
		}
		switch {
		case rng.IntN(2) == 0:
			// The new sector, as far as it goes: zeros where data is shorter.
			clear(out[from:to])
			if from < int64(len(n.data)) {
				copy(out[from:to], n.data[from:])
			}
		case rng.IntN(8) == 0:
			// A byte that was being changed may be anything.
			for i := from; i < min(to, int64(len(n.data))); i++ {
				if n.data[i] != out[i] {
					out[i] = byte(rng.Uint32())
				}
			}
		}
	}
	return out
}

// Names returns all file names, sorted.
func (m *Mem) Names() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.live))
}

// ReadFile returns a copy of a file's content as a process sees it.
func (m *Mem) ReadFile(name string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.live[path.Clean(name)]
	if n == nil {
		return nil, notExist("read", name)
	}
	return slices.Clone(n.data), nil
}

// Mutate changes a file's content in place, durably, as rot on a disk would.
func (m *Mem) Mutate(name string, change func(data []byte) []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.live[path.Clean(name)]
	if n == nil {
		return notExist("mutate", name)
	}
	n.data = change(n.data)
	n.synced = slices.Clone(n.data)
	n.dirty = map[int64]bool{}
	n.space = int64(len(n.data))
	return nil
}

// Snapshot maps every file to a copy of its content.
func (m *Mem) Snapshot() map[string][]byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make(map[string][]byte, len(m.live))
	for name, n := range m.live {
		out[name] = slices.Clone(n.data)
	}
	return out
}

func notExist(op, name string) error {
	return &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
}

// Create implements vfs.FS.
func (m *Mem) Create(name string) (vfs.File, error) {
	name = path.Clean(name)
	if err := m.before("create", name); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.dirs[path.Dir(name)] {
		return nil, notExist("create", name)
	}
	if m.live[name] != nil {
		return nil, &fs.PathError{Op: "create", Path: name, Err: fs.ErrExist}
	}
	if m.free() <= 0 {
		return nil, noSpace("create", name)
	}
	n := &node{dirty: map[int64]bool{}, opens: 1}
	m.live[name] = n
	m.pending = append(m.pending, nameOp{kind: "create", new: name, node: n})
	return &file{m: m, n: n, name: name, write: true}, nil
}

// Open implements vfs.FS.
func (m *Mem) Open(name string) (vfs.File, error) { return m.open(name, false) }

// OpenReadWrite implements vfs.FS.
func (m *Mem) OpenReadWrite(name string) (vfs.File, error) { return m.open(name, true) }

func (m *Mem) open(name string, write bool) (vfs.File, error) {
	name = path.Clean(name)
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.live[name]
	if n == nil {
		return nil, notExist("open", name)
	}
	n.opens++
	return &file{m: m, n: n, name: name, write: write}, nil
}

// Remove implements vfs.FS.
func (m *Mem) Remove(name string) error {
	name = path.Clean(name)
	if err := m.before("remove", name); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.live[name] == nil {
		return notExist("remove", name)
	}
	m.drop(name)
	m.pending = append(m.pending, nameOp{kind: "remove", old: name})
	return nil
}

// Rename implements vfs.FS.
func (m *Mem) Rename(oldname, newname string) error {
	oldname, newname = path.Clean(oldname), path.Clean(newname)
	if err := m.before("rename", newname); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.live[oldname]
	if n == nil || !m.dirs[path.Dir(newname)] {
		return notExist("rename", oldname)
	}
	delete(m.live, oldname)
	m.drop(newname)
	m.live[newname] = n
	m.pending = append(m.pending, nameOp{kind: "rename", old: oldname, new: newname, node: n})
	return nil
}

// List implements vfs.FS.
func (m *Mem) List(dir string) ([]string, error) {
	dir = path.Clean(dir)
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.dirs[dir] {
		return nil, notExist("open", dir)
	}
	var out []string
	for name := range m.live {
		if path.Dir(name) == dir {
			out = append(out, path.Base(name))
		}
	}
	for d := range m.dirs {
		if d != dir && path.Dir(d) == dir {
			out = append(out, path.Base(d))
		}
	}
	slices.Sort(out)
	return out, nil
}

// MkdirAll implements vfs.FS. Directories are durable at once.
func (m *Mem) MkdirAll(dir string) error {
	dir = path.Clean(dir)
	m.mu.Lock()
	defer m.mu.Unlock()
	for !m.dirs[dir] {
		if m.free() <= 0 {
			return noSpace("mkdir", dir)
		}
		m.dirs[dir] = true
		dir = path.Dir(dir)
	}
	return nil
}

// SyncDir implements vfs.FS.
func (m *Mem) SyncDir(dir string) error {
	dir = path.Clean(dir)
	if err := m.before("syncdir", dir); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.dirs[dir] {
		return notExist("open", dir)
	}
	within := func(name string) bool { return name != "" && path.Dir(name) == dir }
	m.pending = slices.DeleteFunc(m.pending, func(op nameOp) bool { return within(op.old) || within(op.new) })
	for name := range m.durable {
		if path.Dir(name) == dir && m.live[name] == nil {
			delete(m.durable, name)
		}
	}
	for name, n := range m.live {
		if path.Dir(name) == dir {
			m.durable[name] = n
		}
	}
	return nil
}

// Lock implements vfs.FS.
func (m *Mem) Lock(name string) (io.Closer, error) {
	name = path.Clean(name)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.locks[name] {
		return nil, fmt.Errorf("lock %s: %w", name, vfs.ErrLocked)
	}
	m.locks[name] = true
	return unlock(sync.OnceFunc(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.locks, name)
	})), nil
}

type unlock func()

func (u unlock) Close() error { u(); return nil }

// String lists the files and their sizes.
func (m *Mem) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(m.live)) {
		fmt.Fprintf(&b, "%s %d\n", name, len(m.live[name].data))
	}
	return b.String()
}
