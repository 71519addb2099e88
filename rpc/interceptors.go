package rpc

import (
	"context"
	"fmt"
	"runtime/debug"
	"strings"
	"sync"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

var (
	logPrefix    = "/" + v1.Log_ServiceDesc.ServiceName + "/"
	adminPrefix  = "/" + v1.Admin_ServiceDesc.ServiceName + "/"
	peerPrefix   = "/" + v1.Peer_ServiceDesc.ServiceName + "/"
	healthPrefix = "/" + healthpb.Health_ServiceDesc.ServiceName + "/"
)

// unary and streaming wrap every call: admitted, counted, its panics contained,
// its error a status.
func (s *Service) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	ended := s.observed(info.FullMethod, false)
	defer func() {
		if r := recover(); r != nil {
			resp, err = nil, s.panicked(info.FullMethod, r, debug.Stack())
		}
		err = statusOf(err)
		ended(err)
	}()
	if err := s.admit(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	if !strings.HasPrefix(info.FullMethod, healthPrefix) {
		if err := s.calls.begin(); err != nil {
			return nil, err
		}
		defer s.calls.end()
	}
	return handler(ctx, req)
}

func (s *Service) streaming(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	ended := s.observed(info.FullMethod, true)
	defer func() {
		if r := recover(); r != nil {
			err = s.panicked(info.FullMethod, r, debug.Stack())
		}
		err = statusOf(err)
		ended(err)
	}()
	if err := s.admit(stream.Context(), info.FullMethod); err != nil {
		return statusWith(err, map[string]string{MetaRequest: "0"}) // as below
	}
	if !strings.HasPrefix(info.FullMethod, logPrefix) && !strings.HasPrefix(info.FullMethod, peerPrefix) && !strings.HasPrefix(info.FullMethod, adminPrefix) {
		return s.foreign(srv, stream, info, handler)
	}
	if err := s.calls.begin(); err != nil {
		return statusWith(err, map[string]string{MetaRequest: "0"}) // of those sent already, none was taken
	}
	defer s.calls.end()
	return handler(srv, stream)
}

// foreign runs a stream of a service that knows nothing of shutting down, such
// as a health watch, which would keep a graceful stop waiting for ever. The
// call ends when the server has drained; that in turn ends the handler, whose
// next send or receive fails.
func (s *Service) foreign(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	done := make(chan error, 1)
	s.background.Add(1)
	go func() {
		defer s.background.Done()
		defer func() {
			if r := recover(); r != nil {
				done <- s.panicked(info.FullMethod, r, debug.Stack())
			}
		}()
		done <- handler(srv, stream)
	}()
	select {
	case err := <-done:
		return err
	case <-s.drained.Done():
		return &shutdownError{}
	}
}

// panicked logs a panic and returns what the caller gets to see of it.
func (s *Service) panicked(method string, value any, stack []byte) error {
	s.logger.Error("a call panicked", "method", method, "panic", value, "stack", string(stack))
	return fmt.Errorf("panic in %s", method)
}

// callCounter bounds the open calls and knows when the last one is over.
type callCounter struct {
	limit int

	mu     sync.Mutex
	open   int           // guarded by mu
	closed bool          // guarded by mu
	idle   chan struct{} // closed when closed and nothing is open
}

func (c *callCounter) begin() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return &shutdownError{}
	}
	if c.open >= c.limit {
		return &tooManyCallsError{limit: c.limit}
	}
	c.open++
	return nil
}

func (c *callCounter) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open--
	if c.closed && c.open == 0 {
		close(c.idle)
	}
}

// close refuses further calls and returns what tells when the open ones are
// over. It may be called again.
func (c *callCounter) close() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.closed = true
		if c.open == 0 {
			close(c.idle)
		}
	}
	return c.idle
}

func (c *callCounter) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open
}
