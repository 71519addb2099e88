package replica

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/hashicorp/raft"
)

// fsmState is all that the state machine knows, and all that a local snapshot
// stores: the records stay where they are.
type fsmState struct {
	// NextOffset is the high watermark: the offset after the last committed
	// record.
	NextOffset uint64 `json:"next_offset"`
}

// fsm is the replicated state machine. Applying an entry moves the high
// watermark and nothing else. It is deterministic: no clock, no randomness.
//
// Raft calls ApplyBatch, Snapshot and Restore from one goroutine.
type fsm struct {
	state     fsmState
	watermark *watermark
	applied   *atomic.Uint64
	// onApplied, if set, is told of the last entry of each batch.
	onApplied func(index uint64)
}

// ApplyBatch implements raft.BatchingFSM, which Raft needs in order to count
// configuration entries as seen: otherwise it puts snapshots off until the
// next command. Raft applies entries again after a restart, so that a lower
// watermark than the present one is no news.
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	results := make([]any, len(logs))
	for i, l := range logs {
		results[i] = f.apply(l)
	}
	f.applied.Store(logs[len(logs)-1].Index)
	f.watermark.advance(f.state.NextOffset)
	if f.onApplied != nil {
		f.onApplied(logs[len(logs)-1].Index)
	}
	return results
}

func (f *fsm) apply(l *raft.Log) error {
	if l.Type != raft.LogCommand {
		return nil
	}
	base, count, _, err := decodeExtensions(l.Extensions)
	if err != nil {
		return fmt.Errorf("apply entry %d: %w", l.Index, err)
	}
	f.state.NextOffset = max(f.state.NextOffset, base+uint64(count))
	return nil
}

// Apply implements raft.FSM.
func (f *fsm) Apply(l *raft.Log) any { return f.ApplyBatch([]*raft.Log{l})[0] }

// Snapshot implements raft.FSM.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) { return fsmSnapshot(f.state), nil }

// Restore implements raft.FSM. Raft calls it only to install a snapshot that a
// leader sent; a snapshot of this store has no records to send.
func (f *fsm) Restore(r io.ReadCloser) error {
	return errors.Join(errors.New("a snapshot without records cannot be installed"), r.Close())
}

type fsmSnapshot fsmState

// Persist implements raft.FSMSnapshot.
func (s fsmSnapshot) Persist(sink raft.SnapshotSink) error {
	b, err := json.Marshal(fsmState(s))
	if err == nil {
		_, err = sink.Write(b)
	}
	if err != nil {
		return errors.Join(err, sink.Cancel())
	}
	// Raft closes the sink.
	return nil
}

// Release implements raft.FSMSnapshot.
func (fsmSnapshot) Release() {}

var _ raft.BatchingFSM = (*fsm)(nil)
