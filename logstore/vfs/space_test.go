package vfs_test

import (
	"errors"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

func TestFree(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		free, err := fsys.Free(dir)
		must(t, err)
		if free == 0 {
			t.Error("no space")
		}
		if _, err := fsys.Free(filepath.Join(dir, "none")); err == nil {
			t.Error("of a directory that is not there")
		}
	})
}

// TestFull: what a full filesystem does, as far as a log counts on it.
func TestFull(t *testing.T) {
	fsys := vfstest.New()
	must(t, fsys.MkdirAll("dir"))
	fsys.SetCapacity(1000)
	free := func(want uint64) {
		t.Helper()
		if got, err := fsys.Free("dir"); err != nil || got != want {
			t.Fatalf("free: %d, %v; want %d", got, err, want)
		}
	}
	wantFull := func(err error) {
		t.Helper()
		if !vfs.IsFull(err) || !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("got %v", err)
		}
	}
	a, err := fsys.Create("dir/a")
	must(t, err)
	must(t, a.Preallocate(600))
	must(t, a.Preallocate(600))
	free(400)
	write(t, a, "hello", 595) // reserved
	free(400)

	b, err := fsys.Create("dir/b")
	must(t, err)
	write(t, b, string(make([]byte, 400)), 0)
	free(0)
	write(t, b, "over", 100)
	write(t, a, "over", 0)
	n, err := b.WriteAt([]byte("xyz"), 399)
	wantFull(err)
	if size, _ := b.Size(); n != 1 || size != 400 {
		t.Errorf("wrote %d bytes, the file has %d", n, size)
	}
	wantFull(a.Preallocate(601))
	wantFull(fsys.MkdirAll("other/dir"))
	must(t, fsys.MkdirAll("dir"))
	_, err = fsys.Create("dir/c")
	wantFull(err)

	// Growing takes nothing, but then there is nothing there to write to.
	must(t, a.Truncate(500))
	free(100)
	must(t, a.Truncate(700))
	free(100)
	_, err = a.WriteAt([]byte("x"), 699)
	wantFull(err)
	free(0) // the part that it got
	must(t, a.Truncate(500))
	free(100)

	// What fails to get all of its space keeps what there was.
	wantFull(a.Preallocate(700))
	if size, _ := a.Size(); size != 600 {
		t.Errorf("the file has %d bytes", size)
	}
	free(0)

	// A file is there until nobody has it open.
	c, err := fsys.Open("dir/b")
	must(t, err)
	must(t, fsys.Remove("dir/b"))
	must(t, b.Close())
	free(0)
	must(t, c.Close())
	free(400)
	b, err = fsys.Create("dir/b")
	must(t, err)
	must(t, b.Preallocate(400))
	must(t, fsys.Rename("dir/b", "dir/a"))
	free(0)
	must(t, a.Close())
	free(600)
	must(t, b.Close())
	free(600)
	if fsys.Used() != 400 {
		t.Errorf("used: %d", fsys.Used())
	}
	fsys.SetCapacity(100)
	free(0)
	fsys.SetCapacity(-1)
	must(t, fsys.MkdirAll("other"))
}

func TestIsFull(t *testing.T) {
	for err, want := range map[error]bool{
		syscall.ENOSPC: true,
		syscall.EDQUOT: true,
		errors.Join(errors.New("other"), syscall.EDQUOT): true,
		syscall.EIO: false,
		nil:         false,
	} {
		if got := vfs.IsFull(err); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
}
