package replica

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	autopilot "github.com/hashicorp/raft-autopilot"
)

// settled waits until a leader leads, one among some if they are named, and all
// voters answer it.
func (g *testGroup) settled(ctx context.Context, among ...string) *Replica {
	g.t.Helper()
	leader := g.leader(ctx, among...)
	for {
		alive := true
		for _, s := range leader.members() {
			alive = alive && leader.alive(string(s.ID))
		}
		if alive {
			return leader
		}
		select {
		case <-ctx.Done():
			g.t.Fatal("some never answered")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// voters of the latest configuration, as one string.
func voters(r *Replica) (s string) {
	for _, m := range r.members() {
		if m.Suffrage == raft.Voter {
			s += string(m.ID)
		} else {
			s += "(" + string(m.ID) + ")"
		}
	}
	return s
}

// TestMembers adds, promotes and removes.
func TestMembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		defer g.stop()
		ctx, cancel := g.within(100)
		defer cancel()
		leader := g.settled(ctx)
		follower := g.nodes[g.others(leader.cfg.ID)[0]]
		// d would be given a vote as soon as autopilot runs for that long.
		time.Sleep(15 * time.Second)
		d := g.start("d")
		var notLeader *NotLeaderError
		if err := follower.AddNonvoter(ctx, "d", "d:1"); !errors.As(err, &notLeader) || notLeader.LeaderID != leader.cfg.ID {
			t.Errorf("by a follower: %v", err)
		}
		for range 2 { // the second time there is nothing to do
			if err := leader.AddNonvoter(ctx, "d", "d:1"); err != nil {
				t.Fatal(err)
			}
		}
		if got := voters(leader); got != "abc(d)" {
			t.Errorf("at once: %s", got)
		}
		mustPropose(t, leader, "x", 1)
		if err := d.WaitReadable(ctx, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(9 * time.Second)
		if got := voters(leader); got != "abc(d)" {
			t.Errorf("before it was stable: %s", got)
		}
		var notVoter *NotVoterError
		if err := leader.TransferLeadership(ctx, "d"); !errors.As(err, &notVoter) {
			t.Errorf("to one without a vote: %v", err)
		}
		time.Sleep(21 * time.Second)
		if got := voters(leader); got != "abcd" {
			t.Errorf("after half a minute: %s", got)
		}
		servers, err := leader.Servers()
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range servers {
			if s.Leader != (s.ID == leader.cfg.ID) || !s.Voter || s.Health == nil || !s.Health.Healthy || s.Health.LastIndex == 0 {
				t.Errorf("%+v %+v", s, s.Health)
			}
		}
		if servers, _ := follower.Servers(); servers[0].Health != nil {
			t.Error("a follower tells health")
		}
		var unknown *UnknownServerError
		if err := leader.RemoveServer(ctx, "z"); !errors.As(err, &unknown) || unknown.ID != "z" {
			t.Errorf("an unknown one: %v", err)
		}
		if err := leader.RemoveServer(ctx, follower.cfg.ID); err != nil {
			t.Error(err)
		}
		if err := leader.RemoveServer(ctx, leader.cfg.ID); !errors.As(err, &notLeader) || notLeader.LeaderID == leader.cfg.ID {
			t.Errorf("itself: %v", err)
		} else if err := g.nodes[notLeader.LeaderID].WaitReady(ctx); err != nil {
			t.Error(err)
		} else if err := g.nodes[notLeader.LeaderID].RemoveServer(ctx, leader.cfg.ID); err != nil {
			t.Errorf("by the next: %v", err)
		} else if got := voters(g.nodes[notLeader.LeaderID]); len(got) != 2 {
			t.Errorf("in the end: %s", got)
		}
	})
}

// TestQuorumGuard: no removal leaves too few that answer.
func TestQuorumGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		defer g.stop()
		ctx, cancel := g.within(100)
		defer cancel()
		leader := g.settled(ctx)
		others := g.others(leader.cfg.ID)
		g.net.isolate(others[0], true, leader.cfg.ID, others[1])
		time.Sleep(5 * time.Second)
		var quorum *QuorumError
		if err := leader.RemoveServer(ctx, others[1]); !errors.As(err, &quorum) || *quorum != (QuorumError{2, 1, 2}) {
			t.Errorf("the one that answers: %v", err)
		}
		if err := leader.TransferLeadership(ctx, others[0]); !errors.Is(err, ErrNoSuccessor) {
			t.Errorf("transfer to one that does not answer: %v", err)
		}
		if got := voters(leader); got != "abc" {
			t.Fatal(got)
		}
		// One that comes back without its data, at the same address.
		if err := leader.AddNonvoter(ctx, "d", others[0]+":1"); err != nil {
			t.Fatal(err)
		}
		want := map[string]bool{leader.cfg.ID: true, others[1]: true, "d": false}
		for _, s := range leader.members() {
			if vote, ok := want[string(s.ID)]; !ok || vote != (s.Suffrage == raft.Voter) {
				t.Errorf("%v", leader.members())
			}
		}
		if err := leader.RemoveServer(ctx, others[1]); err != nil {
			// Alone it is a majority of one.
			t.Errorf("down to one: %v", err)
		}
		if err := leader.RemoveServer(ctx, leader.cfg.ID); !errors.As(err, &quorum) {
			t.Errorf("the last one: %v", err)
		}
		g.net.isolate(others[0], false, leader.cfg.ID, others[1])
	})
}

// TestTransfer moves leadership where it is wanted, and tells who waits for it.
func TestTransfer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		defer g.stop()
		ctx, cancel := g.within(100)
		defer cancel()
		leader := g.settled(ctx)
		for _, id := range append(g.others(leader.cfg.ID), leader.cfg.ID) {
			changed := g.nodes[id].LeaderChanges()
			begin := time.Now()
			if err := leader.TransferLeadership(ctx, id); err != nil {
				t.Fatal(err)
			}
			<-changed
			if err := g.nodes[id].WaitReady(ctx); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(begin); took > leader.cfg.ElectionTimeout {
				t.Errorf("took %v", took)
			}
			var elsewhere *NotLeaderError
			if err := leader.TransferLeadership(ctx, id); !errors.As(err, &elsewhere) && !errors.Is(err, ErrNoLeader) {
				t.Errorf("by a follower: %v", err)
			}
			leader = g.settled(ctx, id)
			if err := leader.TransferLeadership(ctx, id); err != nil {
				t.Errorf("%s to itself: %v", id, err)
			}
			mustPropose(t, leader, "x", 1)
		}
		// Not to the one that does not answer.
		others := g.others(leader.cfg.ID)
		g.net.isolate(others[0], true, leader.cfg.ID, others[1])
		time.Sleep(5 * time.Second)
		if err := leader.TransferLeadership(ctx, ""); err != nil {
			t.Error(err)
		}
		g.leader(ctx, others[1])
		g.net.isolate(others[0], false, leader.cfg.ID, others[1])
	})
}

// TestWitnesses is the table of what the leader's contact and the registry come
// to.
func TestWitnesses(t *testing.T) {
	var c AutopilotConfig
	c.applyDefaults(0)
	now := time.Unix(1e9, 0)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	const short, long, ever = time.Second, 11 * time.Minute, 25 * time.Hour
	absent := Member{AbsentSince: ago(long), Trusted: true}
	for name, tc := range map[string]struct {
		silent time.Duration
		member Member
		known  bool
		want   autopilot.NodeStatus
	}{
		"in contact":                       {0, Member{Trusted: true}, true, autopilot.NodeAlive},
		"in contact, absent":               {0, absent, true, autopilot.NodeAlive},
		"in contact, critical":             {0, Member{Critical: true, Trusted: true}, true, autopilot.NodeAlive},
		"in contact, left":                 {0, Member{Left: true, Trusted: true}, true, autopilot.NodeAlive},
		"silent for a moment, absent":      {5 * time.Second, absent, true, autopilot.NodeAlive},
		"silent for long, absent":          {long, absent, true, autopilot.NodeLeft},
		"silent for long, absent, shortly": {ever, Member{AbsentSince: ago(short), Trusted: true}, true, autopilot.NodeFailed},
		"silent, absent since just now":    {long, Member{AbsentSince: ago(short), Trusted: true}, true, autopilot.NodeAlive},
		"silent, registry not trusted":     {ever, Member{AbsentSince: ago(ever)}, true, autopilot.NodeAlive},
		"silent, critical, not trusted":    {ever, Member{Critical: true}, true, autopilot.NodeAlive},
		"silent, nothing known":            {ever, Member{}, false, autopilot.NodeAlive},
		"silent for long, critical":        {long, Member{Critical: true, Trusted: true}, true, autopilot.NodeAlive},
		"silent for a day, critical":       {ever, Member{Critical: true, Trusted: true}, true, autopilot.NodeFailed},
		"silent for a day, there and well": {ever, Member{Trusted: true}, true, autopilot.NodeAlive},
	} {
		if got := status(&c, tc.silent, tc.member, tc.known, now); got != tc.want {
			t.Errorf("%s: %s, want %s", name, got, tc.want)
		}
	}
}

// TestPruning takes a voter away and says different things of it.
func TestPruning(t *testing.T) {
	for name, tc := range map[string]struct {
		trusted, absent, left bool
		after                 time.Duration // it is cut off for so long
		replacement           bool
		unstable              bool   // the replacement has no vote yet
		want                  string // voters, x for the one that is gone
	}{
		"registry is empty":            {after: time.Hour, replacement: true, want: "abcd"},
		"registry was wiped":           {absent: true, after: time.Hour, replacement: true, want: "abcd"},
		"gone, nobody in its place":    {trusted: true, absent: true, after: 2 * time.Hour, want: "abc"},
		"gone, with a replacement":     {trusted: true, absent: true, after: 2 * time.Hour, replacement: true, want: "abd"},
		"gone, replacement to come":    {trusted: true, absent: true, after: 2 * time.Hour, replacement: true, unstable: true, want: "abc(d)"},
		"gone for a while":             {trusted: true, absent: true, after: 5 * time.Minute, replacement: true, want: "abcd"},
		"left, nobody in its place":    {trusted: true, left: true, after: time.Minute, want: "ab"},
		"left, and answers":            {trusted: true, left: true, want: "ab"},
		"left, registry not trusted":   {left: true, after: time.Minute, want: "ab"},
		"not gone, but out of contact": {trusted: true, after: time.Hour, replacement: true, want: "abcd"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var known atomic.Pointer[map[string]Member]
				known.Store(&map[string]Member{})
				g := newGroup(t, 3, func(c *Config) {
					c.CommitTimeout = time.Second // fewer events in so long a time
					c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = 20*time.Second, 20*time.Second, 15*time.Second
					c.StallLimit = time.Minute
					c.SnapshotInterval = time.Hour
					c.Autopilot.LastContactThreshold = 30 * time.Second
					c.Autopilot.Members = func() map[string]Member { return *known.Load() }
					if tc.unstable {
						c.Autopilot.ServerStabilizationTime = 4 * time.Hour
					}
				})
				defer g.stop()
				ctx, cancel := g.within(10000)
				defer cancel()
				leader := g.settled(ctx)
				if leader.cfg.ID != "a" {
					if err := leader.TransferLeadership(ctx, "a"); err != nil {
						t.Fatal(err)
					}
					leader = g.leader(ctx, "a")
				}
				if tc.unstable {
					time.Sleep(4*time.Hour + time.Minute) // autopilot gives votes at once in its first time
				}
				if tc.replacement {
					g.start("d")
					if err := leader.AddNonvoter(ctx, "d", "d:1"); err != nil {
						t.Fatal(err)
					}
					time.Sleep(2 * time.Minute)
					if got := voters(leader); (got == "abcd") == tc.unstable {
						t.Fatalf("replacement: %s", got)
					}
				}
				m := Member{Trusted: tc.trusted, Left: tc.left}
				if tc.absent {
					m.AbsentSince = time.Now()
				}
				if name != "registry is empty" {
					known.Store(&map[string]Member{"a": {Trusted: true}, "b": {Trusted: true}, "c": m, "d": {Trusted: true}})
				}
				if tc.after > 0 {
					g.net.isolate("c", true, "a", "b", "d")
				}
				time.Sleep(max(tc.after, time.Minute))
				if got := voters(leader); got != tc.want {
					t.Errorf("voters %s, want %s", got, tc.want)
				}
				g.net.isolate("c", false, "a", "b", "d")
			})
		})
	}
}

// TestStats: what the agent says of members counts, and one that does not answer
// is asked once at a time.
func TestStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		g := newGroup(t, 3, func(c *Config) {
			// Each node's own: one that has just led may still be waiting.
			var hanging atomic.Int64
			c.Autopilot.Stats = func(ctx context.Context, id, address string) (ServerStats, error) {
				asked.Add(1)
				if address != id+":1" {
					return ServerStats{}, fmt.Errorf("address %s", address)
				}
				if id == "c" {
					if hanging.Add(1) > 1 {
						t.Error("asked again before it answered")
					}
					<-ctx.Done()
					time.Sleep(10 * time.Second)
					hanging.Add(-1)
					return ServerStats{}, ctx.Err()
				}
				return ServerStats{LastContact: time.Millisecond, LastTerm: 2, LastIndex: 5}, nil
			}
		})
		defer g.stop()
		ctx, cancel := g.within(100)
		defer cancel()
		leader := g.settled(ctx)
		if leader.cfg.ID != "a" {
			if err := leader.TransferLeadership(ctx, "a"); err != nil {
				t.Fatal(err)
			}
			leader = g.leader(ctx, "a")
		}
		time.Sleep(time.Minute)
		if asked.Load() == 0 {
			t.Error("nobody was asked")
		}
		servers, err := leader.Servers()
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range servers {
			if s.ID == "c" && (s.Health.Healthy || s.Health.LastContact >= 0) || s.ID == "a" && !s.Health.Healthy {
				t.Errorf("%s: %+v", s.ID, s.Health)
			}
		}
	})
}
