package agent

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
	"github.com/diurnalog/diurna/rpc/client"
)

// TestSimPowerOfOne: of the two nodes that acknowledged, one loses its power and
// the other stands still; the third, which saw nothing of it, and the one that
// comes back have to go on together. (What a node forgot then, all would
// forget.)
func TestSimPowerOfOne(t *testing.T) {
	t.Parallel()
	rounds := simRounds(t, 30)
	simulate(t, simSeed(t), simOptions{clients: 1}, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		cl := c.clients[0]
		for range rounds {
			leader := c.awaitLeader()
			others := c.others(leader)
			c.rng.Shuffle(2, func(i, j int) { others[i], others[j] = others[j], others[i] })
			absent, forgets, waits := others[0], others[1], leader
			if c.rng.IntN(2) == 0 {
				forgets, waits = waits, forgets
			}
			c.net.Pause(absent.name)
			for range 1 + c.rng.IntN(5) {
				cl.append(leader, 1+c.rng.IntN(3), nil, 2*time.Second)
			}
			survive := vfstest.Survival(c.rng.IntN(2))
			c.h.note("%s saw nothing; %s stands still; %s loses its power, %v survives", absent.name, waits.name, forgets.name, survive)
			c.net.Pause(waits.name)
			forgets.power(c.rng, survive)
			forgets.start()
			c.net.Resume(absent.name)
			c.firstAck(absent, forgets)
			c.net.Resume(waits.name)
			c.awaitReady(c.nodes...)
		}
		c.audit()
	})
}

// TestSimPowerOfAll: all machines lose their power at the same moment, under
// load.
func TestSimPowerOfAll(t *testing.T) {
	t.Parallel()
	rounds := simRounds(t, 25)
	simulate(t, simSeed(t), simOptions{clients: 4}, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		for _, cl := range c.clients {
			cl.limit, cl.think = 4*rounds, time.Second
		}
		c.work(func() {
			for range rounds {
				time.Sleep(millis(c.rng, 3000))
				survive := vfstest.Survival(c.rng.IntN(3))
				c.h.note("the power is off everywhere, %v survives", survive)
				c.powerAll(c.rng, survive, c.nodes)
				for _, n := range c.nodes {
					n.start()
				}
				c.awaitReady(c.nodes...)
			}
		})
		c.audit()
	})
}

// TestSimDisk: the leader's disk fails in one way or another. Another node
// acknowledges soon, and nothing is lost when the first comes back.
func TestSimDisk(t *testing.T) {
	t.Parallel()
	faults := map[string]struct {
		begin func(n *simNode, p *simProcess)
		// within is how soon another has to acknowledge.
		within time.Duration
		// moves: that other has to lead.
		moves bool
	}{
		"hangs":                {func(_ *simNode, p *simProcess) { p.disk.stall() }, 3 * simElection, true},
		"hangs, reading too":   {func(_ *simNode, p *simProcess) { p.disk.pause() }, 3 * simElection, true},
		"fails to sync once":   {func(_ *simNode, p *simProcess) { p.disk.failOnce("sync") }, 3 * simElection, true},
		"fails to write once":  {func(_ *simNode, p *simProcess) { p.disk.failOnce("write") }, 3 * simElection, true},
		"is full":              {func(n *simNode, _ *simProcess) { n.mem.SetCapacity(n.mem.Used()) }, 10 * time.Second, true},
		"takes far too long":   {func(_ *simNode, p *simProcess) { p.disk.slow(3 * simElection) }, 6 * simElection, true},
		"takes a bit too long": {func(_ *simNode, p *simProcess) { p.disk.slow(simElection / 4) }, 10 * simElection, false},
		"is gone":              {func(n *simNode, _ *simProcess) { n.kill() }, 6 * simElection, true},
	}
	rounds := simRounds(t, 4)
	seed := simSeed(t)
	for name, f := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			opts := simOptions{clients: 3, tune: func(_ *simNode, cfg *config.Config) { cfg.Disk.MinFree = 16 << 10 }}
			simulate(t, seed, opts, func(c *simCluster) {
				c.awaitReady(c.nodes...)
				for _, cl := range c.clients {
					cl.limit, cl.think = 20*rounds, time.Second/4
				}
				var slowest time.Duration
				c.work(func() {
					for range rounds {
						time.Sleep(millis(c.rng, 1000))
						leader := c.awaitLeader()
						p, _ := leader.running()
						c.h.note("the disk of %s %s", leader.name, name)
						f.begin(leader, p)
						// A disk that nobody wants anything of fails nobody.
						took := c.firstAck(c.others(leader)...)
						if f.moves {
							c.awaitLeader(leader)
						}
						slowest = max(slowest, took)
						c.h.note("the first acknowledgement took %v", took)
						if c.rng.IntN(2) == 0 {
							time.Sleep(millis(c.rng, 5000))
						}
						leader.repair()
						c.awaitReady(c.nodes...)
					}
				})
				t.Logf("the first acknowledgement took up to %v", slowest)
				if slowest > f.within {
					t.Errorf("the first acknowledgement took up to %v, more than %v", slowest, f.within)
				}
				c.audit()
			})
		})
	}
}

// TestSimSlowFollower: one follower's slow disk is nobody else's business.
func TestSimSlowFollower(t *testing.T) {
	t.Parallel()
	simulate(t, simSeed(t), simOptions{clients: 1}, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		leader := c.awaitLeader()
		term := c.term()
		cl := c.clients[0]
		measure := func() (sum time.Duration) {
			for range 50 {
				if a := cl.append(leader, 1, nil, 5*time.Second); a.outcome == simAcked {
					sum += a.until - a.at
				}
			}
			return sum / 50
		}
		usual := measure()
		p, _ := c.others(leader)[0].running()
		p.disk.slow(simElection / 2)
		slow := measure()
		t.Logf("an append takes %v, with a slow follower %v", usual, slow)
		if slow > usual+usual/2 || c.term() != term {
			t.Errorf("an append takes %v instead of %v, with %d elections", slow, usual, c.term()-term)
		}
		p.disk.set(nil, nil)
		c.audit()
	})
}

// TestSimRot: bits of one replica's files flip, while it is down or under its
// nose. Nobody ever gets to read a wrong byte, what is damaged is fetched from
// the others, and nothing gets shorter.
func TestSimRot(t *testing.T) {
	t.Parallel()
	clusters := simRounds(t, 20)
	seed := simSeed(t)
	for i := range clusters {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			opts := simOptions{clients: 4, registry: i%2 == 1, tune: func(_ *simNode, cfg *config.Config) { cfg.Log.ScrubInterval = 10 * time.Second }}
			simulate(t, seed+uint64(i), opts, func(c *simCluster) {
				c.awaitReady(c.nodes...)
				for _, cl := range c.clients {
					cl.limit = 50
				}
				victim := c.nodes[c.rng.IntN(3)]
				c.work(func() {
					time.Sleep(millis(c.rng, 10000))
					running := c.rng.IntN(2) == 0
					if !running {
						victim.shutdown()
					}
					where, err := victim.rot(c.rng, "/data/logs", 1+c.rng.IntN(3))
					if err != nil {
						t.Error(err)
					}
					c.h.note("bits of %s flip (it runs: %v): %s", victim.name, running, strings.Join(where, ", "))
					if !running {
						victim.start()
					}
					// Found by the scrub at the latest.
					time.Sleep(30 * time.Second)
					if c.rng.IntN(2) == 0 {
						// The others have to do without it now.
						other := c.others(victim)[c.rng.IntN(2)]
						c.awaitReady(c.nodes...)
						c.h.note("%s loses its power", other.name)
						other.power(c.rng, vfstest.None)
						c.firstAck(c.others(other)...)
						other.start()
					}
				})
				c.mend()
				c.audit()
				c.readBack(victim)
			})
		})
	}
}

// readBack reads a node's files as no reader would: everything has to be whole.
func (c *simCluster) readBack(n *simNode) {
	n.shutdown()
	n.start()
	c.awaitReady(n)
}

// TestSimFull: all disks fill up under load, to the last byte on some. Reads go
// on, appends are refused and say why, and when there is space things go on
// without a restart.
func TestSimFull(t *testing.T) {
	t.Parallel()
	rounds := simRounds(t, 10)
	opts := simOptions{clients: 3, tune: func(_ *simNode, cfg *config.Config) { cfg.Disk.MinFree = 48 << 10 }}
	simulate(t, simSeed(t), opts, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		for _, cl := range c.clients {
			cl.limit, cl.think = 40*rounds, time.Second/4
		}
		cl := c.extra()
		defer cl.close()
		refused, full := 0, 0
		c.work(func() {
			for range rounds {
				for _, n := range c.nodes {
					n.mem.SetCapacity(n.mem.Used() + c.rng.Int64N(64<<10)*c.rng.Int64N(2))
				}
				c.h.note("the disks are full")
				// Long enough for what is preallocated to be used up.
				for begin := time.Now(); time.Since(begin) < 10*time.Second; time.Sleep(100 * time.Millisecond) {
					a := cl.append(c.nodes[c.rng.IntN(3)], 4, nil, 2*time.Second)
					if a.outcome == simRefused {
						refused++
						if strings.Contains(a.why, client.ReasonDiskFull) {
							full++
						}
					}
				}
				// A linearizable one needs a leader that could begin its term.
				if r := cl.readAll(c.nodes[c.rng.IntN(3)], func(*simRead) {}); !r.complete {
					t.Errorf("a read while the disks are full: %s", r.why)
				}
				for _, n := range c.nodes {
					n.mem.SetCapacity(-1)
				}
				c.h.note("there is space again")
				// Raft waits for longer and longer, up to 10 s, before it sends again
				// what a follower could not store.
				if took := c.firstAck(c.nodes...); took > 15*time.Second {
					t.Errorf("with space again, an acknowledgement took %v", took)
				}
			}
		})
		t.Logf("%d refused, %d of them because the disk is full", refused, full)
		if full == 0 {
			t.Error("no disk was ever full")
		}
		for _, n := range c.nodes {
			if life := n.place().life; life != 1 {
				t.Errorf("%s was started %d times", n.name, life)
			}
		}
		c.audit()
	})
}
