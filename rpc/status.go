package rpc

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// ErrorDomain is the domain of every google.rpc.ErrorInfo that Diurna sends.
const ErrorDomain = "diurna"

// Reasons of google.rpc.ErrorInfo, with the metadata that comes along. They
// are part of the contract with clients.
const (
	ReasonOffsetOutOfRange = "OFFSET_OUT_OF_RANGE" // offset, first, next
	ReasonOffsetMismatch   = "OFFSET_MISMATCH"     // expected, next
	ReasonNotLeader        = "NOT_LEADER"          // leader_id, leader_address
	ReasonNoLeader         = "NO_LEADER"
	ReasonUnknownOutcome   = "UNKNOWN_OUTCOME"
	ReasonRecordTooLarge   = "RECORD_TOO_LARGE" // position, size, limit
	ReasonBatchTooLarge    = "BATCH_TOO_LARGE"  // size, limit
	ReasonEmptyBatch       = "EMPTY_BATCH"
	ReasonInvalidArgument  = "INVALID_ARGUMENT" // field
	ReasonLogNotFound      = "LOG_NOT_FOUND"    // log
	ReasonOverloaded       = "OVERLOADED"
	ReasonTooManyCalls     = "TOO_MANY_CALLS" // limit
	ReasonShuttingDown     = "SHUTTING_DOWN"  // next_offset, for reads
	ReasonCorrupt          = "CORRUPT"        // file, position
	ReasonDenied           = "DENIED"         // subject, object, action
	ReasonNoCertificate    = "CERTIFICATE_REQUIRED"
	ReasonDeadlineExceeded = "DEADLINE_EXCEEDED"
	ReasonCanceled         = "CANCELED"
	ReasonDiskFull         = "DISK_FULL"
	ReasonWouldLoseQuorum  = "WOULD_LOSE_QUORUM" // voters, healthy
	ReasonUnknownServer    = "UNKNOWN_SERVER"    // id
	ReasonNotAVoter        = "NOT_A_VOTER"       // id
	ReasonForeignCluster   = "FOREIGN_CLUSTER"   // cluster_id
	ReasonInternal         = "INTERNAL"
)

// Metadata that the final error of a ProduceStream carries besides its own.
const (
	// MetaRequest is the position on the stream, from 0, of the request that
	// failed: the first that was not acknowledged.
	MetaRequest = "request"
	// MetaAppendedAfter lists the positions of later requests that were
	// appended all the same, as "5,7-9". Absent when there are none.
	MetaAppendedAfter = "appended_after"
	// MetaUnknownAfter lists those of later requests that may have been.
	MetaUnknownAfter = "unknown_after"
)

// How long clients are told to wait before they try again.
const (
	retryOverloaded = 100 * time.Millisecond
	retryElection   = 500 * time.Millisecond
	retryElsewhere  = 50 * time.Millisecond
	retryCalls      = time.Second
	retryFull       = 5 * time.Second
)

// tooManyCallsError refuses a call that would be one too many.
type tooManyCallsError struct {
	limit int
	what  string // "" for calls
}

func (e *tooManyCallsError) Error() string {
	if e.what != "" {
		return fmt.Sprintf("this node serves %d %s already, which is as many as it will", e.limit, e.what)
	}
	return fmt.Sprintf("more than %d calls are open", e.limit)
}

// shutdownError ends a call because the server is going away.
type shutdownError struct {
	next *uint64 // where a read goes on, if it is one
}

func (e *shutdownError) Error() string {
	if e.next == nil {
		return "shutting down, go on elsewhere"
	}
	return fmt.Sprintf("shutting down, go on at offset %d elsewhere", *e.next)
}

// description is an error as clients get to see it.
type description struct {
	code     codes.Code
	reason   string
	metadata map[string]string
	advice   string // what a person can do about it
	retry    time.Duration
}

// statusOf turns an error into the gRPC status that a client gets. It is the
// only place that knows codes. Errors that are statuses already, such as those
// of a node that a call was forwarded to, pass unchanged.
//
// An unknown outcome is codes.Unknown and not Unavailable: gRPC's retry
// policies and service meshes repeat Unavailable by themselves, which would
// append the batch twice. Everything that is Unavailable here is therefore
// safe to repeat.
func statusOf(err error) error {
	return statusWith(err, nil)
}

// statusWith is statusOf with further metadata.
func statusWith(err error, more map[string]string) error {
	if err == nil {
		return nil
	}
	var d description
	if st, ok := status.FromError(err); ok {
		if len(more) == 0 {
			return st.Err()
		}
		return addMetadata(st, more).Err()
	}
	d = describe(err)
	if d.metadata == nil {
		d.metadata = more
	} else {
		for k, v := range more {
			d.metadata[k] = v
		}
	}
	details := []protoadapt.MessageV1{
		&errdetails.ErrorInfo{Domain: ErrorDomain, Reason: d.reason, Metadata: d.metadata},
		&errdetails.LocalizedMessage{Locale: "en-US", Message: d.advice},
	}
	if d.retry > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(d.retry)})
	}
	st := status.New(d.code, err.Error())
	if full, derr := st.WithDetails(details...); derr == nil {
		st = full
	}
	return st.Err()
}

func describe(err error) description {
	var (
		outOfRange *OffsetOutOfRangeError
		mismatch   *OffsetMismatchError
		notLeader  *NotLeaderError
		record     *RecordTooLargeError
		batch      *BatchTooLargeError
		corrupt    *CorruptError
		invalid    *InvalidArgumentError
		notFound   *LogNotFoundError
		denied     *DeniedError
		calls      *tooManyCallsError
		shutdown   *shutdownError
		change     *UnknownChangeError
		quorum     *QuorumError
		server     *UnknownServerError
		voter      *NotVoterError
		foreign    *ForeignClusterError
	)
	switch {
	case errors.As(err, &change):
		return description{
			code: codes.Unknown, reason: ReasonUnknownOutcome,
			advice: "Look at the list of servers (`diurna operator raft list-peers`) before trying again.",
		}
	// First, because it may wrap the reason why the outcome is unknown.
	case errors.Is(err, ErrUnknownOutcome):
		d := description{
			code: codes.Unknown, reason: ReasonUnknownOutcome,
			advice: "The batch may or may not be in the log. Read the end of the log before sending it again, or send it with expected_offset so that it cannot be appended twice.",
		}
		if errors.Is(err, context.DeadlineExceeded) {
			d.code = codes.DeadlineExceeded
		} else if errors.Is(err, context.Canceled) {
			d.code = codes.Canceled
		}
		return d
	case errors.As(err, &outOfRange):
		advice := "The log ends before this offset. Start at next to wait for new records."
		if outOfRange.Offset < outOfRange.First {
			advice = "Records before first were deleted by retention. Start at first, or at earliest, and treat the gap as lost."
		}
		return description{
			code: codes.OutOfRange, reason: ReasonOffsetOutOfRange, advice: advice,
			metadata: map[string]string{
				"offset": utoa(outOfRange.Offset), "first": utoa(outOfRange.First), "next": utoa(outOfRange.Next),
			},
		}
	case errors.As(err, &mismatch):
		return description{
			code: codes.Aborted, reason: ReasonOffsetMismatch,
			advice:   "Another producer has appended in between, or this batch is in the log already. Read from the expected offset, then decide anew.",
			metadata: map[string]string{"expected": utoa(mismatch.Expected), "next": utoa(mismatch.Next)},
		}
	case errors.As(err, &notLeader):
		return description{
			code: codes.Unavailable, reason: ReasonNotLeader, retry: retryElsewhere,
			advice:   "This node cannot append. Send the batch to the leader.",
			metadata: map[string]string{"leader_id": notLeader.LeaderID, "leader_address": notLeader.LeaderAddress},
		}
	case errors.Is(err, ErrNoLeader):
		return description{
			code: codes.Unavailable, reason: ReasonNoLeader, retry: retryElection,
			advice: "The cluster is electing a leader, or has lost its quorum. Try again; if it lasts, check how many servers are up.",
		}
	case errors.As(err, &record):
		return description{
			code: codes.InvalidArgument, reason: ReasonRecordTooLarge,
			advice:   "Store large values elsewhere and append a reference to them, or raise the server's record limit.",
			metadata: map[string]string{"position": itoa(record.Position), "size": itoa(record.Size), "limit": itoa(record.Limit)},
		}
	case errors.As(err, &batch):
		return description{
			code: codes.InvalidArgument, reason: ReasonBatchTooLarge,
			advice:   "Send the records in several smaller batches.",
			metadata: map[string]string{"size": itoa(batch.Size), "limit": itoa(batch.Limit)},
		}
	case errors.Is(err, ErrEmptyBatch):
		return description{
			code: codes.InvalidArgument, reason: ReasonEmptyBatch,
			advice: "Put at least one record into the request.",
		}
	case errors.As(err, &invalid):
		return description{
			code: codes.InvalidArgument, reason: ReasonInvalidArgument,
			advice:   "The request makes no sense as it is; correct the named field.",
			metadata: map[string]string{"field": invalid.Field},
		}
	case errors.As(err, &notFound):
		return description{
			code: codes.NotFound, reason: ReasonLogNotFound,
			advice:   `Leave the log's name empty, or use "default".`,
			metadata: map[string]string{"log": notFound.Log},
		}
	case errors.As(err, &denied):
		return description{
			code: codes.PermissionDenied, reason: ReasonDenied,
			advice:   "Ask whoever runs this cluster for the permission, or use another client certificate.",
			metadata: map[string]string{"subject": denied.Subject, "object": denied.Object, "action": denied.Action},
		}
	case errors.Is(err, errNoCertificate):
		return description{
			code: codes.Unauthenticated, reason: ReasonNoCertificate,
			advice: "Connect with a client certificate that is signed by a CA which the cluster trusts.",
		}
	case errors.Is(err, ErrOverloaded):
		return description{
			code: codes.ResourceExhausted, reason: ReasonOverloaded, retry: retryOverloaded,
			advice: "The log has as much under way as it takes. Try again a little later, or use ProduceStream, which waits.",
		}
	case errors.As(err, &calls):
		return description{
			code: codes.ResourceExhausted, reason: ReasonTooManyCalls, retry: retryCalls,
			advice:   "Close streams that are not needed, use another server, or raise the server's limit.",
			metadata: map[string]string{"limit": itoa(calls.limit)},
		}
	case errors.As(err, &shutdown):
		d := description{
			code: codes.Unavailable, reason: ReasonShuttingDown, retry: retryElsewhere,
			advice: "This server is going away. Go on with another one.",
		}
		if shutdown.next != nil {
			d.metadata = map[string]string{"next_offset": utoa(*shutdown.next)}
		}
		return d
	case errors.Is(err, ErrClosed):
		return description{
			code: codes.Unavailable, reason: ReasonShuttingDown, retry: retryElsewhere,
			advice: "This server is going away. Go on with another one.",
		}
	case errors.As(err, &corrupt):
		return description{
			code: codes.DataLoss, reason: ReasonCorrupt,
			advice:   "This server's copy is damaged at the named place. Read from another server, and have this one healed.",
			metadata: map[string]string{"file": corrupt.File, "position": strconv.FormatInt(corrupt.Position, 10)},
		}
	case errors.Is(err, ErrDiskFull):
		return description{
			code: codes.ResourceExhausted, reason: ReasonDiskFull, retry: retryFull,
			advice: "Make room on the leader's disk, or keep less: see retention. Records that are stored can be read.",
		}
	case errors.As(err, &quorum):
		return description{
			code: codes.FailedPrecondition, reason: ReasonWouldLoseQuorum,
			advice:   "Bring servers back, or add some, before removing this one.",
			metadata: map[string]string{"voters": itoa(quorum.Voters), "healthy": itoa(quorum.Healthy)},
		}
	case errors.As(err, &server):
		return description{
			code: codes.NotFound, reason: ReasonUnknownServer,
			advice:   "See the list of servers (`diurna operator raft list-peers`) for the ids there are.",
			metadata: map[string]string{"id": server.ID},
		}
	case errors.As(err, &voter):
		return description{
			code: codes.FailedPrecondition, reason: ReasonNotAVoter,
			advice:   "Name a voter, or wait until this server has caught up and becomes one.",
			metadata: map[string]string{"id": voter.ID},
		}
	case errors.As(err, &foreign):
		return description{
			code: codes.FailedPrecondition, reason: ReasonForeignCluster,
			advice:   "Use the address of a node of the cluster that is meant.",
			metadata: map[string]string{"cluster_id": foreign.Ours},
		}
	case errors.Is(err, context.DeadlineExceeded):
		return description{
			code: codes.DeadlineExceeded, reason: ReasonDeadlineExceeded,
			advice: "The call's time was up. Nothing was appended by it.",
		}
	case errors.Is(err, context.Canceled):
		return description{
			code: codes.Canceled, reason: ReasonCanceled,
			advice: "The caller gave up. Nothing was appended by it.",
		}
	default:
		return description{
			code: codes.Internal, reason: ReasonInternal,
			advice: "The server met an error it has no name for. Its log says more.",
		}
	}
}

// addMetadata puts metadata into the ErrorInfo of a status that another node
// made.
func addMetadata(st *status.Status, more map[string]string) *status.Status {
	p := st.Proto()
	for i, any := range p.GetDetails() {
		info := new(errdetails.ErrorInfo)
		if any.UnmarshalTo(info) != nil {
			continue
		}
		if info.Metadata == nil {
			info.Metadata = map[string]string{}
		}
		for k, v := range more {
			info.Metadata[k] = v
		}
		if any.MarshalFrom(info) != nil {
			return st
		}
		p.Details[i] = any
		return status.FromProto(p)
	}
	return st
}

func utoa(v uint64) string { return strconv.FormatUint(v, 10) }
func itoa(v int) string    { return strconv.Itoa(v) }
