package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// A peer's stream carries what all of its clients append, so its window is
// that of a few of them.
const peerWindows = 4

// proposing is one Propose stream of another node. It works as producing does,
// and differs in what a failure means: each request is answered by itself, and
// the stream ends only where nothing that follows could succeed either. How far
// it got then is in the final status, so that the other side knows of
// everything that it has sent.
//
// In particular the stream ends when this node turns out not to lead, and does
// not go on should it lead again: the other side may by then have sent later
// requests of the same client elsewhere.
type proposing struct {
	p      *peerService
	stream grpc.ServerStream
	window window

	propose       context.Context
	cancelPropose context.CancelCauseFunc

	mu sync.Mutex
	// All guarded by mu.
	ended bool  // queue is closed
	taken int   // requests that were proposed or refused
	cause error // why it ended
	lost  bool  // taken is not to be relied on

	queue chan outcome // see producing.queue
}

func (p *peerService) propose(stream grpc.ServerStream) error {
	limits := p.s.limits
	r := &proposing{
		p:      p,
		stream: stream,
		window: newWindow(peerWindows*limits.StreamRequests, peerWindows*limits.StreamBytes),
		queue:  make(chan outcome, peerWindows*limits.StreamRequests+1),
	}
	r.propose, r.cancelPropose = context.WithCancelCause(stream.Context())
	defer r.end(nil)
	stop := context.AfterFunc(p.s.stopping, func() { r.end(&shutdownError{}) })
	defer stop()

	p.s.background.Add(1)
	go func() {
		defer p.s.background.Done()
		defer func() {
			if v := recover(); v != nil {
				r.mu.Lock()
				r.lost = true // perhaps between proposing and counting
				r.mu.Unlock()
				r.end(p.s.panicked("Propose", v, debug.Stack()))
			}
		}()
		r.end(r.receive())
	}()
	return r.answer()
}

// end stops proposals for good, because of err if that is not nil. Only the
// first call counts.
func (r *proposing) end(err error) {
	r.cancelPropose(err)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return
	}
	r.ended, r.cause = true, err
	close(r.queue)
}

// receive returns why there is nothing more to receive: nil when the other
// side has said all.
func (r *proposing) receive() error {
	for next := uint64(0); ; next++ {
		if err := r.window.wait(r.propose); err != nil {
			return err
		}
		raw := new(rawRequest)
		if err := r.stream.RecvMsg(raw); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		req, err := parseProduceRequest(raw.data, r.p.s.limits)
		switch {
		case req.sequence != next: // comes before what could be wrong with the records
			return &InvalidArgumentError{Field: "sequence", Detail: fmt.Sprintf("is %d where %d is due", req.sequence, next)}
		case err == nil && req.log != "" && req.log != DefaultLog:
			err = &LogNotFoundError{Log: req.log}
		}
		if next == 0 {
			if err := r.p.sameCluster(r.propose, req.cluster); err != nil {
				return err
			}
		}
		if err := r.proposeOne(&req, len(raw.data), err); err != nil {
			return err
		}
	}
}

// proposeOne proposes a request, or refuses it because of refusal. It returns
// an error that ends the stream before the request.
func (r *proposing) proposeOne(req *produceRequest, size int, refusal error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return nil
	}
	o := outcome{err: refusal, size: size}
	if refusal == nil {
		o.pending, o.err = r.p.s.local.Propose(r.propose, req.proposal(), true)
		var notLeader *NotLeaderError
		switch {
		case o.err == nil:
		case r.propose.Err() != nil:
			return context.Cause(r.propose) // cancelled by end, which knows better why
		case errors.As(o.err, &notLeader), errors.Is(o.err, ErrNoLeader), errors.Is(o.err, ErrClosed):
			return o.err
		}
	}
	r.taken++
	r.window.add(size)
	r.queue <- o
	return nil
}

// answer answers requests in order until the queue ends.
func (r *proposing) answer() error {
	ctx := r.stream.Context()
	for sequence := uint64(0); ; sequence++ {
		var (
			o  outcome
			ok bool
		)
		select {
		case o, ok = <-r.queue:
		case <-ctx.Done():
			return ctx.Err() // nobody hears it
		}
		if !ok {
			break
		}
		var ack Ack
		err := o.err
		if err == nil {
			ack, err = await(ctx, o.pending)
		}
		if err := r.stream.SendMsg(proposeResponse(sequence, ack, err)); err != nil {
			return err
		}
		r.window.remove(o.size)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cause == nil || r.lost {
		return r.cause
	}
	return statusWith(r.cause, map[string]string{MetaRequest: itoa(r.taken)})
}

func proposeResponse(sequence uint64, ack Ack, err error) *v1.ProposeResponse {
	m := &v1.ProposeResponse{Sequence: sequence}
	if err == nil {
		m.Outcome = &v1.ProposeResponse_Appended{Appended: ackMessage(ack)}
		return m
	}
	st := status.Convert(statusOf(err)).Proto()
	m.Outcome = &v1.ProposeResponse_Error{Error: &v1.ProposeError{
		Code: st.GetCode(), Message: st.GetMessage(), Details: st.GetDetails(),
	}}
	return m
}
