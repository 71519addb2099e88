package replica

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
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
	gens *generations
	// applied is the index of the last entry the FSM has seen; what is at or
	// below it is committed and must never be cut off.
	applied *atomic.Uint64
	// seam is the first index that Raft may read, see seam.go; nil for 0.
	seam *atomic.Uint64
	// broken is told of everything after which the replica cannot go on; down
	// returns what it was told first.
	broken func(error)
	down   func() error
	// rolled is told when the log has got another segment.
	rolled func()
	// full is told when there was no space for entries.
	full   func()
	recent recent
	// raft is nil until it has started.
	raft atomic.Pointer[raft.Raft]

	// cut: Raft has deleted a suffix, and believes that it is still there until
	// it has stored something in its place. It writes from one goroutine.
	cut bool
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
	st := s.gens.Stats()
	if st.LastIndex < st.FirstIndex {
		return 0, nil
	}
	return st.FirstIndex, nil
}

// LastIndex implements raft.LogStore: 0 means empty.
func (s *logStore) LastIndex() (uint64, error) {
	st := s.gens.Stats()
	if st.LastIndex < st.FirstIndex {
		return 0, nil
	}
	return st.LastIndex, nil
}

// GetLog implements raft.LogStore. Raft compares with ErrLogNotFound by ==, and
// takes every other error for a disagreement between two logs, which it mends
// by sending or cutting; so there must be no other error. Where the log cannot
// be read, the replica ends, and so does the goroutine that asked.
func (s *logStore) GetLog(index uint64, out *raft.Log) error {
	if s.seam != nil && index < s.seam.Load() {
		return raft.ErrLogNotFound
	}
	gen := s.gens.use()
	defer s.gens.release(gen)
	if s.recent.get(gen, index, out) {
		return nil
	}
	e, _, err := gen.log.Entry(index, nil)
	switch {
	case errors.Is(err, logstore.ErrNotFound):
		return raft.ErrLogNotFound
	case errors.Is(err, logstore.ErrClosed):
		// Only Raft's metrics can ask so late: their goroutine is the one that
		// its shutdown does not wait for.
		return err
	case err != nil:
		s.broken(fmt.Errorf("raft needs log entry %d, which cannot be read: %w", index, err))
		runtime.Goexit()
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
// from the log. On a follower it must not happen, see rejected. Without space
// nothing is written either, and Raft tries again. Every other failure is the
// end: Raft would go on with a disk of which nothing is known.
func (s *logStore) StoreLogs(logs []*raft.Log) error {
	if err := s.down(); err != nil {
		return err
	}
	entries := make([]logstore.Entry, len(logs))
	for i, l := range logs {
		base, count, appended, err := decodeExtensions(l.Extensions)
		if err != nil {
			s.rejected(s.gens.log(), logs, err)
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
	gen := s.gens.use()
	defer s.gens.release(gen)
	segments := gen.log.Stats().Segments
	before := gen.log.LastAppendTime()
	err := gen.log.Append(entries)
	switch {
	case err == nil:
		s.cut = false
		s.recent.put(gen, logs, before)
		if gen.log.Stats().Segments != segments {
			s.rolled()
		}
	case errors.Is(err, logstore.ErrClosed):
	case errors.Is(err, logstore.ErrFull):
		s.full()
		if s.cut {
			// Raft takes its last entry back only for another one.
			s.broken(fmt.Errorf("%w: there was no space for the entries that were to replace others: %w", ErrRestart, err))
		}
	case errors.Is(err, logstore.ErrRejected), errors.Is(err, logstore.ErrTooLarge):
		s.rejected(gen.log, logs, err)
	default:
		s.broken(err)
	}
	return err
}

// rejected is told of entries that do not continue the log. Our own may be late,
// see sequencer. A leader's must continue what it has just compared: if their
// index does not, Raft believes something else of the log than what it is, which
// opening it again mends; if their offset, term or size does not, the two logs
// are not copies of each other.
func (s *logStore) rejected(log *logstore.Log, logs []*raft.Log, err error) {
	r := s.raft.Load()
	if r == nil || r.State() == raft.Leader {
		return
	}
	if logs[0].Index != log.LastIndex()+1 {
		err = fmt.Errorf("%w: %w", ErrRestart, err)
	}
	s.broken(fmt.Errorf("the leader's entries from %d on: %w", logs[0].Index, err))
}

// DeleteRange implements raft.LogStore. Raft deletes a suffix when a follower
// holds entries that lost an election; a prefix it never may, retention does
// that.
func (s *logStore) DeleteRange(from, to uint64) error {
	if err := s.down(); err != nil {
		return err
	}
	gen := s.gens.use()
	defer s.gens.release(gen)
	if to < gen.log.LastIndex() {
		return nil
	}
	if applied := s.applied.Load(); from <= applied {
		s.broken(fmt.Errorf("raft wants to delete entries %d to %d, but those up to %d are committed", from, to, applied))
		runtime.Goexit()
	}
	s.cut = true
	s.recent.clear()
	err := gen.log.TruncateSuffix(from)
	if err != nil {
		s.broken(err)
	}
	return err
}

var _ raft.LogStore = (*logStore)(nil)
