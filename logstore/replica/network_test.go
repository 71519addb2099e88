package replica

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// memNetwork connects servers of one test in memory. A cut direction holds what
// is sent along it until it is mended, as a network does that loses packets.
type memNetwork struct {
	mu        sync.Mutex
	listeners map[string]*memListener
	cut       map[[2]string]bool
	changes   broadcast
}

func newMemNetwork() *memNetwork {
	return &memNetwork{listeners: map[string]*memListener{}, cut: map[[2]string]bool{}}
}

func (n *memNetwork) isCut(from, to string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cut[[2]string{from, to}]
}

// set cuts or mends one direction.
func (n *memNetwork) set(from, to string, cut bool) {
	n.mu.Lock()
	n.cut[[2]string{from, to}] = cut
	n.mu.Unlock()
	n.changes.poke()
}

// isolate cuts a server off from others, or mends that.
func (n *memNetwork) isolate(id string, cut bool, others ...string) {
	for _, o := range others {
		n.set(id, o, cut)
		n.set(o, id, cut)
	}
}

// listen makes a server's end.
func (n *memNetwork) listen(id string) *memListener {
	l := &memListener{n: n, id: id, queue: make(chan net.Conn, 64), closed: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listeners[id] = l
	return l
}

type memListener struct {
	n      *memNetwork
	id     string
	queue  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *memListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *memListener) Addr() net.Addr { return addr(l.id) }

func (l *memListener) Dial(ctx context.Context, id, _ string) (net.Conn, error) {
	for {
		changed := l.n.changes.next()
		if !l.n.isCut(l.id, id) && !l.n.isCut(id, l.id) {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	l.n.mu.Lock()
	to := l.n.listeners[id]
	l.n.mu.Unlock()
	if to == nil {
		return nil, fmt.Errorf("no server %s", id)
	}
	select {
	case <-to.closed:
		return nil, errors.New("connection refused")
	default:
	}
	out, in := &half{n: l.n, from: l.id, to: id}, &half{n: l.n, from: id, to: l.id}
	select {
	case to.queue <- &memConn{r: out, w: in, peer: l.id}:
		return &memConn{r: in, w: out, peer: id}, nil
	case <-to.closed:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// half is one direction of a connection.
type half struct {
	n        *memNetwork
	from, to string
	mu       sync.Mutex
	buf      []byte
	closed   bool
	changes  broadcast
}

const halfBuffer = 4 << 20

type memConn struct {
	r, w   *half
	peer   string
	mu     sync.Mutex
	rd, wd time.Time
	closed bool
}

// wait returns when something changed, or at the deadline.
func (c *memConn) wait(h *half, halfChanged, netChanged <-chan struct{}, deadline *time.Time) error {
	c.mu.Lock()
	closed, at := c.closed, *deadline
	c.mu.Unlock()
	if closed {
		return net.ErrClosed
	}
	var late <-chan time.Time
	if !at.IsZero() {
		left := time.Until(at)
		if left <= 0 {
			return os.ErrDeadlineExceeded
		}
		timer := time.NewTimer(left)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case <-halfChanged:
	case <-netChanged:
	case <-late:
		return os.ErrDeadlineExceeded
	}
	return nil
}

func (c *memConn) Read(p []byte) (int, error) {
	for {
		halfChanged, netChanged := c.r.changes.next(), c.r.n.changes.next()
		if !c.r.n.isCut(c.r.from, c.r.to) {
			c.r.mu.Lock()
			n, closed := copy(p, c.r.buf), c.r.closed
			c.r.buf = c.r.buf[n:]
			c.r.mu.Unlock()
			if n > 0 {
				c.r.changes.poke()
				return n, nil
			}
			if closed {
				return 0, io.EOF
			}
		}
		if err := c.wait(c.r, halfChanged, netChanged, &c.rd); err != nil {
			return 0, err
		}
	}
}

func (c *memConn) Write(p []byte) (written int, err error) {
	for {
		halfChanged := c.w.changes.next()
		c.w.mu.Lock()
		if c.w.closed {
			c.w.mu.Unlock()
			return written, io.ErrClosedPipe
		}
		n := min(len(p), halfBuffer-len(c.w.buf))
		c.w.buf = append(c.w.buf, p[:n]...)
		c.w.mu.Unlock()
		if n > 0 {
			c.w.changes.poke()
		}
		written += n
		if p = p[n:]; len(p) == 0 {
			return written, nil
		}
		if err := c.wait(c.w, halfChanged, nil, &c.wd); err != nil {
			return written, err
		}
	}
}

func (c *memConn) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	for _, h := range []*half{c.r, c.w} {
		h.mu.Lock()
		h.closed = true
		h.mu.Unlock()
		h.changes.poke()
	}
	return nil
}

func (c *memConn) LocalAddr() net.Addr  { return addr(c.w.from) }
func (c *memConn) RemoteAddr() net.Addr { return addr(c.peer) }

func (c *memConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *memConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	c.rd = t
	c.mu.Unlock()
	c.r.changes.poke()
	return nil
}

func (c *memConn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	c.wd = t
	c.mu.Unlock()
	c.w.changes.poke()
	return nil
}

// testGroup is some servers on one memNetwork.
type testGroup struct {
	t     testing.TB
	dir   string
	net   *memNetwork
	ids   []string
	disks map[string]*vfstest.Mem
	nodes map[string]*Replica
	tweak func(*Config)
}

// newGroup starts n voters, a, b, c and so on.
func newGroup(t testing.TB, n int, tweak func(*Config)) *testGroup {
	t.Helper()
	g := &testGroup{t: t, dir: t.TempDir(), net: newMemNetwork(), disks: map[string]*vfstest.Mem{}, nodes: map[string]*Replica{}, tweak: tweak}
	var first raft.Configuration
	for i := range n {
		id := string(rune('a' + i))
		g.start(id)
		first.Servers = append(first.Servers, raft.Server{ID: raft.ServerID(id), Address: raft.ServerAddress(id + ":1")})
	}
	if err := g.nodes["a"].raft.BootstrapCluster(first).Error(); err != nil {
		t.Fatal(err)
	}
	return g
}

// start opens a server on the disk that it had, if any.
func (g *testGroup) start(id string) *Replica {
	g.t.Helper()
	if g.disks[id] == nil {
		g.disks[id] = vfstest.New()
		g.ids = append(g.ids, id)
	}
	cfg := memConfig(filepath.Join(g.dir, id), g.disks[id])
	if err := vfs.OS.MkdirAll(cfg.Dir); err != nil {
		g.t.Fatal(err)
	}
	cfg.ID, cfg.Address, cfg.Bootstrap, cfg.Network = id, id+":1", nil, g.net.listen(id)
	cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout = 2*time.Second, 2*time.Second, 1500*time.Millisecond
	if g.tweak != nil {
		g.tweak(&cfg)
	}
	r, err := Open(cfg)
	if err != nil {
		g.t.Fatal(err)
	}
	g.nodes[id] = r
	return r
}

// others are all ids but one.
func (g *testGroup) others(id string) (ids []string) {
	for _, o := range g.ids {
		if o != id {
			ids = append(ids, o)
		}
	}
	return ids
}

// stop closes all servers. Those that failed may say so.
func (g *testGroup) stop() {
	g.t.Helper()
	var wg sync.WaitGroup
	for _, id := range g.ids {
		if r := g.nodes[id]; r != nil {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
				defer cancel()
				if err := r.Close(ctx); err != nil && r.Err() == nil {
					g.t.Errorf("close %s: %v", id, err)
				}
			})
		}
	}
	wg.Wait()
}

// leader waits for one among some servers, which takes proposals; all if none is
// named.
func (g *testGroup) leader(ctx context.Context, among ...string) *Replica {
	g.t.Helper()
	if len(among) == 0 {
		among = g.ids
	}
	found := make(chan *Replica, len(among))
	ctx, cancel := context.WithCancel(ctx)
	var waiting sync.WaitGroup
	defer waiting.Wait()
	defer cancel()
	for _, id := range among {
		r := g.nodes[id]
		waiting.Go(func() {
			if r.WaitReady(ctx) == nil {
				found <- r
			}
		})
	}
	select {
	case r := <-found:
		return r
	case <-ctx.Done():
		for _, id := range among {
			g.t.Logf("%s: %+v", id, g.nodes[id].Status())
		}
		g.t.Fatal("no leader in time")
		return nil
	}
}

// within is a context that ends after some election timeouts.
func (g *testGroup) within(elections int) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), time.Duration(elections)*g.nodes["a"].cfg.ElectionTimeout)
}
