package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/rpc"
)

// service is a replica as the gRPC server sees it.
type service struct {
	replica *replica.Replica
	part    *part
	places  sync.Pool // of *[]logstore.Batch
	// read is told what was read.
	read    func([]logstore.Batch)
	tracing *tracing
}

func newService(r *replica.Replica, p *part, read func([]logstore.Batch), t *tracing) *service {
	return &service{replica: r, part: p, read: read, tracing: t, places: sync.Pool{New: func() any { return new([]logstore.Batch) }}}
}

// Propose implements rpc.Log.
func (s *service) Propose(ctx context.Context, p rpc.Proposal, wait bool) (rpc.Pending, error) {
	span := s.tracing.appending(ctx, p, wait)
	pending, err := s.replica.Propose(ctx, replica.Proposal{Records: p.Records, Count: p.Count, Expected: p.Expected}, wait)
	if err != nil {
		err = s.part.rpcError(err)
		appended(span, rpc.Ack{}, err)
		return nil, err
	}
	return outcome{pending, s.part, span}, nil
}

type outcome struct {
	*replica.Pending
	part *part
	span trace.Span // nil: not traced
}

// Result implements rpc.Pending.
func (o outcome) Result() (rpc.Ack, error) {
	ack, err := o.Pending.Result()
	err = o.part.rpcError(err)
	appended(o.span, rpc.Ack(ack), err)
	return rpc.Ack(ack), err
}

// Bounds implements rpc.Log.
func (s *service) Bounds() rpc.Bounds {
	first, watermark, end := s.replica.Bounds()
	return rpc.Bounds{First: first, HighWatermark: watermark, End: end}
}

// WaitReadable implements rpc.Log.
func (s *service) WaitReadable(ctx context.Context, offset uint64) error {
	return s.part.rpcError(s.replica.WaitReadable(ctx, offset))
}

// Linearize implements rpc.Log.
func (s *service) Linearize(ctx context.Context) error {
	return s.part.rpcError(s.replica.Linearize(ctx))
}

// OffsetAtTime implements rpc.Log.
func (s *service) OffsetAtTime(t time.Time) (uint64, error) {
	offset, err := s.replica.OffsetAtTime(t)
	return offset, s.part.rpcError(err)
}

// A payload is preceded in the buffer by its frame's header, which is what the
// server promises its readers as headroom.
const _ = uint(logstore.HeaderSize - rpc.Headroom)

// ReadBatches implements rpc.Log.
func (s *service) ReadBatches(from uint64, buf []byte, dst []rpc.Batch) ([]rpc.Batch, error) {
	places := s.places.Get().(*[]logstore.Batch)
	defer s.places.Put(places)
	var err error
	*places, err = s.replica.Read(from, buf, (*places)[:0])
	if err != nil {
		return dst, s.part.rpcError(err)
	}
	s.read(*places)
	for _, b := range *places {
		dst = append(dst, rpc.Batch{
			BaseOffset: b.BaseOffset,
			Count:      b.Count,
			AppendTime: time.Unix(0, b.AppendTime),
			Start:      b.Start,
			End:        b.End,
		})
	}
	return dst, nil
}

// rpcError says in the server's terms what the replica said in its own.
func (p *part) rpcError(err error) error {
	if err == nil {
		return nil
	}
	var (
		notLeader  *replica.NotLeaderError
		quorum     *replica.QuorumError
		unknown    *replica.UnknownServerError
		notVoter   *replica.NotVoterError
		mismatch   *replica.OffsetMismatchError
		outOfRange *replica.OffsetOutOfRangeError
		tooLarge   *replica.TooLargeError
		corrupt    *logstore.CorruptError
		short      *logstore.ShortBufferError
	)
	switch {
	case errors.Is(err, replica.ErrUnknownOutcome):
		return fmt.Errorf("%w (%w)", rpc.ErrUnknownOutcome, err)
	case errors.Is(err, replica.ErrNoLeader):
		return rpc.ErrNoLeader
	case errors.Is(err, replica.ErrDiskFull):
		return fmt.Errorf("%w (%w)", rpc.ErrDiskFull, err)
	case errors.Is(err, replica.ErrOverloaded):
		return rpc.ErrOverloaded
	case errors.Is(err, replica.ErrClosed), errors.Is(err, logstore.ErrClosed):
		return rpc.ErrClosed
	case errors.As(err, &notLeader):
		return &rpc.NotLeaderError{LeaderID: notLeader.LeaderID, LeaderAddress: notLeader.LeaderAddress}
	case errors.As(err, &quorum):
		return &rpc.QuorumError{Voters: quorum.Voters, Healthy: quorum.Alive}
	case errors.As(err, &unknown):
		return &rpc.UnknownServerError{ID: unknown.ID}
	case errors.As(err, &notVoter):
		return &rpc.NotVoterError{ID: notVoter.ID}
	case errors.As(err, &mismatch):
		return &rpc.OffsetMismatchError{Expected: mismatch.Expected, Next: mismatch.Next}
	case errors.As(err, &outOfRange):
		return &rpc.OffsetOutOfRangeError{Offset: outOfRange.Offset, First: outOfRange.First, Next: outOfRange.Next}
	case errors.As(err, &tooLarge):
		return &rpc.BatchTooLargeError{Size: tooLarge.Size, Limit: tooLarge.Limit}
	case errors.As(err, &corrupt):
		return &rpc.CorruptError{File: corrupt.File, Position: corrupt.Position, Detail: corrupt.Detail}
	case errors.As(err, &short):
		return &rpc.ShortBufferError{Need: short.Need}
	default:
		return err
	}
}
