package replica

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

func newTestFSM() *fsm {
	f := newFSM(0, fsmState{}, &watermark{}, &atomic.Uint64{}, &atomic.Uint64{})
	f.broken = func(err error) { panic(err) }
	return f
}

func TestApply(t *testing.T) {
	f := newTestFSM()
	steps := []struct {
		logs            []*raft.Log
		next, watermark uint64
		applied         uint64
	}{
		{[]*raft.Log{{Index: 1, Type: raft.LogConfiguration, Data: []byte("c")}}, 0, 0, 1},
		{[]*raft.Log{command(3, 1, 0, 2, 1, ""), command(4, 1, 2, 1, 1, "")}, 3, 3, 4},
		{[]*raft.Log{{Index: 5, Type: raft.LogConfiguration}, command(6, 1, 3, 4, 1, "")}, 7, 7, 6},
		// Again, as after a restart from an older snapshot.
		{[]*raft.Log{command(3, 1, 0, 2, 1, "")}, 7, 7, 6},
	}
	for i, step := range steps {
		results := f.ApplyBatch(step.logs)
		if len(results) != len(step.logs) {
			t.Fatalf("step %d: %d results for %d entries", i, len(results), len(step.logs))
		}
		for _, result := range results {
			if err, _ := result.(error); err != nil {
				t.Errorf("step %d: %v", i, err)
			}
		}
		if f.state.NextOffset != step.next || f.watermark.load() != step.watermark || f.applied.Load() != step.applied {
			t.Errorf("step %d: %+v, watermark %d, applied %d; want %+v", i, f.state, f.watermark.load(), f.applied.Load(), step)
		}
	}
}

// TestApplyRefuses: what this version cannot apply ends the state machine, and
// nothing behind it is applied or goes into a snapshot.
func TestApplyRefuses(t *testing.T) {
	newer := new(*VersionError)
	for name, tc := range map[string]struct {
		log  *raft.Log
		want any
	}{
		"extensions":    {&raft.Log{Index: 2, Extensions: []byte("?")}, new(error)},
		"unknown kind":  {controlLog(2, `{"kind":"cursor"}`), newer},
		"unknown field": {controlLog(2, `{"kind":"log_start","offset":1,"shard":3}`), newer},
		"no kind":       {controlLog(2, `{}`), newer},
		"no json":       {controlLog(2, ``), newer},
		"two values":    {controlLog(2, `{"kind":"log_start"}{}`), newer},
	} {
		f := newTestFSM()
		var told []error
		f.broken = func(err error) { told = append(told, err) }
		results := f.ApplyBatch([]*raft.Log{command(1, 1, 0, 5, 1, ""), tc.log, command(3, 1, 5, 5, 1, "")})
		for i, want := range []bool{false, true, true} {
			if err, _ := results[i].(error); (err != nil) != want {
				t.Errorf("%s: entry %d: %v", name, i+1, err)
			}
		}
		f.Apply(command(4, 1, 10, 5, 1, ""))
		if len(told) != 1 || !errors.As(told[0], tc.want) {
			t.Errorf("%s: told %v", name, told)
		}
		if f.watermark.load() != 5 || f.applied.Load() != 1 {
			t.Errorf("%s: watermark %d, applied %d", name, f.watermark.load(), f.applied.Load())
		}
		if _, err := f.Snapshot(); err == nil {
			t.Errorf("%s: it can be left out of a snapshot", name)
		}
	}
}

func controlLog(index uint64, data string) *raft.Log {
	return &raft.Log{Index: index, Term: 1, Type: raft.LogCommand, Data: []byte(data)}
}

func mustControl(t *testing.T, index uint64, c controlEntry) *raft.Log {
	t.Helper()
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return controlLog(index, string(b))
}

func TestControl(t *testing.T) {
	f := newTestFSM()
	f.Apply(command(1, 1, 0, 100, 1, ""))
	stone := func(id string, index uint64) Tombstone {
		return Tombstone{ID: id, Index: index, Time: time.Unix(0, 5).UTC()}
	}
	var logs []*raft.Log
	for i, step := range []struct {
		c       controlEntry
		refused bool
		want    fsmState
	}{
		{controlEntry{Kind: kindClusterID, ClusterID: "x"}, false, fsmState{ClusterID: "x"}},
		{controlEntry{Kind: kindClusterID, ClusterID: "x"}, false, fsmState{ClusterID: "x"}},
		{controlEntry{Kind: kindClusterID, ClusterID: "y"}, true, fsmState{ClusterID: "x"}}, // the first one counts
		{controlEntry{Kind: kindLogStart, Offset: 50}, false, fsmState{ClusterID: "x", FirstOffset: 50}},
		{controlEntry{Kind: kindLogStart, Offset: 40}, false, fsmState{ClusterID: "x", FirstOffset: 50}},
		{controlEntry{Kind: kindLogStart, Offset: 900}, false, fsmState{ClusterID: "x", FirstOffset: 100}},
		{controlEntry{Kind: kindTombstone, ID: "a", Time: 5}, false, fsmState{ClusterID: "x", FirstOffset: 100, Tombstones: []Tombstone{stone("a", 8)}}},
		{controlEntry{Kind: kindTombstone, ID: "b", Time: 5}, false, fsmState{ClusterID: "x", FirstOffset: 100, Tombstones: []Tombstone{stone("a", 8), stone("b", 9)}}},
		{controlEntry{Kind: kindTombstone, ID: "a", Time: 5}, false, fsmState{ClusterID: "x", FirstOffset: 100, Tombstones: []Tombstone{stone("b", 9), stone("a", 10)}}},
		{controlEntry{Kind: kindUntombstone, ID: "b"}, false, fsmState{ClusterID: "x", FirstOffset: 100, Tombstones: []Tombstone{stone("a", 10)}}},
		{controlEntry{Kind: kindUntombstone, ID: "b"}, false, fsmState{ClusterID: "x", FirstOffset: 100, Tombstones: []Tombstone{stone("a", 10)}}},
	} {
		l := mustControl(t, uint64(i)+2, step.c)
		logs = append(logs, l)
		before := f.view()
		text := fmt.Sprint(before)
		if err, _ := f.Apply(l).(error); (err != nil) != step.refused {
			t.Errorf("step %d: %v", i, err)
		}
		step.want.NextOffset = 100
		if got := f.view(); !reflect.DeepEqual(got, step.want) {
			t.Errorf("step %d: %+v, want %+v", i, got, step.want)
		}
		if fmt.Sprint(before) != text {
			t.Errorf("step %d changed what was shown before", i)
		}
		if f.start.Load() != step.want.FirstOffset {
			t.Errorf("step %d: start %d", i, f.start.Load())
		}
	}
	// All of it again, as after a restart; and from a snapshot.
	want := f.view()
	f.ApplyBatch(logs)
	if got := f.view(); !reflect.DeepEqual(got, want) {
		t.Errorf("applied again: %+v, was %+v", got, want)
	}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var back fsmState
	if err := unmarshalStrictly(b, &back); err != nil || !reflect.DeepEqual(back, want) {
		t.Errorf("%+v (%v), was %+v", back, err, want)
	}
}

func TestTombstonesAreBounded(t *testing.T) {
	f := newTestFSM()
	for i := range uint64(maxTombstones + 10) {
		f.Apply(mustControl(t, i+1, controlEntry{Kind: kindTombstone, ID: fmt.Sprint(i)}))
	}
	got := f.view().Tombstones
	if len(got) != maxTombstones || got[0].ID != "10" {
		t.Errorf("%d tombstones, the first of %s", len(got), got[0].ID)
	}
}

// TestForeignCluster: a replica that learns that it is somewhere else stops.
func TestForeignCluster(t *testing.T) {
	f := newTestFSM()
	f.clusterID = func() string { return "ours" }
	var told error
	f.broken = func(err error) { told = err }
	f.Apply(mustControl(t, 1, controlEntry{Kind: kindClusterID, ClusterID: "theirs"}))
	var foreign *ForeignClusterError
	if !errors.As(told, &foreign) || foreign.Ours != "ours" || foreign.Theirs != "theirs" {
		t.Errorf("told %v", told)
	}
}

// TestSnapshotIsOfItsMoment: what is applied while a snapshot is written is not
// in it.
func TestSnapshotIsOfItsMoment(t *testing.T) {
	f := newTestFSM()
	f.Apply(command(1, 1, 0, 5, 1, ""))
	snap, err := f.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	f.Apply(command(2, 1, 5, 5, 1, ""))
	sink := &snapshotSink{file: snapshotFile{Index: 1}}
	if err := snap.Persist(sink); err != nil {
		t.Fatal(err)
	}
	if got := string(sink.file.State); got != `{"next_offset":5}` {
		t.Errorf("snapshot of offset 5: %s", got)
	}
	snap.Release()
}

// TestRestoreRefuses: a snapshot of numbers has no records to install.
func TestRestoreRefuses(t *testing.T) {
	f := newTestFSM()
	r := &closeCounter{Reader: strings.NewReader(`{"next_offset":5}`)}
	if err := f.Restore(r); err == nil || r.closed != 1 || f.watermark.load() != 0 {
		t.Errorf("%v, closed %d times, watermark %d", err, r.closed, f.watermark.load())
	}
}

type closeCounter struct {
	io.Reader
	closed int
}

func (c *closeCounter) Close() error { c.closed++; return nil }

// TestPersistRefuses: Raft applies some entries again after it was sent a
// snapshot that this replica did not need. Until it has caught up, the state is
// of a later index than a snapshot would say.
func TestPersistRefuses(t *testing.T) {
	f := newTestFSM()
	f.Apply(command(7, 1, 0, 5, 1, ""))
	snap, err := f.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if err := snap.Persist(&snapshotSink{file: snapshotFile{Index: 6}}); err == nil {
		t.Error("a snapshot of index 6 has the state of index 7")
	}
	// No-ops are not shown to the state machine.
	if err := snap.Persist(&snapshotSink{file: snapshotFile{Index: 8}}); err != nil {
		t.Error(err)
	}
	if err := snap.Persist(&raft.DiscardSnapshotSink{}); err == nil {
		t.Error("a sink of something else was written to")
	}
}
