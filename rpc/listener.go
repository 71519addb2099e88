package rpc

import (
	"net"
	"sync"
	"time"
)

// connTracker knows the open connections and which of them speak gRPC yet.
type connTracker struct {
	traffic
	mu      sync.Mutex
	closing bool                      // guarded by mu
	conns   map[*trackedConn]struct{} // guarded by mu
}

// closeUnready closes connections that are not through their handshake, and
// from now on every new one.
func (t *connTracker) closeUnready() {
	t.close(func(c *trackedConn) bool { return !c.ready })
}

// closeAll closes every connection.
func (t *connTracker) closeAll() {
	t.close(func(*trackedConn) bool { return true })
}

func (t *connTracker) close(which func(*trackedConn) bool) {
	t.mu.Lock()
	t.closing = true
	var victims []*trackedConn
	for c := range t.conns {
		if which(c) {
			victims = append(victims, c)
		}
	}
	t.mu.Unlock()
	for _, c := range victims {
		// What fails to close cannot be helped; gRPC notices on its side.
		_ = c.Close()
	}
}

// trackingListener hands out connections that connTracker knows, and so many at
// a time. (netutil.LimitListener would hide that they are secured.)
type trackingListener struct {
	net.Listener
	tracker *connTracker
	slots   chan struct{} // one for each open connection
	closing chan struct{}
	once    sync.Once
}

func newTrackingListener(l net.Listener, limit int, tracker *connTracker) *trackingListener {
	return &trackingListener{Listener: l, tracker: tracker, slots: make(chan struct{}, limit), closing: make(chan struct{})}
}

// Close implements net.Listener.
func (l *trackingListener) Close() error {
	l.once.Do(func() { close(l.closing) })
	return l.Listener.Close()
}

func (l *trackingListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closing:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	c := &trackedConn{Conn: conn, tracker: l.tracker, release: sync.OnceFunc(func() { <-l.slots })}
	t := l.tracker
	t.mu.Lock()
	closing := t.closing
	if t.conns == nil {
		t.conns = make(map[*trackedConn]struct{})
	}
	t.conns[c] = struct{}{}
	t.mu.Unlock()
	if closing {
		_ = c.Close() // gRPC meets it closed and lets go of it
	}
	return c, nil
}

type trackedConn struct {
	net.Conn
	tracker *connTracker
	release func() // gives the place in the listener back
	ready   bool   // guarded by tracker.mu
}

// NetConn is the connection underneath, as tls.Conn has it.
func (c *trackedConn) NetConn() net.Conn { return c.Conn }

// SetDeadline tells when the handshake is over: gRPC sets a deadline before it
// and takes it away after. If that ever changes, connections count as not
// ready, a shutdown turns abrupt, and the tests of it fail.
func (c *trackedConn) SetDeadline(t time.Time) error {
	if t.IsZero() {
		c.tracker.mu.Lock()
		c.ready = true
		c.tracker.mu.Unlock()
	}
	return c.Conn.SetDeadline(t)
}

func (c *trackedConn) Close() error {
	c.tracker.mu.Lock()
	delete(c.tracker.conns, c)
	c.tracker.mu.Unlock()
	defer c.release()
	return c.Conn.Close()
}
