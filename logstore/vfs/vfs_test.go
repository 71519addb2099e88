package vfs_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// The same tests run on the machine's filesystem and on the one that tests of
// the log use: what holds only on one of them would make those tests a lie.
func eachFS(t *testing.T, test func(t *testing.T, fsys vfs.FS, dir string)) {
	t.Run("OS", func(t *testing.T) { test(t, vfs.OS, t.TempDir()) })
	t.Run("Mem", func(t *testing.T) {
		fsys := vfstest.New()
		must(t, fsys.MkdirAll("dir"))
		test(t, fsys, "dir")
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// put makes a file with that content and returns its name.
func put(t *testing.T, fsys vfs.FS, name, content string) string {
	t.Helper()
	f, err := fsys.Create(name)
	must(t, err)
	write(t, f, content, 0)
	must(t, f.Close())
	return name
}

func write(t *testing.T, f vfs.File, content string, off int64) {
	t.Helper()
	if n, err := f.WriteAt([]byte(content), off); err != nil || n != len(content) {
		t.Fatalf("wrote %d of %d bytes: %v", n, len(content), err)
	}
}

func content(t *testing.T, f vfs.File) string {
	t.Helper()
	size, err := f.Size()
	must(t, err)
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); int64(n) != size || err != nil && !errors.Is(err, io.EOF) {
		t.Fatalf("read %d of %d bytes: %v", n, size, err)
	}
	return string(b)
}

func contentOf(t *testing.T, fsys vfs.FS, name string) string {
	t.Helper()
	f, err := fsys.Open(name)
	must(t, err)
	defer f.Close()
	return content(t, f)
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

func TestCreate(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := put(t, fsys, filepath.Join(dir, "a"), "hello")
		_, err := fsys.Create(name)
		wantErr(t, err, fs.ErrExist)
		if got := contentOf(t, fsys, name); got != "hello" {
			t.Errorf("creating it again left %q", got)
		}
		_, err = fsys.Create(filepath.Join(dir, "none", "a"))
		wantErr(t, err, fs.ErrNotExist)

		f, err := fsys.Create(filepath.Join(dir, "b"))
		must(t, err)
		write(t, f, "x", 2) // a hole before it reads as zeros
		if got := content(t, f); got != "\x00\x00x" {
			t.Errorf("holds %q", got)
		}
		must(t, f.Close())
		wantErr(t, f.Close(), fs.ErrClosed)
		_, err = f.ReadAt(make([]byte, 1), 0)
		wantErr(t, err, fs.ErrClosed)
		if err := f.Sync(); err == nil {
			t.Error("a closed file was synced")
		}
	})
}

func TestOpen(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		_, err := fsys.Open(filepath.Join(dir, "none"))
		wantErr(t, err, fs.ErrNotExist)
		_, err = fsys.OpenReadWrite(filepath.Join(dir, "none"))
		wantErr(t, err, fs.ErrNotExist)

		name := put(t, fsys, filepath.Join(dir, "a"), "hello")
		r, err := fsys.Open(name)
		must(t, err)
		defer r.Close()
		if _, err := r.WriteAt([]byte("x"), 0); err == nil {
			t.Error("a file opened for reading was written to")
		}
		if err := r.Truncate(0); err == nil {
			t.Error("a file opened for reading was truncated")
		}
		w, err := fsys.OpenReadWrite(name)
		must(t, err)
		defer w.Close()
		write(t, w, "J", 0)
		if got := content(t, r); got != "Jello" {
			t.Errorf("the other descriptor reads %q", got)
		}
	})
}

func TestReadAtEnd(t *testing.T) {
	tests := map[string]struct {
		off  int64
		n    int
		want string
		err  error
	}{
		"within":     {1, 3, "ell", nil},
		"to the end": {1, 4, "ello", nil}, // EOF is allowed here, see below
		"over":       {3, 5, "lo", io.EOF},
		"at the end": {5, 1, "", io.EOF},
		"behind":     {100, 1, "", io.EOF},
	}
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		f, err := fsys.Open(put(t, fsys, filepath.Join(dir, "a"), "hello"))
		must(t, err)
		defer f.Close()
		for name, tt := range tests {
			b := make([]byte, tt.n)
			n, err := f.ReadAt(b, tt.off)
			if tt.off+int64(tt.n) == 5 && errors.Is(err, io.EOF) {
				err = nil // io.ReaderAt lets it do either
			}
			if string(b[:n]) != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("%s: %q, %v", name, b[:n], err)
			}
		}
	})
}

func TestRename(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
		put(t, fsys, a, "new")
		put(t, fsys, b, "old")
		old, err := fsys.Open(b)
		must(t, err)
		defer old.Close()
		moved, err := fsys.OpenReadWrite(a)
		must(t, err)
		defer moved.Close()

		must(t, fsys.Rename(a, b))
		_, err = fsys.Open(a)
		wantErr(t, err, fs.ErrNotExist)
		if got := contentOf(t, fsys, b); got != "new" {
			t.Errorf("the new name holds %q", got)
		}
		if got := content(t, old); got != "old" {
			t.Errorf("the file that was replaced reads %q", got)
		}
		write(t, moved, "N", 0)
		if got := contentOf(t, fsys, b); got != "New" {
			t.Errorf("a write to the file that was moved gave %q", got)
		}
		wantErr(t, fsys.Rename(a, b), fs.ErrNotExist)
		must(t, fsys.Rename(b, b))
		if got := contentOf(t, fsys, b); got != "New" {
			t.Errorf("renamed to itself it holds %q", got)
		}
	})
}

func TestRemove(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := put(t, fsys, filepath.Join(dir, "a"), "hello")
		f, err := fsys.OpenReadWrite(name)
		must(t, err)
		defer f.Close()
		must(t, fsys.Remove(name))
		wantErr(t, fsys.Remove(name), fs.ErrNotExist)
		if got := content(t, f); got != "hello" {
			t.Errorf("open and removed it reads %q", got)
		}
		// A new file of that name is another file.
		put(t, fsys, name, "other")
		write(t, f, "J", 0)
		if got := contentOf(t, fsys, name); got != "other" {
			t.Errorf("the new file holds %q", got)
		}
		if got := content(t, f); got != "Jello" {
			t.Errorf("the old file reads %q", got)
		}
	})
}

func TestRemoveAll(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		tree := filepath.Join(dir, "tree")
		must(t, fsys.MkdirAll(filepath.Join(tree, "a", "b")))
		must(t, fsys.MkdirAll(filepath.Join(tree, "empty")))
		put(t, fsys, filepath.Join(tree, "a", "b", "x"), "1")
		put(t, fsys, filepath.Join(tree, "y"), "2")
		wantErr(t, fsys.Remove(filepath.Join(tree, "a")), syscall.ENOTEMPTY)
		must(t, vfs.RemoveAll(fsys, tree))
		if _, err := fsys.List(tree); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("still there: %v", err)
		}
		must(t, vfs.RemoveAll(fsys, tree))
		file := put(t, fsys, filepath.Join(dir, "file"), "3")
		must(t, vfs.RemoveAll(fsys, file))
		if _, err := fsys.Open(file); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("still there: %v", err)
		}
	})
}

func TestList(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		if names, err := fsys.List(dir); err != nil || len(names) > 0 {
			t.Errorf("empty: %v, %v", names, err)
		}
		for _, name := range []string{"b", "a10", "a9", "C"} {
			put(t, fsys, filepath.Join(dir, name), "")
		}
		must(t, fsys.MkdirAll(filepath.Join(dir, "sub", "below")))
		put(t, fsys, filepath.Join(dir, "sub", "x"), "")
		names, err := fsys.List(dir)
		if want := []string{"C", "a10", "a9", "b", "sub"}; err != nil || !slices.Equal(names, want) {
			t.Errorf("got %v, %v; want %v", names, err, want)
		}
		_, err = fsys.List(filepath.Join(dir, "none"))
		wantErr(t, err, fs.ErrNotExist)
	})
}

func TestMkdirAll(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		deep := filepath.Join(dir, "x", "y", "z")
		must(t, fsys.MkdirAll(deep))
		must(t, fsys.MkdirAll(deep))
		put(t, fsys, filepath.Join(deep, "a"), "")
		must(t, fsys.SyncDir(deep))
		wantErr(t, fsys.SyncDir(filepath.Join(dir, "none")), fs.ErrNotExist)
	})
}

func TestMkdirAllOverFile(t *testing.T) {
	dir := t.TempDir()
	name := put(t, vfs.OS, filepath.Join(dir, "a"), "")
	for _, d := range []string{name, filepath.Join(name, "below")} {
		if err := vfs.OS.MkdirAll(d); err == nil {
			t.Errorf("made a directory of %s", d)
		}
	}
}

func TestLock(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := filepath.Join(dir, "lock")
		lock, err := fsys.Lock(name)
		must(t, err)
		for range 2 { // failing to take it must not free it
			_, err = fsys.Lock(name)
			wantErr(t, err, vfs.ErrLocked)
		}
		other, err := fsys.Lock(filepath.Join(dir, "lock2"))
		must(t, err)
		must(t, other.Close())
		must(t, lock.Close())
		lock, err = fsys.Lock(name)
		must(t, err)
		must(t, lock.Close())
	})
}

func TestTruncate(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		f, err := fsys.OpenReadWrite(put(t, fsys, filepath.Join(dir, "a"), "hello world"))
		must(t, err)
		defer f.Close()
		for _, tt := range []struct {
			size int64
			want string
		}{{5, "hello"}, {8, "hello\x00\x00\x00"}, {8, "hello\x00\x00\x00"}, {0, ""}, {2, "\x00\x00"}} {
			must(t, f.Truncate(tt.size))
			if got := content(t, f); got != tt.want {
				t.Errorf("truncated to %d it holds %q, want %q", tt.size, got, tt.want)
			}
		}
	})
}

func TestPreallocate(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		f, err := fsys.OpenReadWrite(put(t, fsys, filepath.Join(dir, "a"), "hello"))
		must(t, err)
		defer f.Close()
		for _, tt := range []struct {
			size int64
			want string
		}{{0, "hello"}, {3, "hello"}, {5, "hello"}, {10000, "hello" + string(make([]byte, 9995))}, {7, "hello" + string(make([]byte, 9995))}} {
			must(t, f.Preallocate(tt.size))
			if got := content(t, f); got != tt.want {
				t.Errorf("preallocated to %d it has %d bytes, want %d", tt.size, len(got), len(tt.want))
			}
		}
		// What was cut off must not come back.
		must(t, f.Truncate(2))
		must(t, f.Preallocate(5))
		if got := content(t, f); got != "he\x00\x00\x00" {
			t.Errorf("preallocated again it holds %q", got)
		}
	})
}

func TestMap(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		want := bytes.Repeat([]byte("0123456789abcdef"), 1000) // more than a page
		name := put(t, fsys, filepath.Join(dir, "a"), string(want))
		f, err := fsys.Open(name)
		must(t, err)
		m, err := f.Map(int64(len(want)))
		must(t, err)
		part, err := f.Map(10)
		must(t, err)
		// A mapping needs neither the descriptor nor the name.
		must(t, f.Close())
		must(t, fsys.Remove(name))
		if !bytes.Equal(m.Bytes(), want) || string(part.Bytes()) != "0123456789" {
			t.Errorf("mapped %d and %d bytes", len(m.Bytes()), len(part.Bytes()))
		}
		must(t, m.Close())
		must(t, part.Close())
		if _, err := f.Map(10); err == nil {
			t.Error("a closed file was mapped")
		}
	})
}

func TestMapNothing(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		f, err := fsys.Open(put(t, fsys, filepath.Join(dir, "a"), ""))
		must(t, err)
		defer f.Close()
		if _, err := f.Map(0); err == nil {
			t.Error("nothing was mapped")
		}
	})
}

// TestModes: a log is nobody else's to read.
func TestModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	must(t, vfs.OS.MkdirAll(dir))
	name := put(t, vfs.OS, filepath.Join(dir, "a"), "")
	for name, want := range map[string]fs.FileMode{dir: 0o750, name: 0o640} {
		info, err := os.Stat(name)
		must(t, err)
		if got := info.Mode().Perm(); got&^want != 0 {
			t.Errorf("%s has mode %o, want at most %o", name, got, want)
		}
	}
}

func TestFiles(t *testing.T) {
	eachFS(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := filepath.Join(dir, "a")
		must(t, vfs.WriteFile(fsys, name, []byte("one")))
		put(t, fsys, name+vfs.TempSuffix, "what a crash left")
		must(t, vfs.WriteFile(fsys, name, []byte("two")))
		if b, err := vfs.ReadFile(fsys, name, 3); err != nil || string(b) != "two" {
			t.Errorf("read %q, %v", b, err)
		}
		if _, err := vfs.ReadFile(fsys, name, 2); err == nil {
			t.Error("read more than the limit")
		}
		_, err := vfs.ReadFile(fsys, name+"x", 9)
		wantErr(t, err, fs.ErrNotExist)
		must(t, vfs.WriteFile(fsys, name, nil))
		if b, err := vfs.ReadFile(fsys, name, 0); err != nil || len(b) != 0 {
			t.Errorf("read %q, %v", b, err)
		}
		must(t, vfs.RemoveIfThere(fsys, name))
		must(t, vfs.RemoveIfThere(fsys, name))
		if names, err := fsys.List(dir); err != nil || len(names) > 0 {
			t.Errorf("left %v, %v", names, err)
		}
	})
}
