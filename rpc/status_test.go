package rpc

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestStatusOf(t *testing.T) {
	next := uint64(7)
	for _, c := range []struct {
		err    error
		code   codes.Code
		reason string
		meta   map[string]string
	}{
		{&OffsetOutOfRangeError{5, 6, 9}, codes.OutOfRange, "OFFSET_OUT_OF_RANGE", map[string]string{"offset": "5", "first": "6", "next": "9"}},
		{&OffsetMismatchError{5, 6}, codes.Aborted, "OFFSET_MISMATCH", map[string]string{"expected": "5", "next": "6"}},
		{&NotLeaderError{"b", "b:1"}, codes.Unavailable, "NOT_LEADER", map[string]string{"leader_id": "b", "leader_address": "b:1"}},
		{ErrNoLeader, codes.Unavailable, "NO_LEADER", nil},
		{ErrUnknownOutcome, codes.Unknown, "UNKNOWN_OUTCOME", nil},
		{fmt.Errorf("%w: %w", ErrUnknownOutcome, context.Canceled), codes.Canceled, "UNKNOWN_OUTCOME", nil},
		{fmt.Errorf("%w: %w", ErrUnknownOutcome, context.DeadlineExceeded), codes.DeadlineExceeded, "UNKNOWN_OUTCOME", nil},
		// Whatever the reason, an unknown outcome must not look repeatable.
		{fmt.Errorf("%w: %w", ErrUnknownOutcome, ErrNoLeader), codes.Unknown, "UNKNOWN_OUTCOME", nil},
		{fmt.Errorf("%w: %w", ErrUnknownOutcome, ErrClosed), codes.Unknown, "UNKNOWN_OUTCOME", nil},
		{&RecordTooLargeError{3, 9, 8}, codes.InvalidArgument, "RECORD_TOO_LARGE", map[string]string{"position": "3", "size": "9", "limit": "8"}},
		{&BatchTooLargeError{9, 8}, codes.InvalidArgument, "BATCH_TOO_LARGE", map[string]string{"size": "9", "limit": "8"}},
		{ErrEmptyBatch, codes.InvalidArgument, "EMPTY_BATCH", nil},
		{&InvalidArgumentError{"time", "is before 1970"}, codes.InvalidArgument, "INVALID_ARGUMENT", map[string]string{"field": "time"}},
		{&LogNotFoundError{"audit"}, codes.NotFound, "LOG_NOT_FOUND", map[string]string{"log": "audit"}},
		{&DeniedError{"a", "b", "produce"}, codes.PermissionDenied, "DENIED", map[string]string{"subject": "a", "object": "b", "action": "produce"}},
		{ErrOverloaded, codes.ResourceExhausted, "OVERLOADED", nil},
		{&tooManyCallsError{limit: 4}, codes.ResourceExhausted, "TOO_MANY_CALLS", map[string]string{"limit": "4"}},
		{&shutdownError{}, codes.Unavailable, "SHUTTING_DOWN", nil},
		{&shutdownError{next: &next}, codes.Unavailable, "SHUTTING_DOWN", map[string]string{"next_offset": "7"}},
		{ErrClosed, codes.Unavailable, "SHUTTING_DOWN", nil},
		{&CorruptError{"00.log", 4096, "checksum"}, codes.DataLoss, "CORRUPT", map[string]string{"file": "00.log", "position": "4096"}},
		{ErrDiskFull, codes.ResourceExhausted, "DISK_FULL", nil},
		{&QuorumError{2, 1}, codes.FailedPrecondition, "WOULD_LOSE_QUORUM", map[string]string{"voters": "2", "healthy": "1"}},
		{&UnknownServerError{"d"}, codes.NotFound, "UNKNOWN_SERVER", map[string]string{"id": "d"}},
		{&NotVoterError{"d"}, codes.FailedPrecondition, "NOT_A_VOTER", map[string]string{"id": "d"}},
		{&ForeignClusterError{"x", "y"}, codes.FailedPrecondition, "FOREIGN_CLUSTER", map[string]string{"cluster_id": "x"}},
		{&UnknownChangeError{ErrNoLeader}, codes.Unknown, "UNKNOWN_OUTCOME", nil},
		{context.DeadlineExceeded, codes.DeadlineExceeded, "DEADLINE_EXCEEDED", nil},
		{context.Canceled, codes.Canceled, "CANCELED", nil},
		{errors.New("bug"), codes.Internal, "INTERNAL", nil},
	} {
		for _, err := range []error{c.err, fmt.Errorf("read: %w", c.err)} {
			got := statusOf(err)
			meta := wantStatus(t, got, c.code, c.reason)
			if len(meta) != len(c.meta) {
				t.Errorf("%v: metadata %v, want %v", err, meta, c.meta)
			}
			for k, v := range c.meta {
				if meta[k] != v {
					t.Errorf("%v: metadata %v, want %v", err, meta, c.meta)
				}
			}
			if again := statusOf(got); status.Convert(again).Proto().String() != status.Convert(got).Proto().String() {
				t.Errorf("%v: a status does not pass unchanged", err)
			}
			if more := wantStatus(t, statusWith(got, map[string]string{"request": "1"}), c.code, c.reason); more["request"] != "1" || len(more) != len(c.meta)+1 {
				t.Errorf("%v: metadata %v after adding to it", err, more)
			}
		}
	}
	if statusOf(nil) != nil {
		t.Error("no error is an error")
	}
}
