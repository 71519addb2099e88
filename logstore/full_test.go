package logstore

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// TestFullDisk: whatever space there is, and whenever it goes and comes, an
// append is done or refused as a whole, the log never fails, and everything
// else goes on.
func TestFullDisk(t *testing.T) {
	rng := vfstest.Rand(t)
	refused, done := 0, 0
	for range 80 {
		fsys := vfstest.New()
		opts := smallOptions(fsys)
		opts.inline = rng.IntN(2) == 0
		l := mustOpen(t, opts)
		m := model{first: 1}
		writes := 0
		if opts.inline { // else there are those of the background
			fsys.SetHook(func(op vfstest.Op) error {
				if op.Kind == "write" {
					writes++
				}
				return nil
			})
		}
		for range 60 {
			switch rng.IntN(10) {
			case 0:
				fsys.SetCapacity(-1)
			case 1, 2, 3:
				fsys.SetCapacity(fsys.Used() + rng.Int64N(6*MinSegmentSize))
			case 4, 5:
				fsys.SetCapacity(fsys.Used())
			}
			switch rng.IntN(12) {
			case 0:
				if len(m.entries) > 0 {
					from := m.first + rng.Uint64N(uint64(len(m.entries)))
					must(t, l.TruncateSuffix(from))
					m.truncate(from)
				}
			case 1:
				first, err := l.DeletePrefix(m.first + rng.Uint64N(uint64(len(m.entries))+1))
				must(t, err)
				m.deletePrefix(first)
			case 2:
				must(t, l.Close())
				l = mustOpen(t, opts)
			case 3:
				clone := fsys.CrashClone(rng, vfstest.Survival(rng.IntN(3)))
				clone.SetCapacity(clone.Used())
				again := mustOpen(t, smallOptions(clone))
				must(t, checkEntriesEqual(again, &m))
				must(t, again.Close())
			default:
				most := 1200
				if rng.IntN(6) == 0 {
					most = 3 * MinSegmentSize // segments of their own
				}
				entries := m.generate(rng, 1+rng.IntN(8), most)
				writes = 0
				err := l.Append(entries)
				switch {
				case err == nil:
					done++
					m.append(entries)
				case !errors.Is(err, ErrFull) || !errors.Is(err, syscall.ENOSPC):
					t.Fatal(err)
				default:
					refused++
					if writes > 0 {
						t.Fatalf("%d writes of an append that was refused", writes)
					}
					fsys.SetCapacity(-1)
					must(t, l.Append(entries))
					m.append(entries)
				}
			}
			if l.Err() != nil {
				t.Fatal(l.Err())
			}
			must(t, checkEntriesEqual(l, &m))
		}
		must(t, checkReads(l, &m, rng))
		fsys.SetCapacity(fsys.Used())
		must(t, l.Close())
		for _, name := range fsys.Names() {
			if filepath.Ext(name) == tempSuffix {
				t.Fatalf("%s is left", name)
			}
		}
		l = mustOpen(t, opts)
		must(t, checkReads(l, &m, rng))
		must(t, l.Close())
	}
	t.Logf("%d appends refused, %d done", refused, done)
	if refused < 100 || done < 100 {
		t.Error("too few of one kind to mean anything")
	}
}

// TestFullDiskKeepsNoHalves: what an append had got when it found that there is
// not enough is given back, or kept whole for the next one.
func TestFullDiskKeepsNoHalves(t *testing.T) {
	fsys := vfstest.New()
	l := mustOpen(t, smallOptions(fsys))
	m := model{first: 1}
	rng := vfstest.Rand(t)
	payload := func(n int) []Entry {
		index, term, offset, time := m.next()
		var entries []Entry
		for i := range uint64(n) {
			entries = append(entries, Entry{Index: index + i, Term: term, BaseOffset: offset, AppendTime: time, Payload: make([]byte, MinSegmentSize-segmentHeaderSize-HeaderSize)})
		}
		return entries
	}
	must(t, l.Append(payload(1))) // it fills the active segment
	m.append(payload(1))
	must(t, l.keeper.dropNext())
	used := fsys.Used()
	refuse := func(entries []Entry, capacity, want int64) {
		t.Helper()
		fsys.SetCapacity(capacity)
		if err := l.Append(entries); !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
		if got := fsys.Used(); got != want {
			t.Fatalf("%d bytes are used, not %d:\n%v", got, want, fsys)
		}
	}
	refuse(payload(1), used+MinSegmentSize/2, used)
	refuse(payload(3), used+5*MinSegmentSize/2, used+MinSegmentSize)
	refuse(payload(2), used+MinSegmentSize, used+MinSegmentSize)
	fsys.SetCapacity(fsys.Used())
	entries := payload(1)
	must(t, l.Append(entries))
	m.append(entries)
	must(t, checkReads(l, &m, rng))
	must(t, l.Close())
}

// TestFullDiskFailsOnlyWhenItMust: no space for bytes that were reserved, and
// other errors where space is asked for, are failures as ever.
func TestFullDiskFailsOnlyWhenItMust(t *testing.T) {
	tests := map[string]struct {
		kind string
		err  error
		want error
	}{
		"write without space":     {"write", syscall.ENOSPC, ErrFailed},
		"sync without space":      {"sync", syscall.ENOSPC, ErrFailed},
		"create without space":    {"create", syscall.ENOSPC, ErrFull},
		"create over quota":       {"create", syscall.EDQUOT, ErrFull},
		"preallocate, no space":   {"preallocate", syscall.ENOSPC, ErrFull},
		"preallocate, over quota": {"preallocate", syscall.EDQUOT, ErrFull},
		"create fails":            {"create", syscall.EIO, ErrFailed},
		"preallocate fails":       {"preallocate", syscall.EIO, ErrFailed},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			fsys := vfstest.New()
			opts := smallOptions(fsys)
			l := mustOpen(t, opts)
			must(t, l.Append([]Entry{{Index: 1, Term: 1, Payload: make([]byte, 100)}}))
			fsys.SetHook(func(op vfstest.Op) error {
				if op.Kind == tt.kind {
					return tt.err
				}
				return nil
			})
			big := []Entry{{Index: 2, Term: 1, Payload: make([]byte, MinSegmentSize)}}
			err := l.Append(big)
			if !errors.Is(err, tt.want) || !errors.Is(err, tt.err) || errors.Is(err, ErrFull) != (tt.want == ErrFull) {
				t.Fatalf("got %v", err)
			}
			fsys.SetHook(nil)
			if tt.want == ErrFull {
				must(t, l.Append(big))
				must(t, l.Close())
			} else if err := l.Close(); !errors.Is(err, ErrFailed) {
				t.Fatal(err)
			}
		})
	}
}

// TestFullDiskNoNewLog: a log that cannot be made says why, and is made once
// there is space.
func TestFullDiskNoNewLog(t *testing.T) {
	for capacity := int64(0); ; capacity += 100 {
		fsys := vfstest.New()
		fsys.SetCapacity(capacity)
		l, err := Open(testDir, smallOptions(fsys))
		if err == nil {
			if capacity < MinSegmentSize {
				t.Errorf("made in %d bytes", capacity)
			}
			must(t, l.Close())
			return
		}
		if !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
		fsys.SetCapacity(-1)
		must(t, mustOpen(t, smallOptions(fsys)).Close())
	}
}

// TestFullDiskImport: an import that does not fit leaves the space as it was.
func TestFullDiskImport(t *testing.T) {
	src, m := fuzzLog(t, true)
	l := mustOpen(t, smallOptions(src))
	stream := exportBytes(t, l, m.last())
	must(t, l.Close())
	n := 0
	for capacity := int64(0); ; capacity += 512 {
		fsys := vfstest.New()
		fsys.SetCapacity(capacity)
		_, err := Import(testDir, smallOptions(fsys), bytes.NewReader(stream))
		if err == nil {
			break
		}
		n++
		if !errors.Is(err, ErrFull) || fsys.Used() != 0 {
			t.Fatalf("%v\n%v", err, fsys)
		}
	}
	if n < 10 {
		t.Errorf("only %d sizes were too small", n)
	}
}

// TestFullDiskTruncateExported: a truncation under an export needs space for a copy, and
// does nothing without it.
func TestFullDiskTruncateExported(t *testing.T) {
	fsys, m := fuzzLog(t, true)
	l := mustOpen(t, smallOptions(fsys))
	x, err := l.Export(m.last())
	must(t, err)
	fsys.SetCapacity(fsys.Used() + 100)
	used := fsys.Used()
	if err := l.TruncateSuffix(m.last()); !errors.Is(err, ErrFull) || l.Err() != nil || fsys.Used() != used {
		t.Fatalf("%v; %v; %d bytes more", err, l.Err(), fsys.Used()-used)
	}
	must(t, checkEntriesEqual(l, &m))
	must(t, x.Close())
	must(t, l.TruncateSuffix(m.last()))
	m.truncate(m.last())
	must(t, checkEntriesEqual(l, &m))
	must(t, l.Close())
}

// TestFullRealDisk fills small filesystems of the kernel's.
func TestFullRealDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	for _, kind := range []string{"tmpfs", "ext4"} {
		t.Run(kind, func(t *testing.T) {
			mount := t.TempDir()
			args := []string{"-t", "tmpfs", "-o", "size=8m", "tmpfs", mount}
			if kind == "ext4" {
				image := filepath.Join(t.TempDir(), "image")
				must(t, os.WriteFile(image, nil, 0o600))
				must(t, os.Truncate(image, 8<<20))
				if out, err := exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-m", "0", image).CombinedOutput(); err != nil {
					t.Skipf("cannot make a filesystem: %v %s", err, out)
				}
				args = []string{"-t", "ext4", "-o", "loop", image, mount}
			}
			if out, err := exec.CommandContext(t.Context(), "mount", args...).CombinedOutput(); err != nil {
				t.Skipf("cannot mount: %v %s", err, out)
			}
			t.Cleanup(func() {
				if out, err := exec.Command("umount", mount).CombinedOutput(); err != nil {
					t.Errorf("umount: %v %s", err, out)
				}
			})
			fillRealDisk(t, mount)
		})
	}
}

func fillRealDisk(t *testing.T, mount string) {
	rng := vfstest.Rand(t)
	dir := filepath.Join(mount, "log")
	opts := Options{SegmentSize: 256 << 10}
	open := func() *Log {
		t.Helper()
		l, err := Open(dir, opts)
		must(t, err)
		return l
	}
	l := open()
	t.Cleanup(func() { _ = l.Close() }) // or the filesystem stays busy
	m := model{first: 1}
	var err error
	for err == nil {
		entries := m.generate(rng, 1+rng.IntN(10), 15<<10)
		if err = l.Append(entries); err == nil {
			m.append(entries)
		}
	}
	if !errors.Is(err, ErrFull) || l.Err() != nil {
		t.Fatalf("%v; %v", err, l.Err())
	}
	// The rest of the space goes to somebody else.
	ballast := filepath.Join(mount, "ballast")
	f, err := os.Create(ballast)
	must(t, err)
	for size := 64 << 10; size > 0; size /= 2 {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !vfs.IsFull(err) {
			t.Fatal(err)
		}
	}
	must(t, f.Close())
	if free, err := vfs.OS.Free(dir); err != nil || free > 0 {
		t.Fatalf("free: %d, %v", free, err)
	}
	// In the space that the active segment has.
	for range 3 {
		entries := m.generate(rng, 1, 100)
		err := l.Append(entries)
		if errors.Is(err, ErrFull) {
			break
		}
		must(t, err)
		m.append(entries)
	}
	must(t, checkReads(l, &m, rng))
	must(t, l.Close())
	l = open()
	must(t, checkReads(l, &m, rng))
	big := m.generate(rng, 80, 15<<10)
	if err := l.Append(big); !errors.Is(err, ErrFull) {
		t.Fatal(err)
	}
	from := m.last() - 1
	must(t, l.TruncateSuffix(from))
	m.truncate(from)
	must(t, l.Close())
	l = open()
	must(t, checkReads(l, &m, rng))

	// Retention, or an operator, makes room.
	first, err := l.DeletePrefix(m.first + uint64(len(m.entries))/2)
	must(t, err)
	m.deletePrefix(first)
	for range 3 {
		entries := m.generate(rng, 15, 15<<10)
		must(t, l.Append(entries))
		m.append(entries)
	}
	must(t, checkReads(l, &m, rng))
	must(t, l.Close())
	t.Logf("%+v", l.Stats())
}
