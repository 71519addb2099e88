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

// ErrNoSuccessor: leadership cannot be handed over, because no other voter
// answers.
var ErrNoSuccessor = errors.New("no other voter answers")

// QuorumError: the change would leave a group in which too few voters are known
// to live to agree on anything. Nothing was changed.
type QuorumError struct {
	// Voters would remain, Alive of them answered lately, Need must.
	Voters, Alive, Need int
}

func (e *QuorumError) Error() string {
	return fmt.Sprintf("%d voters would remain, of which %d answer; %d have to", e.Voters, e.Alive, e.Need)
}

// UnknownServerError: the group has no such member.
type UnknownServerError struct{ ID string }

func (e *UnknownServerError) Error() string {
	return fmt.Sprintf("server %s is no member of the group", e.ID)
}

// NotVoterError: the member has no vote, so that it cannot lead.
type NotVoterError struct{ ID string }

func (e *NotVoterError) Error() string { return fmt.Sprintf("server %s has no vote", e.ID) }

// ask puts a question to Raft in a goroutine that Close waits for, because Raft
// leaves some without an answer when it ends. The question goes on when ctx
// ends.
func (r *Replica) ask(ctx context.Context, question func() error) error {
	answer := make(chan error, 1)
	r.askMu.Lock()
	switch err := r.Err(); {
	case r.closed:
		r.askMu.Unlock()
		return ErrClosed
	case err != nil:
		r.askMu.Unlock()
		return err
	}
	r.asking.Go(func() { answer <- question() })
	r.askMu.Unlock()
	select {
	case err := <-answer:
		return err
	case <-r.failed:
		return r.Err()
	case <-r.closing:
		return fmt.Errorf("%w: %w", ErrUnknownOutcome, ErrClosed)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// leads returns nil on the leader, once it takes proposals.
func (r *Replica) leads() error {
	switch err := r.Err(); {
	case err != nil:
		return err
	case r.seq.ready.Load() == 0:
		return r.notLeader()
	}
	return nil
}

// changed turns Raft's answer to a change of the group into ours.
func (r *Replica) changed(err error) error {
	switch {
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return r.notLeader()
	case errors.Is(err, raft.ErrRaftShutdown):
		return ErrClosed
	}
	return err
}

// members of the latest configuration, committed or not.
func (r *Replica) members() []raft.Server {
	return r.raft.GetConfiguration().Configuration().Servers
}

func (r *Replica) member(id string) (raft.Server, error) {
	for _, s := range r.members() {
		if string(s.ID) == id {
			return s, nil
		}
	}
	return raft.Server{}, &UnknownServerError{id}
}

// alive tells whether a server answered this leader lately.
func (r *Replica) alive(id string) bool {
	if id == r.cfg.ID {
		return true
	}
	if r.transport == nil {
		return false
	}
	c, ok := r.transport.contacts.get(id)
	return ok && r.cfg.Now().Sub(c.at) <= max(r.cfg.HeartbeatTimeout, r.cfg.Autopilot.LastContactThreshold)
}

// AddNonvoter makes a server a member that gets the log and has no vote; it is
// given one when it has kept up for a while, see AutopilotConfig. For a member it
// changes the address and nothing else. A member that has the same address
// under another id is removed first: it is not there any more.
//
// Only the leader can. Other errors than *NotLeaderError, ErrNoLeader and
// *QuorumError leave open whether it happened; doing it again is harmless.
func (r *Replica) AddNonvoter(ctx context.Context, id, address string) error {
	if id == "" || address == "" {
		return errors.New("a server needs an id and an address")
	}
	if err := r.leads(); err != nil {
		return err
	}
	for _, s := range r.members() {
		switch {
		case string(s.Address) != address:
		case string(s.ID) == id:
			return nil
		default:
			if err := r.RemoveServer(ctx, string(s.ID)); err != nil {
				return fmt.Errorf("remove %s, which had the address %s: %w", s.ID, address, err)
			}
		}
	}
	return r.changed(r.ask(ctx, func() error {
		return r.raft.AddNonvoter(raft.ServerID(id), raft.ServerAddress(address), 0, r.cfg.ElectionTimeout).Error()
	}))
}

// RemoveServer removes a member, and remembers that, so that it is not taken
// for one that has yet to join. It is refused with *QuorumError if the voters
// that remain and answer are no majority of those that remain.
//
// Only the leader can. A leader that is asked to remove itself hands leadership
// over and returns *NotLeaderError, which names whom to ask then. Other errors
// leave open whether it happened; doing it again is harmless.
func (r *Replica) RemoveServer(ctx context.Context, id string) error {
	if err := r.leads(); err != nil {
		return err
	}
	var quorum *QuorumError
	err := r.mayRemove(id)
	if errors.As(err, &quorum) {
		// A new leader has not heard of everybody yet.
		select {
		case <-time.After(r.cfg.HeartbeatTimeout / 4):
		case <-ctx.Done():
		}
		err = r.mayRemove(id)
	}
	if err != nil {
		return err
	}
	if id == r.cfg.ID {
		if err := r.TransferLeadership(ctx, ""); err != nil {
			return err
		}
		return r.awaitOtherLeader(ctx)
	}
	if err := r.control(ctx, controlEntry{Kind: kindTombstone, ID: id}); err != nil {
		return err
	}
	return r.changed(r.ask(ctx, func() error {
		// What the check rests on may have changed while the entry was written.
		if err := r.mayRemove(id); err != nil {
			return err
		}
		r.changing.Lock()
		future := r.raft.RemoveServer(raft.ServerID(id), 0, r.cfg.ElectionTimeout)
		r.changing.Unlock()
		return future.Error()
	}))
}

// mayRemove keeps a majority alive.
func (r *Replica) mayRemove(id string) error {
	server, err := r.member(id)
	if err != nil || server.Suffrage != raft.Voter {
		return err
	}
	var e QuorumError
	for _, s := range r.members() {
		if s.Suffrage == raft.Voter && string(s.ID) != id {
			e.Voters++
			if r.alive(string(s.ID)) {
				e.Alive++
			}
		}
	}
	if e.Need = e.Voters/2 + 1; e.Alive < e.Need {
		return &e
	}
	return nil
}

// awaitOtherLeader returns a *NotLeaderError as soon as it can name one.
func (r *Replica) awaitOtherLeader(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*r.cfg.ElectionTimeout)
	defer cancel()
	for {
		changed := r.LeaderChanges()
		err := r.notLeader()
		if !errors.Is(err, ErrNoLeader) {
			return err
		}
		select {
		case <-changed:
		case <-r.closing:
			return ErrClosed
		case <-ctx.Done():
			return err
		}
	}
}

// TransferLeadership makes another voter the leader; "" leaves the choice to
// this one, which takes the most advanced of those that answer. It returns when
// that has happened or failed, within about two election timeouts. Until then
// proposals are refused, with ErrNoLeader.
//
// Errors: *NotLeaderError or ErrNoLeader where this one does not lead,
// *UnknownServerError, *NotVoterError, ErrNoSuccessor: also for a voter that
// was to take over before, did not keep up, and has not moved since.
func (r *Replica) TransferLeadership(ctx context.Context, id string) error {
	switch err := r.Err(); {
	case err != nil:
		return err
	case r.raft.State() != raft.Leader:
		return r.notLeader()
	case id == r.cfg.ID:
		return nil
	}
	var to raft.Server
	var err error
	if id == "" {
		to, err = r.successor()
	} else if to, err = r.member(id); err == nil && to.Suffrage != raft.Voter {
		err = &NotVoterError{id}
	} else if err == nil && !r.alive(id) {
		err = fmt.Errorf("%w: %s does not", ErrNoSuccessor, id)
	} else if err == nil && r.stuck(to.ID) {
		err = fmt.Errorf("%w: %s has been asked, and is still where it was", ErrNoSuccessor, id)
	}
	if err != nil {
		return err
	}
	return r.changed(r.ask(ctx, func() error {
		tried := r.attempt(to.ID)
		err := r.raft.LeadershipTransferToServer(to.ID, to.Address).Error()
		if err != nil {
			r.lastTransfer.Store(&tried)
		}
		return err
	}))
}

// transfer is an attempt to hand leadership to a server, whose last entry was this.
type transfer struct {
	to         raft.ServerID
	term, last uint64
}

func (r *Replica) attempt(to raft.ServerID) transfer {
	c, _ := r.transport.contacts.get(string(to))
	return transfer{to, r.raft.CurrentTerm(), c.last}
}

// stuck reports whether a server that was to take over in this term lags behind
// and has not moved since. Raft leaves a question to the goroutine that replicates
// to such a one, and a second question would wait behind the first for ever, and
// two goroutines with it.
func (r *Replica) stuck(to raft.ServerID) bool {
	before := r.lastTransfer.Load()
	return before != nil && *before == r.attempt(to) && before.last < r.raft.LastIndex()
}

// successor is the most advanced voter that answers. Raft's own choice may be
// one that does not.
func (r *Replica) successor() (raft.Server, error) {
	voters := slices.DeleteFunc(r.otherVoters(), func(s raft.Server) bool { return !r.alive(string(s.ID)) || r.stuck(s.ID) })
	if len(voters) == 0 {
		return raft.Server{}, ErrNoSuccessor
	}
	return slices.MaxFunc(voters, func(a, b raft.Server) int {
		x, _ := r.transport.contacts.get(string(a.ID))
		y, _ := r.transport.contacts.get(string(b.ID))
		return cmp.Compare(x.last, y.last)
	}), nil
}

// Server is one member of the Raft group.
type Server struct {
	ID, Address string
	Voter       bool
	Leader      bool
	// Health is the leader's view; nil elsewhere, and before it has one.
	Health *ServerHealth
}

// ServerHealth is what the leader knows of a member.
type ServerHealth struct {
	// Healthy: it was in contact lately and is not far behind.
	Healthy bool
	// StableSince is when Healthy changed last.
	StableSince time.Time
	// LastContact is how long ago the member and the leader were in contact;
	// negative if never.
	LastContact time.Duration
	// LastIndex is the member's last entry.
	LastIndex uint64
}

// Servers returns the group's members as this server knows them.
func (r *Replica) Servers() ([]Server, error) {
	_, leader := r.raft.LeaderWithID()
	health := r.pilot.health()
	var servers []Server
	for _, s := range r.members() {
		servers = append(servers, Server{
			ID: string(s.ID), Address: string(s.Address), Voter: s.Suffrage == raft.Voter, Leader: s.ID == leader,
			Health: health[s.ID],
		})
	}
	return servers, nil
}

// LeaderChanges returns a channel that is closed when next this server's part in
// the group changes, or the leader it knows, or that it takes proposals.
// Status tells what is so then.
func (r *Replica) LeaderChanges() <-chan struct{} { return r.changes.next() }

// watchLeader turns Raft's observations into changes.
func (r *Replica) watchLeader() {
	seen := make(chan raft.Observation, 16)
	observer := raft.NewObserver(seen, false, func(o *raft.Observation) bool {
		switch o.Data.(type) {
		case raft.LeaderObservation, raft.RaftState:
			return true
		}
		return false
	})
	r.raft.RegisterObserver(observer)
	defer r.raft.DeregisterObserver(observer)
	r.changes.poke() // what came before it listened
	for {
		select {
		case <-seen:
			r.changes.poke()
		case <-r.closing:
			r.changes.poke()
			return
		}
	}
}
