package replica

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// Network connects the members of a group. Its streams reach the very server
// that was asked for, or nobody: who is at the other end is its business.
type Network interface {
	// Listener accepts streams of other members. The replica closes it, unless
	// Open fails.
	net.Listener
	// Dial opens a stream to the server with an id. The address is the one in
	// the group's configuration, for a network that knows no better.
	Dial(ctx context.Context, id, address string) (net.Conn, error)
}

// The first byte of a stream says what it is for.
const (
	streamRPC      = 'R' // hashicorp/raft's requests and answers, one after another
	streamSnapshot = 'S' // one snapshot, see stream.go
)

const (
	// maxStreams that others may have open here at a time. A peer has about
	// four.
	maxStreams = 256
	// rpcOverhead is what a full request may be longer than its entries' data,
	// and what is read ahead of the next.
	rpcOverhead = 1 << 20
	// maxAnswer bounds an answer to a request.
	maxAnswer = 1 << 20
	// streamBegin is how long a stream may take to say what it is for.
	streamBegin = 10 * time.Second
	// bulkTimeout is how long an append of entries may take, at least: sending
	// up to 64 MiB, storing them there, and the answer.
	bulkTimeout = 10 * time.Second
	// requestsInFlight: a request is prepared while the one before is on its way.
	// More make batches smaller and latency longer.
	requestsInFlight = 2
)

var (
	errSevered = errors.New("this server takes no more part in its group")
	errTooMuch = errors.New("a peer sends more than one message may have")
)

// transport is a raft.Transport over a Network. It stands between two parts of
// hashicorp/raft, its NetworkTransport and its protocol, and mends what of them
// would let replicas diverge:
//
//   - SetHeartbeatHandler does nothing. With a handler, Raft takes heartbeats
//     beside its main goroutine, and a deposed leader can stamp entries that it
//     is about to write with the term of the leader that sent one (upstream
//     issue 695).
//   - A request's commit index never goes beyond what the request itself
//     verified. Raft commits up to its own last entry, which may be one that the
//     leader has never seen.
//   - What a correct leader never sends is refused: Raft would panic.
//
// Snapshots take a way of their own, see stream.go. Heartbeats and votes have
// connections and a timeout apart from entries, so that a peer which is back is
// noticed soon, while a large request may take its time.
type transport struct {
	network Network
	address raft.ServerAddress
	logger  hclog.Logger
	// requestBytes bounds a request, stall how long a snapshot's stream may be
	// without progress.
	requestBytes int64
	stall        time.Duration
	dialTimeout  time.Duration
	contacts     contacts
	// told is the highest index that a leader has called committed.
	told atomic.Uint64
	// committed is the index up to which this server knows entries to be
	// committed; nil in tests that have no state machine.
	committed *watermark

	control, bulk *raft.NetworkTransport
	rpcs          chan raft.RPC

	ctx      context.Context // until Close
	cancel   context.CancelFunc
	incoming chan net.Conn
	work     sync.WaitGroup

	mu    sync.Mutex
	deaf  bool // nothing comes in any more
	conns map[*stream]struct{}

	closeOnce sync.Once
	closeErr  error
}

func newTransport(cfg *Config) *transport {
	t := &transport{
		network:      cfg.Network,
		address:      raft.ServerAddress(cfg.Address),
		logger:       cfg.Logger.Named("transport"),
		requestBytes: maxRPCBytes + rpcOverhead,
		stall:        cfg.SnapshotStall,
		dialTimeout:  cfg.ElectionTimeout,
		contacts:     contacts{now: cfg.Now, last: map[string]contact{}},
		rpcs:         make(chan raft.RPC),
		incoming:     make(chan net.Conn),
		conns:        map[*stream]struct{}{},
	}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	inner := func(accepts bool, timeout time.Duration, pool int) *raft.NetworkTransport {
		return raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			Stream:          &streamLayer{t, accepts},
			MaxPool:         pool,
			MaxRPCsInFlight: requestsInFlight,
			Timeout:         timeout,
			Logger:          t.logger,
		})
	}
	t.control = inner(false, cfg.ElectionTimeout, 2)
	t.bulk = inner(true, max(bulkTimeout, 5*cfg.ElectionTimeout), 1)
	t.work.Go(t.accept)
	t.work.Go(t.forward)
	return t
}

// target carries a server's id through raft.NetworkTransport, which knows
// servers by address only.
func target(id raft.ServerID, address raft.ServerAddress) raft.ServerAddress {
	return raft.ServerAddress(string(id) + "@" + string(address))
}

func splitTarget(t raft.ServerAddress) (id, address string) {
	at := strings.LastIndexByte(string(t), '@')
	return string(t[:max(at, 0)]), string(t[at+1:])
}

// streamLayer is what raft.NetworkTransport sees of the network.
type streamLayer struct {
	t       *transport
	accepts bool
}

func (l *streamLayer) Accept() (net.Conn, error) {
	incoming := l.t.incoming
	if !l.accepts {
		incoming = nil
	}
	select {
	case c := <-incoming:
		return c, nil
	case <-l.t.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (l *streamLayer) Close() error   { return nil } // the transport does it
func (l *streamLayer) Addr() net.Addr { return addr(l.t.address) }

func (l *streamLayer) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return l.t.dial(streamRPC, to, min(timeout, l.t.dialTimeout))
}

type addr string

func (a addr) Network() string { return "diurna" }
func (a addr) String() string  { return string(a) }

// stream is a connection that the transport can close, and that carries no
// message without a bound. Raft's decoder allocates as bytes arrive, but it
// would go on for ever.
type stream struct {
	net.Conn
	t     *transport
	in    bool  // somebody else opened it
	limit int64 // of bytes between two writes
	read  atomic.Int64
	once  sync.Once
}

func (s *stream) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if s.read.Add(int64(n)) > s.limit {
		return 0, errTooMuch
	}
	return n, err
}

func (s *stream) Write(p []byte) (int, error) {
	s.read.Store(0)
	return s.Conn.Write(p)
}

func (s *stream) Close() error {
	err := s.Conn.Close()
	s.once.Do(func() {
		s.t.mu.Lock()
		delete(s.t.conns, s)
		s.t.mu.Unlock()
		s.t.work.Done()
	})
	return err
}

// track makes a connection one that Close ends and waits for.
func (t *transport) track(c net.Conn, limit int64, in bool) (*stream, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.ctx.Err() != nil || in && t.deaf:
		return nil, errors.Join(errSevered, c.Close())
	case in && len(t.conns) >= maxStreams:
		return nil, errors.Join(fmt.Errorf("more than %d streams are open", maxStreams), c.Close())
	}
	s := &stream{Conn: c, t: t, in: in, limit: limit}
	t.conns[s] = struct{}{}
	t.work.Add(1)
	return s, nil
}

func (t *transport) dial(kind byte, to raft.ServerAddress, timeout time.Duration) (*stream, error) {
	ctx, cancel := context.WithTimeout(t.ctx, timeout)
	defer cancel()
	id, address := splitTarget(to)
	c, err := t.network.Dial(ctx, id, address)
	if err != nil {
		return nil, err
	}
	s, err := t.track(c, maxAnswer, false)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if _, err := c.Write([]byte{kind}); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// accept takes streams until the network's end is closed.
func (t *transport) accept() {
	wait := time.Duration(0)
	for t.ctx.Err() == nil {
		c, err := t.network.Accept()
		if err != nil {
			if t.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			t.logger.Warn("cannot accept a stream", "error", err)
			select {
			case <-time.After(wait):
			case <-t.ctx.Done():
			}
			continue
		}
		wait = 0
		s, err := t.track(c, t.requestBytes, true)
		if err != nil {
			t.logger.Warn("refused a stream", "from", c.RemoteAddr(), "error", err)
			continue
		}
		t.work.Go(func() { t.begin(s) })
	}
}

// begin reads what a stream is for.
func (t *transport) begin(s *stream) {
	var kind [1]byte
	tooSlow := time.AfterFunc(streamBegin, func() { _ = s.Conn.Close() })
	_, err := s.Conn.Read(kind[:])
	tooSlow.Stop()
	switch {
	case err != nil:
	case kind[0] == streamRPC:
		select {
		case t.incoming <- s:
			return
		case <-t.ctx.Done():
		}
	case kind[0] == streamSnapshot:
		err = t.receiveSnapshot(s)
	default:
		err = fmt.Errorf("unknown kind %#x", kind[0])
	}
	if err != nil && t.ctx.Err() == nil {
		t.logger.Warn("a stream ended", "from", s.RemoteAddr(), "error", err)
	}
	_ = s.Close()
}

// forward brings requests to Raft.
func (t *transport) forward() {
	for {
		select {
		case rpc := <-t.bulk.Consumer():
			if rpc.Reader != nil {
				rpc.Respond(&raft.InstallSnapshotResponse{}, errors.New("snapshots have streams of their own"))
				continue
			}
			if !t.deliver(rpc) {
				return
			}
		case <-t.ctx.Done():
			return
		}
	}
}

// deliver hands a request over, or answers it if it is none that a correct
// server sends. It returns false when the transport is closed.
func (t *transport) deliver(rpc raft.RPC) bool {
	var committed uint64
	if c, ok := rpc.Command.(*raft.AppendEntriesRequest); ok {
		committed = c.LeaderCommitIndex // before mend takes it back to what is here
	}
	if err := mend(rpc.Command); err != nil {
		t.logger.Error("refused a request that no correct server sends", "error", err)
		rpc.Respond(&raft.AppendEntriesResponse{}, err)
		return true
	}
	raise(&t.told, committed)
	select {
	case t.rpcs <- rpc:
		return true
	case <-t.ctx.Done():
		return false
	}
}

// mend clamps a request's commit index to what the request verifies, see
// transport, and refuses what Raft would panic over.
func mend(command any) error {
	switch c := command.(type) {
	case *raft.AppendEntriesRequest:
		for i, e := range c.Entries {
			switch {
			case e == nil:
				return errors.New("an entry is missing")
			case e.Index != c.PrevLogEntry+uint64(i)+1:
				return fmt.Errorf("entry %d is in the place of %d", e.Index, c.PrevLogEntry+uint64(i)+1)
			case e.Term > c.Term:
				return fmt.Errorf("entry %d is of term %d, its leader of term %d", e.Index, e.Term, c.Term)
			}
			switch e.Type {
			case raft.LogCommand, raft.LogNoop, raft.LogBarrier:
			case raft.LogConfiguration:
				if err := checkConfiguration(e.Data); err != nil {
					return fmt.Errorf("entry %d: %w", e.Index, err)
				}
			default:
				return fmt.Errorf("entry %d has the unknown type %d", e.Index, e.Type)
			}
		}
		c.LeaderCommitIndex = min(c.LeaderCommitIndex, c.PrevLogEntry+uint64(len(c.Entries)))
	case *raft.InstallSnapshotRequest:
		if c.SnapshotVersion != raft.SnapshotVersionMax || c.Size < 0 {
			return fmt.Errorf("a snapshot of version %d, size %d", c.SnapshotVersion, c.Size)
		}
		return checkConfiguration(c.Configuration)
	}
	return nil
}

// hush ends everything that comes in, for good.
func (t *transport) hush() {
	t.mu.Lock()
	t.deaf = true
	var in []*stream
	for s := range t.conns {
		if s.in {
			in = append(in, s)
		}
	}
	t.mu.Unlock()
	for _, s := range in {
		_ = s.Conn.Close()
	}
}

// Close ends all streams, both ways. Raft calls it, too.
func (t *transport) Close() error {
	t.closeOnce.Do(func() { t.closeErr = t.close() })
	return t.closeErr
}

func (t *transport) close() error {
	err := errors.Join(t.control.Close(), t.bulk.Close())
	t.hush()
	t.cancel()
	if closeErr := t.network.Close(); !errors.Is(closeErr, net.ErrClosed) {
		err = errors.Join(err, closeErr)
	}
	t.mu.Lock()
	var open []*stream
	for s := range t.conns {
		open = append(open, s)
	}
	t.mu.Unlock()
	for _, s := range open {
		if !s.in {
			// It may lie in a pool, where nobody waits for it.
			_ = s.Close()
		} else {
			_ = s.Conn.Close()
		}
	}
	return err
}

// wait returns when nothing of the transport runs any more, after Close.
func (t *transport) wait() { t.work.Wait() }

// Consumer implements raft.Transport.
func (t *transport) Consumer() <-chan raft.RPC { return t.rpcs }

// LocalAddr implements raft.Transport.
func (t *transport) LocalAddr() raft.ServerAddress { return t.address }

// EncodePeer implements raft.Transport.
func (t *transport) EncodePeer(_ raft.ServerID, a raft.ServerAddress) []byte { return []byte(a) }

// DecodePeer implements raft.Transport.
func (t *transport) DecodePeer(b []byte) raft.ServerAddress { return raft.ServerAddress(b) }

// SetHeartbeatHandler implements raft.Transport by doing nothing, see
// transport.
func (t *transport) SetHeartbeatHandler(func(raft.RPC)) {}

// AppendEntries implements raft.Transport.
func (t *transport) AppendEntries(id raft.ServerID, a raft.ServerAddress, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	way := t.bulk
	if len(req.Entries) == 0 && req.PrevLogEntry == 0 && req.LeaderCommitIndex == 0 {
		way = t.control // a heartbeat
	}
	err := way.AppendEntries(id, target(id, a), req, resp)
	if err == nil && resp.Term <= req.Term {
		t.contacts.note(string(id), resp.LastLog)
	}
	return err
}

// RequestVote implements raft.Transport.
func (t *transport) RequestVote(id raft.ServerID, a raft.ServerAddress, req *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return t.control.RequestVote(id, target(id, a), req, resp)
}

// RequestPreVote implements raft.WithPreVote.
func (t *transport) RequestPreVote(id raft.ServerID, a raft.ServerAddress, req *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return t.control.RequestPreVote(id, target(id, a), req, resp)
}

// TimeoutNow implements raft.Transport.
func (t *transport) TimeoutNow(id raft.ServerID, a raft.ServerAddress, req *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return t.control.TimeoutNow(id, target(id, a), req, resp)
}

// contact is when a server last answered this one, as its leader, and how far
// its log went.
type contact struct {
	at   time.Time
	last uint64
}

// contacts are those with all servers.
type contacts struct {
	now  func() time.Time
	mu   sync.Mutex
	last map[string]contact
}

func (c *contacts) note(id string, last uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last[id] = contact{c.now(), last}
}

func (c *contacts) get(id string) (contact, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	got, ok := c.last[id]
	return got, ok
}

// keep forgets all servers but some.
func (c *contacts) keep(ids map[string]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id := range c.last {
		if !ids[id] {
			delete(c.last, id)
		}
	}
}

var (
	_ raft.Transport   = (*transport)(nil)
	_ raft.WithPreVote = (*transport)(nil)
	_ raft.WithClose   = (*transport)(nil)
)
