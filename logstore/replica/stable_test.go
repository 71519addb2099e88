package replica

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

var (
	_ raft.StableStore = (*stableStore)(nil)
)

const stableFile = "d/" + stableName

var (
	testReplica     = replicaID{1, 2, 3}
	keyLastVoteCand = []byte("LastVoteCand")
)

// newStableFS returns a filesystem with a new file.
func newStableFS(t testing.TB) *vfstest.Mem {
	t.Helper()
	fs := vfstest.New()
	if err := errors.Join(fs.MkdirAll("d"), createStable(fs, "d", testReplica)); err != nil {
		t.Fatal(err)
	}
	return fs
}

func mustOpenStable(t testing.TB, fs vfs.FS) *stableStore {
	t.Helper()
	s, err := openStable(fs, "d", func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	if err := s.repair(); err != nil {
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

// reopenVote opens a file and reads it as Raft would.
func reopenVote(fs vfs.FS, dir string) (vote, error) {
	s, err := openStable(fs, dir, func(error) {})
	if err != nil {
		return vote{}, err
	}
	v, err := readVote(s)
	return v, errors.Join(err, s.repair(), s.Close())
}

func TestStableKeepsValues(t *testing.T) {
	fs := newStableFS(t)
	s := mustOpenStable(t, fs)
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
		if s.id != testReplica || !s.unused() {
			t.Fatalf("id %v, unused %v", s.id, s.unused())
		}
		s.Close()
		s = mustOpenStable(t, fs)
	}
	for i, length := range []int{0, 1, 300, 1000, 3900, 1000, 10} {
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
		s = mustOpenStable(t, fs)
		if got, err := readVote(s); err != nil || got != want || s.unused() {
			t.Fatalf("reopened: %+v (%v), want %+v", got, err, want)
		}
	}
	var corrupt *CorruptError
	if _, err := s.GetUint64(keyLastVoteCand); !errors.As(err, &corrupt) {
		t.Errorf("a candidate as a number: %v", err)
	}
	s.Close()
}

// TestStableNeedsNoSpace: a change writes to the same bytes only, both slots,
// each synced before the next; the same value again writes nothing.
func TestStableNeedsNoSpace(t *testing.T) {
	fs := newStableFS(t)
	s := mustOpenStable(t, fs)
	var ops []string
	fs.SetHook(func(op vfstest.Op) error {
		ops = append(ops, op.Kind)
		return nil
	})
	for range 2 {
		if err := s.SetUint64(keyCurrentTerm, 7); err != nil {
			t.Fatal(err)
		}
	}
	if want := []string{"write", "sync", "write", "sync"}; !slices.Equal(ops, want) {
		t.Errorf("operations %v, want %v", ops, want)
	}
	if b, err := fs.ReadFile(stableFile); err != nil || len(b) != stableSize {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	s.Close()
}

// TestStableFailure: Raft goes on with some values that it could not write, and
// a failed sync must never be tried again.
func TestStableFailure(t *testing.T) {
	broken := errors.New("broken")
	for k := range 4 {
		fs := newStableFS(t)
		var told []error
		s, err := openStable(fs, "d", func(err error) { told = append(told, err) })
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		fs.SetHook(func(vfstest.Op) error {
			if n++; n-1 == k {
				return broken
			}
			return nil
		})
		for range 3 {
			if err := s.SetUint64(keyCurrentTerm, 1); !errors.Is(err, broken) || len(told) != 1 || told[0] != err {
				t.Errorf("operation %d: %v, told %v", k, err, told)
			}
		}
		if n != k+1 {
			t.Errorf("operation %d: %d more after the failure", k, n-k-1)
		}
		if _, err := s.Get(keyCurrentTerm); err != errKeyNotFound {
			t.Errorf("what was not written is there: %v", err)
		}
		s.Close()
	}
	s := mustOpenStable(t, newStableFS(t))
	s.failed = func(error) {}
	if err := s.Set(keyLastVoteCand, make([]byte, stableSlot)); err == nil {
		t.Error("a value that is larger than the file was taken")
	}
	s.Close()
}

// TestStableGuard: a goroutine of Raft's ends where it could not store a term,
// and nothing is voted where the replica is broken.
func TestStableGuard(t *testing.T) {
	fs := newStableFS(t)
	s := mustOpenStable(t, fs)
	defer s.Close()
	s.failed = func(error) {}
	dog := newWatchdog(time.Minute, func(string) {})
	g := watchedStable{s, dog}
	if didEnd(func() { _ = g.SetUint64(keyCurrentTerm, 1) }) || didEnd(func() { _ = g.Set(keyLastVoteCand, nil) }) {
		t.Error("it ends although the value was stored")
	}
	dog.dead.Store(true)
	if !didEnd(func() { _ = g.SetUint64(keyCurrentTerm, 2) }) || g.Set(keyLastVoteCand, []byte("x")) == nil {
		t.Error("it votes although the replica is broken")
	}
	dog.dead.Store(false)
	fs.SetHook(func(vfstest.Op) error { return errors.New("broken") })
	if !didEnd(func() { _ = g.SetUint64(keyCurrentTerm, 2) }) {
		t.Error("it goes on although the value was not stored")
	}
	if term, err := g.GetUint64(keyCurrentTerm); term != 1 || err != nil {
		t.Errorf("term %d, %v", term, err)
	}
}

// reslot changes a slot and gives it a right checksum.
func reslot(b []byte, change func(b []byte)) []byte {
	b = slices.Clone(b)
	change(b)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b[12:], castagnoli))
	return b
}

// TestStableRefuses files that are not what was written.
func TestStableRefuses(t *testing.T) {
	fs := newStableFS(t)
	s := mustOpenStable(t, fs)
	var states [][]byte // of the file, after each change
	for i := range uint64(4) {
		if err := s.SetUint64(keyCurrentTerm, i+1); err != nil {
			t.Fatal(err)
		}
		b, err := fs.ReadFile(stableFile)
		if err != nil {
			t.Fatal(err)
		}
		states = append(states, b)
	}
	s.Close()
	last := states[3][:stableSlot]
	older := func(n int) []byte { return states[3-n][:stableSlot] }
	foreign := reslot(last, func(b []byte) { b[16] ^= 1 })
	newer := reslot(last, func(b []byte) { b[12] = 2 })
	long := reslot(last, func(b []byte) { b[40] = 200 })
	twice := func(slot []byte) []byte { return slices.Concat(slot, slot) }
	for name, tc := range map[string]struct {
		content []byte
		want    any
	}{
		"empty":                     {[]byte{}, new(*CorruptError)},
		"one byte":                  {states[3][:1], new(*CorruptError)},
		"one slot":                  {last, new(*CorruptError)},
		"too long":                  {append(twice(last), 0), new(*CorruptError)},
		"text":                      {bytes.Repeat([]byte("no vote\n"), stableSize/8), new(*CorruptError)},
		"zeros":                     {make([]byte, stableSize), new(*CorruptError)},
		"second slot newer":         {slices.Concat(older(1), last), new(*CorruptError)},
		"first two changes ahead":   {slices.Concat(last, older(2)), new(*CorruptError)},
		"one number, two contents":  {slices.Concat(last, reslot(last, func(b []byte) { b[stableHeader+20] ^= 1 })), new(*CorruptError)},
		"half another's":            {slices.Concat(last, foreign), new(*CorruptError)},
		"too many values":           {twice(long), new(*CorruptError)},
		"newer version":             {twice(newer), new(*VersionError)},
		"newer version, half":       {slices.Concat(newer, last), new(*VersionError)},
		"newer version, other half": {slices.Concat(last, newer), new(*VersionError)},
	} {
		if err := fs.Mutate(stableFile, func([]byte) []byte { return slices.Clone(tc.content) }); err != nil {
			t.Fatal(err)
		}
		s, err := openStable(fs, "d", nil)
		if err == nil {
			s.Close()
		}
		if !errors.As(err, tc.want) {
			t.Errorf("%s: %v", name, err)
		}
		if after, _ := fs.ReadFile(stableFile); !bytes.Equal(after, tc.content) {
			t.Errorf("%s: the file was changed", name)
		}
	}
	// What a crash, or rot of one slot, leaves.
	for name, tc := range map[string]struct {
		content []byte
		term    uint64
	}{
		"between the slots":      {slices.Concat(last, older(1)), 4},
		"within the first write": {slices.Concat(make([]byte, stableSlot), older(1)), 3},
		"second slot gone":       {slices.Concat(last, make([]byte, stableSlot)), 4},
	} {
		if err := fs.Mutate(stableFile, func([]byte) []byte { return slices.Clone(tc.content) }); err != nil {
			t.Fatal(err)
		}
		s := mustOpenStable(t, fs)
		if term, err := s.GetUint64(keyCurrentTerm); term != tc.term || err != nil {
			t.Errorf("%s: term %d, %v", name, term, err)
		}
		s.Close()
		// From now on either slot may rot.
		if b, err := fs.ReadFile(stableFile); err != nil || !bytes.Equal(b[:stableSlot], b[stableSlot:]) {
			t.Errorf("%s: the slots differ after opening (%v)", name, err)
		}
	}
}

// TestStableRot changes bits anywhere in the file: opening it either says that
// it is damaged, or gives the very values that were written last.
func TestStableRot(t *testing.T) {
	rng := vfstest.Rand(t)
	fs := newStableFS(t)
	s := mustOpenStable(t, fs)
	var want vote
	for i := range uint64(9) {
		want = vote{i + 3, i + 2, "server-" + string(rune('a'+i))}
		if err := want.write(s); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	content, err := fs.ReadFile(stableFile)
	if err != nil {
		t.Fatal(err)
	}
	refused, fine := 0, 0
	for n := range vfstest.Env(t, "DIURNA_FLIPS", 3000) {
		b := slices.Clone(content)
		at := []int{rng.IntN(len(b))}
		if n%2 == 0 { // where something is
			at[0] = n / 2 % 160
			if n%4 == 0 {
				at[0] += stableSlot
			}
		}
		for rng.IntN(3) == 0 {
			at = append(at, rng.IntN(2)*stableSlot+rng.IntN(160))
		}
		for _, i := range at {
			b[i] ^= 1 << rng.IntN(8)
		}
		if rng.IntN(50) == 0 { // garbage
			for i := at[0]; i < min(at[0]+rng.IntN(600), len(b)); i++ {
				b[i] = byte(rng.Uint32())
			}
		}
		if err := fs.Mutate(stableFile, func([]byte) []byte { return b }); err != nil {
			t.Fatal(err)
		}
		got, err := reopenVote(fs, "d")
		var corrupt *CorruptError
		switch {
		case errors.As(err, &corrupt):
			refused++
		case err != nil || got != want:
			t.Fatalf("bytes %v changed: %+v (%v), want %+v", at, got, err, want)
		default:
			fine++
			// Opening has healed it: the other slot may go now.
			for _, slot := range []int{0, 1} {
				healed, err := fs.ReadFile(stableFile)
				if err != nil {
					t.Fatal(err)
				}
				healed[slot*stableSlot+40] ^= 4
				if err := fs.Mutate(stableFile, func([]byte) []byte { return healed }); err != nil {
					t.Fatal(err)
				}
				if got, err := reopenVote(fs, "d"); err != nil || got != want {
					t.Fatalf("bytes %v, then slot %d: %+v (%v)", at, slot, got, err)
				}
			}
		}
	}
	t.Logf("%d refused, %d harmless", refused, fine)
	if refused == 0 || fine == 0 {
		t.Error("the flips hit nothing, or everything")
	}
}

// TestStableCrash crashes at every operation of some changes, and again while
// opening what that left, and then lets one slot rot: the values are those
// before or after the change that was under way, and once seen they stay.
func TestStableCrash(t *testing.T) {
	rng := vfstest.Rand(t)
	crash := errors.New("crash")
	votes := []vote{{1, 1, "a"}, {2, 2, strings.Repeat("b", 600)}, {3, 2, "c"}}
	for k := 1; ; k++ {
		fs := newStableFS(t)
		s := mustOpenStable(t, fs)
		s.failed = func(error) {}
		n := 0
		fs.SetHook(func(vfstest.Op) error {
			if n++; n >= k {
				return crash
			}
			return nil
		})
		var before, after map[string][]byte // the change under way
		var err error
		for _, v := range votes {
			for _, c := range []struct{ key, value []byte }{
				{keyCurrentTerm, binary.LittleEndian.AppendUint64(nil, v.term)},
				{keyLastVoteTerm, binary.LittleEndian.AppendUint64(nil, v.voteTerm)},
				{keyLastVoteCand, []byte(v.candidate)},
			} {
				if err == nil {
					before = s.values
					after = map[string][]byte{string(c.key): c.value}
					for key, value := range before {
						if key != string(c.key) {
							after[key] = value
						}
					}
					err = s.Set(c.key, c.value)
				}
			}
		}
		s.Close()
		if err == nil {
			t.Logf("%d operations", k-1)
			return
		}
		for range 10 {
			for _, survive := range []vfstest.Survival{vfstest.None, vfstest.Some, vfstest.All} {
				clone := fs.CrashClone(rng, survive)
				// The repair may be interrupted, too.
				stop := rng.IntN(3)
				clone.SetHook(func(vfstest.Op) error {
					if stop--; stop < 0 {
						return crash
					}
					return nil
				})
				if s, err := openStable(clone, "d", nil); err == nil {
					_ = s.repair()
					s.Close()
				}
				clone = clone.CrashClone(rng, survive)
				s := mustOpenStable(t, clone)
				seen := s.values
				s.Close()
				if !sameValues(seen, before) && !sameValues(seen, after) {
					t.Fatalf("operation %d, %v survive: %v, neither %v nor %v", k, survive, seen, before, after)
				}
				at := rng.IntN(stableSize)
				if err := clone.Mutate(stableFile, func(b []byte) []byte { b[at] ^= 1 << rng.IntN(8); return b }); err != nil {
					t.Fatal(err)
				}
				s = mustOpenStable(t, clone)
				if !sameValues(s.values, seen) {
					t.Fatalf("operation %d, %v survive, byte %d rots: %v, was %v", k, survive, at, s.values, seen)
				}
				s.Close()
			}
		}
	}
}

func sameValues(a, b map[string][]byte) bool {
	for key, value := range a {
		if !bytes.Equal(b[key], value) {
			return false
		}
	}
	return len(a) == len(b)
}

// TestStableOlder: a file from a backup does not know of votes since.
func TestStableOlder(t *testing.T) {
	s := mustOpenStable(t, newStableFS(t))
	defer s.Close()
	if err := s.check(0); err != nil {
		t.Error(err)
	}
	var corrupt *CorruptError
	if err := s.check(1); !errors.As(err, &corrupt) {
		t.Error(err)
	}
	if err := (vote{7, 7, "a"}).write(s); err != nil {
		t.Fatal(err)
	}
	if err := s.check(8); !errors.As(err, &corrupt) {
		t.Error(err)
	}
	if err := s.check(7); err != nil {
		t.Error(err)
	}
}

func FuzzStable(f *testing.F) {
	slot, err := (&stableState{id: testReplica, seq: 3, values: map[string][]byte{"a": []byte("b"), "": nil}}).encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(slot[:200], false)
	f.Add(slot[:200], true)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		b = append(slices.Clip(b), make([]byte, max(0, stableSlot-len(b)))...)[:stableSlot]
		if sealed {
			b = reslot(b, func(b []byte) {
				copy(b, stableMagic)
				binary.LittleEndian.PutUint32(b[12:], stableVersion)
			})
		}
		s, err := parseStable("x", b)
		if err != nil {
			return
		}
		again, err := s.encode()
		if err != nil {
			t.Fatal(err)
		}
		if back, err := parseStable("x", again); err != nil || !sameValues(back.values, s.values) || back.id != s.id || back.seq != s.seq {
			t.Fatalf("%+v (%v), was %+v", back, err, s)
		}
	})
}
