package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
	"github.com/diurnalog/diurna/rpc/client"
)

// joins is how a node is started that founds nothing.
func joins(_ *simNode, cfg *config.Config) { cfg.Cluster.BootstrapExpect = 0 }

// id is who the node is, by what is on its disk; empty while nothing is.
func (n *simNode) id() string {
	id, err := readNodeFile(n.mem, "/data")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.c.t.Errorf("%s: %v", n.name, err)
	}
	return id.node
}

// servers returns the group as a node has it, by id; nil if it does not run.
func (n *simNode) servers() map[string]replica.Server {
	_, a := n.running()
	if a == nil {
		return nil
	}
	servers, err := a.replica.Servers()
	if err != nil {
		return nil
	}
	group := map[string]replica.Server{}
	for _, s := range servers {
		group[s.ID] = s
	}
	return group
}

// awaitGroup waits until the group has exactly these voters, and no other
// server, as all of them know: what only the leader knows may not last.
func (c *simCluster) awaitGroup(nodes ...*simNode) bool {
	return c.await(fmt.Sprintf("%v are the voters", names(nodes)), func() bool {
		for _, witness := range nodes {
			group := witness.servers()
			if len(group) != len(nodes) {
				return false
			}
			for _, n := range nodes {
				if s, ok := group[n.id()]; !ok || !s.Voter || s.Address != n.address() {
					return false
				}
			}
		}
		return c.leader() != nil
	})
}

// operate has somebody do what an operator asks for, however often it takes.
func (c *simCluster) operate(what string, at []*simNode, do func(ctx context.Context, conn *client.Client) error) bool {
	operator := c.extra()
	defer operator.close()
	return c.await(what, func() bool {
		for _, n := range at {
			if _, a := n.running(); a == nil {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			err := do(ctx, operator.conn(n))
			cancel()
			if err == nil {
				return true
			}
			c.h.note("%s, asked of %s: %v", what, n.name, err)
			operator.drop(n, err)
		}
		return false
	})
}

// remove has a node removed.
func (c *simCluster) remove(n *simNode) bool {
	id := n.id()
	return c.operate(n.name+" is removed", c.others(n), func(ctx context.Context, conn *client.Client) error {
		_, _, err := conn.RemovePeer(ctx, id)
		var e *client.Error
		if errors.As(err, &e) && e.Reason == "UNKNOWN_SERVER" {
			return nil // by an attempt before
		}
		return err
	})
}

// take has a node taken in that no registry tells about.
func (c *simCluster) take(n *simNode) bool {
	return c.registry != nil || c.operate(n.name+" is added", c.others(n), func(ctx context.Context, conn *client.Client) error {
		_, _, err := conn.AddPeer(ctx, n.id(), n.address())
		return err
	})
}

// TestSimMembers: nodes join, are removed and are replaced, one after another,
// while others lose their power or their network, under load.
func TestSimMembers(t *testing.T) {
	t.Parallel()
	clusters := simRounds(t, 6)
	seed := simSeed(t)
	for i := range clusters {
		for _, registry := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d, registry %v", i, registry), func(t *testing.T) {
				t.Parallel()
				simulate(t, seed+uint64(i), simOptions{clients: 4, registry: registry}, func(c *simCluster) { simMembers(c) })
			})
		}
	}
}

// simMembers is one life of a cluster.
func simMembers(c *simCluster) {
	c.awaitReady(c.nodes...)
	for _, cl := range c.clients {
		cl.think, cl.limit = time.Second, 60
	}
	members := slices.Clone(c.nodes)
	// trouble does something to one of the members that are to stay, for a
	// while, and returns what to do about it.
	trouble := func(spare *simNode) (over func()) {
		n := members[c.rng.IntN(len(members))]
		if n == spare {
			return func() {}
		}
		switch c.rng.IntN(5) {
		case 0:
			c.h.note("%s loses its power", n.name)
			n.power(c.rng, vfstest.Survival(c.rng.IntN(3)))
			return n.back
		case 1:
			c.h.note("%s is isolated", n.name)
			c.net.Isolate(n.name)
			return c.net.Heal
		case 2:
			c.h.note("%s stands still", n.name)
			c.net.Pause(n.name)
			return func() { c.net.Resume(n.name) }
		case 3:
			c.h.note("%s is restarted", n.name)
			n.shutdown()
			return n.back
		default:
			return func() {}
		}
	}
	c.work(func() {
		// A fourth and a fifth.
		for range 2 {
			n := c.addNode(joins)
			c.h.note("%s joins", n.name)
			over := trouble(nil)
			n.start()
			time.Sleep(millis(c.rng, 5000))
			over()
			if !c.take(n) {
				return
			}
			members = append(members, n)
			if !c.awaitGroup(members...) {
				return
			}
		}
		// One is removed, running or not, be it the leader.
		gone := members[c.rng.IntN(len(members))]
		if c.rng.IntN(2) == 0 {
			gone.kill()
		}
		c.h.note("%s is to be removed", gone.name)
		over := trouble(gone)
		time.Sleep(millis(c.rng, 2000))
		if _, a := gone.running(); a != nil && c.rng.IntN(2) == 0 {
			c.h.note("it leaves on its own")
			if !c.operate(gone.name+" leaves", []*simNode{gone}, func(ctx context.Context, conn *client.Client) error {
				_, err := conn.Leave(ctx, gone.id())
				return err
			}) {
				return
			}
		} else if !c.remove(gone) {
			return
		}
		over()
		members = slices.DeleteFunc(members, func(n *simNode) bool { return n == gone })
		if !c.awaitGroup(members...) {
			return
		}
		// It does not come back by itself.
		gone.back()
		time.Sleep(20 * time.Second)
		if !c.awaitGroup(members...) {
			return
		}
		gone.shutdown()
		c.forget(gone)

		// One is lost with its disk, and another takes its place, at the same
		// address.
		lost := members[c.rng.IntN(len(members))]
		c.h.note("%s gets a new disk", lost.name)
		lost.kill()
		lost.mem = vfstest.New()
		over = trouble(lost)
		time.Sleep(millis(c.rng, 3000))
		lost.start()
		time.Sleep(millis(c.rng, 5000))
		over()
		c.awaitGroup(members...)
	})
	c.mend()
	c.awaitGroup(members...)
	c.audit(members...)
}

// TestSimNewDisks: every node in turn comes back with an empty disk, under the
// same name and at the same address. It must not vote with nothing: it has to
// get the log first.
func TestSimNewDisks(t *testing.T) {
	t.Parallel()
	for _, registry := range []bool{false, true} {
		t.Run(fmt.Sprintf("registry %v", registry), func(t *testing.T) {
			t.Parallel()
			simulate(t, simSeed(t), simOptions{clients: 3, registry: registry}, func(c *simCluster) {
				c.awaitReady(c.nodes...)
				for _, cl := range c.clients {
					cl.think, cl.limit = time.Second, 60
				}
				c.work(func() {
					for range 2 {
						for _, n := range c.nodes {
							was := n.id()
							n.kill()
							n.mem = vfstest.New()
							c.h.note("%s gets a new disk", n.name)
							n.start()
							if !c.awaitGroup(c.nodes...) {
								return
							}
							if n.id() == was {
								c.t.Errorf("%s has the id that it had before it lost everything", n.name)
							}
						}
					}
				})
				c.audit()
			})
		})
	}
}

// TestSimRetention: a node that was away while the others deleted what it lacks
// gets a snapshot, and the network breaks while it does.
func TestSimRetention(t *testing.T) {
	t.Parallel()
	rounds := simRounds(t, 4)
	opts := simOptions{clients: 1, tune: func(_ *simNode, cfg *config.Config) { cfg.Log.RetentionBytes = 4 * simSegment }}
	simulate(t, simSeed(t), opts, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		cl := c.clients[0]
		for range rounds {
			away := c.nodes[c.rng.IntN(len(c.nodes))]
			_, a := away.running()
			_, has, _ := a.replica.Bounds()
			c.h.note("%s is away", away.name)
			away.kill()
			c.await("the others have deleted what it has not got", func() bool {
				for range 10 {
					cl.append(c.others(away)[0], 4, nil, 2*time.Second)
				}
				time.Sleep(2 * time.Second) // retention is not in a hurry
				for _, o := range c.others(away) {
					if _, a := o.running(); a == nil {
						return false
					} else if first, _, _ := a.replica.Bounds(); first <= has {
						return false
					}
				}
				return true
			})
			away.start()
			for range 6 {
				time.Sleep(millis(c.rng, 200))
				c.net.Reset(away.name)
				if c.rng.IntN(4) == 0 {
					c.h.note("%s loses its power", away.name)
					away.power(c.rng, vfstest.Survival(c.rng.IntN(3)))
					away.start()
				}
			}
			c.awaitReady(c.nodes...)
		}
		c.auditFrom()
	})
}

// auditFrom is audit for logs that do not begin at 0 any more.
func (c *simCluster) auditFrom() {
	c.forgets = true
	auditor := c.extra()
	defer auditor.close()
	if auditor.insist(c.nodes) == nil || !c.awaitReady(c.nodes...) {
		return
	}
	var all []string
	for _, n := range c.nodes {
		c.await(n.name+" can be read from its beginning", func() bool {
			r := auditor.read(n, simRead{client: auditor.id, node: n.place(), linear: true}, client.ConsumeOptions{Linearizable: true})
			if r.why == "" && len(r.records) > 0 {
				all = append(all, fmt.Sprint(r.records[len(r.records)-1]))
				return true
			}
			return false
		})
	}
	if len(slices.Compact(all)) != 1 {
		c.t.Errorf("(h) the logs end with %s", strings.Join(all, ", "))
	}
}

// TestSimRegistry: whatever the registry says, or does not, and whoever is away
// at the same time, no node is removed: three are what was asked for.
func TestSimRegistry(t *testing.T) {
	t.Parallel()
	rounds := simRounds(t, 30)
	opts := simOptions{clients: 3, registry: true, tune: func(_ *simNode, cfg *config.Config) {
		cfg.Membership.LeftAfter, cfg.Membership.DeadAfter, cfg.Membership.CleanupDead = 3*time.Second, 10*time.Second, true
	}}
	simulate(t, simSeed(t), opts, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		for _, cl := range c.clients {
			cl.limit, cl.think = 3*rounds, time.Second
		}
		c.work(func() {
			for range rounds {
				what, end := c.loseRegistry(c.rng)
				c.h.note("the registry: %s", what)
				n := c.victim(c.rng)
				switch c.rng.IntN(4) {
				case 0:
					c.h.note("%s is isolated", n.name)
					c.net.Isolate(n.name)
				case 1:
					c.h.note("%s loses its power", n.name)
					n.power(c.rng, vfstest.None)
					if c.rng.IntN(2) == 0 {
						n.start()
					}
				}
				time.Sleep(millis(c.rng, 15000))
				if end != nil {
					end()
				}
				c.net.Heal()
				n.back()
				if c.rng.IntN(2) == 0 {
					c.awaitReady(c.nodes...)
				}
			}
		})
		c.mend()
		c.awaitGroup(c.nodes...)
		c.audit()
	})
}

// TestSimTooMuchDamage: two copies of three are damaged. Nobody begins anew
// then: what is left, in all three, is all there is.
func TestSimTooMuchDamage(t *testing.T) {
	t.Parallel()
	for _, registry := range []bool{false, true} {
		t.Run(fmt.Sprintf("registry %v", registry), func(t *testing.T) {
			t.Parallel()
			simulate(t, 1, simOptions{registry: registry}, func(c *simCluster) {
				c.awaitReady(c.nodes...)
				cl := c.extra()
				defer cl.close()
				for range 20 {
					cl.append(c.nodes[0], 4, nil, 2*time.Second)
				}
				c.powerAll(c.rng, vfstest.None, c.nodes)
				const file = "/data/logs/default/CURRENT"
				before := map[*simNode]string{}
				var whole []byte
				for _, n := range c.nodes {
					before[n] = n.id()
					if n == c.nodes[2] {
						break
					}
					if err := n.mem.Mutate(file, func(b []byte) []byte {
						whole = slices.Clone(b)
						b[len(b)/2] ^= 4
						return b
					}); err != nil {
						t.Fatal(err)
					}
				}
				for _, n := range c.nodes {
					n.start()
				}
				time.Sleep(simPatience)
				for _, n := range c.nodes {
					if n.id() != before[n] {
						t.Errorf("%s began anew, with nobody to get the log from", n.name)
					}
				}
				// Somebody restores one of the two.
				c.nodes[1].shutdown()
				if err := c.nodes[1].mem.Mutate(file, func([]byte) []byte { return whole }); err != nil {
					t.Fatal(err)
				}
				c.nodes[1].start()
				c.awaitReady(c.nodes...)
				c.awaitGroup(c.nodes...)
				c.audit()
			})
		})
	}
}
