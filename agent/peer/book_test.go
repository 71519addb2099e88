package peer

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

const bookFile = "data/peers"

func bookDir(t testing.TB) *vfstest.Mem {
	t.Helper()
	m := vfstest.New()
	if err := m.MkdirAll("data"); err != nil {
		t.Fatal(err)
	}
	return m
}

func openBook(t testing.TB, fsys vfs.FS) *Book {
	t.Helper()
	b, err := OpenBook(fsys, bookFile)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func addresses(b *Book) map[string]string {
	got := make(map[string]string)
	for id, e := range b.All() {
		got[id] = e.Address
	}
	return got
}

func expectBook(t testing.TB, b *Book, want map[string]string) {
	t.Helper()
	if got := addresses(b); !maps.Equal(got, want) {
		t.Errorf("the book has %v, want %v", got, want)
	}
}

// writes counts the times that the file is replaced.
func writes(m *vfstest.Mem) *int {
	count := 0
	m.SetHook(func(op vfstest.Op) error {
		if op.Kind == "rename" && op.Name == bookFile {
			count++
		}
		return nil
	})
	return &count
}

func TestBook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := bookDir(t)
		count := writes(m)
		b := openBook(t, m)
		expectBook(t, b, map[string]string{})
		update := func(wantWrites int, pairs ...string) {
			t.Helper()
			a := make(map[string]string)
			for i := 0; i < len(pairs); i += 2 {
				a[pairs[i]] = pairs[i+1]
			}
			if err := b.Update(a); err != nil {
				t.Fatal(err)
			}
			if *count != wantWrites {
				t.Fatalf("written %d times, want %d", *count, wantWrites)
			}
		}
		update(0)
		update(1, "n1", "10.0.0.1:8400", "n2", "[::1]:8400")
		update(1, "n1", "10.0.0.1:8400")
		time.Sleep(time.Hour)
		update(1, "n2", "[::1]:8400")
		update(2, "n3", "c.example:8400")
		update(3, "n1", "10.0.0.9:8400")
		want := map[string]string{"n1": "10.0.0.9:8400", "n2": "[::1]:8400", "n3": "c.example:8400"}
		expectBook(t, b, want)
		if got, ok := b.Lookup("n1"); !ok || got != "10.0.0.9:8400" {
			t.Errorf("n1 is at %q", got)
		}
		if _, ok := b.Lookup("n4"); ok {
			t.Error("n4 is known")
		}

		crashed := m.CrashClone(vfstest.Rand(t), vfstest.None)
		b2 := openBook(t, crashed)
		if !maps.Equal(b.All(), b2.All()) {
			t.Errorf("read back %v, want %v", b2.All(), b.All())
		}

		if err := b.Forget("n1", "n4"); err != nil || *count != 4 {
			t.Errorf("%v, written %d times", err, *count)
		}
		if err := b.Forget("n1"); err != nil || *count != 4 {
			t.Errorf("%v, written %d times", err, *count)
		}
		delete(want, "n1")
		expectBook(t, openBook(t, m), want)

		// So that the file's times tell which are the oldest.
		time.Sleep(24 * time.Hour)
		update(5, "n2", "[::1]:8400")
		e := openBook(t, m).All()
		if age := time.Since(e["n2"].Seen); age != 0 {
			t.Errorf("seen %v ago", age)
		}
		if age := time.Since(e["n3"].Seen); age != 24*time.Hour {
			t.Errorf("seen %v ago", age)
		}
	})
}

func TestBookIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := bookDir(t)
		b := openBook(t, m)
		long := strings.Repeat("x", nameLimit-8)
		many := make(map[string]string)
		for i := range bookLimit {
			many[fmt.Sprintf("%s-%d", long, i)] = long
		}
		if err := b.Update(many); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		delete(many, long+"-7") // not seen this time
		if err := b.Update(many); err != nil {
			t.Fatal(err)
		}
		many["new"] = "new:1"
		if err := b.Update(map[string]string{"new": "new:1"}); err != nil {
			t.Fatal(err)
		}
		expectBook(t, b, many)
		expectBook(t, openBook(t, m), many) // the largest file there is
	})
}

func TestBookLeavesOutWhatIsInvalid(t *testing.T) {
	b := openBook(t, bookDir(t))
	err := b.Update(map[string]string{"good": "h:1", "": "h:1", "no address": "h:1", "n": "", "m": "h:1\nnode x y 0", "l": strings.Repeat("h", 300)})
	if err == nil || strings.Count(err.Error(), "cannot be remembered") != 5 {
		t.Error(err)
	}
	expectBook(t, b, map[string]string{"good": "h:1"})
}

// TestBookDiskFails: what was learned counts at once, and is written later.
func TestBookDiskFails(t *testing.T) {
	for _, kind := range []string{"create", "write", "sync", "rename", "syncdir"} {
		m := bookDir(t)
		b := openBook(t, m)
		if err := b.Update(map[string]string{"n1": "old:1"}); err != nil {
			t.Fatal(err)
		}
		m.SetHook(func(op vfstest.Op) error {
			if op.Kind == kind {
				return syscall.ENOSPC
			}
			return nil
		})
		want := map[string]string{"n1": "new:1"}
		if err := b.Update(want); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%s: %v", kind, err)
		}
		expectBook(t, b, want)
		m.SetHook(nil)
		if err := b.Update(nil); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		expectBook(t, openBook(t, m), want)
	}
}

// TestBookCrash: a crash leaves the file as it was or as it is.
func TestBookCrash(t *testing.T) {
	rng := vfstest.Rand(t)
	old, latest := map[string]string{"n1": "old:1"}, map[string]string{"n1": "new:1"}
	m := bookDir(t)
	b := openBook(t, m)
	if err := b.Update(old); err != nil {
		t.Fatal(err)
	}
	var clones []*vfstest.Mem
	m.SetHook(func(vfstest.Op) error {
		for range 20 {
			clones = append(clones, m.CrashClone(rng, vfstest.Some))
		}
		return nil
	})
	if err := b.Update(latest); err != nil {
		t.Fatal(err)
	}
	m.SetHook(nil)
	clones = append(clones, m.CrashClone(rng, vfstest.None))
	for i, c := range clones {
		got := addresses(openBook(t, c))
		if !maps.Equal(got, latest) && (!maps.Equal(got, old) || i == len(clones)-1) {
			t.Errorf("crash %d of %d left %v", i, len(clones), got)
		}
	}
}

// TestBookDamage: any change of the file is noticed, and costs only what was
// remembered.
func TestBookDamage(t *testing.T) {
	good := encodeBook(map[string]Entry{"n1": {"h:1", time.Unix(7, 0)}, "n2": {"h:2", time.Unix(8, 0)}})
	damaged := [][]byte{nil, good[:len(good)-1], append(good[:len(good):len(good)], '\n'), make([]byte, bookFileLimit+1)}
	for i := range good {
		for bit := range 8 {
			c := append([]byte(nil), good...)
			c[i] ^= 1 << bit
			damaged = append(damaged, c)
		}
	}
	for _, body := range []string{"", "diurna-peers 2\n", "node n1 h:1 7\n", "diurna-peers 1\nnode n1 h:1\n", "diurna-peers 1\nnode n1 h:1 x\n",
		"diurna-peers 1\nnode n1 h:1 7\nnode n1 h:1 7\n", "diurna-peers 1\n\n", "diurna-peers 1\nnode n1  7\n", "diurna-peers 1\nedon n1 h:1 7\n"} {
		damaged = append(damaged, []byte(body+bookSum([]byte(body))))
	}
	m := bookDir(t)
	for _, content := range damaged {
		if err := vfs.WriteFile(m, bookFile, content); err != nil {
			t.Fatal(err)
		}
		b, err := OpenBook(m, bookFile)
		if err == nil || !strings.Contains(err.Error(), bookFile) {
			t.Fatalf("%.80q: %v", content, err)
		}
		expectBook(t, b, map[string]string{})
		if err := b.Update(map[string]string{"n3": "h:3"}); err != nil {
			t.Fatal(err)
		}
		expectBook(t, openBook(t, m), map[string]string{"n3": "h:3"})
	}
}

// unreadable is a filesystem that opens nothing.
type unreadable struct{ vfs.FS }

func (unreadable) Open(name string) (vfs.File, error) {
	return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EIO}
}

func TestBookUnreadable(t *testing.T) {
	b, err := OpenBook(unreadable{bookDir(t)}, bookFile)
	if !errors.Is(err, syscall.EIO) {
		t.Error(err)
	}
	if err := b.Update(map[string]string{"n1": "h:1"}); err != nil {
		t.Error(err)
	}
	expectBook(t, b, map[string]string{"n1": "h:1"})
}

// TestBookWhileTheDiskHangs: reading does not wait for writing, and everybody
// can do everything at once.
func TestBookWhileTheDiskHangs(t *testing.T) {
	m := bookDir(t)
	b := openBook(t, m)
	hangs, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	m.SetHook(func(vfstest.Op) error {
		once.Do(func() {
			close(hangs)
			<-goOn
		})
		return nil
	})
	var work sync.WaitGroup
	work.Go(func() {
		if err := b.Update(map[string]string{"n1": "h:1"}); err != nil {
			t.Error(err)
		}
	})
	<-hangs
	if _, ok := b.Lookup("n1"); !ok || len(b.All()) != 1 {
		t.Error("the book does not know what it is writing")
	}
	for i := range 8 {
		work.Go(func() {
			id := fmt.Sprint("m", i)
			if err := errors.Join(b.Update(map[string]string{id: "h:2"}), b.Forget(id)); err != nil {
				t.Error(err)
			}
		})
	}
	close(goOn)
	work.Wait()
	expectBook(t, openBook(t, m), map[string]string{"n1": "h:1"})
}
