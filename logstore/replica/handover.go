package replica

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

const (
	// handoverTime bounds each of the two steps by which a server that breaks
	// hands leadership over.
	handoverTime = 200 * time.Millisecond
)

// broken ends this server's part in the group because of err, once: from here
// on nothing is stored, voted or acknowledged. Damage is ErrDamaged, whoever
// found it. It is called by whoever notices,
// Raft's own goroutines included, and does not wait.
func (r *Replica) broken(err error) {
	r.failOnce.Do(func() {
		r.dog.dead.Store(true)
		// Now: Raft steps down when it hears of a failure.
		var led uint64
		select {
		case <-r.opened:
			if term := r.raft.CurrentTerm(); r.raft.State() == raft.Leader {
				led = term
			}
		default:
		}
		if isDamage(err) && !errors.Is(err, ErrDamaged) {
			err = fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		r.failure.Store(&err)
		if errors.Is(err, ErrRestart) {
			r.cfg.Logger.Warn("this replica stops", "error", err)
		} else {
			r.cfg.Logger.Error("this replica stops", "error", err)
		}
		go r.sever(err, led)
	})
}

// sever tells the others, if this server led, closes the transport, answers
// what is in flight, and then says that it failed: who hears it may end the
// process at once. It led in that term, if that is not 0.
func (r *Replica) sever(err error, led uint64) {
	defer close(r.severed)
	<-r.opened
	if t := r.transport; t != nil && r.raft != nil {
		t.hush()
		if led > 0 {
			r.abdicate(t, led)
		}
		if closeErr := t.Close(); closeErr != nil {
			r.cfg.Logger.Warn("the transport did not close", "error", closeErr)
		}
	}
	if r.seq != nil {
		r.seq.fail()
	}
	r.cfg.OnFatal(err)
	close(r.failed)
}

// abdicate makes the most advanced voter that answers stand for election, now
// rather than when it misses heartbeats. The others will vote although they
// know a leader, because it asks on this one's behalf.
func (r *Replica) abdicate(t *transport, term uint64) {
	header := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(r.cfg.ID), Addr: []byte(r.cfg.Address)}
	type answer struct {
		server raft.Server
		err    error
		resp   raft.AppendEntriesResponse
	}
	voters := r.otherVoters()
	answers := make(chan answer, len(voters))
	for _, s := range voters {
		t.work.Go(func() {
			// A heartbeat asks how far it is.
			a := answer{server: s}
			req := raft.AppendEntriesRequest{RPCHeader: header, Term: term}
			a.err = t.AppendEntries(s.ID, s.Address, &req, &a.resp)
			answers <- a
		})
	}
	var heard []answer
	late := time.After(handoverTime)
	for range voters {
		select {
		case a := <-answers:
			switch {
			case a.err != nil:
			case a.resp.Term > term:
				return // somebody else leads, or is about to
			default:
				heard = append(heard, a)
			}
			continue
		case <-late:
		}
		break
	}
	slices.SortStableFunc(heard, func(a, b answer) int { return cmp.Compare(b.resp.LastLog, a.resp.LastLog) })
	late = time.After(handoverTime)
	for _, a := range heard {
		asked := make(chan error, 1)
		t.work.Go(func() {
			asked <- t.TimeoutNow(a.server.ID, a.server.Address, &raft.TimeoutNowRequest{RPCHeader: header}, &raft.TimeoutNowResponse{})
		})
		select {
		case err := <-asked:
			if err == nil {
				r.cfg.Logger.Info("handed leadership over", "to", a.server.ID)
				return
			}
		case <-late:
			return
		}
	}
}

// otherVoters of the latest configuration.
func (r *Replica) otherVoters() []raft.Server {
	var voters []raft.Server
	for _, s := range r.raft.GetConfiguration().Configuration().Servers {
		if s.Suffrage == raft.Voter && string(s.ID) != r.cfg.ID {
			voters = append(voters, s)
		}
	}
	return voters
}

// stalled hears of a disk operation that takes too long. Where nobody could
// take over, it is only said.
func (r *Replica) stalled(what string) {
	// A server that has no configuration yet is not alone: it was about to get it.
	if len(r.members()) > 0 && len(r.otherVoters()) == 0 {
		r.cfg.Logger.Warn("the disk is very slow", "operation", what, "longer_than", r.cfg.StallLimit)
		r.dog.calm()
		return
	}
	r.broken(fmt.Errorf("%w: to %s takes longer than %v", ErrStalled, what, r.cfg.StallLimit))
}

// Failed is closed when this server's part in the group has ended for a reason
// that Err tells, and, if it led, others were asked to take over.
func (r *Replica) Failed() <-chan struct{} { return r.failed }

// Err returns why this server takes no part in its group any more, or nil:
// ErrDamaged, ErrRestart, or else something after which the process must end.
func (r *Replica) Err() error {
	if err := r.failure.Load(); err != nil {
		return *err
	}
	return nil
}

// resign hands leadership over before a close, if this server leads and
// another voter lives.
func (r *Replica) resign(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*r.cfg.ElectionTimeout)
	defer cancel()
	if err := r.HandOver(ctx); err != nil {
		r.cfg.Logger.Warn("leadership could not be handed over before the close", "error", err)
	}
}
