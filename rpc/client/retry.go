package client

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// What is waited between attempts, at first and at most, before jitter.
const (
	minBackoff = 50 * time.Millisecond
	maxBackoff = time.Second
)

// endpoint is the one to use now.
func (c *Client) endpoint() *endpoint { return c.endpoints[c.current.Load()] }

// leave goes on to the next endpoint, unless somebody else already has.
func (c *Client) leave(ep *endpoint) {
	c.current.CompareAndSwap(ep.index, (ep.index+1)%int64(len(c.endpoints)))
}

// elsewhere reports whether another node may do what this one did not.
func (e *Error) elsewhere() bool {
	switch e.Reason {
	case ReasonUnreachable, ReasonTLSFailed, ReasonConnectionLost, ReasonShuttingDown, ReasonNoLeader, ReasonNotLeader, ReasonTooManyCalls:
		return true
	}
	return false
}

// unconnected reports whether there was no connection to make the call on.
func (e *Error) unconnected() bool {
	return e.Reason == ReasonUnreachable || e.Reason == ReasonTLSFailed
}

// attempts decides whether a call is made again, and where.
type attempts struct {
	client *Client
	// quick allows no waiting: every address is tried once.
	quick bool
	start time.Time // of the first failure without success since
	last  time.Time // of the last one
	made  int       // since start
	delay time.Duration
}

// steady is how long after a failure another one has nothing to do with it.
const steady = 10 * time.Second

// again waits and reports whether to try once more after e, which is definite
// or about a read. It moves on to another endpoint where that may help, and
// gives up when ctx ends or the time for it is over.
func (a *attempts) again(ctx context.Context, ep *endpoint, e *Error) bool {
	c := a.client
	now := time.Now()
	if a.made == 0 || now.Sub(a.last) > steady {
		a.start, a.made, a.delay = now, 0, 0
	}
	a.last = now
	a.made++
	if e.Code != codes.Unavailable || ctx.Err() != nil {
		return false
	}
	if e.elsewhere() {
		c.leave(ep)
	}
	if e.unconnected() {
		if a.made < len(c.endpoints) {
			return true
		}
		if !c.connected.Load() {
			return false // there never was anybody: a wrong address, most likely
		}
		if e.Reason == ReasonTLSFailed && !c.spoke.Load() {
			return false // wrong certificates, most likely; later they may be renewed
		}
	}
	if a.quick {
		return false
	}
	a.delay = min(max(2*a.delay, minBackoff), maxBackoff)
	wait := max(a.delay, min(e.RetryAfter, maxBackoff))
	wait = time.Duration(float64(wait) * (0.5 + rand.Float64()))
	if now.Sub(a.start)+wait > c.retry {
		return false
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// succeeded says that there is progress.
func (a *attempts) succeeded() { a.made = 0 }

// ask makes a unary call that changes nothing, to the first node that can be
// reached.
func (c *Client) ask(ctx context.Context, method string, req, resp any) error {
	a := attempts{client: c, quick: true}
	for {
		ep := c.endpoint()
		e := ep.invoke(ctx, method, req, resp)
		if e == nil {
			return nil
		}
		e.Definite = true // nothing was to be changed
		if !a.again(ctx, ep, e) {
			return e
		}
	}
}

// change makes a unary call that changes something, to the first node that can
// be reached: once it is sent it is not sent again.
func (c *Client) change(ctx context.Context, method string, req, resp any) error {
	a := attempts{client: c, quick: true}
	for {
		ep := c.endpoint()
		e := ep.invoke(ctx, method, req, resp)
		if e == nil {
			return nil
		}
		if !e.unconnected() || !a.again(ctx, ep, e) {
			return e
		}
	}
}

// invoke makes a unary call. Unlike gRPC's own it tells whether anything was
// sent when it fails.
func (ep *endpoint) invoke(ctx context.Context, method string, req, resp any, opts ...grpc.CallOption) *Error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := ep.conn.NewStream(ctx, &grpc.StreamDesc{}, method, opts...)
	if err != nil {
		return ep.wrap(err, false)
	}
	// A failed send says no more than that the answer holds the reason.
	sendErr := stream.SendMsg(req)
	if err := stream.RecvMsg(resp); err != nil {
		return ep.wrap(err, true)
	}
	if sendErr != nil {
		return ep.wrap(sendErr, true)
	}
	return nil
}

// asError is err as what it is in this package.
func asError(err error) (e *Error, ok bool) {
	return e, errors.As(err, &e)
}
