package peer

import (
	"container/list"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// The defaults of PortConfig, and what is fixed.
const (
	DefaultHandshakeTimeout = 10 * time.Second
	DefaultMaxHandshakes    = 256
	DefaultBacklog          = 128

	// lingerTime and lingerBytes bound how long a refused side is listened to,
	// so that it can read why: closing with unread data would reset it.
	lingerTime  = time.Second
	lingerBytes = 64 << 10

	// acceptWaitMin and acceptWaitMax are the pauses after a failed accept, such
	// as one for lack of file descriptors.
	acceptWaitMin = 5 * time.Millisecond
	acceptWaitMax = time.Second
)

// PortConfig says who a Port is. Self is required.
type PortConfig struct {
	// Self returns this node's id, and its cluster's, empty if it is in none
	// yet. It is asked for every peer.
	Self func() (nodeID, clusterID string)
	// TLS, if set, is what every connection has to be secured by; nil is
	// plaintext. The port sets its NextProtos, and those of what its
	// GetConfigForClient returns: ALPN decides between Clients and Peers. That a
	// peer shows a certificate, and one of a node, is for VerifyConnection to
	// see to. What may change while the port is open has to come from
	// GetConfigForClient or GetCertificate.
	TLS *tls.Config
	// Failed, if set, is told why a handshake of TLS failed: that a CA is not
	// known may be news to whoever keeps them. It must be quick.
	Failed func(error)
	// Check, if set, has the last word on a peer that fits (see Match): an error
	// refuses it, a *RefusedError with its own reason. conn is for looking at,
	// not for reading or writing: ConnectionState has its certificate, SameNode
	// compares that with hello. Check runs concurrently and must be quick.
	Check func(conn net.Conn, hello Hello) error
	// HandshakeTimeout is how long a connection may take to say what it is, and
	// a peer to greet. Default 10 s.
	HandshakeTimeout time.Duration
	// MaxHandshakes bounds the connections that have not said so yet; beyond,
	// the one that has waited longest is closed. Default 256.
	MaxHandshakes int
	// Backlog bounds the connections that wait for an Accept of Clients, and
	// those that wait for one of Peers; more are closed. Default 128.
	Backlog int
	// Logger defaults to none.
	Logger hclog.Logger
}

// Port splits one listener into one for clients and one for peers. NewPort
// starts it, Close ends it. All methods are safe for concurrent use.
type Port struct {
	cfg      PortConfig
	listener net.Listener
	logger   hclog.Logger
	seen     *causes
	tls      *tls.Config // nil: plaintext

	slots   chan struct{} // one for each handshake
	closing chan struct{}
	work    sync.WaitGroup

	mu         sync.Mutex
	closed     error     // why; guarded by mu
	handshakes list.List // of net.Conn, oldest first; guarded by mu
	clients    *lane     // guarded by mu
	peers      *lane     // guarded by mu
}

// NewPort takes over l and begins to accept.
func NewPort(l net.Listener, cfg PortConfig) *Port {
	if cfg.HandshakeTimeout <= 0 {
		cfg.HandshakeTimeout = DefaultHandshakeTimeout
	}
	if cfg.MaxHandshakes <= 0 {
		cfg.MaxHandshakes = DefaultMaxHandshakes
	}
	if cfg.Backlog <= 0 {
		cfg.Backlog = DefaultBacklog
	}
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	p := &Port{
		cfg:      cfg,
		listener: l,
		logger:   cfg.Logger,
		seen:     newCauses(),
		slots:    make(chan struct{}, cfg.MaxHandshakes),
		closing:  make(chan struct{}),
		clients:  newLane(l.Addr(), cfg.Backlog),
		peers:    newLane(l.Addr(), cfg.Backlog),
	}
	if cfg.TLS != nil {
		p.tls = withProtocols(cfg.TLS, ProtocolRaft, ProtocolClients)
	}
	p.work.Add(1)
	go func() {
		defer p.work.Done()
		p.accept()
	}()
	return p
}

// Addr is where the port listens.
func (p *Port) Addr() net.Addr { return p.listener.Addr() }

// Clients returns the listener of gRPC connections, which are as they came, or,
// with TLS, past its handshake: see ConnectionState. Closing it leaves the rest of the port open; connections for it are then
// closed, until Clients is called again and returns a new one.
func (p *Port) Clients() net.Listener { return p.open(&p.clients) }

// Peers returns the listener of peer streams, after their greeting. What its
// Accept returns is a *Conn. It closes and opens again as Clients does.
func (p *Port) Peers() net.Listener { return p.open(&p.peers) }

func (p *Port) open(which **lane) net.Listener {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed == nil && (*which).isClosed() {
		*which = newLane(p.listener.Addr(), p.cfg.Backlog)
	}
	return *which
}

// Close closes the port, both of its listeners, and the connections that neither
// has handed out, and waits for what the port runs. Those handed out are their
// owners'.
func (p *Port) Close() error {
	first := p.end(net.ErrClosed)
	err := p.listener.Close()
	p.work.Wait()
	if !first || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// end closes everything but the listener underneath, once.
func (p *Port) end(why error) (first bool) {
	p.mu.Lock()
	if p.closed != nil {
		p.mu.Unlock()
		return false
	}
	p.closed = why
	close(p.closing)
	clients, peers := p.clients, p.peers
	var waiting []net.Conn
	for e := p.handshakes.Front(); e != nil; e = e.Next() {
		waiting = append(waiting, e.Value.(net.Conn))
	}
	p.mu.Unlock()
	clients.end(why)
	peers.end(why)
	for _, conn := range waiting {
		discard(conn)
	}
	return true
}

// accept runs until the listener is closed, or broken for good.
func (p *Port) accept() {
	wait := acceptWaitMin
	for {
		conn, err := p.listener.Accept()
		if err == nil {
			wait = acceptWaitMin
			p.begin(conn)
			continue
		}
		if passing, ok := errors.AsType[interface {
			error
			Temporary() bool
		}](err); !ok || !passing.Temporary() {
			if p.end(err) {
				p.logger.Error("the port accepts nothing any more", "address", p.Addr().String(), "error", err)
			}
			return
		}
		if p.seen.first("accept", "", time.Now()) {
			p.logger.Error("a connection could not be accepted; trying again", "address", p.Addr().String(), "error", err)
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-p.closing:
			timer.Stop()
		}
		wait = min(2*wait, acceptWaitMax)
	}
}

// begin starts the handshake of a connection, making room if there is none.
func (p *Port) begin(conn net.Conn) {
	select {
	case p.slots <- struct{}{}:
	default:
		p.evict()
		select {
		case p.slots <- struct{}{}:
		case <-p.closing:
			discard(conn)
			return
		}
	}
	place := p.enter(conn)
	if place == nil {
		<-p.slots
		discard(conn)
		return
	}
	p.work.Add(1)
	go func() {
		defer p.work.Done()
		defer func() { <-p.slots }()
		p.handshake(conn, place)
	}()
}

// enter notes that a connection is in its handshake; nil once the port closes.
func (p *Port) enter(conn net.Conn) *list.Element {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed != nil {
		return nil
	}
	return p.handshakes.PushBack(conn)
}

// leave takes a connection out of its handshake. If that is not so, it has been
// closed by somebody else.
func (p *Port) leave(place *list.Element) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed != nil || place.Value == nil {
		return false
	}
	p.handshakes.Remove(place)
	place.Value = nil
	return true
}

// evict closes the connection that has been silent for longest.
func (p *Port) evict() {
	p.mu.Lock()
	oldest := p.handshakes.Front()
	if oldest == nil || p.closed != nil {
		p.mu.Unlock()
		return
	}
	conn := p.handshakes.Remove(oldest).(net.Conn)
	oldest.Value = nil
	p.mu.Unlock()
	p.report("crowded", conn, "too many connections that do not say what they want; closed the oldest", "limit", p.cfg.MaxHandshakes)
	discard(conn)
}

// handshake finds out what a connection is for and hands it on.
func (p *Port) handshake(raw net.Conn, place *list.Element) {
	if err := p.sort(raw, place); err != nil {
		p.refused(raw, err)
		p.leave(place)
		discard(raw)
	}
}

// sort returns an error if the connection was not handed on.
func (p *Port) sort(raw net.Conn, place *list.Element) error {
	if err := raw.SetDeadline(time.Now().Add(p.cfg.HandshakeTimeout)); err != nil {
		return err
	}
	sort := choose
	if p.tls != nil {
		sort = p.secure
	}
	kind, conn, err := sort(raw)
	if err != nil {
		return err
	}
	which := &p.clients
	if kind == forPeers {
		which = &p.peers
		if conn, err = p.greet(raw, conn); err != nil {
			return err
		}
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		return err
	}
	if !p.leave(place) {
		return net.ErrClosed
	}
	p.mu.Lock()
	l := *which
	p.mu.Unlock()
	if !l.offer(conn) {
		return errNotAccepted
	}
	return nil
}

// kind is what a connection is for.
type kind int

const (
	forClients kind = iota
	forPeers
)

// choose decides what a plaintext connection is for, and returns it as if
// nothing had been read from it. With TLS, secure is in its place.
func choose(conn net.Conn) (kind, net.Conn, error) {
	var first [1]byte
	if _, err := io.ReadFull(conn, first[:]); err != nil {
		return 0, nil, fmt.Errorf("%w: %w", errSilent, err)
	}
	switch first[0] {
	case 'P':
		return forClients, putBack(conn, first[0]), nil
	case magic[0]:
		return forPeers, putBack(conn, first[0]), nil
	case 0x16:
		return 0, nil, errTLS
	case 'G', 'H', 'O', 'D', 'C', 'T':
		return 0, nil, errHTTP1
	}
	return 0, nil, errStranger
}

// Why a connection is closed without a word.
var (
	errSilent      = errors.New("the connection did not say what it is for")
	errTLS         = errors.New("this port speaks plaintext; the client tried TLS")
	errHTTP1       = errors.New("this port speaks gRPC; the client tried HTTP/1")
	errStranger    = errors.New("the first byte is neither gRPC's nor a peer's")
	errNotAccepted = errors.New("nobody accepts such connections now, or too many wait already")
)

// greet answers the hello of a peer. The connection it returns has given up
// nothing but the greeting.
func (p *Port) greet(raw, conn net.Conn) (net.Conn, error) {
	self, cluster := p.cfg.Self()
	hello, err := p.hear(conn, self, cluster)
	refusal, refused := errors.AsType[*RefusedError](err)
	if err != nil && !refused {
		return nil, err
	}
	a := answer{OK: err == nil, ClusterID: cluster, NodeID: self, Version: version}
	if refused {
		a.Reason, a.Text = refusal.Reason, printable(refusal.Text)
	}
	if werr := writeMessage(conn, "", a); werr != nil {
		return nil, errors.Join(err, werr)
	}
	if refused {
		linger(raw)
		return nil, err
	}
	if _, ok := conn.(*replayConn); ok {
		conn = raw // which has nothing to be replayed any more
	}
	return &Conn{Conn: conn, hello: hello}, nil
}

// hear reads a hello and judges it.
func (p *Port) hear(conn net.Conn, self, cluster string) (Hello, error) {
	v, err := readMagic(conn)
	if err != nil {
		return Hello{}, err
	}
	if v != version {
		return Hello{}, Refuse(ReasonVersion, "this node speaks version %s of the protocol between nodes, the other version %s", version, v)
	}
	b, err := readMessage(conn)
	if errors.Is(err, errTooLong) {
		return Hello{}, Refuse(ReasonMalformed, "%v", err)
	}
	if err != nil {
		return Hello{}, err
	}
	hello, err := decodeHello(b)
	if err != nil {
		return Hello{}, Refuse(ReasonMalformed, "%v", err)
	}
	if err := Match(self, cluster, hello); err != nil {
		return hello, err
	}
	if p.cfg.Check == nil {
		return hello, nil
	}
	err = p.cfg.Check(conn, hello)
	if _, ok := errors.AsType[*RefusedError](err); err != nil && !ok {
		err = Refuse(ReasonRefused, "%v", err)
	}
	return hello, err
}

// linger lets the other side read the refusal before the connection closes. The
// connection is about to be closed, so what fails does not matter.
func linger(conn net.Conn) {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
	_ = conn.SetReadDeadline(time.Now().Add(lingerTime))
	_, _ = io.CopyN(io.Discard, conn, lingerBytes)
}

// refused says so, once.
func (p *Port) refused(conn net.Conn, err error) {
	if refusal, ok := errors.AsType[*RefusedError](err); ok {
		p.report("refused "+string(refusal.Reason), conn, "a peer was refused", "reason", string(refusal.Reason), "text", printable(refusal.Text))
		return
	}
	if failure, ok := errors.AsType[*handshakeError](err); ok {
		p.report("handshake "+failure.kind, conn, failure.text, append(shown(err), "error", printable(failure.err.Error()))...)
		return
	}
	for _, cause := range []error{errTLS, errHTTP1, errStranger, errPlaintext, errHTTPTLS, errNoTLS, errALPN, errNotAccepted} {
		if errors.Is(err, cause) {
			p.report(cause.Error(), conn, "a connection was closed: "+cause.Error())
			return
		}
	}
	// Health checks connect and say nothing; others come and go.
	if p.logger.IsDebug() {
		p.logger.Debug("a connection ended before it was accepted", "remote", conn.RemoteAddr().String(), "error", err)
	}
}

// report warns about a connection, once for each cause and host.
func (p *Port) report(cause string, conn net.Conn, message string, args ...any) {
	remote := conn.RemoteAddr().String()
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		host = remote
	}
	if p.seen.first(cause, host, time.Now()) {
		p.logger.Warn(message, append([]any{"remote", remote}, args...)...)
	}
}

// discard closes a connection that nobody wants; that it fails changes nothing.
func discard(conn net.Conn) { _ = conn.Close() }
