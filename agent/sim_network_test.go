package agent

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// simRounds is how often a scenario repeats what it is about; `make soak` asks
// for more.
func simRounds(t *testing.T, def int) int {
	t.Helper()
	if def /= simScale; testing.Short() {
		def /= 10
	}
	def = max(def, 1)
	return vfstest.Env(t, "DIURNA_ROUNDS", def)
}

// simSeed is the seed of a scenario: it logs it, and takes it from DIURNA_SEED.
func simSeed(t *testing.T) uint64 {
	t.Helper()
	seed := uint64(vfstest.Env(t, "DIURNA_SEED", int(rand.Uint64()>>2)))
	t.Logf("seed: DIURNA_SEED=%d", seed)
	simSeeds.Store(t.Name(), seed)
	return seed
}

// simSeeds are the seeds of scenarios, by their tests' names.
var simSeeds sync.Map

// firstAck returns how long it takes until an append that is begun now, or
// later, at one of some nodes is acknowledged.
func (c *simCluster) firstAck(nodes ...*simNode) time.Duration {
	begin := time.Now()
	cl := c.extra()
	defer cl.close()
	for patience := simElection / 4; time.Since(begin) < simPatience; patience += simElection / 20 {
		for _, n := range nodes {
			if cl.append(n, 1, nil, patience).outcome == simAcked {
				return time.Since(begin)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Errorf("%v: nothing was acknowledged by %v for %v", time.Since(c.h.began), names(nodes), simPatience)
	return simPatience
}

// terms returns the highest term that a node is in.
func (c *simCluster) term() (term uint64) {
	for _, n := range c.nodes {
		if _, a := n.running(); a != nil {
			term = max(term, a.replica.Status().Term)
		}
	}
	return term
}

// TestSimLeaderIsolated: the leader loses everybody, again and again.
func TestSimLeaderIsolated(t *testing.T) {
	t.Parallel()
	rounds := simRounds(t, 50)
	simulate(t, simSeed(t), simOptions{clients: 3}, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		for _, cl := range c.clients {
			cl.limit = rounds
			cl.think = 2 * time.Second
		}
		var slowest time.Duration
		c.work(func() {
			for range rounds {
				leader := c.awaitLeader()
				c.net.Isolate(leader.name)
				took := c.firstAck(c.others(leader)...)
				c.h.note("without %s for %v", leader.name, took)
				slowest = max(slowest, took)
				if c.rng.IntN(2) == 0 {
					time.Sleep(millis(c.rng, 2000))
				}
				c.net.Heal()
			}
		})
		t.Logf("the slowest of %d took %v", rounds, slowest)
		if slowest > 10*simElection {
			t.Errorf("it took up to %v until somebody else acknowledged", slowest)
		}
		c.audit()
	})
}

// TestSimOneWay: one node does not reach another, for every pair, in one
// direction and in both. The others go on, and nobody disturbs them.
func TestSimOneWay(t *testing.T) {
	t.Parallel()
	simulate(t, simSeed(t), simOptions{clients: 3}, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		for _, cl := range c.clients {
			cl.think, cl.limit = 3*time.Second, 40
		}
		c.work(func() {
			for _, both := range []bool{false, true} {
				for _, a := range c.nodes {
					for _, b := range c.others(a) {
						leader := c.awaitLeader()
						term := c.term()
						c.net.Block(a.name, b.name)
						if both {
							c.net.Block(b.name, a.name)
						}
						what := fmt.Sprintf("%s does not reach %s (both ways: %v), %s leads", a.name, b.name, both, leader.name)
						c.h.note("%s", what)
						// Whoever is cut off from the leader may stand for election
						// once; then there has to be rest.
						time.Sleep(10 * simElection)
						if took := c.firstAck(c.nodes...); took > simElection {
							t.Errorf("%s: an acknowledgement took %v", what, took)
						}
						if grown := c.term() - term; grown > 3 {
							t.Errorf("%s: %d elections in %v", what, grown, 10*simElection)
						}
						c.net.Heal()
					}
				}
			}
		})
		c.audit()
	})
}

// TestSimFlapping: the way between the leader and a follower comes and goes.
// That may cost elections, but not one after another.
func TestSimFlapping(t *testing.T) {
	t.Parallel()
	simulate(t, simSeed(t), simOptions{clients: 3}, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		for _, cl := range c.clients {
			cl.think, cl.limit = 2*time.Second, 40
		}
		term := c.term()
		c.work(func() {
			leader := c.awaitLeader()
			other := c.others(leader)[0]
			for range 150 {
				c.net.Block(leader.name, other.name)
				c.net.Block(other.name, leader.name)
				time.Sleep(200 * time.Millisecond)
				c.net.Unblock(leader.name, other.name)
				c.net.Unblock(other.name, leader.name)
				time.Sleep(200 * time.Millisecond)
			}
		})
		if grown := c.term() - term; grown > 10 {
			t.Errorf("%d elections in a minute", grown)
		}
		c.audit()
	})
}

// TestSimZombie: a leader is stopped and does not know it. It goes on believing
// that it leads, since its own lease is long, while the others elect somebody
// else. Whatever clients ask it then, it must acknowledge nothing and show
// nothing old as the latest.
func TestSimZombie(t *testing.T) {
	t.Parallel()
	rounds, seed := simRounds(t, 10), simSeed(t)
	for name, clients := range map[string]int{"busy": 3, "idle": 0} {
		t.Run(name, func(t *testing.T) { simZombie(t, seed, clients, rounds) })
	}
}

func simZombie(t *testing.T, seed uint64, clients, rounds int) {
	opts := simOptions{clients: clients, tune: func(n *simNode, cfg *config.Config) {
		if n.name == "n1" {
			// As a process that is stopped: time does not pass for it.
			cfg.Raft.HeartbeatTimeout, cfg.Raft.ElectionTimeout, cfg.Raft.LeaderLeaseTimeout = time.Minute, time.Minute, time.Minute
			cfg.ShutdownTimeout = 3 * time.Minute // it ends when it believes what everybody else knows
		}
	}}
	simulate(t, seed, opts, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		for _, cl := range c.clients {
			cl.limit = 60
		}
		zombie := c.nodes[0]
		reader := c.extra()
		defer reader.close()
		asked := 0
		c.work(func() {
			for range rounds {
				c.await("n1 leads", func() bool {
					leader := c.leader()
					if leader == zombie {
						return true
					}
					if _, z := zombie.running(); leader != nil && z != nil {
						if _, a := leader.running(); a != nil {
							_ = a.part.TransferLeadership(context.Background(), z.NodeID()) // or else again
						}
					}
					return false
				})
				c.cutOff(zombie)
				c.h.note("%s is cut off from its peers", zombie.name)
				c.firstAck(c.others(zombie)...)
				_, z := zombie.running()
				for range 10 {
					if z == nil || z.replica.Status().State != "Leader" {
						break
					}
					asked++
					// Before there is something in flight for which a refusal
					// would have to wait.
					expected := uint64(0)
					if a := reader.append(zombie, 1, &expected, 300*time.Millisecond); a.next != nil {
						c.h.note("it says that the log ends at %d", *a.next)
					}
					if r := reader.readAll(zombie, func(r *simRead) { r.linear = true }); r.complete {
						t.Error("a leader that is none answered a linearizable read")
					}
					if a := reader.append(zombie, 1, nil, 300*time.Millisecond); a.outcome == simAcked {
						t.Error("a leader that is none acknowledged")
					}
				}
				c.join(zombie)
				c.h.note("%s is back", zombie.name)
				c.awaitReady(c.nodes...)
			}
		})
		if asked == 0 {
			t.Error("nothing was asked of a leader that is none")
		}
		c.audit()
	})
}

// TestSimUncommitted: a leader that is cut off from its peers still stores what
// it is sent. Nobody may read that: it is going to be replaced.
func TestSimUncommitted(t *testing.T) {
	t.Parallel()
	rounds := simRounds(t, 20)
	simulate(t, simSeed(t), simOptions{clients: 1}, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		cl := c.clients[0]
		doubt := 0
		for range rounds {
			leader := c.awaitLeader()
			c.cutOff(leader)
			for range 1 + c.rng.IntN(4) {
				if a := cl.append(leader, 1+c.rng.IntN(3), nil, 50*time.Millisecond); a.outcome == simUnknown {
					doubt++
				}
				cl.readAll(leader, func(*simRead) {})
			}
			c.firstAck(c.others(leader)...)
			cl.readAll(leader, func(*simRead) {})
			c.join(leader)
			c.awaitReady(c.nodes...)
			cl.readAll(leader, func(*simRead) {})
		}
		if doubt == 0 {
			t.Error("no leader that was cut off took anything")
		}
		c.audit()
	})
}
