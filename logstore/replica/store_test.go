package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// testStore is a logStore on a filesystem in memory that counts what it says
// to be fatal.
type testStore struct {
	logStore
	fs    *vfstest.Mem
	fatal []error
	err   error // that it is down with
	rolls int
}

func newTestStore(t *testing.T) *testStore {
	s := &testStore{fs: vfstest.New()}
	log, err := logstore.Open("log", logstore.Options{FS: s.fs, SegmentSize: logstore.MinSegmentSize})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	s.gens = newGenerations(&generation{log: log, unused: make(chan struct{})})
	s.applied = &atomic.Uint64{}
	s.broken = func(err error) { s.fatal = append(s.fatal, err) }
	s.down = func() error { return s.err }
	s.rolled = func() { s.rolls++ }
	s.full = func() {}
	return s
}

// command makes an entry with records as the sequencer does.
func command(index, term, base uint64, count uint32, at int64, data string) *raft.Log {
	return &raft.Log{
		Index: index, Term: term, Type: raft.LogCommand, Data: []byte(data),
		Extensions: encodeExtensions(base, count, at), AppendedAt: time.Unix(0, at),
	}
}

func (s *testStore) bounds(t *testing.T) [2]uint64 {
	t.Helper()
	first, err1 := s.FirstIndex()
	last, err2 := s.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return [2]uint64{first, last}
}

// didEnd tells whether f ended its goroutine.
func didEnd(f func()) bool {
	returned := make(chan bool, 1)
	go func() {
		ok := false
		defer func() { returned <- ok }()
		f()
		ok = true
	}()
	return !<-returned
}

func TestStoreKeepsEntries(t *testing.T) {
	s := newTestStore(t)
	if got := s.bounds(t); got != [2]uint64{0, 0} {
		t.Fatalf("empty store holds %v", got)
	}
	var out raft.Log
	for _, index := range []uint64{0, 1, 7} {
		// Raft compares with ==; any other error and a follower is stuck.
		if err := s.GetLog(index, &out); err != raft.ErrLogNotFound {
			t.Fatalf("entry %d of an empty store: %v", index, err)
		}
	}

	const at = 1_700_000_000_000_000_000
	logs := []*raft.Log{
		{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: []byte("config")},
		{Index: 2, Term: 2, Type: raft.LogNoop},
		command(3, 2, 0, 5, at, "five"),
		{Index: 4, Term: 2, Type: raft.LogBarrier},
		command(5, 3, 5, 1, at+7, strings.Repeat("x", 9000)), // a segment of its own
		command(6, 3, 6, 1, at+7, ""),
		{Index: 7, Term: 3, Type: raft.LogConfiguration, Data: []byte{0, 1, 2}},
	}
	if err := s.StoreLogs(logs[:4]); err != nil {
		t.Fatal(err)
	}
	for _, l := range logs[4:] {
		if err := s.StoreLog(l); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.bounds(t); got != [2]uint64{1, 7} {
		t.Fatalf("store holds %v, want 1 to 7", got)
	}
	for _, want := range logs {
		out := raft.Log{Index: 99, Extensions: []byte("left over")}
		if err := s.GetLog(want.Index, &out); err != nil {
			t.Fatal(err)
		}
		if out.Index != want.Index || out.Term != want.Term || out.Type != want.Type ||
			!bytes.Equal(out.Data, want.Data) || !bytes.Equal(out.Extensions, want.Extensions) {
			t.Errorf("entry %d is %+v, want %+v", want.Index, out, want)
		}
	}
	for index, want := range map[uint64]time.Time{
		1: {}, // before all records: no time, and not 1970
		3: time.Unix(0, at),
		4: time.Unix(0, at), // that of the record before
		5: time.Unix(0, at+7),
		7: time.Unix(0, at+7),
	} {
		if err := s.GetLog(index, &out); err != nil || !out.AppendedAt.Equal(want) {
			t.Errorf("entry %d was appended at %v (%v), want %v", index, out.AppendedAt, err, want)
		}
	}
	if err := s.GetLog(8, &out); err != raft.ErrLogNotFound {
		t.Errorf("entry behind the end: %v", err)
	}
	if s.fatal != nil {
		t.Errorf("fatal: %v", s.fatal)
	}
}

// TestStoreRefuses: what does not continue the log is an error of the caller,
// which leaves no trace and harms nobody.
func TestStoreRefuses(t *testing.T) {
	s := newTestStore(t)
	if err := s.StoreLogs([]*raft.Log{{Index: 1, Term: 4}, command(2, 4, 0, 3, 100, "abc")}); err != nil {
		t.Fatal(err)
	}
	good := func() *raft.Log { return command(3, 4, 3, 1, 100, "d") }
	changed := func(change func(*raft.Log)) []*raft.Log {
		l := good()
		change(l)
		return []*raft.Log{l}
	}
	before := s.fs.Snapshot()
	for name, logs := range map[string][]*raft.Log{
		"gap":                changed(func(l *raft.Log) { l.Index = 4 }),
		"again":              changed(func(l *raft.Log) { l.Index = 2 }),
		"gap behind":         {good(), command(5, 4, 4, 1, 100, "e")},
		"base too low":       changed(func(l *raft.Log) { l.Extensions = encodeExtensions(2, 1, 100) }),
		"base too high":      changed(func(l *raft.Log) { l.Extensions = encodeExtensions(4, 1, 100) }),
		"base behind":        {good(), command(4, 4, 5, 1, 100, "e")},
		"time falls":         changed(func(l *raft.Log) { l.Extensions = encodeExtensions(3, 1, 99) }),
		"term falls":         changed(func(l *raft.Log) { l.Term = 3 }),
		"too large":          changed(func(l *raft.Log) { l.Data = make([]byte, logstore.MaxPayload+1) }),
		"extensions, short":  changed(func(l *raft.Log) { l.Extensions = l.Extensions[1:] }),
		"extensions, behind": {good(), {Index: 4, Term: 4, Extensions: []byte("?")}},
	} {
		err := s.StoreLogs(logs)
		if !errors.Is(err, logstore.ErrRejected) && !errors.Is(err, logstore.ErrTooLarge) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !reflect.DeepEqual(before, s.fs.Snapshot()) {
		t.Error("something was written")
	}
	if s.fatal != nil {
		t.Errorf("fatal: %v", s.fatal)
	}
	if err := s.StoreLog(good()); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// TestStoreFailure: Raft goes on after an error of its store, so that somebody
// else must be told.
func TestStoreFailure(t *testing.T) {
	for _, kind := range []string{"write", "sync"} {
		s := newTestStore(t)
		if err := s.StoreLog(command(1, 1, 0, 1, 1, "a")); err != nil {
			t.Fatal(err)
		}
		broken := errors.New("broken")
		s.fs.SetHook(func(op vfstest.Op) error {
			if op.Kind == kind && strings.HasSuffix(op.Name, ".log") {
				return broken
			}
			return nil
		})
		if err := s.StoreLog(command(2, 1, 1, 1, 1, "b")); !errors.Is(err, broken) {
			t.Fatalf("%s: %v", kind, err)
		}
		if len(s.fatal) != 1 || !errors.Is(s.fatal[0], broken) {
			t.Fatalf("%s: fatal: %v", kind, s.fatal)
		}
		s.fs.SetHook(nil)
		if err := s.StoreLog(command(2, 1, 1, 1, 1, "b")); !errors.Is(err, logstore.ErrFailed) {
			t.Fatalf("%s: tried again: %v", kind, err)
		}
		_ = s.gens.close()
	}
}

func TestStoreDeleteRange(t *testing.T) {
	s := newTestStore(t)
	for i := range uint64(20) {
		if err := s.StoreLog(command(i+1, 1, i, 1, int64(i), strings.Repeat("y", 500))); err != nil {
			t.Fatal(err)
		}
	}
	s.applied.Store(10)
	steps := []struct {
		from, to uint64
		want     [2]uint64
		ends     bool
	}{
		{1, 5, [2]uint64{1, 20}, false},  // a prefix is not Raft's to delete
		{1, 19, [2]uint64{1, 20}, false}, // nor is one that leaves one entry
		{18, 20, [2]uint64{1, 17}, false},
		{11, 99, [2]uint64{1, 10}, false}, // all that is not applied
		{10, 10, [2]uint64{1, 10}, true},  // applied is committed
		{1, 10, [2]uint64{1, 10}, true},   // the whole log, too
		{11, 10, [2]uint64{1, 10}, false},
	}
	for _, step := range steps {
		fatal := len(s.fatal)
		var err error
		ended := didEnd(func() { err = s.DeleteRange(step.from, step.to) })
		if err != nil || ended != step.ends || (len(s.fatal) > fatal) != step.ends {
			t.Errorf("delete %d to %d: %v, ended %v, fatal %v", step.from, step.to, err, ended, s.fatal[fatal:])
		}
		if got := s.bounds(t); got != step.want {
			t.Errorf("delete %d to %d leaves %v, want %v", step.from, step.to, got, step.want)
		}
	}
	// A new leader's entries take the place of those cut off.
	if err := s.StoreLog(command(11, 2, 10, 3, 50, "new")); err != nil {
		t.Fatal(err)
	}

	s.fs.SetHook(func(op vfstest.Op) error {
		if op.Kind == "truncate" {
			return errors.New("broken")
		}
		return nil
	})
	fatal := len(s.fatal)
	if err := s.DeleteRange(11, 11); err == nil || len(s.fatal) != fatal+1 {
		t.Errorf("truncation failed: %v, fatal %v", err, s.fatal[fatal:])
	}
	s.fs.SetHook(nil)
}

// TestStoreIsNotMonotonic: Raft wipes a MonotonicLogStore after it installed a
// snapshot.
func TestStoreIsNotMonotonic(t *testing.T) {
	var s raft.LogStore = &logStore{}
	if m, ok := s.(raft.MonotonicLogStore); ok && m.IsMonotonic() {
		t.Error("the store is monotonic")
	}
}

// TestStoreDamage: Raft takes an error of GetLog for a log that differs, and
// would begin to cut.
func TestStoreDamage(t *testing.T) {
	s := newTestStore(t)
	if err := s.StoreLogs([]*raft.Log{command(1, 1, 0, 1, 1, "first"), command(2, 1, 1, 1, 1, "second")}); err != nil {
		t.Fatal(err)
	}
	file := fmt.Sprintf("log/%020d.log", 1)
	if err := s.fs.Mutate(file, func(b []byte) []byte {
		b[bytes.Index(b, []byte("first"))] ^= 1
		return b
	}); err != nil {
		t.Fatal(err)
	}
	s.recent.clear() // they have not just been written
	var out raft.Log
	ended := didEnd(func() { _ = s.GetLog(1, &out) })
	var corrupt *logstore.CorruptError
	if !ended || len(s.fatal) != 1 || !errors.As(s.fatal[0], &corrupt) || corrupt.File != file {
		t.Errorf("ended %v, fatal %v", ended, s.fatal)
	}
	if err := s.GetLog(2, &out); err != nil {
		t.Errorf("the entry behind: %v", err)
	}
}

// TestStoreClosed: Raft's metrics may ask for the oldest entry when all is over;
// that is no failure of the disk.
func TestStoreClosed(t *testing.T) {
	s := newTestStore(t)
	if err := s.StoreLog(command(1, 1, 0, 1, 1, "a")); err != nil {
		t.Fatal(err)
	}
	if err := s.gens.close(); err != nil {
		t.Fatal(err)
	}
	s.recent.clear()
	var out raft.Log
	if err := s.GetLog(1, &out); !errors.Is(err, logstore.ErrClosed) {
		t.Errorf("read: %v", err)
	}
	if err := s.StoreLog(command(2, 1, 1, 1, 1, "b")); !errors.Is(err, logstore.ErrClosed) {
		t.Errorf("write: %v", err)
	}
	if s.fatal != nil {
		t.Errorf("fatal: %v", s.fatal)
	}
}

// TestMembershipUnderLoad: Raft's own entries overtake batches on the way to the
// store, and must not make them fail.
func TestMembershipUnderLoad(t *testing.T) {
	r := mustOpen(t, testConfig(t, t.TempDir()))
	defer mustClose(t, r)
	term := r.raft.CurrentTerm()
	stop := make(chan struct{})
	done := make(chan int)
	go func() {
		n := 0
		for ; ; n++ {
			select {
			case <-stop:
				done <- n
				return
			default:
			}
			p, err := r.Propose(context.Background(), batchOf(uint64(n), 1), true)
			if err == nil {
				if n%16 == 0 {
					_, err = result(p)
				}
			}
			if err != nil {
				t.Error(err)
			}
		}
	}()
	for range 100 {
		if err := errors.Join(r.raft.AddNonvoter("b", "b:1", 0, 0).Error(), r.raft.RemoveServer("b", 0, 0).Error()); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	if n := <-done; r.raft.CurrentTerm() != term {
		t.Errorf("term %d after %d batches, was %d", r.raft.CurrentTerm(), n, term)
	}
}

// TestStoreFull: without space nothing is written and nothing is wrong, but
// where Raft has just cut something off that it goes on to believe in.
func TestStoreFull(t *testing.T) {
	s := newTestStore(t)
	large := strings.Repeat("x", 3000)
	for i := range uint64(10) {
		if err := s.StoreLog(command(i+1, 1, i, 1, 1, large)); err != nil {
			t.Fatal(err)
		}
	}
	if s.rolls == 0 {
		t.Error("nobody was told of new segments")
	}
	fill := func() (stored int, err error) {
		for i := s.gens.log().LastIndex(); err == nil; i++ {
			err = s.StoreLogs([]*raft.Log{command(i+1, 2, i, 1, 1, large)})
			stored++
		}
		return stored, err
	}
	s.fs.SetCapacity(s.fs.Used())
	if _, err := fill(); !errors.Is(err, logstore.ErrFull) || s.fatal != nil {
		t.Fatalf("%v, fatal %v", err, s.fatal)
	}
	s.fs.SetCapacity(-1)
	last := s.gens.log().LastIndex()
	if err := s.StoreLog(command(last+1, 2, last, 1, 1, large)); err != nil {
		t.Fatal(err)
	}
	// One cut and its replacement.
	s.fs.SetCapacity(s.fs.Used())
	if err := s.DeleteRange(last+1, last+1); err != nil {
		t.Fatal(err)
	}
	if _, err := fill(); !errors.Is(err, logstore.ErrFull) {
		t.Fatal(err)
	}
	if len(s.fatal) > 0 {
		t.Errorf("after a cut whose replacement was stored: fatal %v", s.fatal)
	}
	last = s.gens.log().LastIndex()
	if err := s.DeleteRange(last, last); err != nil {
		t.Fatal(err)
	}
	several := []*raft.Log{command(last, 3, last-1, 1, 1, large), command(last+1, 3, last, 1, 1, large), command(last+2, 3, last+1, 1, 1, large)}
	if err := s.StoreLogs(several); !errors.Is(err, logstore.ErrFull) || len(s.fatal) != 1 || !errors.Is(s.fatal[0], ErrRestart) {
		t.Errorf("after a cut: %v, fatal %v", err, s.fatal)
	}
}

// TestStoreDown: nothing is stored once the replica is broken.
func TestStoreDown(t *testing.T) {
	s := newTestStore(t)
	if err := s.StoreLog(command(1, 1, 0, 1, 1, "a")); err != nil {
		t.Fatal(err)
	}
	s.err = errors.New("down")
	before := s.fs.Snapshot()
	if err := s.StoreLog(command(2, 1, 1, 1, 1, "b")); err != s.err {
		t.Error(err)
	}
	if err := s.DeleteRange(1, 1); err != s.err {
		t.Error(err)
	}
	if !reflect.DeepEqual(before, s.fs.Snapshot()) {
		t.Error("something was written")
	}
}
