package replica

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"
)

// fsm is the replicated state machine. Applying an entry with records moves the
// high watermark and nothing else; one without changes the small state. It is
// deterministic: no clock, no randomness.
//
// Raft calls ApplyBatch, Snapshot and Restore from one goroutine.
type fsm struct {
	watermark *watermark
	applied   *atomic.Uint64 // greatest index applied; never falls
	start     *atomic.Uint64 // first offset that may be read; never falls
	seam      atomic.Uint64  // see fsmState.Seam; never falls
	// clusterID is what this replica believes; "" if it believes nothing.
	clusterID func() string
	// broken is told when the state machine cannot go on.
	broken func(error)
	// onShown, if set, is told how far state has come, onApplied of the last
	// entry that Raft gave.
	onShown, onApplied func(index uint64)
	// install makes a snapshot that a leader sent the current one.
	install func(*staged) (fsmState, error)

	// index is that of the last entry in state: Raft applies entries again
	// after a restart, and after it was sent a snapshot that it did not need.
	index uint64
	dead  bool // what was applied last could not be; nothing is after it

	mu      sync.Mutex // of state, for those outside of Raft's goroutine
	state   fsmState
	changed chan struct{} // closed by the next control entry; nil while nobody waits
}

// newFSM returns a state machine as it was at an index.
func newFSM(index uint64, state fsmState, w *watermark, applied, start *atomic.Uint64) *fsm {
	f := &fsm{clusterID: func() string { return "" }, watermark: w, applied: applied, start: start, index: index, state: state}
	f.show(index)
	return f
}

// show lets readers see the state.
func (f *fsm) show(index uint64) {
	raise(&f.seam, f.state.Seam)
	raise(f.start, f.state.FirstOffset)
	raise(f.applied, index)
	f.watermark.advance(f.state.NextOffset)
	if f.onShown != nil {
		f.onShown(index)
	}
}

// raise is called by one goroutine.
func raise(v *atomic.Uint64, to uint64) {
	if to > v.Load() {
		v.Store(to)
	}
}

// view returns the state. It shares its slices, which never change.
func (f *fsm) view() fsmState {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state
}

// changes returns what is closed by the next change other than the watermark's.
func (f *fsm) changes() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.changed == nil {
		f.changed = make(chan struct{})
	}
	return f.changed
}

func (f *fsm) set(state fsmState, news bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state = state
	if news && f.changed != nil {
		close(f.changed)
		f.changed = nil
	}
}

var errDead = errors.New("an earlier entry could not be applied")

// ApplyBatch implements raft.BatchingFSM, which Raft needs in order to count
// configuration entries as seen: otherwise it puts snapshots off until the
// next command.
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	results := make([]any, len(logs))
	state, news := f.state, false
	for i, l := range logs {
		if f.dead {
			results[i] = errDead
			continue
		}
		if l.Index <= f.index {
			continue
		}
		isNews, answer, err := apply(&state, l)
		if err != nil {
			f.dead = true
			results[i] = err
			f.broken(err)
			continue
		}
		f.index = l.Index
		news = news || isNews
		if answer != nil {
			results[i] = answer
		}
	}
	f.set(state, news)
	f.show(f.index)
	f.checkCluster()
	if f.onApplied != nil {
		f.onApplied(logs[len(logs)-1].Index)
	}
	return results
}

// apply applies one entry. An error means that the state machine cannot go on;
// answer is what its proposer is told.
func apply(state *fsmState, l *raft.Log) (news bool, answer, err error) {
	if l.Type != raft.LogCommand {
		return false, nil, nil
	}
	base, count, _, err := decodeExtensions(l.Extensions)
	if err != nil {
		return false, nil, fmt.Errorf("apply entry %d: %w", l.Index, err)
	}
	if count > 0 {
		state.NextOffset = max(state.NextOffset, base+uint64(count))
		return false, nil, nil
	}
	c, err := parseControl(l.Index, l.Data)
	if err != nil {
		return false, nil, err
	}
	return true, state.control(l.Index, &c), nil
}

// checkCluster ends a replica that is in another cluster than it believes.
func (f *fsm) checkCluster() {
	if err := checkClusterID(f.clusterID(), f.state.ClusterID); err != nil && !f.dead {
		f.dead = true
		f.broken(err)
	}
}

func checkClusterID(ours, theirs string) error {
	if ours != "" && theirs != "" && ours != theirs {
		return &ForeignClusterError{Ours: ours, Theirs: theirs}
	}
	return nil
}

// Apply implements raft.FSM.
func (f *fsm) Apply(l *raft.Log) any { return f.ApplyBatch([]*raft.Log{l})[0] }

// Snapshot implements raft.FSM.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if f.dead {
		return nil, errDead
	}
	return &fsmSnapshot{f.index, f.state}, nil
}

// Restore implements raft.FSM. Raft calls it only to install a snapshot that a
// leader sent and that this replica's snapshot store has staged.
func (f *fsm) Restore(r io.ReadCloser) error {
	snap := unwrap(r)
	if snap == nil {
		return errors.Join(errors.New("a snapshot without records cannot be installed"), r.Close())
	}
	if f.dead {
		return errDead
	}
	state, err := f.install(snap)
	if err != nil {
		return err
	}
	if snap.file.Index > f.index {
		f.index = snap.file.Index
		f.set(state, true)
	}
	f.show(f.index)
	f.checkCluster()
	if snap.restart {
		// It never takes its last entry back (hashicorp/raft issue 697).
		f.broken(fmt.Errorf("%w: raft still believes in the longer log that a snapshot has replaced", ErrRestart))
	}
	return nil
}

// unwrap finds our reader in what Raft made of it.
func unwrap(r io.ReadCloser) *staged {
	for {
		switch v := r.(type) {
		case *staged:
			return v
		case raft.ReadCloserWrapper:
			r = v.WrappedReadCloser()
		default:
			return nil
		}
	}
}

type fsmSnapshot struct {
	index uint64
	state fsmState
}

// Persist implements raft.FSMSnapshot. Raft closes the sink.
func (s *fsmSnapshot) Persist(sink raft.SnapshotSink) error {
	k, ok := sink.(*snapshotSink)
	if !ok {
		return fmt.Errorf("a %T takes no snapshots of this log", sink)
	}
	if s.index > k.file.Index {
		// Raft is about to apply again what is in the state.
		return fmt.Errorf("the state is of index %d, later than the snapshot's %d", s.index, k.file.Index)
	}
	b, err := json.Marshal(s.state)
	if err != nil {
		return err
	}
	k.file.State = b
	return nil
}

// Release implements raft.FSMSnapshot.
func (*fsmSnapshot) Release() {}

var _ raft.BatchingFSM = (*fsm)(nil)
