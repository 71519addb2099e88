package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"strings"
	"sync"

	"google.golang.org/grpc"
)

// producing is one ProduceStream. One goroutine receives and proposes, the
// handler's own waits for outcomes in order and acknowledges.
//
// The receiver can be stuck in RecvMsg, which only the end of the call
// interrupts, so the call never waits for it. What makes "everything up to
// here was proposed, nothing after" true nevertheless is that proposing and
// queueing happen under mu, and not at all once ended is set.
type producing struct {
	s      *Service
	stream grpc.ServerStream
	window window

	// propose is the context of proposals that wait for room.
	propose       context.Context
	cancelPropose context.CancelCauseFunc

	mu    sync.Mutex
	ended bool // guarded by mu; queue is closed
	// queue holds what has been proposed, in order, and may end with an error
	// that was met instead. Its capacity is the window's and one, so that
	// sending to it never blocks.
	queue chan outcome
	log   Log    // of the receiver
	name  string // of log
}

// outcome is what will become of one request: pending, or err.
type outcome struct {
	pending Pending
	err     error
	size    int
}

func (s *Service) produceStream(stream grpc.ServerStream) error {
	ctx := stream.Context()
	p := &producing{
		s:      s,
		stream: stream,
		window: newWindow(s.limits.StreamRequests, s.limits.StreamBytes),
		queue:  make(chan outcome, s.limits.StreamRequests+1),
	}
	p.propose, p.cancelPropose = context.WithCancelCause(ctx)
	defer p.end(nil)
	stop := context.AfterFunc(s.stopping, func() { p.end(&shutdownError{}) })
	defer stop()

	s.background.Add(1)
	go func() {
		defer s.background.Done()
		defer func() {
			if r := recover(); r != nil {
				p.end(s.panicked("ProduceStream", r, debug.Stack()))
			}
		}()
		p.end(p.receive())
	}()
	return p.acknowledge(ctx)
}

// end stops proposals for good: the queue holds what was proposed before, then
// err if there is one. Only the first call counts.
func (p *producing) end(err error) {
	p.cancelPropose(err) // or the receiver might keep mu while it waits for room
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return
	}
	p.ended = true
	if err != nil {
		p.queue <- outcome{err: err}
	}
	close(p.queue)
}

// receive returns why there is nothing more to receive: nil when the client
// has said all.
func (p *producing) receive() error {
	for {
		// Not reading is what pushes back: the client's flow-control window
		// stays used up.
		if err := p.window.wait(p.propose); err != nil {
			return err
		}
		raw := new(rawRequest)
		if err := p.stream.RecvMsg(raw); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		req, err := parseProduceRequest(raw.data, p.s.limits)
		if err != nil {
			return err
		}
		if req.log == "" {
			req.log = DefaultLog // or it would be asked for twice by two names
		}
		if p.log == nil || req.log != p.name {
			if p.log, err = p.s.logFor(p.propose, req.log, ActionProduce); err != nil {
				return err
			}
			p.name = req.log
		}
		if err := p.proposeOne(&req, len(raw.data)); err != nil {
			return err
		}
	}
}

func (p *producing) proposeOne(req *produceRequest, size int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return nil
	}
	pending, err := p.log.Propose(p.propose, req.proposal(), true)
	if err != nil {
		// Cancelled by end, which knows better why.
		if cause := context.Cause(p.propose); cause != nil && errors.Is(err, context.Canceled) {
			return cause
		}
		return err
	}
	p.window.add(size)
	p.queue <- outcome{pending: pending, size: size}
	return nil
}

// acknowledge answers requests in order until the queue ends or one fails.
func (p *producing) acknowledge(ctx context.Context) error {
	for position := 0; ; position++ {
		var (
			o  outcome
			ok bool
		)
		select {
		case o, ok = <-p.queue:
		case <-ctx.Done():
			// Both may be ready: the queue need not be empty.
			return fmt.Errorf("%w: %w", ErrUnknownOutcome, ctx.Err())
		}
		if !ok {
			return nil
		}
		if o.err != nil {
			return statusWith(o.err, map[string]string{MetaRequest: itoa(position)})
		}
		ack, err := await(ctx, o.pending)
		if err != nil {
			return p.fail(ctx, position, err)
		}
		if err := p.stream.SendMsg(ackMessage(ack)); err != nil {
			return err
		}
		p.window.remove(o.size)
	}
}

// fail ends the stream because of the request at position. Later ones may be
// under way already and may succeed, which the client cannot guess, so their
// outcomes are awaited and reported with the error.
func (p *producing) fail(ctx context.Context, position int, cause error) error {
	p.end(nil)
	var appended, unknown ranges
	later := position
	for o := range p.queue {
		later++
		if o.err != nil {
			continue // was met instead of proposing
		}
		switch _, err := await(ctx, o.pending); {
		case err == nil:
			appended.add(later)
		case errors.Is(err, ErrUnknownOutcome):
			unknown.add(later)
		}
	}
	meta := map[string]string{MetaRequest: itoa(position)}
	// A status travels in an HTTP header of limited size. Past that, the exact
	// list gives way to one range that is merely certain to contain it.
	if len(appended)+len(unknown) > maxRanges {
		unknown = ranges{{position + 1, later}}
		appended = nil
	}
	if len(appended) > 0 {
		meta[MetaAppendedAfter] = appended.String()
	}
	if len(unknown) > 0 {
		meta[MetaUnknownAfter] = unknown.String()
	}
	return statusWith(cause, meta)
}

// maxRanges keeps the lists in an error below about 1 KiB.
const maxRanges = 64

// ranges is an ascending list of positions, neighbours joined.
type ranges [][2]int

func (r *ranges) add(n int) {
	if l := len(*r); l > 0 && (*r)[l-1][1] == n-1 {
		(*r)[l-1][1] = n
		return
	}
	*r = append(*r, [2]int{n, n})
}

func (r ranges) String() string {
	var b strings.Builder
	for i, x := range r {
		if i > 0 {
			b.WriteByte(',')
		}
		if x[0] == x[1] {
			fmt.Fprintf(&b, "%d", x[0])
		} else {
			fmt.Fprintf(&b, "%d-%d", x[0], x[1])
		}
	}
	return b.String()
}

// window counts what one stream has under way. One goroutine waits and adds,
// any may remove.
type window struct {
	maxRequests, maxBytes int

	mu              sync.Mutex
	requests, bytes int // guarded by mu
	// room has a token after a remove since the last look.
	room chan struct{}
}

func newWindow(requests, bytes int) window {
	return window{maxRequests: requests, maxBytes: bytes, room: make(chan struct{}, 1)}
}

// wait returns when there is room for one request of unknown size.
func (w *window) wait(ctx context.Context) error {
	for {
		w.mu.Lock()
		ok := w.requests < w.maxRequests && w.bytes < w.maxBytes
		w.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-w.room:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (w *window) add(size int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.requests++
	w.bytes += size
}

func (w *window) remove(size int) {
	w.mu.Lock()
	w.requests--
	w.bytes -= size
	w.mu.Unlock()
	select {
	case w.room <- struct{}{}:
	default:
	}
}
