package peer

import (
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"sync/atomic"
)

// Conn is a peer stream after its greeting.
type Conn struct {
	net.Conn
	hello Hello
}

// Hello is what the dialling side said.
func (c *Conn) Hello() Hello { return c.hello }

// NetConn is the connection underneath, as tls.Conn has it.
func (c *Conn) NetConn() net.Conn { return c.Conn }

// ConnectionState is what TLS found out about the other node; ok is false where
// the stream is plaintext.
func (c *Conn) ConnectionState() (state tls.ConnectionState, ok bool) { return ConnectionState(c.Conn) }

// CloseWrite ends the stream in one direction, where the connection can.
func (c *Conn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}

// lane is one of the listeners that a Port is split into.
type lane struct {
	addr  net.Addr
	queue chan net.Conn
	done  chan struct{}

	mu  sync.Mutex
	err error // why it is closed; guarded by mu
}

func newLane(addr net.Addr, backlog int) *lane {
	return &lane{addr: addr, queue: make(chan net.Conn, backlog), done: make(chan struct{})}
}

// offer queues a connection, unless the lane is closed or full.
func (l *lane) offer(conn net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return false
	}
	select {
	case l.queue <- conn:
		return true
	default:
		return false
	}
}

// Accept returns the next connection. Once the lane is closed its error is
// net.ErrClosed; if the port broke, what broke it.
func (l *lane) Accept() (net.Conn, error) {
	// Closed first: select would choose at random.
	select {
	case <-l.done:
		return nil, l.opError("accept")
	default:
	}
	select {
	case conn := <-l.queue:
		return conn, nil
	case <-l.done:
		return nil, l.opError("accept")
	}
}

// Close closes the lane and what waits in it. A second time it is an error, as
// it is with other listeners.
func (l *lane) Close() error {
	if !l.end(net.ErrClosed) {
		return l.opError("close")
	}
	return nil
}

// Addr is the port's.
func (l *lane) Addr() net.Addr { return l.addr }

func (l *lane) isClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err != nil
}

func (l *lane) opError(op string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if inner, ok := errors.AsType[*net.OpError](l.err); ok {
		return inner
	}
	return &net.OpError{Op: op, Net: l.addr.Network(), Addr: l.addr, Err: l.err}
}

func (l *lane) end(why error) (first bool) {
	l.mu.Lock()
	if l.err != nil {
		l.mu.Unlock()
		return false
	}
	l.err = why
	close(l.done)
	l.mu.Unlock()
	for {
		select {
		case conn := <-l.queue:
			discard(conn)
		default:
			return true
		}
	}
}

// replayConn is a connection that has one byte back that was read from it.
// Everything else goes to the connection underneath.
type replayConn struct {
	net.Conn
	first   byte
	pending atomic.Bool
}

func putBack(conn net.Conn, first byte) *replayConn {
	c := &replayConn{Conn: conn, first: first}
	c.pending.Store(true)
	return c
}

func (c *replayConn) Read(p []byte) (int, error) {
	if len(p) > 0 && c.pending.CompareAndSwap(true, false) {
		p[0] = c.first
		return 1, nil
	}
	return c.Conn.Read(p)
}

// NetConn is the connection underneath, which lacks the byte.
func (c *replayConn) NetConn() net.Conn { return c.Conn }

// CloseWrite ends the stream in one direction, where the connection can.
func (c *replayConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}
