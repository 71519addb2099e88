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

// CorruptError: a file of the replica other than the log's own is damaged. The
// log's errors are *logstore.CorruptError.
type CorruptError struct {
	File   string
	Detail string
}

func (e *CorruptError) Error() string { return fmt.Sprintf("%s is damaged: %s", e.File, e.Detail) }
