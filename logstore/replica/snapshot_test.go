package replica

import (
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

const snapDir = "data/snapshots"

var testServers = raft.Configuration{Servers: []raft.Server{
	{ID: "a", Address: "a:1", Suffrage: raft.Voter}, {ID: "b", Address: "b:1", Suffrage: raft.Nonvoter},
}}

func mustOpenSnapshots(t testing.TB, fs *vfstest.Mem) *snapshotDir {
	t.Helper()
	s, err := openSnapshots(fs, snapDir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// asStore is the directory as Raft's snapshot store, without a log.
func asStore(s *snapshotDir) *snapshotStore {
	return &snapshotStore{cfg: &Config{FS: s.fs}, gens: newGenerations(&generation{snapshots: s})}
}

// takeSnapshot does what Raft does.
func takeSnapshot(s *snapshotDir, index, term, next uint64) error {
	sink, err := asStore(s).Create(raft.SnapshotVersionMax, index, term, testServers, 1, nil)
	if err != nil {
		return err
	}
	if err := (&fsmSnapshot{index, fsmState{NextOffset: next}}).Persist(sink); err != nil {
		return err
	}
	return errors.Join(sink.Close(), sink.Close())
}

// listed returns the index that Raft would start from; 0 if there is none.
func listed(s *snapshotDir) (uint64, error) {
	metas, err := asStore(s).List()
	if err != nil || len(metas) == 0 {
		return 0, err
	}
	return metas[0].Index, nil
}

func TestSnapshotKeepsTwo(t *testing.T) {
	fs := vfstest.New()
	s := mustOpenSnapshots(t, fs)
	if metas, err := asStore(s).List(); err != nil || len(metas) > 0 {
		t.Fatalf("empty store: %v, %v", metas, err)
	}
	for i := uint64(1); i <= 12; i++ {
		if err := takeSnapshot(s, i*100, i, i*1000); err != nil {
			t.Fatal(err)
		}
		metas, err := asStore(s).List()
		if err != nil || len(metas) != 1 {
			t.Fatalf("%v, %v", metas, err)
		}
		m := metas[0]
		if m.Index != i*100 || m.Term != i || m.ConfigurationIndex != 1 || !slices.Equal(m.Configuration.Servers, testServers.Servers) {
			t.Fatalf("snapshot %d: %+v", i, m)
		}
		f, err := s.read(m.ID)
		if err != nil {
			t.Fatal(err)
		}
		var state fsmState
		if err := unmarshalStrictly(f.State, &state); err != nil || state.NextOffset != i*1000 {
			t.Fatalf("state %q: %v", f.State, err)
		}
		if n := len(fs.Names()); n != min(int(i), snapshotsKept) {
			t.Fatalf("%d files after snapshot %d", n, i)
		}
		// The same one again, as when Raft retries.
		if err := takeSnapshot(s, i*100, i, i*1000); err != nil {
			t.Fatal(err)
		}
	}
	if err := takeSnapshot(s, 1150, 12, 1); err == nil {
		t.Error("an older snapshot took the newest one's place")
	}
	if got, err := listed(s); got != 1200 || err != nil {
		t.Errorf("newest is %d, %v", got, err)
	}
	sink, err := asStore(s).Create(1, 5000, 12, testServers, 1, nil)
	if err := errors.Join(err, sink.Cancel(), sink.Close()); err != nil {
		t.Error(err)
	}
	if got, err := listed(s); got != 1200 || err != nil {
		t.Errorf("after a cancelled one the newest is %d, %v", got, err)
	}
}

// TestSnapshotDamage: the older one stands in for a damaged one, but not nothing.
func TestSnapshotDamage(t *testing.T) {
	fs := vfstest.New()
	s := mustOpenSnapshots(t, fs)
	for i := range uint64(2) {
		if err := takeSnapshot(s, 100+i, 1, 1000+i); err != nil {
			t.Fatal(err)
		}
	}
	flip := func(b []byte) []byte { b[len(b)/2] ^= 4; return b }
	older, newer := s.path(snapshotID(100, 1)), s.path(snapshotID(101, 1))
	if err := fs.Mutate(newer, flip); err != nil {
		t.Fatal(err)
	}
	f, damage, err := s.newest()
	if err != nil || f.Index != 100 || damage == nil || !strings.Contains(damage.Error(), newer) {
		t.Fatalf("%+v, damage %v, %v", f, damage, err)
	}
	if got, err := listed(s); got != 100 || err != nil {
		t.Fatalf("newest is %d, %v", got, err)
	}
	// The next one leaves the good one to fall back to.
	if err := takeSnapshot(s, 102, 1, 1002); err != nil {
		t.Fatal(err)
	}
	if got := fs.Names(); !slices.Equal(got, []string{older, s.path(snapshotID(102, 1))}) {
		t.Fatalf("files: %v", got)
	}
	for _, name := range fs.Names() {
		if err := fs.Mutate(name, flip); err != nil {
			t.Fatal(err)
		}
	}
	_, err = asStore(s).List()
	var corrupt *CorruptError
	if !errors.As(err, &corrupt) || !strings.Contains(err.Error(), older) || !strings.Contains(err.Error(), s.path(snapshotID(102, 1))) {
		t.Errorf("all damaged: %v", err)
	}
	if _, _, err := asStore(s).Open(snapshotID(102, 1)); !errors.As(err, &corrupt) {
		t.Errorf("open: %v", err)
	}
}

// TestSnapshotFlips: no flipped bit goes unnoticed.
func TestSnapshotFlips(t *testing.T) {
	f := snapshotFile{Index: 7, Term: 3, Configuration: raft.EncodeConfiguration(testServers), ConfigurationIndex: 2, State: []byte(`{"next_offset":9}`)}
	good, err := encodeSnapshot(&f)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := parseSnapshot("x", good); err != nil || fmt.Sprint(*got) != fmt.Sprint(f) {
		t.Fatalf("%+v, %v", got, err)
	}
	for bit := range len(good) * 8 {
		b := slices.Clone(good)
		b[bit/8] ^= 1 << (bit % 8)
		if _, err := parseSnapshot("x", b); err == nil {
			t.Errorf("bit %d of byte %d", bit%8, bit/8)
		}
	}
	for n := range good {
		if _, err := parseSnapshot("x", good[:n]); err == nil {
			t.Errorf("cut to %d bytes", n)
		}
	}
	if _, err := parseSnapshot("x", append(slices.Clone(good), 'x')); err == nil {
		t.Error("a byte too many")
	}
}

// reseal gives a body a right checksum.
func reseal(t testing.TB, body string) []byte {
	t.Helper()
	return fmt.Appendf(nil, "%s\n%08x\n%s\n", snapshotMagic, crc32.Checksum([]byte(body), castagnoli), body)
}

// TestSnapshotContradictions: content that was written so, by something else.
func TestSnapshotContradictions(t *testing.T) {
	const c = `"configuration":"ku5TZXJ2ZXJzkA=="`
	for name, body := range map[string]string{
		"unknown field":   `{"index":7,"term":3,"configuration":"kA==","configuration_index":2,"state":{},"shard":1}`,
		"no json":         `index 7`,
		"two values":      `{"index":7} {"index":8}`,
		"no servers":      `{"index":7,"term":3,"configuration":"","configuration_index":2,"state":{}}`,
		"no servers here": `{"index":7,"term":3,"configuration":"wcHB","configuration_index":2,"state":{}}`,
		"negative":        `{"index":-7,"term":3,` + c + `,"configuration_index":2,"state":{}}`,
	} {
		if f, err := parseSnapshot("x", reseal(t, body)); err == nil {
			t.Errorf("%s: %+v", name, f)
		}
	}
	fs := vfstest.New()
	s := mustOpenSnapshots(t, fs)
	if err := takeSnapshot(s, 7, 3, 9); err != nil {
		t.Fatal(err)
	}
	if err := fs.Rename(s.path(snapshotID(7, 3)), s.path(snapshotID(8, 3))); err != nil {
		t.Fatal(err)
	}
	var corrupt *CorruptError
	if _, err := asStore(s).List(); !errors.As(err, &corrupt) {
		t.Errorf("under another one's name: %v", err)
	}
}

// TestSnapshotCrash crashes at every operation of taking a snapshot: there is
// always the old one or the new one, and never a leftover.
func TestSnapshotCrash(t *testing.T) {
	rng := vfstest.Rand(t)
	crash := errors.New("crash")
	for k := 1; ; k++ {
		fs := vfstest.New()
		s := mustOpenSnapshots(t, fs)
		for i := range uint64(3) {
			if err := takeSnapshot(s, 100+i, 1, i); err != nil {
				t.Fatal(err)
			}
		}
		n := 0
		fs.SetHook(func(vfstest.Op) error {
			if n++; n >= k {
				return crash
			}
			return nil
		})
		err := takeSnapshot(s, 200, 1, 5)
		if err == nil {
			if k < 5 {
				t.Errorf("only %d operations", k-1)
			}
			return
		}
		if !errors.Is(err, crash) {
			t.Fatal(err)
		}
		for range 20 {
			for _, survive := range []vfstest.Survival{vfstest.None, vfstest.Some, vfstest.All} {
				checkAfterSnapshotCrash(t, fs.CrashClone(rand.New(rand.NewPCG(rng.Uint64(), 0)), survive), fmt.Sprintf("operation %d, %v survive", k, survive))
			}
		}
	}
}

func checkAfterSnapshotCrash(t *testing.T, fs *vfstest.Mem, when string) {
	t.Helper()
	s := mustOpenSnapshots(t, fs)
	for _, name := range fs.Names() {
		if strings.HasSuffix(name, ".tmp") {
			t.Errorf("%s: %s is left over", when, name)
		}
	}
	_, damage, err := s.newest()
	if err != nil || damage != nil {
		t.Errorf("%s: damage %v, %v", when, damage, err)
	}
	got, err := listed(s)
	if err != nil || got != 102 && got != 200 {
		t.Errorf("%s: newest is %d, %v", when, got, err)
	}
	if err := takeSnapshot(s, 300, 1, 6); err != nil {
		t.Errorf("%s: the next one: %v", when, err)
	}
	if n := len(fs.Names()); n != snapshotsKept {
		t.Errorf("%s: %d files after the next one", when, n)
	}
}

// TestSnapshotDurable: a snapshot that was taken survives any crash.
func TestSnapshotDurable(t *testing.T) {
	rng := vfstest.Rand(t)
	fs := vfstest.New()
	s := mustOpenSnapshots(t, fs)
	for i := uint64(1); i < 20; i++ {
		if err := takeSnapshot(s, i, 1, i); err != nil {
			t.Fatal(err)
		}
		for _, survive := range []vfstest.Survival{vfstest.None, vfstest.Some, vfstest.All} {
			if got, err := listed(mustOpenSnapshots(t, fs.CrashClone(rng, survive))); got != i || err != nil {
				t.Errorf("snapshot %d, %v survive: newest is %d, %v", i, survive, got, err)
			}
		}
	}
}

func FuzzSnapshot(f *testing.F) {
	good, err := encodeSnapshot(&snapshotFile{Index: 7, Term: 3, Configuration: raft.EncodeConfiguration(testServers), State: []byte(`{"next_offset":9}`)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, false)
	f.Add([]byte(`{"index":1,"configuration":"kA==","state":null}`), true)
	f.Add([]byte{}, false)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		if sealed {
			b = reseal(t, string(b))
		}
		s, err := parseSnapshot("x", b)
		if err != nil {
			return
		}
		s.meta() // decodes the configuration
		var state fsmState
		_ = unmarshalStrictly(s.State, &state)
		again, err := encodeSnapshot(s)
		if s.State == nil {
			return // Raft's sink never leaves it out
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseSnapshot("x", again); err != nil {
			t.Fatalf("%q: %v", again, err)
		}
	})
}
