package replica

import (
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/raft"
)

func newTestFSM() *fsm { return &fsm{watermark: &watermark{}, applied: &atomic.Uint64{}} }

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
		{[]*raft.Log{command(3, 1, 0, 2, 1, "")}, 7, 7, 3},
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
	if err, _ := f.Apply(&raft.Log{Index: 7, Type: raft.LogCommand, Extensions: []byte("?")}).(error); err == nil {
		t.Error("an entry that cannot be read was applied")
	}
	if f.watermark.load() != 7 {
		t.Errorf("and moved the watermark to %d", f.watermark.load())
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
	sink := &snapshotSink{}
	if err := snap.Persist(sink); err != nil {
		t.Fatal(err)
	}
	if got := sink.state.String(); got != `{"next_offset":5}` {
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

type brokenSink struct{ snapshotSink }

var errBroken = errors.New("broken")

func (*brokenSink) Write([]byte) (int, error) { return 0, errBroken }

func TestPersistFailure(t *testing.T) {
	sink := &brokenSink{}
	if err := (fsmSnapshot{}).Persist(sink); !errors.Is(err, errBroken) || !sink.done {
		t.Errorf("%v, cancelled %v", err, sink.done)
	}
}
