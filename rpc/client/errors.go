package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Reasons that an Error may carry. Servers send those of the first group, with
// the named metadata; they may send others too, so treat an unknown one by its
// Code. The client makes those of the second.
const (
	ReasonUnknownOutcome   = "UNKNOWN_OUTCOME"
	ReasonOffsetOutOfRange = "OFFSET_OUT_OF_RANGE" // offset, first, next
	ReasonOffsetMismatch   = "OFFSET_MISMATCH"     // expected, next
	ReasonNotLeader        = "NOT_LEADER"          // leader_id, leader_address
	ReasonNoLeader         = "NO_LEADER"
	ReasonRecordTooLarge   = "RECORD_TOO_LARGE" // position, size, limit
	ReasonBatchTooLarge    = "BATCH_TOO_LARGE"  // size, limit
	ReasonInvalidArgument  = "INVALID_ARGUMENT" // field
	ReasonLogNotFound      = "LOG_NOT_FOUND"    // log
	ReasonOverloaded       = "OVERLOADED"
	ReasonTooManyCalls     = "TOO_MANY_CALLS" // limit
	ReasonShuttingDown     = "SHUTTING_DOWN"  // next_offset, for reads
	ReasonCorrupt          = "CORRUPT"        // file, position
	ReasonDenied           = "DENIED"         // subject, object, action
	ReasonNoCertificate    = "CERTIFICATE_REQUIRED"
	ReasonDiskFull         = "DISK_FULL"
	ReasonWouldLoseQuorum  = "WOULD_LOSE_QUORUM" // voters, healthy
	ReasonUnknownServer    = "UNKNOWN_SERVER"    // id
	ReasonNotAVoter        = "NOT_A_VOTER"       // id
	ReasonForeignCluster   = "FOREIGN_CLUSTER"   // cluster_id

	// ReasonUnreachable: no connection could be made.
	ReasonUnreachable = "UNREACHABLE"
	// ReasonTLSFailed: a connection was made and could not be secured. The
	// metadata's cause is one of the Cause constants.
	ReasonTLSFailed = "TLS_FAILED"
	// ReasonConnectionLost: the connection broke during the call.
	ReasonConnectionLost = "CONNECTION_LOST"
	// ReasonTimeout: the caller's context or the AckTimeout ended the wait.
	ReasonTimeout = "TIMEOUT"
	// ReasonProtocol: the server answered something it should not.
	ReasonProtocol = "PROTOCOL"
)

// errorDomain is the google.rpc.ErrorInfo domain of Diurna's own errors: only
// these speak about what became of a batch.
const errorDomain = "diurna"

// ErrClosed is returned by a Producer that was closed.
var ErrClosed = errors.New("producer is closed")

// Error is a call that failed. Get at it with errors.As.
type Error struct {
	// Code is the gRPC status code.
	Code codes.Code
	// Reason is machine-readable, UPPER_SNAKE; see the Reason constants. Empty
	// where a server sent none.
	Reason string
	// Metadata belongs to the reason, for example the first and next offset of
	// OFFSET_OUT_OF_RANGE. May be nil.
	Metadata map[string]string
	// Message tells people what is the case, Advice what they can do about it;
	// the latter may be empty.
	Message, Advice string
	// Definite says, of a produce, that nothing of what the error stands for
	// was or will be appended. When it is false the outcome is unknown: look
	// for the records before sending them again. Reads append nothing. Of a
	// change to the cluster it says that it was and will not be made.
	Definite bool
	// RetryAfter is how long the server asks to wait before trying again; 0
	// where it does not say.
	RetryAfter time.Duration
	// Addr is the address of the node that was asked.
	Addr string

	cause error
}

// Error names the reason, where there is one, after the message.
func (e *Error) Error() string {
	if e.Reason == "" {
		return e.Message
	}
	return fmt.Sprintf("%s (%s)", e.Message, e.Reason)
}

// Unwrap returns the error of the context or of the network that caused e, if
// that is known.
func (e *Error) Unwrap() error { return e.cause }

// Uint reads a number from the metadata.
func (e *Error) Uint(name string) (uint64, bool) {
	n, err := strconv.ParseUint(e.Metadata[name], 10, 64)
	return n, err == nil
}

// Retryable reports whether the same call may succeed later without any change
// to it. For a produce, see also Definite.
func (e *Error) Retryable() bool {
	return e.Code == codes.Unavailable || e.Code == codes.ResourceExhausted || e.Code == codes.Aborted
}

// wrap turns the error of a gRPC call into an *Error. sent says whether
// anything that could append had been handed to the connection before.
func (ep *endpoint) wrap(err error, sent bool) *Error {
	var already *Error
	if errors.As(err, &already) {
		return already
	}
	if errors.Is(err, io.EOF) {
		return ep.protocolError(sent, "the server ended the call without an answer")
	}
	st := status.Convert(err)
	e := &Error{Code: st.Code(), Message: st.Message(), Addr: ep.addr}
	var known bool
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.Domain == errorDomain {
				known, e.Reason, e.Metadata = true, d.Reason, d.Metadata
			}
		case *errdetails.LocalizedMessage:
			e.Advice = d.Message
		case *errdetails.RetryInfo:
			e.RetryAfter = d.GetRetryDelay().AsDuration()
		}
	}
	if known {
		e.Definite = e.Reason != ReasonUnknownOutcome
		return e
	}
	// From here on it is gRPC that speaks, ours or the other side's, and it
	// knows nothing of batches: whatever was sent may have been appended. The
	// one exception never reached a handler.
	e.Definite = !sent || e.Code == codes.Unimplemented
	switch e.Code {
	case codes.Unavailable:
		why := e.Message
		if dialErr := ep.dialErr.Load(); dialErr != nil {
			e.cause, why = *dialErr, rootCause(*dialErr)
		}
		failed, insecure := errors.AsType[*tlsError](e.cause)
		if insecure && !sent {
			e.Reason, e.Metadata, e.Advice = ReasonTLSFailed, map[string]string{"cause": failed.cause}, failed.advice
			e.Message = fmt.Sprintf("no secure connection to %s: %s", ep.addr, failed.Error())
		} else if sent {
			e.Reason, e.Message = ReasonConnectionLost, fmt.Sprintf("lost the connection to %s: %s", ep.addr, why)
		} else {
			e.Reason, e.Message = ReasonUnreachable, fmt.Sprintf("cannot reach a node at %s: %s", ep.addr, why)
		}
	case codes.DeadlineExceeded:
		e.Reason, e.cause = ReasonTimeout, context.DeadlineExceeded
		e.Message = "no answer in time"
	case codes.Canceled:
		e.Reason, e.cause = ReasonTimeout, context.Canceled
		e.Message = "canceled"
	}
	return e
}

func (ep *endpoint) protocolError(sent bool, format string, args ...any) *Error {
	return &Error{
		Code:     codes.Internal,
		Reason:   ReasonProtocol,
		Message:  fmt.Sprintf(format, args...),
		Definite: !sent,
		Addr:     ep.addr,
	}
}

func (ep *endpoint) timeoutError(cause error, message string) *Error {
	e := &Error{Code: codes.DeadlineExceeded, Reason: ReasonTimeout, Message: message, Addr: ep.addr, cause: cause}
	if errors.Is(cause, context.Canceled) {
		e.Code = codes.Canceled
	}
	return e
}

// rootCause is the part of a dial error that people need: the address is
// already beside it.
func rootCause(err error) string {
	if ended, ok := errors.AsType[*endedError](err); ok {
		return ended.Error()
	}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return dns.Err
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		err = op.Err
	}
	var sys *os.SyscallError
	if errors.As(err, &sys) {
		err = sys.Err
	}
	return err.Error()
}
