package peertest

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// pair is a connection, both sides of it. Everything in it is guarded by net.mu.
type pair struct {
	net   *Net
	id    uint64
	there way // from the side that dialled

	dialling, accepting *conn

	cut   bool        // one way or the other
	death *time.Timer // when the sides lose patience; nil unless cut
}

func newPair(n *Net, there way, from, to addr) *pair {
	p := &pair{net: n, id: n.nextConn, there: there}
	n.nextConn++
	back := way{there.to, there.from}
	// Each reads from the flow that the other writes to.
	forth, home := newFlow(n, there), newFlow(n, back)
	p.dialling = newConn(p, from, to, home, forth)
	p.accepting = newConn(p, to, from, forth, home)
	forth.to, home.to = p.accepting, p.dialling
	n.conns[p.id] = p
	p.follow()
	return p
}

// follow does what a change of what is cut means for the connection.
func (p *pair) follow() {
	n := p.net
	was := p.cut
	p.cut = n.cut(p.there) || n.cut(way{p.there.to, p.there.from})
	switch {
	case p.cut && !was && n.patience > 0:
		var death *time.Timer
		death = time.AfterFunc(n.patience, func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			if p.death == death { // else the way was free in the meantime
				p.fail(syscall.ETIMEDOUT)
			}
		})
		p.death = death
	case !p.cut && was:
		p.calm()
		if n.resetOnHeal > 0 && n.rng.Float64() < n.resetOnHeal {
			p.fail(syscall.ECONNRESET)
			return
		}
	}
	p.accepting.in.deliver()
	p.dialling.in.deliver()
}

func (p *pair) calm() {
	if p.death != nil {
		p.death.Stop()
		p.death = nil
	}
}

// fail breaks both sides at once.
func (p *pair) fail(err error) {
	p.dialling.fail(err)
	p.accepting.fail(err)
	p.settle()
}

// settle forgets the connection once neither side can do anything with it.
func (p *pair) settle() {
	if !p.dialling.over() || !p.accepting.over() {
		return
	}
	p.calm()
	for _, c := range []*conn{p.dialling, p.accepting} {
		c.reading.stop()
		c.writing.stop()
	}
	p.dialling.in.stop()
	p.accepting.in.stop()
	delete(p.net.conns, p.id)
}

// flow is one direction of a connection.
type flow struct {
	net *Net
	way way
	to  *conn // the side that reads

	sent  []packet    // under way; none arrives before the one in front of it
	timer *time.Timer // for the first of sent

	ready  []byte // arrived and not read
	eof    bool   // nothing comes after ready
	queued int    // bytes in sent and ready
	ended  bool   // the sender has ended its side
}

// packet is a piece of a stream, or how it ends.
type packet struct {
	data []byte
	end  error // io.EOF: in order; otherwise the connection is reset
	due  time.Time
}

func newFlow(n *Net, w way) *flow { return &flow{net: n, way: w} }

// send puts a packet on its way.
func (f *flow) send(data []byte, end error) {
	due := time.Now().Add(f.net.travel(f.way, len(data)))
	f.queued += len(data)
	f.sent = append(f.sent, packet{data, end, due})
	f.deliver()
}

// deliver takes from sent what has arrived, and sees to it that the rest is when
// it is due.
func (f *flow) deliver() {
	if f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
	if f.net.cut(f.way) {
		return // follow calls again
	}
	for len(f.sent) > 0 {
		p := f.sent[0]
		if wait := time.Until(p.due); wait > 0 {
			f.timer = time.AfterFunc(wait, func() {
				f.net.mu.Lock()
				defer f.net.mu.Unlock()
				f.deliver()
			})
			return
		}
		f.sent = f.sent[1:]
		f.arrive(p)
	}
	f.sent = nil
}

// arrive hands a packet to the side that reads.
func (f *flow) arrive(p packet) {
	to := f.to
	switch {
	case to.closed && p.end == nil:
		// Nobody reads it any more; the sender learns so.
		f.queued -= len(p.data)
		if !to.refusing {
			to.refusing = true
			to.out.send(nil, syscall.ECONNRESET)
		}
	case errors.Is(p.end, io.EOF):
		f.eof = true
	case p.end != nil:
		to.fail(p.end)
		to.pair.settle()
	default:
		f.ready = append(f.ready, p.data...)
	}
	to.readers.Broadcast()
}

// stop ends the flow's timer, and drops what is under way. What has arrived can
// still be read.
func (f *flow) stop() {
	if f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
	f.sent = nil
}

// conn is one side of a connection.
type conn struct {
	pair          *pair
	local, remote addr
	in, out       *flow

	readers, writers *sync.Cond
	reading, writing deadline

	closed   bool  // by its owner
	broken   error // by the network
	refusing bool  // the other side was told that nobody reads
}

func newConn(p *pair, local, remote addr, in, out *flow) *conn {
	c := &conn{pair: p, local: local, remote: remote, in: in, out: out}
	c.readers, c.writers = sync.NewCond(&p.net.mu), sync.NewCond(&p.net.mu)
	return c
}

// over tells whether the side can neither read nor be read from any more.
func (c *conn) over() bool { return c.closed || c.broken != nil }

// fail breaks this side.
func (c *conn) fail(err error) {
	if c.broken == nil {
		c.broken = err
	}
	c.wake()
}

func (c *conn) wake() {
	c.readers.Broadcast()
	c.writers.Broadcast()
}

func (c *conn) opError(op string, err error) error {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		err = os.NewSyscallError(op, errno)
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.remote, Err: err}
}

// Read returns what has arrived before it says that the connection is broken.
func (c *conn) Read(p []byte) (int, error) {
	c.pair.net.mu.Lock()
	defer c.pair.net.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.opError("read", net.ErrClosed)
		case c.reading.passed():
			return 0, c.opError("read", os.ErrDeadlineExceeded)
		case len(p) == 0:
			return 0, nil
		case len(c.in.ready) > 0:
			k := copy(p, c.in.ready)
			c.in.ready = c.in.ready[k:]
			if len(c.in.ready) == 0 {
				c.in.ready = nil
			}
			c.in.queued -= k
			c.other().writers.Broadcast()
			return k, nil
		case c.broken != nil:
			return 0, c.opError("read", c.broken)
		case c.in.eof:
			return 0, io.EOF
		}
		c.readers.Wait()
	}
}

// Write blocks while too much is under way.
func (c *conn) Write(p []byte) (done int, err error) {
	n := c.pair.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if l := n.link(c.out.way); l.Reset > 0 && len(p) > 0 && c.writable() == nil && n.rng.Float64() < l.Reset {
		return c.writeAndBreak(p)
	}
	for {
		// First: what was sent is, whatever came back.
		if done > 0 && done == len(p) {
			return done, nil
		}
		if err := c.writable(); err != nil {
			return done, c.opError("write", err)
		}
		if len(p) == 0 {
			return 0, nil
		}
		if room := min(window-c.out.queued, segment, len(p)-done); room > 0 {
			c.out.send(append([]byte(nil), p[done:done+room]...), nil)
			done += room
			continue
		}
		c.writers.Wait()
	}
}

func (c *conn) writable() error {
	switch {
	case c.closed:
		return net.ErrClosed
	case c.broken != nil:
		return c.broken
	case c.writing.passed():
		return os.ErrDeadlineExceeded
	case c.out.ended:
		return syscall.EPIPE
	}
	return nil
}

// writeAndBreak lets some of p through, and resets the connection. Whether the
// writer learns of it now says nothing about how much got through.
func (c *conn) writeAndBreak(p []byte) (int, error) {
	rng := c.pair.net.rng
	through := 0
	switch rng.IntN(3) {
	case 0:
		through = len(p)
	case 1:
		through = rng.IntN(len(p))
	}
	through = min(through, window)
	if through > 0 {
		c.out.send(append([]byte(nil), p[:through]...), nil)
	}
	c.out.ended = true
	c.out.send(nil, syscall.ECONNRESET)
	c.fail(syscall.ECONNRESET)
	c.pair.settle()
	if rng.IntN(2) == 0 {
		return len(p), nil
	}
	return 0, c.opError("write", syscall.ECONNRESET)
}

// Close lets what was written arrive, then the end of the stream. If there is
// something that was not read, the other side is reset.
func (c *conn) Close() error {
	c.pair.net.mu.Lock()
	defer c.pair.net.mu.Unlock()
	if c.closed {
		return c.opError("close", net.ErrClosed)
	}
	if len(c.in.ready) > 0 {
		c.abort()
		return nil
	}
	c.closed = true
	c.end(io.EOF)
	return nil
}

// abort closes this side and resets the other.
func (c *conn) abort() {
	c.closed, c.refusing = true, true
	c.end(syscall.ECONNRESET)
}

func (c *conn) end(how error) {
	if c.broken == nil && (!c.out.ended || !errors.Is(how, io.EOF)) {
		c.out.ended = true
		c.out.send(nil, how)
	}
	c.in.queued -= len(c.in.ready)
	c.in.ready = nil
	c.wake()
	c.pair.settle()
}

// CloseWrite ends the stream in one direction.
func (c *conn) CloseWrite() error {
	c.pair.net.mu.Lock()
	defer c.pair.net.mu.Unlock()
	if err := c.writable(); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return c.opError("shutdown", err)
	}
	c.out.ended = true
	c.out.send(nil, io.EOF)
	c.writers.Broadcast()
	return nil
}

func (c *conn) other() *conn {
	if c == c.pair.dialling {
		return c.pair.accepting
	}
	return c.pair.dialling
}

func (c *conn) LocalAddr() net.Addr  { return c.local }
func (c *conn) RemoteAddr() net.Addr { return c.remote }

func (c *conn) SetDeadline(t time.Time) error      { return c.setDeadlines(t, true, true) }
func (c *conn) SetReadDeadline(t time.Time) error  { return c.setDeadlines(t, true, false) }
func (c *conn) SetWriteDeadline(t time.Time) error { return c.setDeadlines(t, false, true) }

func (c *conn) setDeadlines(t time.Time, read, write bool) error {
	c.pair.net.mu.Lock()
	defer c.pair.net.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	if read {
		c.reading.set(c, c.readers, t)
	}
	if write {
		c.writing.set(c, c.writers, t)
	}
	return nil
}

// deadline ends the waiting of one direction.
type deadline struct {
	at      time.Time
	timer   *time.Timer
	expired bool // the timer fired; the clock may differ by a little
}

func (d *deadline) passed() bool {
	return d.expired || !d.at.IsZero() && !time.Now().Before(d.at)
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}

func (d *deadline) set(c *conn, waiting *sync.Cond, t time.Time) {
	d.stop()
	d.at, d.expired = t, false
	if t.IsZero() {
		return
	}
	if wait := time.Until(t); wait > 0 {
		var timer *time.Timer
		timer = time.AfterFunc(wait, func() {
			c.pair.net.mu.Lock()
			defer c.pair.net.mu.Unlock()
			if d.timer == timer {
				d.expired = true
				waiting.Broadcast()
			}
		})
		d.timer = timer
		return
	}
	waiting.Broadcast()
}
