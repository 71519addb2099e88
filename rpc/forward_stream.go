package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// forwarded is a batch on its way to the leader: a Pending.
type forwarded struct {
	f    *Forwarder
	p    Proposal
	size int64
	done chan struct{}
	ack  Ack
	err  error
}

func (fw *forwarded) Done() <-chan struct{} { return fw.done }
func (fw *forwarded) Result() (Ack, error)  { return fw.ack, fw.err }

func (fw *forwarded) finish(ack Ack, err error) {
	fw.ack, fw.err = ack, err
	fw.p.Records = nil
	fw.f.release(fw)
	close(fw.done)
}

// forwardStream is one Propose stream. A batch is queued, then sent, then
// answered; when the stream ends, what was sent and not answered may have been
// appended, and what was queued was not.
//
// It ends when it was not used for a while, when it is retired and everything
// on it is answered, or when it fails. It is then not opened again: the next
// batch makes a new one.
type forwardStream struct {
	f       *Forwarder
	address string
	before  *forwardStream // to be awaited; nil after that
	ctx     context.Context
	cancel  context.CancelFunc
	wake    chan struct{} // one token: something below has changed
	over    chan struct{} // closed when every batch is answered

	mu       sync.Mutex // protects all below
	retired  bool       // takes no more
	grace    *time.Timer
	queue    []*forwarded
	sent     []*forwarded
	answered uint64 // batches
}

func newForwardStream(f *Forwarder, address string, before *forwardStream) *forwardStream {
	st := &forwardStream{
		f: f, address: address, before: before,
		wake: make(chan struct{}, 1),
		over: make(chan struct{}),
	}
	st.ctx, st.cancel = context.WithCancel(f.ctx)
	return st
}

// enqueue takes a batch, unless the stream is about to end.
func (st *forwardStream) enqueue(fw *forwarded) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.retired {
		return false
	}
	st.queue = append(st.queue, fw)
	st.poke()
	return true
}

// retire makes the stream end once everything on it is answered, or after
// grace, if that is not 0.
func (st *forwardStream) retire(grace time.Duration) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.retired = true
	if grace > 0 && st.grace == nil {
		st.grace = time.AfterFunc(grace, st.cancel)
	}
	st.poke()
}

func (st *forwardStream) poke() {
	select {
	case st.wake <- struct{}{}:
	default:
	}
}

func (st *forwardStream) run() {
	defer st.cancel()
	if st.before != nil {
		select {
		case <-st.before.over:
		case <-st.ctx.Done():
		}
		st.before = nil
	}
	err := st.serve()
	if err != nil {
		if st.f.doubt(st.address) {
			st.f.cfg.Logger.Info("a stream to the leader ended", "address", st.address, "cause", status.Convert(err).Message())
		}
	}
	st.end(err)
	close(st.over)
}

// serve opens the stream and returns why it ended; nil is its regular end.
func (st *forwardStream) serve() error {
	conn, err := st.f.conns.get(st.address)
	if err != nil {
		return err
	}
	defer st.f.conns.put(conn)
	stream, err := conn.NewStream(st.ctx, &v1.Peer_ServiceDesc.Streams[0], v1.Peer_Propose_FullMethodName)
	if err != nil {
		return err
	}
	var (
		received error
		wg       sync.WaitGroup
	)
	wg.Go(func() {
		received = st.receive(stream)
		st.cancel() // ends the others, which may be waiting
	})
	wg.Go(st.watch)
	st.send(stream)
	wg.Wait()
	return received
}

// send hands batches to the stream until it is time to end it, or it has ended.
func (st *forwardStream) send(stream grpc.ClientStream) {
	idle := time.NewTimer(st.f.cfg.IdleTimeout)
	defer idle.Stop()
	for sequence := uint64(0); ; {
		fw, end := st.next()
		if end {
			// Fails only where the stream has ended, which receive sees.
			_ = stream.CloseSend()
			return
		}
		if fw != nil {
			m := &rawResponse{data: mem.BufferSlice{mem.SliceBuffer(st.head(fw, sequence)), mem.SliceBuffer(fw.p.Records)}}
			sequence++
			if err := stream.SendMsg(m); errors.Is(err, io.EOF) {
				return // receive gets the reason
			} else if err != nil {
				st.cancel()
				return
			}
			idle.Reset(st.f.cfg.IdleTimeout)
			continue
		}
		select {
		case <-st.wake:
		case <-idle.C:
			st.retireIdle()
			idle.Reset(st.f.cfg.IdleTimeout)
		case <-st.ctx.Done():
			return
		}
	}
}

// next returns a batch to send, counted as sent already, or that nothing will
// come.
func (st *forwardStream) next() (fw *forwarded, end bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.queue) > 0 {
		fw = st.queue[0]
		st.queue[0] = nil
		st.queue = st.queue[1:]
		// Before it is: the other order could call a batch not appended that was.
		st.sent = append(st.sent, fw)
		return fw, false
	}
	return nil, st.retired && len(st.sent) == 0
}

func (st *forwardStream) retireIdle() {
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.queue)+len(st.sent) == 0 {
		st.retired = true
		st.poke()
	}
}

// watch retires the stream if the node at its other end does not answer and
// was replaced. All clients may be waiting for room, so that no batch would
// bring the news.
func (st *forwardStream) watch() {
	tick := time.NewTicker(stallCheck)
	defer tick.Stop()
	for seen := uint64(0); ; {
		select {
		case <-tick.C:
		case <-st.ctx.Done():
			return
		}
		st.mu.Lock()
		stalled := len(st.sent) > 0 && st.answered == seen
		seen = st.answered
		st.mu.Unlock()
		if !stalled {
			continue
		}
		if now, ok := st.f.leaderAddress(st.ctx); ok && now != st.address {
			st.retire(retireGrace)
		}
	}
}

// head is the wire form of a ProposeRequest up to its records.
func (st *forwardStream) head(fw *forwarded, sequence uint64) []byte {
	cluster := ""
	if sequence == 0 {
		cluster = st.f.cfg.ClusterID()
	}
	return appendProposeHead(make([]byte, 0, 32+len(cluster)), sequence, fw.p.Expected, cluster)
}

func appendProposeHead(b []byte, sequence uint64, expected *uint64, cluster string) []byte {
	b = protowire.AppendTag(b, fieldProposeSequence, protowire.VarintType)
	b = protowire.AppendVarint(b, sequence)
	if expected != nil {
		b = protowire.AppendTag(b, fieldRequestExpected, protowire.VarintType)
		b = protowire.AppendVarint(b, *expected)
	}
	if cluster != "" {
		b = protowire.AppendTag(b, fieldProposeCluster, protowire.BytesType)
		b = protowire.AppendString(b, cluster)
	}
	return b
}

// receive takes the answers until the stream ends.
func (st *forwardStream) receive(stream grpc.ClientStream) error {
	resp := new(v1.ProposeResponse)
	for {
		resp.Reset()
		if err := stream.RecvMsg(resp); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		fw, err := st.take(resp.GetSequence())
		if err != nil {
			return err
		}
		switch o := resp.GetOutcome().(type) {
		case *v1.ProposeResponse_Appended:
			if n := o.Appended.GetNextOffset() - o.Appended.GetBaseOffset(); n != uint64(fw.p.Count) {
				fw.finish(Ack{}, fmt.Errorf("%w: the leader acknowledged %d records of %d", ErrUnknownOutcome, n, fw.p.Count))
				continue
			}
			fw.finish(Ack{
				BaseOffset: o.Appended.GetBaseOffset(),
				NextOffset: o.Appended.GetNextOffset(),
				AppendTime: o.Appended.GetAppendTime().AsTime(),
			}, nil)
		case *v1.ProposeResponse_Error:
			fw.finish(Ack{}, st.refusal(o.Error))
		default:
			fw.finish(Ack{}, fmt.Errorf("%w: the leader gave an answer that says nothing", ErrUnknownOutcome))
		}
	}
}

// take returns the batch that the next answer is about.
func (st *forwardStream) take(sequence uint64) (*forwarded, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.sent) == 0 || sequence != st.answered {
		return nil, fmt.Errorf("the leader answered request %d out of turn", sequence)
	}
	fw := st.sent[0]
	st.sent[0] = nil
	st.sent = st.sent[1:]
	st.answered++
	if st.retired && len(st.sent) == 0 {
		st.poke()
	}
	return fw, nil
}

// refusal is the error of one request.
func (st *forwardStream) refusal(m *v1.ProposeError) error {
	p := status.New(codes.Code(m.GetCode()), m.GetMessage()).Proto()
	p.Details = m.GetDetails()
	err := status.ErrorProto(p)
	if err == nil || !isOurs(err) {
		return fmt.Errorf("%w: the leader gave an answer that says nothing: %s", ErrUnknownOutcome, m.GetMessage())
	}
	return st.leaderError(err)
}

// leaderError is the function of this name, and notes what the error tells of
// who leads.
func (st *forwardStream) leaderError(err error) error {
	err = leaderError(err, st.address)
	var notLeader *NotLeaderError
	if errors.As(err, &notLeader) {
		st.f.learn(st.address, notLeader)
	}
	return err
}

// end answers everything that is left, now that the stream has ended with err.
func (st *forwardStream) end(err error) {
	st.mu.Lock()
	st.retired = true
	if st.grace != nil {
		st.grace.Stop()
	}
	sent, queue, first := st.sent, st.queue, st.answered
	st.sent, st.queue = nil, nil
	st.mu.Unlock()

	// The text only: a status inside would be taken for the error itself.
	why := "the stream was ended"
	if err != nil {
		why = status.Convert(err).Message()
	}
	unknown := fmt.Errorf("%w: the connection to the leader at %s was lost: %s", ErrUnknownOutcome, st.address, why)
	definite := fmt.Errorf("%w: the connection to the leader at %s was lost: %s", ErrNoLeader, st.address, why)
	// How many were taken, if the other side says so: no more were appended.
	taken := first + uint64(len(sent))
	switch {
	case err == nil:
	case st.f.ctx.Err() != nil:
		definite = ErrClosed
	case isOurs(err):
		if n, ok := takenBefore(err); ok {
			taken, definite = n, st.leaderError(err)
		} else if status.Code(err) == codes.Unimplemented {
			taken, definite = 0, st.leaderError(err)
		}
	}
	for i, fw := range sent {
		if first+uint64(i) < taken {
			fw.finish(Ack{}, unknown)
		} else {
			fw.finish(Ack{}, definite)
		}
	}
	for _, fw := range queue {
		fw.finish(Ack{}, definite)
	}
}
