package replica

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	autopilot "github.com/hashicorp/raft-autopilot"
)

// AutopilotConfig says how the leader looks after the group's members: it gives
// a vote to those that have kept up for a while, and removes those that are
// gone.
//
// It removes a member only on two witnesses: the leader's own contact with it,
// and what Members says. A registry that is empty, wiped or unreachable
// removes nobody.
type AutopilotConfig struct {
	// Disabled leaves votes and members as they are; health is still told.
	Disabled bool
	// KeepDead never removes a member that is gone, unless it left on purpose.
	KeepDead bool
	// MinQuorum is how many voters have to remain when a dead one is removed: it
	// is kept until its replacement votes. Default: 3.
	MinQuorum int
	// LastContactThreshold is for how long a healthy member may be without
	// contact. Default: 1 s, or the heartbeat timeout if that is longer.
	LastContactThreshold time.Duration
	// MaxTrailingLogs is how many entries a healthy member may be behind.
	// Default: 1000.
	MaxTrailingLogs uint64
	// ServerStabilizationTime is how long a member has to be healthy before it is
	// given a vote. Default: 10 s.
	ServerStabilizationTime time.Duration
	// LeftAfter is how long a member must have been absent from Members, and out
	// of contact, to be removed. Default: 10 min.
	LeftAfter time.Duration
	// DeadAfter is the same for one that Members still knows, but calls critical.
	// Default: 24 h.
	DeadAfter time.Duration
	// UpdateInterval and ReconcileInterval are how often health is looked at, and
	// acted upon. Default: 2 s, so that a member that is well for long enough does
	// not wait for much longer.
	UpdateInterval, ReconcileInterval time.Duration
	// Members tells what is known of members beside Raft, by id. It must not
	// block. Default: nothing.
	Members func() map[string]Member
	// Stats asks a member how far it is. Default: what its answers to heartbeats
	// say.
	Stats func(ctx context.Context, id, address string) (ServerStats, error)
}

// Member is what is known of a server beside Raft.
type Member struct {
	Address, Version string
	// Left: it said itself that it leaves for good. It is removed at once.
	Left bool
	// Critical: it is known, but does not answer or is not well.
	Critical bool
	// AbsentSince is since when it has been missing; zero if it is there.
	AbsentSince time.Time
	// Trusted: what says so is complete enough to conclude that somebody is
	// absent, and has been ever since AbsentSince.
	Trusted bool
}

// ServerStats is how far a server is.
type ServerStats struct {
	// LastContact is how long ago it heard from the leader; negative if never.
	LastContact         time.Duration
	LastTerm, LastIndex uint64
}

func (c *AutopilotConfig) applyDefaults(heartbeat time.Duration) {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&c.LastContactThreshold, max(time.Second, heartbeat))
	def(&c.ServerStabilizationTime, 10*time.Second)
	def(&c.LeftAfter, 10*time.Minute)
	def(&c.DeadAfter, 24*time.Hour)
	def(&c.UpdateInterval, autopilot.DefaultUpdateInterval)
	def(&c.ReconcileInterval, autopilot.DefaultUpdateInterval)
	if c.MinQuorum == 0 {
		c.MinQuorum = 3
	}
	if c.MaxTrailingLogs == 0 {
		c.MaxTrailingLogs = 1000
	}
	if c.Members == nil {
		c.Members = func() map[string]Member { return nil }
	}
}

// pilot runs raft-autopilot while this server leads. It is its delegate, and
// what it knows of Raft.
//
// raft-autopilot removes at its next tick, and past all limits, whatever is in
// Raft's configuration and not among the servers it is told of. So it is told
// of all that are in the configuration, and never more; and its own way to
// remove one is shut: only RemoveServer removes, with its guard.
type pilot struct {
	r     *Replica
	ap    *autopilot.Autopilot
	since time.Time // when this server began to lead

	mu       sync.Mutex
	running  bool
	asking   map[raft.ServerID]bool // Stats that have not returned
	removing bool
	work     sync.WaitGroup
	ctx      context.Context
	cancel   context.CancelFunc
}

// newPilot does not start anything.
func newPilot(r *Replica) *pilot {
	p := &pilot{r: r, asking: map[raft.ServerID]bool{}}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	options := []autopilot.Option{
		autopilot.WithLogger(r.cfg.Logger),
		autopilot.WithUpdateInterval(r.cfg.Autopilot.UpdateInterval),
		autopilot.WithReconcileInterval(r.cfg.Autopilot.ReconcileInterval),
		autopilot.WithTimeProvider(clock(r.cfg.Now)),
	}
	if r.cfg.Autopilot.Disabled {
		options = append(options, autopilot.WithReconciliationDisabled())
	}
	p.ap = autopilot.New(pilotedRaft{r}, p, options...)
	return p
}

type clock func() time.Time

func (c clock) Now() time.Time { return c() }

// run starts and stops autopilot with leadership, until the replica closes or
// fails.
func (p *pilot) run() {
	defer p.work.Wait()
	defer p.cancel()
	var term uint64
	for {
		changed := p.r.LeaderChanges()
		if now := p.r.seq.ready.Load(); now != term {
			p.stop()
			if term = now; now != 0 {
				p.start()
			}
		}
		select {
		case <-changed:
			continue
		case <-p.r.closing:
		case <-p.r.failed:
		}
		p.stop()
		return
	}
}

func (p *pilot) start() {
	known := map[string]bool{}
	for _, s := range p.r.members() {
		known[string(s.ID)] = true
	}
	if p.r.transport != nil {
		p.r.transport.contacts.keep(known)
	}
	p.mu.Lock()
	p.since = p.r.cfg.Now()
	p.running = true
	p.mu.Unlock()
	p.ap.Start(p.ctx)
}

func (p *pilot) stop() {
	p.mu.Lock()
	was := p.running
	p.running = false
	p.mu.Unlock()
	if was {
		<-p.ap.Stop()
	}
}

// health of all members, while this server leads.
func (p *pilot) health() map[raft.ServerID]*ServerHealth {
	p.mu.Lock()
	running := p.running
	p.mu.Unlock()
	state := p.ap.GetState()
	if !running || state == nil {
		return nil
	}
	all := map[raft.ServerID]*ServerHealth{}
	for id, s := range state.Servers {
		all[id] = &ServerHealth{
			Healthy: s.Health.Healthy, StableSince: s.Health.StableSince,
			LastContact: s.Stats.LastContact, LastIndex: s.Stats.LastIndex,
		}
	}
	return all
}

// AutopilotConfig implements autopilot.ApplicationIntegration.
func (p *pilot) AutopilotConfig() *autopilot.Config {
	c := &p.r.cfg.Autopilot
	return &autopilot.Config{
		CleanupDeadServers:      !c.KeepDead,
		LastContactThreshold:    c.LastContactThreshold,
		MaxTrailingLogs:         c.MaxTrailingLogs,
		MinQuorum:               uint(c.MinQuorum),
		ServerStabilizationTime: c.ServerStabilizationTime,
	}
}

// silent is for how long a member has not answered this leader.
func (p *pilot) silent(id string) time.Duration {
	if id == p.r.cfg.ID {
		return 0
	}
	p.mu.Lock()
	last := p.since
	p.mu.Unlock()
	if p.r.transport != nil {
		if c, ok := p.r.transport.contacts.get(id); ok && c.at.After(last) {
			last = c.at
		}
	}
	return p.r.cfg.Now().Sub(last)
}

// status is what the two witnesses come to.
func status(c *AutopilotConfig, silent time.Duration, m Member, known bool, now time.Time) autopilot.NodeStatus {
	absent := time.Duration(0)
	if known && !m.AbsentSince.IsZero() {
		absent = now.Sub(m.AbsentSince)
	}
	switch {
	case !known, !m.Trusted:
		// One witness is none.
	case silent <= c.LastContactThreshold:
	case silent >= c.LeftAfter && absent >= c.LeftAfter:
		return autopilot.NodeLeft
	case silent >= c.DeadAfter && (m.Critical || absent > 0):
		return autopilot.NodeFailed
	}
	return autopilot.NodeAlive
}

// KnownServers implements autopilot.ApplicationIntegration.
func (p *pilot) KnownServers() map[raft.ServerID]*autopilot.Server {
	members := p.r.cfg.Autopilot.Members()
	now := p.r.cfg.Now()
	servers := map[raft.ServerID]*autopilot.Server{}
	for _, s := range p.r.members() {
		m, known := members[string(s.ID)]
		server := &autopilot.Server{
			ID:         s.ID,
			Name:       string(s.ID),
			Address:    s.Address,
			Version:    m.Version,
			NodeStatus: status(&p.r.cfg.Autopilot, p.silent(string(s.ID)), m, known, now),
			IsLeader:   string(s.ID) == p.r.cfg.ID,
		}
		if s.Suffrage == raft.Voter {
			// Only those: a dead voter goes when its replacement has a vote, not when
			// it is about to get one.
			server.NodeType = autopilot.NodeVoter
		}
		servers[s.ID] = server
	}
	return servers
}

// FetchServerStats implements autopilot.ApplicationIntegration.
func (p *pilot) FetchServerStats(ctx context.Context, servers map[raft.ServerID]*autopilot.Server) map[raft.ServerID]*autopilot.ServerStats {
	type answer struct {
		id    raft.ServerID
		stats ServerStats
		err   error
	}
	all := map[raft.ServerID]*autopilot.ServerStats{}
	answers := make(chan answer, len(servers))
	asked := 0
	for id, s := range servers {
		switch {
		case string(id) == p.r.cfg.ID:
			all[id] = p.heard(string(id))
		case p.r.cfg.Autopilot.Stats == nil:
			all[id] = p.heard(string(id))
		case p.begin(id):
			asked++
			p.work.Go(func() {
				defer p.end(id)
				stats, err := p.r.cfg.Autopilot.Stats(ctx, string(id), string(s.Address))
				answers <- answer{id, stats, err}
			})
		}
	}
	for range asked {
		select {
		case a := <-answers:
			if a.err != nil {
				p.r.cfg.Logger.Debug("a member does not tell how far it is", "id", a.id, "error", a.err)
				continue
			}
			all[a.id] = &autopilot.ServerStats{LastContact: a.stats.LastContact, LastTerm: a.stats.LastTerm, LastIndex: a.stats.LastIndex}
		case <-ctx.Done():
			return p.silence(all, servers)
		}
	}
	return p.silence(all, servers)
}

// silence stands for members that did not answer: raft-autopilot would go on
// with what they said before.
func (p *pilot) silence(all map[raft.ServerID]*autopilot.ServerStats, servers map[raft.ServerID]*autopilot.Server) map[raft.ServerID]*autopilot.ServerStats {
	for id := range servers {
		if all[id] == nil {
			all[id] = &autopilot.ServerStats{LastContact: -1}
		}
	}
	return all
}

// heard makes a member's stats of its answers to heartbeats.
func (p *pilot) heard(id string) *autopilot.ServerStats {
	term := p.r.lastTerm()
	if id == p.r.cfg.ID {
		return &autopilot.ServerStats{LastTerm: term, LastIndex: p.r.raft.LastIndex()}
	}
	if p.r.transport == nil {
		return &autopilot.ServerStats{LastContact: -1}
	}
	c, ok := p.r.transport.contacts.get(id)
	if !ok {
		return &autopilot.ServerStats{LastContact: -1}
	}
	stats := &autopilot.ServerStats{LastContact: p.r.cfg.Now().Sub(c.at), LastIndex: c.last}
	if c.last >= p.r.seq.began.Load() {
		// It has an entry that only this leader can have given it, or a tail of
		// its own that is about to be cut off, and then it will be behind again.
		stats.LastTerm = term
	}
	return stats
}

func (p *pilot) begin(id raft.ServerID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asking[id] {
		return false
	}
	p.asking[id] = true
	return true
}

func (p *pilot) end(id raft.ServerID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.asking, id)
}

// NotifyState implements autopilot.ApplicationIntegration. Who left on purpose is
// removed here: raft-autopilot would keep it for the sake of MinQuorum.
func (p *pilot) NotifyState(*autopilot.State) {
	if p.r.cfg.Autopilot.Disabled {
		return
	}
	members := p.r.cfg.Autopilot.Members()
	for _, s := range p.r.members() {
		if members[string(s.ID)].Left && string(s.ID) != p.r.cfg.ID {
			p.remove(string(s.ID), "it left")
		}
	}
}

// RemoveFailedServer implements autopilot.ApplicationIntegration.
func (p *pilot) RemoveFailedServer(s *autopilot.Server) {
	p.remove(string(s.ID), "it is gone: "+string(s.NodeStatus))
}

// remove removes a member in the background, one at a time.
func (p *pilot) remove(id, why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.removing || p.ctx.Err() != nil {
		return
	}
	p.removing = true
	p.work.Go(func() {
		ctx, cancel := context.WithTimeout(p.ctx, max(10*time.Second, 5*p.r.cfg.ElectionTimeout))
		defer cancel()
		if err := p.r.RemoveServer(ctx, id); err != nil {
			p.r.cfg.Logger.Warn("a member cannot be removed", "id", id, "because", why, "error", err)
		} else {
			p.r.cfg.Logger.Info("removed a member", "id", id, "because", why)
		}
		p.mu.Lock()
		p.removing = false
		p.mu.Unlock()
	})
}

// lastTerm is the term of this server's last entry.
func (r *Replica) lastTerm() uint64 {
	term, err := strconv.ParseUint(r.raft.Stats()["last_log_term"], 10, 64)
	if err != nil {
		return 0
	}
	return term
}

// pilotedRaft is what raft-autopilot may do with Raft. It waits for no answer
// that will not come.
type pilotedRaft struct{ r *Replica }

type pilotedFuture struct {
	raft.IndexFuture
	r *Replica
}

func (f pilotedFuture) Error() error {
	return f.r.ask(context.Background(), f.IndexFuture.Error)
}

var errNotByAutopilot = errors.New("raft-autopilot does not do this here")

type refusal struct{ raft.IndexFuture }

func (refusal) Error() error { return errNotByAutopilot }

// AddVoter gives a member a vote. What raft-autopilot decides rests on what it
// saw some time ago: a server that was removed since is not taken in again.
func (p pilotedRaft) AddVoter(id raft.ServerID, a raft.ServerAddress, index uint64, _ time.Duration) raft.IndexFuture {
	p.r.changing.Lock()
	defer p.r.changing.Unlock()
	if _, err := p.r.member(string(id)); err != nil {
		return refusal{}
	}
	if _, removed := p.r.Tombstones()[string(id)]; removed {
		return refusal{}
	}
	return pilotedFuture{p.r.raft.AddVoter(id, a, index, p.r.cfg.ElectionTimeout), p.r}
}

func (pilotedRaft) AddNonvoter(raft.ServerID, raft.ServerAddress, uint64, time.Duration) raft.IndexFuture {
	return refusal{}
}

func (pilotedRaft) DemoteVoter(raft.ServerID, uint64, time.Duration) raft.IndexFuture {
	return refusal{}
}

func (pilotedRaft) RemoveServer(raft.ServerID, uint64, time.Duration) raft.IndexFuture {
	return refusal{}
}

func (pilotedRaft) LeadershipTransferToServer(raft.ServerID, raft.ServerAddress) raft.Future {
	return refusal{}
}

func (p pilotedRaft) LastIndex() uint64          { return p.r.raft.LastIndex() }
func (p pilotedRaft) Leader() raft.ServerAddress { a, _ := p.r.raft.LeaderWithID(); return a }
func (p pilotedRaft) Stats() map[string]string {
	return map[string]string{"last_log_term": fmt.Sprint(p.r.lastTerm())}
}
func (p pilotedRaft) State() raft.RaftState { return p.r.raft.State() }
func (p pilotedRaft) GetConfiguration() raft.ConfigurationFuture {
	return p.r.raft.GetConfiguration()
}

var (
	_ autopilot.Raft                   = pilotedRaft{}
	_ autopilot.ApplicationIntegration = (*pilot)(nil)
)
