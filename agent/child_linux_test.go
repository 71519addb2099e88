package agent

import (
	"encoding/binary"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// childAttr puts a child into a process group of its own, and has it end with
// this process, however that ends.
func childAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// fileWatch tells what a process does to the files of a few folders, as it
// does it.
type fileWatch struct {
	f      *os.File
	events chan struct{}
}

// watchFiles watches a folder and those in it.
func watchFiles(t testing.TB, dir string) *fileWatch {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	w := &fileWatch{f: os.NewFile(uintptr(fd), "inotify"), events: make(chan struct{})}
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		_, err = unix.InotifyAddWatch(fd, name, unix.IN_OPEN|unix.IN_ACCESS|unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVE|unix.IN_DELETE)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(w.events)
		buf := make([]byte, 64<<10)
		for {
			n, err := w.f.Read(buf)
			if err != nil {
				return // closed
			}
			for at := 0; at < n; at += unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(buf[at+12:])) {
				w.events <- struct{}{}
			}
		}
	}()
	return w
}

// next returns with the next event, false if there will be none.
func (w *fileWatch) next(ended <-chan struct{}) bool {
	select {
	case <-w.events:
		return true
	case <-ended:
		return false
	}
}

func (w *fileWatch) close(t testing.TB) {
	t.Helper()
	if err := w.f.Close(); err != nil {
		t.Error(err)
	}
	for range w.events { // until it ends
	}
}
