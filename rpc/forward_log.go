package rpc

import (
	"context"
	"errors"
	"sync"
	"time"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// forwardingLog is a node's log as its clients see it: what the node cannot do
// because it does not lead goes through the leader.
type forwardingLog struct {
	Log
	peer Peer
	f    *Forwarder
}

func newForwardingLog(log Log, peer Peer, f *Forwarder) *forwardingLog {
	f.self.Store(&peer)
	return &forwardingLog{Log: log, peer: peer, f: f}
}

// Propose implements Log.
func (l *forwardingLog) Propose(ctx context.Context, p Proposal, wait bool) (Pending, error) {
	pending, err := l.Log.Propose(ctx, p, wait)
	if err == nil {
		// The node has come to lead. What it had sent to the leader before is
		// soon to be answered.
		l.f.settle()
		return pending, nil
	}
	leader, elsewhere := leaderOf(err)
	if !elsewhere {
		return nil, err
	}
	return l.f.propose(ctx, leader, p, wait)
}

// Linearize implements Log.
func (l *forwardingLog) Linearize(ctx context.Context) error {
	err := l.Log.Linearize(ctx)
	leader, elsewhere := leaderOf(err)
	if !elsewhere {
		return err
	}
	index, err := l.f.reads.index(ctx, leader)
	if err != nil {
		return err
	}
	return l.peer.WaitApplied(ctx, index)
}

// leaderOf reports whether err says that another node leads, and which.
func leaderOf(err error) (NotLeaderError, bool) {
	var notLeader *NotLeaderError
	if !errors.As(err, &notLeader) || notLeader.LeaderAddress == "" {
		return NotLeaderError{}, false
	}
	return *notLeader, true
}

// readIndexTimeout bounds one question to the leader.
const readIndexTimeout = 5 * time.Second

// readIndexer asks the leader for its read index on behalf of all readers. One
// call is under way at a time; who comes meanwhile shares the next one, since
// the answer of one that had begun before may be too low for it.
type readIndexer struct {
	f *Forwarder

	mu            sync.Mutex
	closed        bool           // guarded by mu
	running, next *readIndexCall // guarded by mu
}

type readIndexCall struct {
	leader NotLeaderError // guarded by mu until the call begins
	cancel context.CancelFunc
	done   chan struct{}
	index  uint64
	err    error
}

// index returns an index that covers everything acknowledged before the call.
func (r *readIndexer) index(ctx context.Context, leader NotLeaderError) (uint64, error) {
	c, err := r.join(leader)
	if err != nil {
		return 0, err
	}
	select {
	case <-c.done:
		return c.index, c.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (r *readIndexer) join(leader NotLeaderError) (*readIndexCall, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, ErrClosed
	}
	if r.running == nil {
		c := &readIndexCall{leader: leader, done: make(chan struct{})}
		ctx := r.beginLocked(c)
		r.f.wg.Go(func() { r.run(ctx, c) })
		return c, nil
	}
	if r.running.leader.LeaderAddress != leader.LeaderAddress {
		r.running.cancel() // a former leader may never answer
	}
	if r.next == nil {
		r.next = &readIndexCall{done: make(chan struct{})}
	}
	r.next.leader = leader
	return r.next, nil
}

func (r *readIndexer) beginLocked(c *readIndexCall) context.Context {
	ctx, cancel := context.WithTimeout(r.f.ctx, readIndexTimeout)
	c.cancel = cancel
	r.running, r.next = c, nil
	return ctx
}

// run makes the calls until nobody waits for another.
func (r *readIndexer) run(ctx context.Context, c *readIndexCall) {
	for c != nil {
		c.index, c.err = r.f.readIndex(ctx, c.leader)
		c.cancel()
		close(c.done)

		r.mu.Lock()
		c = r.next
		if c == nil {
			r.running = nil
		} else {
			ctx = r.beginLocked(c)
		}
		r.mu.Unlock()
	}
}

func (r *readIndexer) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
}

// readIndex asks the leader, and the one that it names if it no longer is.
func (f *Forwarder) readIndex(ctx context.Context, leader NotLeaderError) (uint64, error) {
	f.mu.Lock()
	leader = f.redirectLocked(leader)
	f.mu.Unlock()
	req := &v1.ReadIndexRequest{ClusterId: f.cfg.ClusterID()}
	for attempt := 0; ; attempt++ {
		address := leader.LeaderAddress
		resp := new(v1.ReadIndexResponse)
		_, err := f.call(ctx, address, v1.Peer_ReadIndex_FullMethodName, req, resp)
		if err == nil {
			return resp.GetIndex(), nil
		}
		if ctx.Err() != nil {
			// Not the reader's own time: this one asks for many.
			return 0, errNoAnswer(address)
		}
		err = leaderError(err, address)
		next, elsewhere := leaderOf(err)
		if elsewhere {
			f.learn(address, &next)
		}
		if !elsewhere || attempt > 0 || next.LeaderAddress == address {
			return 0, err
		}
		leader = next
	}
}
