package agent

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// errPower is what a process gets to see of its disk when it should not exist
// any more.
var errPower = errors.New("the power is off")

// simDisk is a node's disk as one process has it: a filesystem in memory that
// can be made slow, hang, or fail, and that is cut off when the process is dead,
// so that nothing which runs on can change what the next one finds.
type simDisk struct {
	mem *vfstest.Mem

	// using is held while something is done to mem, and taken to cut it off.
	using sync.RWMutex
	off   bool

	mu      sync.Mutex
	changed chan struct{} // closed when those that wait should look again
	// hold tells how long an operation has to wait, as hang to be told again.
	hold func(op, name string) time.Duration
	// fail tells what an operation fails with.
	fail  func(op, name string) error
	locks map[string]bool
}

const hang = time.Duration(-1)

func newSimDisk(mem *vfstest.Mem) *simDisk {
	return &simDisk{mem: mem, changed: make(chan struct{}), locks: map[string]bool{}}
}

// writing tells whether an operation changes the disk or makes it durable.
func writing(op string) bool {
	return slices.Contains([]string{"create", "write", "sync", "truncate", "preallocate", "rename", "remove", "syncdir"}, op)
}

// set changes what is wrong with the disk; nil, nil is nothing.
func (d *simDisk) set(hold func(op, name string) time.Duration, fail func(op, name string) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hold, d.fail = hold, fail
	close(d.changed)
	d.changed = make(chan struct{})
}

// pause lets everything wait, reading too, until set says otherwise.
func (d *simDisk) pause() { d.set(func(string, string) time.Duration { return hang }, nil) }

// stall lets everything that changes the disk wait.
func (d *simDisk) stall() {
	d.set(func(op, _ string) time.Duration {
		if writing(op) {
			return hang
		}
		return 0
	}, nil)
}

// slow makes every sync take that long.
func (d *simDisk) slow(by time.Duration) {
	d.set(func(op, _ string) time.Duration {
		if op == "sync" || op == "syncdir" {
			return by
		}
		return 0
	}, nil)
}

// failOnce lets the next operation of a kind fail, and everything after it
// succeed.
func (d *simDisk) failOnce(kind string) {
	var once sync.Once
	d.set(nil, func(op, _ string) (err error) {
		if op == kind {
			once.Do(func() { err = syscall.EIO })
		}
		return err
	})
}

// cut ends all that this process can do to the disk, for good. What is done to
// the filesystem afterwards is somebody else's doing.
func (d *simDisk) cut() {
	d.using.Lock()
	d.off = true
	d.using.Unlock()
	d.set(nil, nil) // who waits sees that it is off
}

// do does something to the filesystem when the disk lets it.
func (d *simDisk) do(op, name string, f func() error) error {
	for {
		d.mu.Lock()
		hold, fail, changed := d.hold, d.fail, d.changed
		d.mu.Unlock()
		var wait time.Duration
		if hold != nil {
			wait = hold(op, name)
		}
		if wait == 0 {
			if fail != nil {
				if err := fail(op, name); err != nil {
					return d.failed(op, name, err)
				}
			}
			break
		}
		var late <-chan time.Time
		if wait != hang {
			late = time.After(wait)
		}
		select {
		case <-changed:
			continue
		case <-late:
		}
		break
	}
	d.using.RLock()
	defer d.using.RUnlock()
	if d.off {
		return &fs.PathError{Op: op, Path: name, Err: errPower}
	}
	return f()
}

// failed does what a failing disk does besides: what a sync could not write
// counts as written from then on.
func (d *simDisk) failed(op, name string, err error) error {
	failure := &fs.PathError{Op: op, Path: name, Err: err}
	d.using.RLock()
	defer d.using.RUnlock()
	if op != "sync" || d.off {
		return failure
	}
	// Only the filesystem itself can forget what is dirty.
	d.mem.SetHook(func(o vfstest.Op) error {
		if o.Kind == "sync" && o.Name == name {
			return err
		}
		return nil
	})
	defer d.mem.SetHook(nil)
	if f, openErr := d.mem.Open(name); openErr == nil {
		if syncErr := f.Sync(); syncErr == nil {
			panic("a sync that was to fail did not")
		}
		_ = f.Close()
	}
	return failure
}

// rot damages the node's files, see rot. The node must not run.
func (n *simNode) rot(rng *rand.Rand, part string, bits int) (where []string, err error) {
	n.rotten = true
	return rot(n.mem, rng, part, bits)
}

// rot damages stored files, a bit each of n that have part in their names, and
// says where. Nobody may be using them.
func rot(mem *vfstest.Mem, rng *rand.Rand, part string, n int) (where []string, err error) {
	for range n {
		var names []string
		for _, name := range mem.Names() {
			if b, err := mem.ReadFile(name); err == nil && len(b) > 0 && strings.Contains(name, part) {
				names = append(names, name)
			}
		}
		if len(names) == 0 {
			return where, nil
		}
		name := names[rng.IntN(len(names))]
		err := mem.Mutate(name, func(b []byte) []byte {
			// Segments are preallocated: rot in the zeros is nobody's loss.
			used := len(b)
			for used > 1 && b[used-1] == 0 {
				used--
			}
			at := rng.IntN(used)
			b[at] ^= 1 << rng.IntN(8)
			where = append(where, fmt.Sprintf("%s:%d of %d", name, at, used))
			return b
		})
		if err != nil {
			return where, err
		}
	}
	return where, nil
}

func (d *simDisk) opened(op, name string, open func(string) (vfs.File, error)) (file vfs.File, err error) {
	err = d.do(op, name, func() error {
		f, err := open(name)
		if err == nil {
			file = &simFile{f, d, name}
		}
		return err
	})
	return file, err
}

func (d *simDisk) Create(name string) (vfs.File, error) {
	return d.opened("create", name, d.mem.Create)
}
func (d *simDisk) Open(name string) (vfs.File, error) { return d.opened("open", name, d.mem.Open) }
func (d *simDisk) OpenReadWrite(name string) (vfs.File, error) {
	return d.opened("open", name, d.mem.OpenReadWrite)
}

func (d *simDisk) Remove(name string) error {
	return d.do("remove", name, func() error { return d.mem.Remove(name) })
}

func (d *simDisk) Rename(oldname, newname string) error {
	return d.do("rename", newname, func() error { return d.mem.Rename(oldname, newname) })
}

func (d *simDisk) List(dir string) (names []string, err error) {
	err = d.do("list", dir, func() (err error) { names, err = d.mem.List(dir); return err })
	return names, err
}

func (d *simDisk) MkdirAll(dir string) error {
	return d.do("mkdir", dir, func() error { return d.mem.MkdirAll(dir) })
}

func (d *simDisk) SyncDir(dir string) error {
	return d.do("syncdir", dir, func() error { return d.mem.SyncDir(dir) })
}

func (d *simDisk) Free(dir string) (bytes uint64, err error) {
	err = d.do("statfs", dir, func() (err error) { bytes, err = d.mem.Free(dir); return err })
	return bytes, err
}

// Lock is the process's own: a lock ends with its process, whatever that left
// behind.
func (d *simDisk) Lock(name string) (lock io.Closer, err error) {
	err = d.do("lock", name, func() error {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.locks[name] {
			return fmt.Errorf("lock %s: %w", name, vfs.ErrLocked)
		}
		d.locks[name] = true
		lock = &simLock{d, name}
		return nil
	})
	return lock, err
}

type simLock struct {
	d    *simDisk
	name string
}

func (l *simLock) Close() error {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	delete(l.d.locks, l.name)
	return nil
}

type simFile struct {
	vfs.File
	d    *simDisk
	name string
}

func (f *simFile) ReadAt(p []byte, off int64) (n int, err error) {
	err = f.d.do("read", f.name, func() (err error) { n, err = f.File.ReadAt(p, off); return err })
	return n, err
}

func (f *simFile) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.d.do("write", f.name, func() (err error) { n, err = f.File.WriteAt(p, off); return err })
	return n, err
}

func (f *simFile) Size() (size int64, err error) {
	err = f.d.do("stat", f.name, func() (err error) { size, err = f.File.Size(); return err })
	return size, err
}

func (f *simFile) Sync() error { return f.d.do("sync", f.name, f.File.Sync) }

func (f *simFile) Truncate(size int64) error {
	return f.d.do("truncate", f.name, func() error { return f.File.Truncate(size) })
}

func (f *simFile) Preallocate(size int64) error {
	return f.d.do("preallocate", f.name, func() error { return f.File.Preallocate(size) })
}

func (f *simFile) Map(size int64) (m vfs.Mapping, err error) {
	err = f.d.do("mmap", f.name, func() (err error) { m, err = f.File.Map(size); return err })
	return m, err
}

var _ vfs.FS = (*simDisk)(nil)
