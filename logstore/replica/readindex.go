package replica

import (
	"context"
	"errors"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
)

// Linearize returns once every record that was acknowledged, by any server,
// before the call is below this server's high watermark. Only the leader can
// do it: what it acknowledged itself, it applied first; what earlier leaders
// acknowledged, it applied before it took proposals; and that it still leads,
// so that nobody else acknowledged anything, it asks a quorum now.
func (r *Replica) Linearize(ctx context.Context) error {
	_, err := r.ReadIndex(ctx)
	return err
}

// ReadIndex returns an index such that a replica which has applied it, see
// WaitApplied, has every record below its high watermark that any server
// acknowledged before the call. Only the leader can; see Linearize.
func (r *Replica) ReadIndex(ctx context.Context) (uint64, error) {
	r.askMu.Lock()
	closed := r.closed
	r.askMu.Unlock()
	if closed {
		return 0, ErrClosed
	}
	if err := r.leads(); err != nil {
		return 0, err
	}
	term := r.seq.ready.Load()
	// Before the question: a leader that is deposed while it asks would
	// otherwise answer with what it learns as a follower, which is less than
	// the next leader acknowledges.
	applied := r.applied.Load()
	if err := r.confirm(ctx); err != nil {
		return 0, err
	}
	if term == 0 || r.raft.CurrentTerm() != term {
		// In another term: a new one has to find its watermark first.
		return 0, r.notLeader()
	}
	return r.significant(applied)
}

// significant returns the last entry up to an applied one that state machines
// are shown: only those move what WaitApplied waits for. An applied index that
// comes from a snapshot may be of another kind.
func (r *Replica) significant(applied uint64) (uint64, error) {
	gen := r.gens.use()
	defer r.gens.release(gen)
	var buf []byte
	for index := applied; index > 0 && index != r.shown.Load(); index-- {
		var e logstore.Entry
		var err error
		e, buf, err = gen.log.Entry(index, buf)
		switch {
		case errors.Is(err, logstore.ErrNotFound):
			return index, nil // what replicas lack here comes to them in a snapshot
		case err != nil:
			return 0, err
		}
		if t := raft.LogType(e.Type); t == raft.LogCommand || t == raft.LogConfiguration {
			return index, nil
		}
		applied = index - 1
	}
	return applied, nil
}

// WaitApplied returns once this replica has applied the entry at index, so that
// reads see what it appended, or with ctx's error or ErrClosed.
func (r *Replica) WaitApplied(ctx context.Context, index uint64) error {
	if r.applied.Load() >= index {
		return nil
	}
	return r.progress.wait(ctx, index-1)
}

// confirmations ask the voters whether this server still leads, for all who
// want to know at the same time.
//
// Raft's VerifyLeader is not asked: it counts answers to heartbeats that were
// sent before the question. A process that was stopped for a while finds some
// in its buffers when it wakes, and would go on reading as the leader that it
// was.
type confirmations struct {
	mu      sync.Mutex
	next    *round // has not begun: who joins it asked before it did
	running bool
	waiting map[raft.ServerID]int // questions without an answer
}

// maxUnconfirmed bounds the questions to a server that does not answer.
const maxUnconfirmed = 2

type round struct {
	done chan struct{}
	err  error
}

// confirm returns nil if this server led at some moment after the call.
func (r *Replica) confirm(ctx context.Context) error {
	c := &r.confirming
	c.mu.Lock()
	if c.next == nil {
		c.next = &round{done: make(chan struct{})}
	}
	mine := c.next
	if !c.running {
		r.askMu.Lock()
		if r.closed {
			r.askMu.Unlock()
			c.next = nil
			c.mu.Unlock()
			return ErrClosed
		}
		c.running = true
		r.asking.Go(r.confirmAll)
		r.askMu.Unlock()
	}
	c.mu.Unlock()
	select {
	case <-mine.done:
		return mine.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// confirmAll runs rounds until nobody wants one.
func (r *Replica) confirmAll() {
	c := &r.confirming
	for {
		c.mu.Lock()
		now := c.next
		c.next = nil
		c.running = now != nil
		c.mu.Unlock()
		if now == nil {
			return
		}
		now.err = r.confirmOnce()
		close(now.done)
	}
}

// confirmOnce sends a heartbeat to every voter and waits for a majority.
func (r *Replica) confirmOnce() error {
	term := r.raft.CurrentTerm()
	voters := r.otherVoters()
	if r.raft.State() != raft.Leader || len(voters) > 0 && r.transport == nil {
		return r.notLeader()
	}
	header := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(r.cfg.ID), Addr: []byte(r.cfg.Address)}
	answers := make(chan bool, len(voters))
	asked := 0
	for _, s := range voters {
		if !r.confirming.begin(s.ID) {
			continue
		}
		asked++
		r.transport.work.Go(func() {
			defer r.confirming.end(s.ID)
			req := raft.AppendEntriesRequest{RPCHeader: header, Term: term}
			var resp raft.AppendEntriesResponse
			err := r.transport.AppendEntries(s.ID, s.Address, &req, &resp)
			answers <- err == nil && resp.Success && resp.Term == term
		})
	}
	for need := (len(voters) + 1) / 2; need > 0; {
		if asked == 0 {
			return r.notLeader()
		}
		select {
		case yes := <-answers:
			if asked--; yes {
				need--
			}
		case <-r.failed:
			return r.Err()
		case <-r.closing:
			return ErrClosed
		}
	}
	return nil
}

func (c *confirmations) begin(id raft.ServerID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.waiting[id] >= maxUnconfirmed {
		return false
	}
	if c.waiting == nil {
		c.waiting = map[raft.ServerID]int{}
	}
	c.waiting[id]++
	return true
}

func (c *confirmations) end(id raft.ServerID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.waiting[id]--; c.waiting[id] == 0 {
		delete(c.waiting, id)
	}
}
