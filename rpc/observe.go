package rpc

import (
	"sync/atomic"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Observer is told of every call, also of those that are refused. Its funcs are
// called by the call's own goroutine, possibly many at a time: they must be quick.
// What a stream carries is not told, message by message: that would cost more
// than to carry it.
type Observer interface {
	// CallBegins is told of a method, as "/diurna.v1.Log/Produce".
	CallBegins(method string, stream bool)
	// CallEnds is told how the call ended and what it took.
	CallEnds(method string, stream bool, end CallEnd)
}

// CallEnd is how a call ended.
type CallEnd struct {
	Code codes.Code
	// Reason is the one of this package's that the caller was given; empty where
	// all was well, and where the error is not of this package.
	Reason string
	Took   time.Duration
}

// observed tells the observer that a call begins, and returns what tells it how
// it ended.
func (s *Service) observed(method string, stream bool) (end func(error)) {
	if s.observer == nil {
		return func(error) {}
	}
	begin := time.Now()
	s.observer.CallBegins(method, stream)
	return func(err error) {
		e := CallEnd{Took: time.Since(begin)}
		if err != nil {
			st := status.Convert(err)
			e.Code = st.Code()
			for _, d := range st.Details() {
				if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == ErrorDomain {
					e.Reason = info.GetReason()
				}
			}
		}
		s.observer.CallEnds(method, stream, e)
	}
}

// Stats is what the port is doing.
type Stats struct {
	// Connections that are open.
	Connections int
	// Received and Sent are the bytes of all connections so far, those of TLS not
	// counted.
	Received, Sent uint64
}

// Stats returns one look at the port.
func (s *Service) Stats() Stats {
	s.conns.mu.Lock()
	open := len(s.conns.conns)
	s.conns.mu.Unlock()
	return Stats{Connections: open, Received: s.conns.received.Load(), Sent: s.conns.sent.Load()}
}

// traffic counts the bytes of connections.
type traffic struct{ received, sent atomic.Uint64 }

// Read implements net.Conn.
func (c *trackedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.tracker.received.Add(uint64(n))
	return n, err
}

// Write implements net.Conn.
func (c *trackedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.tracker.sent.Add(uint64(n))
	return n, err
}
