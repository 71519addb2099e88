package peertest

import (
	"context"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/diurnalog/diurna/agent/peer"
)

const (
	// window is how much of a direction of a connection may be under way or not
	// read yet before writing blocks, in bytes.
	window = 256 << 10
	// segment is the most that is delayed as one, in bytes.
	segment = 16 << 10
	// backlog is how many connections wait for an Accept; dialling waits then.
	backlog = 128
	// dialPatience is when dialling gives up without a context's help.
	dialPatience = 2 * time.Minute
	// patience is the default of SetPatience.
	patience = 30 * time.Second
)

// Link is how one host's packets reach another. The zero value is a perfect
// network.
type Link struct {
	// Delay is how long everything takes, and Jitter the most that is added at
	// random. Order within a connection is kept.
	Delay, Jitter time.Duration
	// Reset is the probability with which a write breaks its connection, after
	// some of it, all or nothing got through. The writer may not learn of it in
	// that write.
	Reset float64
	// BytesPerSecond is shared by all connections of the link; 0 is unlimited.
	BytesPerSecond int
}

// way is an ordered pair of hosts.
type way struct{ from, to string }

// Net is the network. All methods are safe for concurrent use.
type Net struct {
	mu        sync.Mutex
	rng       *rand.Rand
	closed    bool
	changed   chan struct{} // closed when a waiting dial should look again
	listeners map[string]*listener
	conns     map[uint64]*pair
	nextConn  uint64
	nextPort  map[string]int // for Listen
	nextDial  map[string]int

	common   Link
	links    map[way]Link
	busy     map[way]time.Time // until when a link with limited speed sends
	blocked  map[way]bool
	isolated map[string]bool
	paused   map[string]bool
	refusing map[string]bool

	patience    time.Duration
	resetOnHeal float64
}

// New returns a perfect network without hosts. The generator is the Net's from
// now on.
func New(rng *rand.Rand) *Net {
	return &Net{
		rng:       rng,
		changed:   make(chan struct{}),
		listeners: make(map[string]*listener),
		conns:     make(map[uint64]*pair),
		nextPort:  make(map[string]int),
		nextDial:  make(map[string]int),
		links:     make(map[way]Link),
		busy:      make(map[way]time.Time),
		blocked:   make(map[way]bool),
		isolated:  make(map[string]bool),
		paused:    make(map[string]bool),
		refusing:  make(map[string]bool),
		patience:  patience,
	}
}

// Host returns the network as one host sees it: it listens at name:port or at
// :port, where port 0 is a free one that was never used before, and dials from
// there. Any number of calls mean the same host.
func (n *Net) Host(name string) peer.Network { return host{n, name} }

// Close breaks all connections, closes all listeners, and ends dials and timers.
func (n *Net) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	for _, address := range slices.Sorted(maps.Keys(n.listeners)) {
		n.listeners[address].end()
	}
	for _, p := range n.open() {
		p.fail(net.ErrClosed)
	}
	n.wake()
}

// open returns the open connections, in the order of their making.
func (n *Net) open() []*pair {
	var all []*pair
	for _, id := range slices.Sorted(maps.Keys(n.conns)) {
		all = append(all, n.conns[id])
	}
	return all
}

// wake lets waiting dials look again.
func (n *Net) wake() {
	close(n.changed)
	n.changed = make(chan struct{})
}

// cut tells whether packets vanish on a way. A host always reaches itself.
func (n *Net) cut(w way) bool {
	if w.from == w.to {
		return false
	}
	return n.blocked[w] || n.isolated[w.from] || n.isolated[w.to] || n.paused[w.from] || n.paused[w.to]
}

// link returns the faults of a way, which has none within a host.
func (n *Net) link(w way) Link {
	if w.from == w.to {
		return Link{}
	}
	if l, ok := n.links[w]; ok {
		return l
	}
	return n.common
}

// travel is how long a packet takes that is sent now.
func (n *Net) travel(w way, size int) time.Duration {
	l := n.link(w)
	d := l.Delay
	if l.Jitter > 0 {
		d += time.Duration(n.rng.Int64N(int64(l.Jitter) + 1))
	}
	if l.BytesPerSecond > 0 {
		now := time.Now()
		start := now
		if n.busy[w].After(now) {
			start = n.busy[w]
		}
		n.busy[w] = start.Add(time.Duration(float64(size) / float64(l.BytesPerSecond) * float64(time.Second)))
		d += n.busy[w].Sub(now)
	}
	return d
}

// host is a peer.Network.
type host struct {
	net  *Net
	name string
}

// addr is a host:port.
type addr string

func (addr) Network() string  { return "tcp" }
func (a addr) String() string { return string(a) }

func join(name string, port int) string { return net.JoinHostPort(name, strconv.Itoa(port)) }

// firstPort is the first that is given to who asks for port 0, firstDial to who
// dials.
const (
	firstPort = 20000
	firstDial = 40000
	lastDial  = 1<<16 - 1
)

func (n *Net) freePort(name string) int {
	n.nextPort[name] = max(n.nextPort[name], firstPort)
	for n.listeners[join(name, n.nextPort[name])] != nil {
		n.nextPort[name]++
	}
	n.nextPort[name]++
	return n.nextPort[name] - 1
}

// dialPort is where a connection comes from; that it may be in use already
// confuses only who looks.
func (n *Net) dialPort(name string) int {
	port := max(n.nextDial[name], firstDial)
	n.nextDial[name] = port + 1
	if port == lastDial {
		n.nextDial[name] = firstDial
	}
	return port
}

func (h host) Listen(address string) (net.Listener, error) {
	fail := func(err error) (net.Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: "tcp", Addr: addr(address), Err: err}
	}
	name, portText, err := net.SplitHostPort(address)
	if err != nil {
		return fail(err)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return fail(err)
	}
	if name != "" && name != h.name {
		return fail(os.NewSyscallError("bind", syscall.EADDRNOTAVAIL))
	}
	n := h.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return fail(net.ErrClosed)
	}
	if port == 0 {
		port = uint64(n.freePort(h.name))
	}
	full := join(h.name, int(port))
	if n.listeners[full] != nil {
		return fail(os.NewSyscallError("bind", syscall.EADDRINUSE))
	}
	l := &listener{net: n, addr: addr(full), queue: make(chan *conn, backlog), done: make(chan struct{})}
	n.listeners[full] = l
	n.wake()
	return l, nil
}

func (h host) Dial(ctx context.Context, address string) (net.Conn, error) {
	c, err := h.dial(ctx, address)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: addr(address), Err: err}
	}
	return c, nil
}

// dial sends a packet there, which the listener answers with one back; either
// may have to wait until the way is free, as it would be repeated.
func (h host) dial(ctx context.Context, address string) (net.Conn, error) {
	name, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	there, back := way{h.name, name}, way{name, h.name}
	giveUp := time.NewTimer(dialPatience)
	defer giveUp.Stop()
	n := h.net
	n.mu.Lock()
	trip := n.travel(there, 0) + n.travel(back, 0)
	n.mu.Unlock()
	if trip > 0 {
		arrives := time.NewTimer(trip)
		defer arrives.Stop()
		select {
		case <-arrives.C:
		case <-giveUp.C:
			return nil, os.NewSyscallError("connect", syscall.ETIMEDOUT)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		c, changed, err := n.connect(there, back, address)
		if c != nil || err != nil {
			return c, err
		}
		select {
		case <-changed:
		case <-giveUp.C:
			return nil, os.NewSyscallError("connect", syscall.ETIMEDOUT)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// connect makes a connection, or returns what to wait for.
func (n *Net) connect(there, back way, address string) (net.Conn, <-chan struct{}, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, nil, net.ErrClosed
	}
	if n.cut(there) || n.cut(back) {
		return nil, n.changed, nil
	}
	l := n.listeners[address]
	if l == nil || n.refusing[there.to] {
		return nil, nil, os.NewSyscallError("connect", syscall.ECONNREFUSED)
	}
	if len(l.queue) == cap(l.queue) {
		return nil, n.changed, nil
	}
	p := newPair(n, there, addr(join(there.from, n.dialPort(there.from))), l.addr)
	l.queue <- p.accepting
	return p.dialling, nil, nil
}

// listener accepts what is dialled.
type listener struct {
	net   *Net
	addr  addr
	queue chan *conn
	done  chan struct{}
	ended bool // guarded by net.mu
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
	default:
		select {
		case c := <-l.queue:
			l.net.mu.Lock()
			defer l.net.mu.Unlock()
			l.net.wake()
			return c, nil
		case <-l.done:
		}
	}
	return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: net.ErrClosed}
}

func (l *listener) Addr() net.Addr { return l.addr }

func (l *listener) Close() error {
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	if !l.end() {
		return &net.OpError{Op: "close", Net: "tcp", Addr: l.addr, Err: net.ErrClosed}
	}
	return nil
}

// end closes the listener and resets what waits in it.
func (l *listener) end() (first bool) {
	if l.ended {
		return false
	}
	l.ended = true
	delete(l.net.listeners, string(l.addr))
	close(l.done)
	for {
		select {
		case c := <-l.queue:
			c.abort()
		default:
			l.net.wake()
			return true
		}
	}
}
