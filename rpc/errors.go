package rpc

import (
	"errors"
	"fmt"
)

// Errors that a Log may return. Every one of them except ErrUnknownOutcome
// means, when it answers a proposal, that nothing was appended.
var (
	// ErrUnknownOutcome: the batch was handed to replication and what became of
	// it is not known. It may be in the log now or later.
	ErrUnknownOutcome = errors.New("outcome unknown: the batch may or may not have been appended")
	// ErrNoLeader: no leader is known now.
	ErrNoLeader = errors.New("no leader")
	// ErrOverloaded: too much is in flight already.
	ErrOverloaded = errors.New("too much in flight")
	// ErrClosed: the log is shutting down.
	ErrClosed = errors.New("log is closed")
	// ErrDiskFull: there is no room on the leader's disk. Reads go on.
	ErrDiskFull = errors.New("the disk is full")
)

// OffsetOutOfRangeError: a read outside of what is kept.
type OffsetOutOfRangeError struct{ Offset, First, Next uint64 }

func (e *OffsetOutOfRangeError) Error() string {
	return fmt.Sprintf("offset %d is out of range: the log holds offsets %d up to, not including, %d", e.Offset, e.First, e.Next)
}

// OffsetMismatchError: the batch would not have got its expected offset.
type OffsetMismatchError struct{ Expected, Next uint64 }

func (e *OffsetMismatchError) Error() string {
	return fmt.Sprintf("expected offset %d, but the next offset is %d", e.Expected, e.Next)
}

// NotLeaderError: this node cannot append; the named one leads.
type NotLeaderError struct{ LeaderID, LeaderAddress string }

func (e *NotLeaderError) Error() string {
	return fmt.Sprintf("not the leader: node %s at %s leads", e.LeaderID, e.LeaderAddress)
}

// RecordTooLargeError: one record of a batch is over the limit.
type RecordTooLargeError struct{ Position, Size, Limit int }

func (e *RecordTooLargeError) Error() string {
	return fmt.Sprintf("record %d of the batch has %d bytes, the limit is %d", e.Position, e.Size, e.Limit)
}

// BatchTooLargeError: a batch is over the limit.
type BatchTooLargeError struct{ Size, Limit int }

func (e *BatchTooLargeError) Error() string {
	return fmt.Sprintf("the batch has %d bytes, the limit is %d", e.Size, e.Limit)
}

// CorruptError: stored bytes failed their check. Nothing was repaired or
// skipped.
type CorruptError struct {
	File     string
	Position int64
	Detail   string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s is damaged at byte %d: %s", e.File, e.Position, e.Detail)
}

// ShortBufferError: a read needs a buffer of Need bytes.
type ShortBufferError struct{ Need int }

func (e *ShortBufferError) Error() string {
	return fmt.Sprintf("the buffer must have %d bytes", e.Need)
}

// ErrEmptyBatch: a produce request without records.
var ErrEmptyBatch = errors.New("the batch has no records")

// InvalidArgumentError: a request that cannot mean anything, whatever the log
// holds.
type InvalidArgumentError struct{ Field, Detail string }

func (e *InvalidArgumentError) Error() string { return fmt.Sprintf("%s: %s", e.Field, e.Detail) }

// LogNotFoundError: there is no log of this name.
type LogNotFoundError struct{ Log string }

func (e *LogNotFoundError) Error() string { return fmt.Sprintf("there is no log %q", e.Log) }

// DeniedError: the caller may not do this.
type DeniedError struct{ Subject, Object, Action string }

func (e *DeniedError) Error() string {
	if e.Action == string(ActionPeer) {
		return fmt.Sprintf("%q is not a node of the cluster, which this call is for", e.Subject)
	}
	return fmt.Sprintf("%q may not %s log %q", e.Subject, e.Action, e.Object)
}

// errNoCertificate: a call of nobody in particular.
var errNoCertificate = errors.New("the connection has shown no client certificate, without which nobody may call this")

// QuorumError: a change to the cluster's configuration was refused, because
// what it leaves behind could not agree on anything.
type QuorumError struct {
	// Voters is how many voters there would be, Healthy how many of them are
	// there now.
	Voters, Healthy int
}

func (e *QuorumError) Error() string {
	return fmt.Sprintf("the quorum would be lost: of %d voters that would be left, only %d are healthy", e.Voters, e.Healthy)
}

// UnknownServerError: there is no server of this id in the configuration.
type UnknownServerError struct{ ID string }

func (e *UnknownServerError) Error() string {
	return fmt.Sprintf("there is no server %q in the cluster", e.ID)
}

// NotVoterError: the server is not a voter, and what was asked for takes one.
type NotVoterError struct{ ID string }

func (e *NotVoterError) Error() string { return fmt.Sprintf("server %q is not a voter", e.ID) }

// ForeignClusterError: a node of one cluster was asked in the name of another.
type ForeignClusterError struct{ Ours, Theirs string }

func (e *ForeignClusterError) Error() string {
	return fmt.Sprintf("this node belongs to cluster %s, not to %s", e.Ours, e.Theirs)
}

// UnknownChangeError: a change to the cluster was begun and its outcome is not
// known. It is an ErrUnknownOutcome.
type UnknownChangeError struct{ Cause error }

func (e *UnknownChangeError) Error() string {
	return fmt.Sprintf("outcome unknown: the change may or may not have been made: %v", e.Cause)
}

// Is implements errors.Is.
func (e *UnknownChangeError) Is(target error) bool { return target == ErrUnknownOutcome }
