package agent

import (
	"io"
	"sync"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// faultyFS is the machine's filesystem with a hook before everything that
// writes: it may fail it, or hang.
type faultyFS struct {
	vfs.FS
	unlocked chan struct{} // closed when a lock is given up

	mu   sync.Mutex
	hook func(op, name string) error
}

func newFaultyFS() *faultyFS { return &faultyFS{FS: vfs.OS, unlocked: make(chan struct{})} }

func (f *faultyFS) set(hook func(op, name string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = hook
}

func (f *faultyFS) before(op, name string) error {
	f.mu.Lock()
	hook := f.hook
	f.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(op, name)
}

func (f *faultyFS) Create(name string) (vfs.File, error) {
	if err := f.before("create", name); err != nil {
		return nil, err
	}
	file, err := f.FS.Create(name)
	return faultyFile{file, f, name}, err
}

func (f *faultyFS) Open(name string) (vfs.File, error) {
	if err := f.before("open", name); err != nil {
		return nil, err
	}
	return f.FS.Open(name)
}

func (f *faultyFS) OpenReadWrite(name string) (vfs.File, error) {
	if err := f.before("open", name); err != nil {
		return nil, err
	}
	file, err := f.FS.OpenReadWrite(name)
	return faultyFile{file, f, name}, err
}

func (f *faultyFS) Rename(oldname, newname string) error {
	if err := f.before("rename", newname); err != nil {
		return err
	}
	return f.FS.Rename(oldname, newname)
}

func (f *faultyFS) MkdirAll(dir string) error {
	if err := f.before("mkdir", dir); err != nil {
		return err
	}
	return f.FS.MkdirAll(dir)
}

func (f *faultyFS) SyncDir(dir string) error {
	if err := f.before("syncdir", dir); err != nil {
		return err
	}
	return f.FS.SyncDir(dir)
}

func (f *faultyFS) Lock(name string) (io.Closer, error) {
	if err := f.before("lock", name); err != nil {
		return nil, err
	}
	c, err := f.FS.Lock(name)
	if err != nil {
		return nil, err
	}
	return &lockCloser{c, f}, nil
}

type lockCloser struct {
	io.Closer
	fs *faultyFS
}

func (l *lockCloser) Close() error {
	defer close(l.fs.unlocked)
	return l.Closer.Close()
}

type faultyFile struct {
	vfs.File
	fs   *faultyFS
	name string
}

func (f faultyFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.fs.before("write", f.name); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (f faultyFile) Sync() error {
	if err := f.fs.before("sync", f.name); err != nil {
		return err
	}
	return f.File.Sync()
}
