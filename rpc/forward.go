package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// ForwarderConfig says how a Forwarder reaches other nodes.
type ForwarderConfig struct {
	// Dial connects to a node's address. Required.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Credentials secure the connections, see DialTLS; nil means plaintext.
	Credentials credentials.TransportCredentials
	// ClusterID is the id of this node's cluster as far as it is known now. A
	// node of another one, at an address that has changed hands, refuses. nil
	// and the empty id mean that it is not known.
	ClusterID func() string
	// InFlightBytes bounds the batches that are on their way to the leader and
	// not yet answered, with about 512 bytes for each besides its records: past
	// it streams wait, and a single Produce fails with OVERLOADED. Default
	// 32 MiB, at least 4 MiB.
	InFlightBytes int
	// IdleTimeout is how long a stream or a connection is kept without use.
	// Default 1 minute.
	IdleTimeout time.Duration
	// Logger defaults to none.
	Logger hclog.Logger
}

// proposalOverhead is what a waiting batch costs beside its records.
const proposalOverhead = 512

const (
	// retireGrace is how long a leader that was replaced may take to answer
	// what it was sent before. As long, later batches wait.
	retireGrace = time.Second
	// stallCheck is how often a stream that gets no answers looks whether its
	// node still leads.
	stallCheck = 500 * time.Millisecond
	// failureQuiet is how long after a stream that failed another one's failure is
	// not worth a line in the log: until there is a leader, every batch of every
	// client may have its own.
	failureQuiet = 10 * time.Second
	// hintLife is how long the word of a former leader on who leads now counts
	// for more than this node's own view.
	hintLife = 2 * time.Second
)

// Forwarder takes to other nodes what this one cannot do: batches to append
// and linearizable reads to the leader, questions to anyone. One Forwarder
// serves all clients of a node: batches go over a single stream to the leader,
// in the order in which they come. It is safe for concurrent use.
type Forwarder struct {
	cfg   ForwarderConfig
	conns connPool
	room  *semaphore.Weighted // bytes of batches not yet answered
	reads readIndexer

	// self is how to ask this node who leads; set by New.
	self atomic.Pointer[Peer]
	// under counts the batches that are not answered.
	under atomic.Int64

	ctx    context.Context // ends when Close gives up
	cancel context.CancelFunc
	wg     sync.WaitGroup // streams and read-index calls

	mu      sync.Mutex
	closed  bool           // guarded by mu
	current *forwardStream // guarded by mu
	hint    leaderHint     // guarded by mu
	// failed is where a stream failed last that was logged, and when.
	failed   string    // guarded by mu
	failedAt time.Time // guarded by mu
}

// leaderHint is what a node that had been taken for the leader said of who is.
type leaderHint struct {
	from  string // its address
	to    NotLeaderError
	until time.Time
}

// NewForwarder prepares a Forwarder. It connects to nobody yet.
func NewForwarder(cfg ForwarderConfig) (*Forwarder, error) {
	if cfg.Dial == nil {
		return nil, errors.New("a Forwarder needs a way to dial")
	}
	if cfg.Credentials == nil {
		cfg.Credentials = insecure.NewCredentials()
	}
	if cfg.ClusterID == nil {
		cfg.ClusterID = func() string { return "" }
	}
	if cfg.InFlightBytes == 0 {
		cfg.InFlightBytes = 32 << 20
	}
	if cfg.InFlightBytes < 4<<20 {
		return nil, fmt.Errorf("a Forwarder's InFlightBytes is %d, must be at least %d", cfg.InFlightBytes, 4<<20)
	}
	if cfg.IdleTimeout <= 0 {
		cfg.IdleTimeout = time.Minute
	}
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	codec, err := newCodec()
	if err != nil {
		return nil, err
	}
	f := &Forwarder{cfg: cfg, room: semaphore.NewWeighted(int64(cfg.InFlightBytes))}
	f.conns.init(cfg, codec)
	f.reads.f = f
	f.ctx, f.cancel = context.WithCancel(context.Background())
	return f, nil
}

// Status asks the node at address who it is. The error is a gRPC status, or
// ErrNoLeader's like where the node cannot be reached.
func (f *Forwarder) Status(ctx context.Context, address string) (NodeStatus, error) {
	resp := new(v1.StatusResponse)
	if _, err := f.call(ctx, address, v1.Peer_Status_FullMethodName, new(v1.StatusRequest), resp); err != nil {
		return NodeStatus{}, fmt.Errorf("ask the node at %s for its status: %w", address, err)
	}
	return statusFromMessage(resp), nil
}

// Confirm asks the node at address, which says that it leads, to prove it: by a
// round of messages to a quorum, begun after the call.
func (f *Forwarder) Confirm(ctx context.Context, address string) error {
	req := &v1.ReadIndexRequest{ClusterId: f.cfg.ClusterID()}
	if _, err := f.call(ctx, address, v1.Peer_ReadIndex_FullMethodName, req, new(v1.ReadIndexResponse)); err != nil {
		return fmt.Errorf("ask the node at %s whether it still leads: %w", address, err)
	}
	return nil
}

// Close takes no more batches, waits, until ctx ends, for the outcomes of those
// under way, and closes every connection. What has no outcome by then is
// answered with ErrUnknownOutcome; ctx's error says that there was such.
func (f *Forwarder) Close(ctx context.Context) error {
	f.mu.Lock()
	f.closed = true
	if f.current != nil {
		f.current.retire(0)
	}
	f.mu.Unlock()
	f.reads.close()

	done := make(chan struct{})
	go func() {
		defer close(done)
		f.wg.Wait()
	}()
	var err error
	select {
	case <-done:
	case <-ctx.Done():
		if n := f.under.Load(); n > 0 {
			err = fmt.Errorf("%d batches were on their way to the leader: %w", n, ctx.Err())
		}
	}
	f.cancel()
	<-done
	return errors.Join(err, f.conns.close())
}

// propose hands a batch over to be taken to the leader. It is Log.Propose for
// a node that does not lead.
func (f *Forwarder) propose(ctx context.Context, leader NotLeaderError, p Proposal, wait bool) (Pending, error) {
	f.follow(leader)
	size := int64(len(p.Records)) + proposalOverhead
	if wait {
		if err := f.room.Acquire(ctx, size); err != nil {
			return nil, err
		}
	} else if !f.room.TryAcquire(size) {
		return nil, ErrOverloaded
	}
	fw := &forwarded{f: f, p: p, size: size, done: make(chan struct{})}
	f.under.Add(1)
	if err := f.enqueue(leader, fw); err != nil {
		f.release(fw)
		return nil, err
	}
	return fw, nil
}

// follow retires a stream to a node that no longer leads, so that what is on
// it gets an outcome and makes room.
func (f *Forwarder) follow(leader NotLeaderError) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.current != nil && f.current.address != f.redirectLocked(leader).LeaderAddress {
		f.current.retire(retireGrace)
	}
}

// settle retires the stream because this node leads now.
func (f *Forwarder) settle() {
	if f.under.Load() == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.current != nil {
		f.current.retire(retireGrace)
	}
}

func (f *Forwarder) enqueue(leader NotLeaderError, fw *forwarded) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return ErrClosed
	}
	leader = f.redirectLocked(leader)
	if st := f.current; st != nil {
		if st.address == leader.LeaderAddress && st.enqueue(fw) {
			return nil
		}
		st.retire(retireGrace)
	}
	// It begins when the stream before it is over, so that a client's batches
	// cannot overtake one another on their way to different nodes.
	f.current = newForwardStream(f, leader.LeaderAddress, f.current)
	f.current.enqueue(fw)
	f.wg.Go(f.current.run)
	return nil
}

// redirectLocked is who leads, by this node's view or by a fresher one.
func (f *Forwarder) redirectLocked(leader NotLeaderError) NotLeaderError {
	if f.hint.from == leader.LeaderAddress && f.hint.from != "" && time.Now().Before(f.hint.until) {
		return f.hint.to
	}
	return leader
}

// learn notes what the node at from, asked as the leader, said of who leads.
func (f *Forwarder) learn(from string, said *NotLeaderError) {
	if said.LeaderAddress == "" || said.LeaderAddress == from {
		return
	}
	if self := f.self.Load(); self != nil {
		if st, err := (*self).Status(f.ctx); err != nil || st.NodeID == said.LeaderID {
			return // if this node really leads, it finds out by itself
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hint = leaderHint{from: from, to: *said, until: time.Now().Add(hintLife)}
}

// doubt drops a hint that has led to a node that did not do, and tells whether
// that is news.
func (f *Forwarder) doubt(address string) (news bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hint.to.LeaderAddress == address {
		f.hint = leaderHint{}
	}
	now := time.Now()
	if f.failed == address && now.Sub(f.failedAt) < failureQuiet {
		return false
	}
	f.failed, f.failedAt = address, now
	return true
}

// leaderAddress is who leads by this node's own view now; ok is false where it
// knows nobody.
func (f *Forwarder) leaderAddress(ctx context.Context) (address string, ok bool) {
	self := f.self.Load()
	if self == nil {
		return "", false
	}
	st, err := (*self).Status(ctx)
	if err != nil || st.LeaderAddress == "" {
		return "", false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.redirectLocked(NotLeaderError{LeaderID: st.LeaderID, LeaderAddress: st.LeaderAddress}).LeaderAddress, true
}

func (f *Forwarder) release(fw *forwarded) {
	f.under.Add(-1)
	f.room.Release(fw.size)
}
