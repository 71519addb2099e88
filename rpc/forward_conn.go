package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// connPool keeps one connection per address for as long as it is of use.
type connPool struct {
	options []grpc.DialOption
	idle    time.Duration

	mu     sync.Mutex
	closed bool                 // guarded by mu
	conns  map[string]*peerConn // guarded by mu
}

type peerConn struct {
	*grpc.ClientConn
	users int       // guarded by the pool's mu
	last  time.Time // guarded by the pool's mu
}

// maxPeerConns bounds the pool far above any number of nodes.
const maxPeerConns = 1024

// peerConnectTimeout bounds one attempt to connect; until it is over, calls
// wait.
const peerConnectTimeout = 2 * time.Second

func (p *connPool) init(cfg ForwarderConfig, codec codec) {
	p.idle = cfg.IdleTimeout
	p.conns = make(map[string]*peerConn)
	p.options = []grpc.DialOption{
		grpc.WithTransportCredentials(cfg.Credentials),
		grpc.WithContextDialer(cfg.Dial),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithIdleTimeout(cfg.IdleTimeout),
		// A node that has come back should not have to wait for long: between
		// attempts, calls fail at once.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: peerConnectTimeout,
		}),
		// Notices a machine that has vanished. The other side allows it.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithWriteBufferSize(128 << 10),
		grpc.WithReadBufferSize(128 << 10),
		grpc.WithDefaultCallOptions(
			grpc.ForceCodecV2(codec),
			// A stream whose connection breaks is over. gRPC would keep what was
			// sent and send it again on another one, and hold the stream's lock
			// until there is one.
			grpc.MaxRetryRPCBufferSize(0),
		),
	}
}

// get returns the connection to address, to be given back with put.
func (p *connPool) get(address string) (*peerConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	now := time.Now()
	for a, c := range p.conns {
		if c.users == 0 && a != address && now.Sub(c.last) > p.idle {
			delete(p.conns, a)
			_ = c.Close() // fails only where it is closed already
		}
	}
	c := p.conns[address]
	if c == nil {
		if len(p.conns) >= maxPeerConns {
			return nil, fmt.Errorf("%w: connections to %d other nodes are open", ErrOverloaded, len(p.conns))
		}
		conn, err := grpc.NewClient("passthrough:///"+address, p.options...)
		if err != nil {
			return nil, fmt.Errorf("connect to %s: %w", address, err)
		}
		c = &peerConn{ClientConn: conn}
		p.conns[address] = c
	}
	c.users++
	return c, nil
}

func (p *connPool) put(c *peerConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c.users--
	c.last = time.Now()
}

func (p *connPool) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	var errs []error
	for a, c := range p.conns {
		delete(p.conns, a)
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// call makes a unary call to the node at address. sent says whether the other
// side may have seen it.
func (f *Forwarder) call(ctx context.Context, address, method string, req, resp any) (sent bool, err error) {
	conn, err := f.conns.get(address)
	if err != nil {
		return false, err
	}
	defer f.conns.put(conn)
	// Not Invoke: opening and sending are told apart here.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{}, method)
	if err != nil {
		return false, err
	}
	// Where sending fails because the call has ended, the answer tells why.
	if err := stream.SendMsg(req); err != nil && !errors.Is(err, io.EOF) {
		return true, err
	}
	return true, stream.RecvMsg(resp)
}

// errorInfo is the part of a status that Diurna itself put there; nil where the
// error comes from gRPC or from something in between.
func errorInfo(err error) *errdetails.ErrorInfo {
	st, ok := status.FromError(err)
	if !ok {
		return nil
	}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == ErrorDomain {
			return info
		}
	}
	return nil
}

// isOurs reports whether an error says for sure what became of the call.
func isOurs(err error) bool {
	return errorInfo(err) != nil || status.Code(err) == codes.Unimplemented
}

// leaderError is what an error of a call to the leader means to the client of
// this node: what is wrong with the request stays as the leader said it, what
// is wrong with the leader is that there is none now.
func leaderError(err error, address string) error {
	if err == nil {
		return nil
	}
	info := errorInfo(err)
	if info == nil {
		switch c := status.Code(err); {
		case errors.Is(err, ErrClosed), errors.Is(err, ErrOverloaded):
			return err
		case c == codes.Canceled:
			return context.Canceled
		case c == codes.DeadlineExceeded:
			return context.DeadlineExceeded
		}
		return fmt.Errorf("%w: the leader at %s cannot be reached: %s", ErrNoLeader, address, status.Convert(err).Message())
	}
	switch info.GetReason() {
	case ReasonNotLeader:
		return &NotLeaderError{LeaderID: info.GetMetadata()["leader_id"], LeaderAddress: info.GetMetadata()["leader_address"]}
	case ReasonUnknownServer:
		return &UnknownServerError{ID: info.GetMetadata()["id"]}
	case ReasonNoLeader, ReasonShuttingDown, ReasonForeignCluster, ReasonTooManyCalls, ReasonDenied, ReasonNoCertificate:
		return fmt.Errorf("%w: the node at %s does not lead: %s", ErrNoLeader, address, status.Convert(err).Message())
	}
	return &remoteError{st: status.Convert(err), unknown: info.GetReason() == ReasonUnknownOutcome}
}

func errNoAnswer(address string) error {
	return fmt.Errorf("%w: the leader at %s does not answer", ErrNoLeader, address)
}

// remoteError is an error that another node has made, with all its details.
type remoteError struct {
	st      *status.Status
	unknown bool
}

func (e *remoteError) Error() string { return e.st.Message() }

// GRPCStatus lets the error pass to the client as it is.
func (e *remoteError) GRPCStatus() *status.Status { return e.st }

// Is implements errors.Is.
func (e *remoteError) Is(target error) bool { return e.unknown && target == ErrUnknownOutcome }

// takenBefore is how many requests of a stream the other side has taken before
// it ended it with err; ok is false where it did not say.
func takenBefore(err error) (n uint64, ok bool) {
	n, perr := strconv.ParseUint(errorInfo(err).GetMetadata()[MetaRequest], 10, 64)
	return n, perr == nil
}
