package agent

import (
	"fmt"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// TestSimHealing: a node whose data is damaged heals itself, and is killed or
// loses its power at any moment of that, again and again; so do the others.
func TestSimHealing(t *testing.T) {
	t.Parallel()
	clusters := simRounds(t, 8)
	seed := simSeed(t)
	const scrub = 2 * time.Second
	for i := range clusters {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			opts := simOptions{clients: 3, registry: i%2 == 1, tune: func(_ *simNode, cfg *config.Config) { cfg.Log.ScrubInterval = scrub }}
			simulate(t, seed+uint64(i), opts, func(c *simCluster) {
				c.awaitReady(c.nodes...)
				for _, cl := range c.clients {
					cl.limit = 60
				}
				c.work(func() {
					for range 3 {
						time.Sleep(millis(c.rng, 3000))
						victim := c.nodes[c.rng.IntN(3)]
						victim.shutdown()
						where, err := victim.rot(c.rng, "/data/logs", 2)
						if err != nil {
							t.Error(err)
						}
						c.h.note("bits of %s flip: %v", victim.name, where)
						for range c.rng.IntN(6) {
							victim.start()
							time.Sleep(millis(c.rng, 2000))
							n := victim
							if c.rng.IntN(4) == 0 {
								n = c.nodes[c.rng.IntN(3)]
							}
							survive := vfstest.Survival(c.rng.IntN(3))
							c.h.note("%s loses its power, %v survives", n.name, survive)
							n.power(c.rng, survive)
							if n != victim {
								n.start()
								victim.shutdown()
							}
						}
						victim.back()
						// Damage that nobody has found yet would be a second one beside the
						// next.
						time.Sleep(3 * scrub)
						c.awaitReady(c.nodes...)
						c.awaitGroup(c.nodes...)
					}
				})
				c.mend()
				c.audit()
			})
		})
	}
}

// TestSimSync: a sync fails once, as far as the program can tell; then the power
// fails, and what the kernel only believed to have written is gone.
func TestSimSync(t *testing.T) {
	t.Parallel()
	rounds := simRounds(t, 12)
	simulate(t, simSeed(t), simOptions{clients: 4}, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		for _, cl := range c.clients {
			cl.limit, cl.think = 20*rounds, time.Second/3
		}
		c.work(func() {
			for range rounds {
				n := c.nodes[c.rng.IntN(3)]
				p, _ := n.running()
				c.h.note("a sync of %s fails", n.name)
				p.disk.failOnce([]string{"sync", "syncdir"}[c.rng.IntN(2)])
				time.Sleep(millis(c.rng, 2000))
				n.back()
				time.Sleep(millis(c.rng, 4000))
				nodes := c.nodes
				if c.rng.IntN(2) == 0 {
					nodes = []*simNode{n}
				}
				c.h.note("the power of %v fails", names(nodes))
				c.powerAll(c.rng, vfstest.Survival(c.rng.IntN(2)), nodes)
				for _, n := range nodes {
					n.start()
				}
				c.awaitReady(c.nodes...)
			}
		})
		c.mend()
		c.audit()
	})
}

// TestSimFive: of five nodes, two may be gone in any way, and the rest goes on.
func TestSimFive(t *testing.T) {
	t.Parallel()
	rounds := simRounds(t, 10)
	const scrub = 5 * time.Second
	opts := simOptions{nodes: 5, clients: 4, registry: true, tune: func(_ *simNode, cfg *config.Config) { cfg.Log.ScrubInterval = scrub }}
	simulate(t, simSeed(t), opts, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		for _, cl := range c.clients {
			cl.limit, cl.think = 20*rounds, time.Second/3
		}
		c.work(func() {
			for range rounds {
				a, b := c.pair(c.rng)
				rotten := false
				for _, n := range []*simNode{a, b} {
					switch c.rng.IntN(5) {
					case 0:
						c.h.note("%s gets a new disk", n.name)
						n.kill()
						n.mem = vfstest.New()
					case 1:
						n.shutdown()
						where, err := n.rot(c.rng, "/data/logs", 3)
						if err != nil {
							t.Error(err)
						}
						c.h.note("bits of %s flip: %v", n.name, where)
						rotten = true
					case 2:
						c.h.note("%s loses its power", n.name)
						n.power(c.rng, vfstest.None)
					case 3:
						c.h.note("%s is isolated", n.name)
						c.net.Isolate(n.name)
					default:
						c.h.note("%s stands still", n.name)
						c.net.Pause(n.name)
					}
				}
				if took := c.firstAck(c.others(a, b)...); took > 10*simElection {
					t.Errorf("without %s and %s, an acknowledgement took %v", a.name, b.name, took)
				}
				time.Sleep(millis(c.rng, 3000))
				c.mend()
				c.awaitReady(c.nodes...)
				c.awaitGroup(c.nodes...)
				if rotten {
					// Damage that nobody has found yet makes a third one of the next two.
					time.Sleep(3 * scrub)
					c.awaitReady(c.nodes...)
					c.awaitGroup(c.nodes...)
				}
			}
		})
		c.audit()
	})
}

// TestSimVotes: nodes lose their power in the middle of elections. What a node
// voted it must not forget: it would vote again, for another leader of the same
// term.
func TestSimVotes(t *testing.T) {
	t.Parallel()
	rounds := simRounds(t, 40)
	simulate(t, simSeed(t), simOptions{clients: 4}, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		for _, cl := range c.clients {
			cl.limit, cl.think = 10*rounds, time.Second/4
		}
		c.work(func() {
			for range rounds {
				// Somebody votes, and leads or makes somebody lead; then it forgets,
				// and the other one of the three wants to be elected by it.
				a := c.awaitLeader()
				c.net.Isolate(a.name)
				b, d := c.others(a)[0], c.others(a)[1]
				if c.rng.IntN(2) == 0 {
					b, d = d, b
				}
				term := c.term()
				c.await("an election begins", func() bool {
					_, x := b.running()
					_, y := d.running()
					return x == nil || y == nil || x.replica.Status().Term > term || y.replica.Status().Term > term
				})
				time.Sleep(time.Duration(c.rng.Int64N(int64(20 * time.Millisecond))))
				c.h.note("%s loses its power in an election", b.name)
				c.net.Heal()
				c.net.Isolate(d.name)
				b.power(c.rng, vfstest.None)
				b.start()
				c.firstAck(a, b)
				c.net.Heal()
				if c.rng.IntN(2) == 0 {
					c.awaitReady(c.nodes...)
				}
			}
		})
		c.mend()
		c.audit()
	})
}
