package client

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// gatherBytes bounds the records of one gathered call.
const gatherBytes = 256 << 10

// gatherer makes one call of those that wait at the same time: what a call
// costs, on both sides, is many times what a small record does.
//
// A call that finds nothing under way goes out at once, by itself. The next one
// does not until what waits is as large as all that is under way together, or
// an answer has come: a few callers hardly ever share, many share a call or
// two, and nobody waits longer than for the answer to somebody else.
//
// Records stay in the order of their callers, each caller's together, and all
// of a call's are appended or none; so a caller cannot tell, except that
// somebody else's record must not spoil his: a call that the server refuses for
// what is in it is repeated caller by caller, which is safe because a refusal
// means that nothing was appended.
type gatherer struct {
	client *Client
	limit  atomic.Int64 // bytes of one call

	mu       sync.Mutex // protects all below
	waiting  []*appending
	queued   int // bytes of waiting
	inFlight int // bytes of calls under way
	closed   bool
	calls    sync.WaitGroup // goroutines; Add under mu, not once closed
}

// appending is one call of Produce.
type appending struct {
	log     string
	records []*Record
	size    int // wire size of records

	gathered *gathered // nil while it waits; guarded by the gatherer's mu
	alone    bool      // set before done: to be sent by itself
	ack      Ack
	err      error
	done     chan struct{}
}

// gathered is one call for several callers. It is given up when all of them
// have given up.
type gathered struct {
	members []*appending
	request []byte
	count   int // records
	size    int
	callers atomic.Int64
	ctx     context.Context
	cancel  context.CancelFunc
}

func newGatherer(c *Client) *gatherer {
	g := &gatherer{client: c}
	g.limit.Store(gatherBytes)
	return g
}

// produce appends records, which were checked, and have the given wire size.
func (g *gatherer) produce(ctx context.Context, log string, records []*Record, size int) (Ack, error) {
	g.mu.Lock()
	if g.inFlight == 0 || g.closed {
		return g.produceAloneLocked(ctx, log, records, size)
	}
	a := &appending{log: log, records: records, size: size, done: make(chan struct{})}
	g.waiting = append(g.waiting, a)
	g.queued += size
	if g.dueLocked() && len(g.waiting) == 1 {
		g.waiting, g.queued = nil, 0
		return g.produceAloneLocked(ctx, log, records, size)
	}
	g.sendLocked()
	g.mu.Unlock()

	select {
	case <-a.done:
	case <-ctx.Done():
		return Ack{}, g.leave(ctx, a)
	}
	if a.alone {
		return g.client.produceAlone(ctx, produceOptions{log: log}, records, size)
	}
	return a.ack, a.err
}

// produceAloneLocked makes a call of its own, and lets go of the lock.
func (g *gatherer) produceAloneLocked(ctx context.Context, log string, records []*Record, size int) (Ack, error) {
	g.inFlight += size
	g.mu.Unlock()
	defer g.landed(size)
	return g.client.produceAlone(ctx, produceOptions{log: log}, records, size)
}

func (g *gatherer) dueLocked() bool {
	return g.queued > 0 && (g.queued >= g.inFlight || int64(g.queued) >= g.limit.Load())
}

// landed counts what is not under way any more.
func (g *gatherer) landed(size int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inFlight -= size
	g.sendLocked()
}

// sendLocked sends what waits, where that is due.
func (g *gatherer) sendLocked() {
	for g.dueLocked() && !g.closed {
		c := g.takeLocked()
		g.calls.Go(func() {
			g.call(c)
			g.landed(c.size)
		})
	}
}

// takeLocked makes a call of those at the front that are for the same log. The
// records are encoded under the lock, because they belong to their callers,
// who may give up as long as they wait.
func (g *gatherer) takeLocked() *gathered {
	c := &gathered{}
	log := g.waiting[0].log
	n := 0
	for n < len(g.waiting) {
		a := g.waiting[n]
		if n > 0 && (a.log != log || int64(c.size+a.size) > g.limit.Load()) {
			break
		}
		c.size += a.size
		n++
	}
	c.members = g.waiting[:n:n]
	if g.waiting = g.waiting[n:]; len(g.waiting) == 0 {
		g.waiting = nil
	}
	c.request = appendRequestHead(make([]byte, 0, c.size+len(log)+8), log, nil)
	for _, a := range c.members {
		for _, r := range a.records {
			c.request = appendRecord(c.request, r, RecordSize(r))
		}
		c.count += len(a.records)
		a.gathered = c
	}
	c.callers.Store(int64(n))
	c.ctx, c.cancel = context.WithCancel(context.Background())
	g.queued -= c.size
	g.inFlight += c.size
	return c
}

// call makes the call and tells its callers what came of it.
func (g *gatherer) call(c *gathered) {
	defer c.cancel()
	ack, err := g.client.produceEncoded(c.ctx, c.request, c.count, nil)
	var e *Error
	refused := errors.As(err, &e) && e.Definite && e.Code == codes.InvalidArgument
	if refused && e.Reason == ReasonBatchTooLarge {
		if limit, ok := e.Uint("limit"); ok && int64(limit) < g.limit.Load() {
			g.limit.Store(int64(limit))
		}
	}
	next := ack.BaseOffset
	for _, a := range c.members {
		switch {
		case refused:
			a.alone = true
		case err != nil:
			a.err = err
		default:
			a.ack = Ack{BaseOffset: next, NextOffset: next + uint64(len(a.records)), AppendTime: ack.AppendTime}
			next = a.ack.NextOffset
		}
		close(a.done)
	}
}

// leave gives up on a: what still waits is not appended.
func (g *gatherer) leave(ctx context.Context, a *appending) error {
	g.mu.Lock()
	c := a.gathered
	if c == nil {
		for i, w := range g.waiting {
			if w == a {
				g.waiting = append(g.waiting[:i:i], g.waiting[i+1:]...)
				g.queued -= a.size
				break
			}
		}
	}
	g.mu.Unlock()
	if c != nil && c.callers.Add(-1) == 0 {
		c.cancel()
	}
	return g.client.endpoint().wrap(status.FromContextError(ctx.Err()).Err(), c != nil)
}

// close waits for the calls under way, which the end of the connection ends,
// and refuses those that wait.
func (g *gatherer) close() {
	g.mu.Lock()
	g.closed = true
	waiting := g.waiting
	g.waiting, g.queued = nil, 0
	g.mu.Unlock()
	for _, a := range waiting {
		a.alone = true // which fails as every call on a closed connection does
		close(a.done)
	}
	g.calls.Wait()
}
