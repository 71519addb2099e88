package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/rpc"
)

// service is a replica as the gRPC server sees it.
type service struct {
	replica *replica.Replica
	places  sync.Pool // of *[]logstore.Batch
}

func newService(r *replica.Replica) *service {
	return &service{replica: r, places: sync.Pool{New: func() any { return new([]logstore.Batch) }}}
}

// Propose implements rpc.Log.
func (s *service) Propose(ctx context.Context, p rpc.Proposal, wait bool) (rpc.Pending, error) {
	pending, err := s.replica.Propose(ctx, replica.Proposal{Records: p.Records, Count: p.Count, Expected: p.Expected}, wait)
	if err != nil {
		return nil, rpcError(err)
	}
	return outcome{pending}, nil
}

type outcome struct{ *replica.Pending }

// Result implements rpc.Pending.
func (o outcome) Result() (rpc.Ack, error) {
	ack, err := o.Pending.Result()
	return rpc.Ack(ack), rpcError(err)
}

// Bounds implements rpc.Log.
func (s *service) Bounds() rpc.Bounds {
	first, watermark, end := s.replica.Bounds()
	return rpc.Bounds{First: first, HighWatermark: watermark, End: end}
}

// WaitReadable implements rpc.Log.
func (s *service) WaitReadable(ctx context.Context, offset uint64) error {
	return rpcError(s.replica.WaitReadable(ctx, offset))
}

// Linearize implements rpc.Log.
func (s *service) Linearize(ctx context.Context) error {
	return rpcError(s.replica.Linearize(ctx))
}

// OffsetAtTime implements rpc.Log.
func (s *service) OffsetAtTime(t time.Time) (uint64, error) {
	offset, err := s.replica.OffsetAtTime(t)
	return offset, rpcError(err)
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
		return dst, rpcError(err)
	}
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
func rpcError(err error) error {
	if err == nil {
		return nil
	}
	var (
		notLeader  *replica.NotLeaderError
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
	case errors.Is(err, replica.ErrOverloaded):
		return rpc.ErrOverloaded
	case errors.Is(err, replica.ErrClosed), errors.Is(err, logstore.ErrClosed):
		return rpc.ErrClosed
	case errors.As(err, &notLeader):
		return &rpc.NotLeaderError{LeaderID: notLeader.LeaderID, LeaderAddress: notLeader.LeaderAddress}
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

// cluster answers who is there.
type cluster struct {
	replica *replica.Replica
	self    string // node id
	name    string
	address string
	version string
}

// Servers implements rpc.Cluster.
func (c *cluster) Servers(context.Context) (rpc.ServerList, error) {
	servers, err := c.replica.Servers()
	if err != nil {
		return rpc.ServerList{}, err
	}
	list := rpc.ServerList{Self: c.self}
	for _, s := range servers {
		server := rpc.Server{ID: s.ID, Address: s.Address, Voter: s.Voter, Leader: s.Leader, LastContact: -1}
		if s.ID == c.self {
			status := c.replica.Status()
			first, watermark, _ := c.replica.Bounds()
			server.Name = c.name
			// Where it is reached now; Raft knows it as of when it joined.
			server.Address = c.address
			server.Term = status.Term
			server.AppliedIndex = status.Applied
			server.FirstOffset = first
			server.HighWatermark = watermark
			server.Version = c.version
		}
		list.Servers = append(list.Servers, server)
	}
	return list, nil
}
