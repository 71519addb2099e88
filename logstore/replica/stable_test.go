package replica

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

var _ raft.StableStore = (*stableStore)(nil)

func mustOpenStable(t testing.TB, file string, seen uint64) *stableStore {
	t.Helper()
	s, err := openStable(file, seen, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// vote is what must never change by itself.
type vote struct {
	term, voteTerm uint64
	candidate      string
}

func (v vote) write(s *stableStore) error {
	return errors.Join(s.SetUint64(keyCurrentTerm, v.term), s.SetUint64(keyLastVoteTerm, v.voteTerm), s.Set(keyLastVoteCand, []byte(v.candidate)))
}

func readVote(s *stableStore) (v vote, err error) {
	var candidate []byte
	var errs [3]error
	v.term, errs[0] = s.GetUint64(keyCurrentTerm)
	v.voteTerm, errs[1] = s.GetUint64(keyLastVoteTerm)
	candidate, errs[2] = s.Get(keyLastVoteCand)
	v.candidate = string(candidate)
	return v, errors.Join(errs[:]...)
}

func TestStableKeepsValues(t *testing.T) {
	file := filepath.Join(t.TempDir(), "raft.db")
	s := mustOpenStable(t, file, 0)
	for range 2 {
		for _, key := range [][]byte{keyCurrentTerm, keyLastVoteCand} {
			// Raft knows it by this text alone.
			if _, err := s.Get(key); err == nil || err.Error() != "not found" {
				t.Fatalf("missing %s: %v", key, err)
			}
			if _, err := s.GetUint64(key); err == nil || err.Error() != "not found" {
				t.Fatalf("missing %s: %v", key, err)
			}
		}
		s.Close()
		s = mustOpenStable(t, file, 0)
	}
	// To BoltDB the lengths are a bucket within a page, one of a page, one of
	// several pages.
	for i, length := range []int{0, 1, 300, 1000, 3000, 20000, 1000, 10} {
		want := vote{1 << (8 * i), uint64(i), strings.Repeat("c\x00\xff", length/3)}
		if err := want.write(s); err != nil {
			t.Fatal(err)
		}
		if got, err := readVote(s); err != nil || got != want {
			t.Fatalf("%+v (%v), want %+v", got, err, want)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = mustOpenStable(t, file, want.term)
		if got, err := readVote(s); err != nil || got != want {
			t.Fatalf("reopened: %+v (%v), want %+v", got, err, want)
		}
	}
	var corrupt *CorruptError
	if _, err := s.GetUint64(keyLastVoteCand); !errors.As(err, &corrupt) {
		t.Errorf("a candidate as a number: %v", err)
	}
	s.Close()
}

// TestStableFailure: Raft goes on with some values that it could not write.
func TestStableFailure(t *testing.T) {
	var told []error
	s, err := openStable(filepath.Join(t.TempDir(), "raft.db"), 0, func(err error) { told = append(told, err) })
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if err := s.SetUint64(keyCurrentTerm, 1); err == nil || len(told) != 1 || told[0] != err {
		t.Errorf("%v, told %v", err, told)
	}
	if _, err := s.Get(keyCurrentTerm); !isKeyNotFound(err) {
		t.Errorf("what was not written is there: %v", err)
	}
}

// TestStableRefuses files that are not what was written.
func TestStableRefuses(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	s := mustOpenStable(t, good, 0)
	if err := (vote{7, 7, "a"}).write(s); err != nil {
		t.Fatal(err)
	}
	s.Close()
	content, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(dir, "foreign")
	bolt, err := raftboltdb.NewBoltStore(foreign)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(bolt.SetUint64(keyCurrentTerm, 7), bolt.Close()); err != nil {
		t.Fatal(err)
	}
	another, err := os.ReadFile(foreign)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"missing":           nil,
		"empty":             {},
		"one byte":          content[:1],
		"half a page":       content[:2048],
		"one page":          content[:4096],
		"two pages":         content[:8192],
		"three pages":       content[:3*4096],
		"text":              bytes.Repeat([]byte("no database\n"), 2000),
		"zeros":             make([]byte, len(content)),
		"another's":         another,
		"meta pages only":   append(slices.Clone(content[:8192]), make([]byte, len(content)-8192)...),
		"no meta pages":     append(make([]byte, 8192), content[8192:]...),
		"both metas zeroed": append(make([]byte, 2*4096), content[2*4096:]...),
	} {
		file := filepath.Join(dir, "test.db")
		_ = os.Remove(file)
		seen := uint64(1)
		if b != nil {
			seen = 0 // it must not be made anew in any case
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s, err := openStable(file, seen, func(err error) { t.Error(err) })
		if s != nil && err == nil {
			s.Close()
		}
		var corrupt *CorruptError
		if !errors.As(err, &corrupt) || corrupt.File != file {
			t.Errorf("%s: %v", name, err)
		}
		if after, _ := os.ReadFile(file); !bytes.Equal(after, b) {
			t.Errorf("%s: the file was changed", name)
		}
	}
}

// TestStableCreation: a crash before the file is complete leaves none.
func TestStableCreation(t *testing.T) {
	file := filepath.Join(t.TempDir(), "raft.db")
	for _, left := range []string{"", "left over"} {
		if err := os.WriteFile(file+vfs.TempSuffix, []byte(left), 0o600); err != nil {
			t.Fatal(err)
		}
		s := mustOpenStable(t, file, 0)
		s.Close()
		if _, err := os.Stat(file + vfs.TempSuffix); !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStableRot changes bits anywhere in the file: opening it either says that
// it is damaged, or gives the very values that were written last. There are
// older ones in it, in pages that BoltDB does not use any more.
func TestStableRot(t *testing.T) {
	rng := vfstest.Rand(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "raft.db")
	s := mustOpenStable(t, file, 0)
	var want vote
	for i := range uint64(9) {
		want = vote{i + 3, i + 2, "server-" + string(rune('a'+i))}
		if err := want.write(s); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes", len(content))
	var used []int // the bytes where a change is likely to matter
	for i, b := range content {
		if b != 0 {
			used = append(used, i)
		}
	}

	refused, fine := 0, 0
	flips := vfstest.Env(t, "DIURNA_FLIPS", 3000)
	for n := range flips {
		b := slices.Clone(content)
		var at []int
		switch rng.IntN(4) {
		case 0: // anywhere
			at = []int{rng.IntN(len(b))}
		default: // near something
			at = []int{min(used[rng.IntN(len(used))]+rng.IntN(3), len(b)-1)}
		}
		if n < 2*4096*8 && n%3 == 0 {
			at = []int{n / 3 % 8192} // the meta pages, one after the other
		}
		for rng.IntN(8) == 0 {
			at = append(at, used[rng.IntN(len(used))])
		}
		for _, i := range at {
			b[i] ^= 1 << rng.IntN(8)
		}
		if rng.IntN(50) == 0 { // garbage
			for i := at[0]; i < min(at[0]+rng.IntN(600), len(b)); i++ {
				b[i] = byte(rng.Uint32())
			}
		}
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := reopenVote(t, file)
		var corrupt *CorruptError
		switch {
		case errors.As(err, &corrupt):
			refused++
		case err != nil || got != want:
			t.Fatalf("bytes %v changed: %+v (%v), want %+v", at, got, err, want)
		default:
			fine++
		}
		// What BoltDB maps of a file that made it panic stays mapped.
		_ = os.Remove(file)
	}
	t.Logf("%d refused, %d harmless", refused, fine)
	if refused == 0 || fine == 0 {
		t.Error("the flips hit nothing, or everything")
	}
}

// reopenVote opens a damaged file and uses it as Raft would.
func reopenVote(t *testing.T, file string) (vote, error) {
	s, err := openStable(file, 1, func(err error) { t.Error(err) })
	if err != nil {
		return vote{}, err
	}
	defer s.Close()
	return readVote(s)
}

// TestStableFallback damages the newer of BoltDB's two meta pages: it goes on
// with the other, without a word.
func TestStableFallback(t *testing.T) {
	dir := t.TempDir()
	for i := range 6 { // whichever page is the newer one
		file := filepath.Join(dir, "raft.db")
		_ = os.Remove(file)
		s := mustOpenStable(t, file, 0)
		var want vote
		for j := range uint64(2 + i) {
			want = vote{j + 1, j + 1, "b"}
			if err := want.write(s); err != nil {
				t.Fatal(err)
			}
		}
		s.Close()
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for page := range 2 {
			b := slices.Clone(content)
			b[page*4096+16+8] ^= 0xff // within what the page's checksum covers
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if got, err := reopenVote(t, file); err != nil || got != want {
				t.Errorf("%d writes, page %d damaged: %+v (%v), want %+v", i, page, got, err, want)
			}
		}
	}
}

func FuzzBolt(f *testing.F) {
	file := filepath.Join(f.TempDir(), "raft.db")
	s := mustOpenStable(f, file, 0)
	for i := range uint64(3) {
		if err := (vote{i, i, strings.Repeat("x", int(i)*1000)}).write(s); err != nil {
			f.Fatal(err)
		}
	}
	s.Close()
	content, err := os.ReadFile(file)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(content)
	f.Add(content[:4096])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		sealed, err := checkBolt(b, "conf", string(recordKey))
		if err == nil {
			_, _ = parseRecord(sealed)
		}
	})
}

// TestStableOlder: a file from a backup does not know of votes since.
func TestStableOlder(t *testing.T) {
	file := filepath.Join(t.TempDir(), "raft.db")
	s := mustOpenStable(t, file, 0)
	if err := errors.Join((vote{7, 7, "a"}).write(s), s.Close()); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var corrupt *CorruptError
	if _, err := openStable(file, 8, nil); !errors.As(err, &corrupt) {
		t.Error(err)
	}
	if after, err := os.ReadFile(file); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the file was changed (%v)", err)
	}
	s = mustOpenStable(t, file, 7)
	s.Close()
}
