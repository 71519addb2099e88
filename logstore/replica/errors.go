package replica

import (
	"errors"
	"fmt"
)

var (
	// ErrUnknownOutcome: the entry was handed to Raft and what became of it is
	// not known; it may be in the log now or later.
	ErrUnknownOutcome = errors.New("outcome unknown")
	// ErrNoLeader: no leader is known now. Nothing was appended.
	ErrNoLeader = errors.New("no leader")
	// ErrOverloaded: too much is in flight. Nothing was appended.
	ErrOverloaded = errors.New("too much in flight")
	// ErrClosed: the replica is shutting down. Nothing was appended.
	ErrClosed = errors.New("replica is closed")
	// ErrHangs: Raft does not stop, because it waits for the disk. It may still
	// write to the replica's files.
	ErrHangs = errors.New("raft does not stop: it waits for the disk")
	// ErrStalled: a disk operation took longer than Config.StallLimit. The
	// process must end: the disk may still write when it pleases.
	ErrStalled = errors.New("the disk hangs")
	// ErrDamaged: bytes that were durable are not what was written. This copy of
	// the log is no replica any more; it must be put aside, and its server must
	// come back with nothing, under another id. Wraps a *CorruptError, of this
	// package or of logstore.
	ErrDamaged = errors.New("the replica is damaged")
	// ErrRestart: Raft believes something of the log that is not so any more. The
	// replica must be closed and opened again, on the same files.
	ErrRestart = errors.New("the replica must be opened again")
)

// NotLeaderError: another node leads. Nothing was appended.
type NotLeaderError struct{ LeaderID, LeaderAddress string }

func (e *NotLeaderError) Error() string {
	return fmt.Sprintf("not the leader; node %s at %s is", e.LeaderID, e.LeaderAddress)
}

// OffsetMismatchError: the batch would not have got its expected offset.
// Nothing was appended.
type OffsetMismatchError struct{ Expected, Next uint64 }

func (e *OffsetMismatchError) Error() string {
	return fmt.Sprintf("expected offset %d, the next one is %d", e.Expected, e.Next)
}

// OffsetOutOfRangeError: a read outside of the readable offsets, First up to,
// not including, Next.
type OffsetOutOfRangeError struct{ Offset, First, Next uint64 }

func (e *OffsetOutOfRangeError) Error() string {
	return fmt.Sprintf("offset %d is not in %d–%d", e.Offset, e.First, e.Next)
}

// TooLargeError: a batch does not fit into one entry. Nothing was appended.
type TooLargeError struct{ Size, Limit int }

func (e *TooLargeError) Error() string {
	return fmt.Sprintf("batch has %d bytes, the limit is %d", e.Size, e.Limit)
}

// ForeignClusterError: this replica believes to be in one cluster, and its group
// is another one.
type ForeignClusterError struct {
	Ours, Theirs string // cluster ids
}

func (e *ForeignClusterError) Error() string {
	return fmt.Sprintf("this node belongs to cluster %s, but its log is that of cluster %s", e.Ours, e.Theirs)
}

// VersionError: something was written by a newer Diurna. An older one that went
// on without it would not be a replica any more.
type VersionError struct {
	What   string
	Detail string
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("%s has %s, which this version does not know: use a newer Diurna", e.What, e.Detail)
}

// CorruptError: a file of the replica other than the log's own is damaged. The
// log's errors are *logstore.CorruptError.
type CorruptError struct {
	File   string
	Detail string
}

func (e *CorruptError) Error() string { return fmt.Sprintf("%s is damaged: %s", e.File, e.Detail) }
