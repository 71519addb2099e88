package replica

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
)

// logStore makes the segment log a raft.LogStore: Raft's log is the log that
// consumers read, so that a record is written and synced once per node.
//
// It is deliberately not a raft.MonotonicLogStore: Raft would wipe it after
// installing a snapshot, whose point is that the log has just been filled.
type logStore struct {
	log *logstore.Log
	// applied is the index of the last entry the FSM has seen; what is at or
	// below it is committed and must never be cut off.
	applied *atomic.Uint64
	// fatal is told of everything after which the process cannot go on.
	fatal func(error)
}

// Records' place in the log travels with the entry, in Extensions, so that
// Data is the bare payload and every replica stores the leader's numbers.
const extensionSize = 20

func encodeExtensions(base uint64, count uint32, time int64) []byte {
	b := make([]byte, 0, extensionSize)
	b = binary.LittleEndian.AppendUint32(b, count)
	b = binary.LittleEndian.AppendUint64(b, base)
	return binary.LittleEndian.AppendUint64(b, uint64(time))
}

// decodeExtensions returns zeros for an entry without records.
func decodeExtensions(b []byte) (base uint64, count uint32, time int64, err error) {
	switch len(b) {
	case 0:
		return 0, 0, 0, nil
	case extensionSize:
		le := binary.LittleEndian
		return le.Uint64(b[4:]), le.Uint32(b), int64(le.Uint64(b[12:])), nil
	default:
		return 0, 0, 0, fmt.Errorf("%w: an entry has %d bytes of extensions, not %d", logstore.ErrRejected, len(b), extensionSize)
	}
}

// FirstIndex implements raft.LogStore: 0 means empty.
func (s *logStore) FirstIndex() (uint64, error) {
	st := s.log.Stats()
	if st.LastIndex < st.FirstIndex {
		return 0, nil
	}
	return st.FirstIndex, nil
}

// LastIndex implements raft.LogStore: 0 means empty.
func (s *logStore) LastIndex() (uint64, error) {
	st := s.log.Stats()
	if st.LastIndex < st.FirstIndex {
		return 0, nil
	}
	return st.LastIndex, nil
}

// GetLog implements raft.LogStore. Raft compares with ErrLogNotFound by ==, and
// takes every other error for a disagreement between two logs, which it mends
// by sending or cutting; so there must be no other error.
func (s *logStore) GetLog(index uint64, out *raft.Log) error {
	e, _, err := s.log.Entry(index, nil)
	switch {
	case errors.Is(err, logstore.ErrNotFound):
		return raft.ErrLogNotFound
	case errors.Is(err, logstore.ErrClosed):
		// Only Raft's metrics can ask so late: their goroutine is the one that
		// its shutdown does not wait for.
		return err
	case err != nil:
		s.fatal(err)
		panic(fmt.Sprintf("raft needs log entry %d, which cannot be read: %v", index, err))
	}
	*out = raft.Log{
		Index: e.Index,
		Term:  e.Term,
		Type:  raft.LogType(e.Type),
		Data:  e.Payload,
	}
	if e.AppendTime > 0 {
		out.AppendedAt = time.Unix(0, e.AppendTime)
	}
	if e.Count > 0 {
		out.Extensions = encodeExtensions(e.BaseOffset, e.Count, e.AppendTime)
	}
	return nil
}

// StoreLog implements raft.LogStore.
func (s *logStore) StoreLog(log *raft.Log) error { return s.StoreLogs([]*raft.Log{log}) }

// StoreLogs implements raft.LogStore: all of them with one write and one sync.
//
// Entries that do not continue the log are refused, with nothing written; on
// the leader that ends its term, and its next one begins with numbers read
// from the log. Every other failure is the end: Raft would go on with a disk
// of which nothing is known.
func (s *logStore) StoreLogs(logs []*raft.Log) error {
	entries := make([]logstore.Entry, len(logs))
	for i, l := range logs {
		base, count, appended, err := decodeExtensions(l.Extensions)
		if err != nil {
			return err
		}
		// Entries without records bring no time of their own, but get that of
		// the record before them: Raft stamps them when it writes them, and one
		// that overtakes a batch on the way there would be later than it.
		entries[i] = logstore.Entry{
			Index:      l.Index,
			Term:       l.Term,
			Type:       uint8(l.Type),
			Count:      count,
			BaseOffset: base,
			AppendTime: appended,
			Payload:    l.Data,
		}
	}
	err := s.log.Append(entries)
	if err != nil && !errors.Is(err, logstore.ErrRejected) && !errors.Is(err, logstore.ErrTooLarge) && !errors.Is(err, logstore.ErrClosed) {
		s.fatal(err)
	}
	return err
}

// DeleteRange implements raft.LogStore. Raft deletes a suffix when a follower
// holds entries that lost an election; a prefix it never may, retention does
// that.
func (s *logStore) DeleteRange(from, to uint64) error {
	if to < s.log.LastIndex() {
		return nil
	}
	if applied := s.applied.Load(); from <= applied {
		err := fmt.Errorf("raft wants to delete entries %d to %d, but those up to %d are committed", from, to, applied)
		s.fatal(err)
		panic(err.Error())
	}
	err := s.log.TruncateSuffix(from)
	if err != nil {
		s.fatal(err)
	}
	return err
}

var _ raft.LogStore = (*logStore)(nil)
