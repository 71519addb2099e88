package agent

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/diurnalog/diurna/agent/peer/peertest"
	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// fault is something that goes wrong for a while. begin does it and returns
// what takes it back; nil where there is nothing to take back, or mend does it.
// Both run in one goroutine with all others, so that they follow one another in
// the order of the schedule.
type fault struct {
	name  string
	begin func(c *simCluster, rng *rand.Rand) (what string, end func())
	// alone: it happens at most once in a history, because a second one might
	// take away more than what the cluster promises to survive.
	alone bool
}

// What is alone has one name.
const lossOfData = "a copy is lost"

var simFaults = []fault{
	{name: "isolate", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n := c.victim(rng)
		c.net.Isolate(n.name)
		return n.name, c.net.Heal
	}},
	// Clients still reach it: what they get from it must not be wrong.
	{name: "cut off from peers", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n := c.victim(rng)
		c.cutOff(n)
		return n.name, func() { c.join(n) }
	}},
	{name: "partition", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		hosts := names(c.nodes)
		for _, cl := range c.clients {
			hosts = append(hosts, cl.host)
		}
		rng.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
		k := 1 + rng.IntN(len(hosts)-1)
		c.net.Partition(hosts[:k], hosts[k:])
		return fmt.Sprint(hosts[:k], " from ", hosts[k:]), c.net.Heal
	}},
	{name: "one way", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		a, b := c.pair(rng)
		c.net.Block(a.name, b.name)
		return a.name + " does not reach " + b.name, func() { c.net.Unblock(a.name, b.name) }
	}},
	{name: "flap", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		a, b := c.pair(rng)
		for range 5 + rng.IntN(10) {
			c.net.Block(a.name, b.name)
			c.net.Block(b.name, a.name)
			time.Sleep(200 * time.Millisecond)
			c.net.Unblock(a.name, b.name)
			c.net.Unblock(b.name, a.name)
			time.Sleep(200 * time.Millisecond)
		}
		return a.name + " and " + b.name, nil
	}},
	{name: "slow network", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		l := peertest.Link{Delay: millis(rng, 100), Jitter: millis(rng, 300)}
		c.net.SetLinks(l)
		return fmt.Sprint(l.Delay, " and up to ", l.Jitter), c.calm
	}},
	{name: "breaking connections", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		l := peertest.Link{Delay: millis(rng, 10), Reset: 0.002 + 0.03*rng.Float64()}
		c.net.SetLinks(l)
		return fmt.Sprintf("%.3f of the writes", l.Reset), c.calm
	}},
	{name: "reset", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n := c.victim(rng)
		c.net.Reset(n.name)
		return n.name, nil
	}},
	{name: "pause", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n := c.victim(rng)
		c.net.Pause(n.name)
		p, _ := n.running()
		if p != nil {
			p.disk.pause()
		}
		return n.name, func() {
			c.net.Resume(n.name)
			if p != nil {
				p.disk.set(nil, nil)
			}
		}
	}},
	{name: "kill", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n := c.victim(rng)
		n.kill()
		return n.name, n.back
	}},
	{name: "power", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n, survive := c.victim(rng), vfstest.Survival(rng.IntN(3))
		n.power(rng, survive)
		return fmt.Sprintf("%s, of what was not synced %v survives", n.name, survive), n.back
	}},
	{name: "power everywhere", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		survive := vfstest.Survival(rng.IntN(3))
		c.powerAll(rng, survive, c.nodes)
		return fmt.Sprintf("of what was not synced %v survives", survive), func() {
			for _, n := range c.nodes {
				n.back()
			}
		}
	}},
	{name: "restart", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n := c.victim(rng)
		n.shutdown()
		return n.name, n.back
	}},
	{name: "move", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n := c.victim(rng)
		n.shutdown()
		if c.registry != nil {
			n.move()
		}
		return n.name + " to " + n.address(), n.back
	}},
	{name: "slow disk", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n, by := c.victim(rng), millis(rng, 400)
		p, _ := n.running()
		if p == nil {
			return n.name + " does not run", nil
		}
		p.disk.slow(by)
		return fmt.Sprint(n.name, ": ", by, " for each sync"), func() { p.disk.set(nil, nil) }
	}},
	{name: "hanging disk", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n := c.victim(rng)
		p, _ := n.running()
		if p == nil {
			return n.name + " does not run", nil
		}
		p.disk.stall()
		return n.name, func() { p.disk.set(nil, nil); n.back() }
	}},
	{name: "failing disk", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n, kind := c.victim(rng), []string{"sync", "write", "syncdir", "create", "rename"}[rng.IntN(5)]
		p, _ := n.running()
		if p == nil {
			return n.name + " does not run", nil
		}
		p.disk.failOnce(kind)
		return n.name + ": one " + kind, func() { p.disk.set(nil, nil); n.back() }
	}},
	{name: "full disk", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n := c.victim(rng)
		n.mem.SetCapacity(n.mem.Used() + rng.Int64N(64<<10))
		return n.name, func() { n.mem.SetCapacity(-1); n.back() }
	}},
	{name: "no registry", begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		return c.loseRegistry(rng)
	}},
	{name: lossOfData, alone: true, begin: func(c *simCluster, rng *rand.Rand) (string, func()) {
		n := c.nodes[rng.IntN(len(c.nodes))]
		// Not where it was killed: what was written within the last second, and
		// rots before the node is started again, is taken for an unfinished write.
		// See docs/GUARANTEES.md.
		if rng.IntN(3) == 0 || !n.shutdown() {
			n.kill()
			n.mem = vfstest.New()
			return n.name + " gets a new disk", n.back
		}
		where, err := n.rot(rng, "/data/logs", 1+rng.IntN(3))
		if err != nil {
			c.t.Error(err)
		}
		return fmt.Sprint(n.name, ": ", strings.Join(where, ", ")), n.back
	}},
}

func millis(rng *rand.Rand, most int) time.Duration {
	return time.Duration(1+rng.IntN(most)) * time.Millisecond
}

// loseRegistry does one of the things to it that registries do.
func (c *simCluster) loseRegistry(rng *rand.Rand) (what string, end func()) {
	n := c.victim(rng)
	p, _ := n.running()
	h := p.hears()
	switch at := rng.IntN(6); {
	case c.registry == nil:
		return "there is none", nil
	case at == 0:
		c.registry.SetDown(true)
		return "it is down", func() { c.registry.SetDown(false) }
	case at == 1:
		c.registry.Wipe()
		return "it is wiped", nil
	case h == nil:
		return n.name + " does not hear it", nil
	case at == 2:
		h.SetDown(true)
		return n.name + " does not reach it", func() { h.SetDown(false) }
	case at == 3:
		h.SetStale(true)
		return n.name + " hears old things", func() { h.SetStale(false) }
	case at == 4:
		h.SetEmpty(true)
		return n.name + " hears of nobody", func() { h.SetEmpty(false) }
	default:
		h.SetHidden(func(o discovery.Node) bool { return o.Name != n.name })
		return n.name + " hears of itself only", func() { h.SetHidden(nil) }
	}
}

// victim is the leader as often as not.
func (c *simCluster) victim(rng *rand.Rand) *simNode {
	at := rng.IntN(2 * len(c.nodes))
	if n := c.leader(); at >= len(c.nodes) && n != nil {
		return n
	}
	return c.nodes[at%len(c.nodes)]
}

func (c *simCluster) pair(rng *rand.Rand) (a, b *simNode) {
	at := rng.Perm(len(c.nodes))
	return c.nodes[at[0]], c.nodes[at[1]]
}

// cutOff cuts a node off from its peers, but not from clients.
func (c *simCluster) cutOff(n *simNode) {
	for _, o := range c.others(n) {
		c.net.Block(n.name, o.name)
		c.net.Block(o.name, n.name)
	}
}

// join takes back cutOff.
func (c *simCluster) join(n *simNode) {
	for _, o := range c.others(n) {
		c.net.Unblock(n.name, o.name)
		c.net.Unblock(o.name, n.name)
	}
}

// powerAll takes the power from several nodes at one moment.
func (c *simCluster) powerAll(rng *rand.Rand, survive vfstest.Survival, nodes []*simNode) {
	for _, n := range nodes {
		if p, _ := n.running(); p != nil {
			p.dying.Do(func() {
				p.wire.cut()
				p.disk.cut()
				close(p.died)
			})
		}
	}
	for _, n := range nodes {
		n.power(rng, survive)
	}
}

// back starts the node if it does not run.
func (n *simNode) back() {
	p, _ := n.running()
	if p != nil && p.dead() {
		n.end()
		p = nil
	}
	if p == nil {
		n.start()
	}
}

// step is one thing to do at one time.
type step struct {
	at time.Duration
	do func()
}

// mix does faults at random, several at a time, for so long. What was drawn is
// noted, so that a seed shows the same schedule every time.
func (c *simCluster) mix(count int, within time.Duration, kinds []fault) {
	var steps []step
	used := map[string]bool{}
	for range count {
		f := kinds[c.rng.IntN(len(kinds))]
		if f.alone && used[f.name] {
			continue
		}
		used[f.name] = true
		rng := rand.New(rand.NewPCG(c.rng.Uint64(), 4))
		at := time.Duration(c.rng.Int64N(int64(within)))
		lasts := 200*time.Millisecond + time.Duration(c.rng.Int64N(int64(8*time.Second)))
		var end func()
		var what string
		steps = append(steps, step{at, func() {
			c.h.note("%s begins", f.name)
			what, end = f.begin(c, rng)
			c.h.note("%s: %s", f.name, what)
		}}, step{at + lasts, func() {
			if end != nil {
				end()
			}
			c.h.note("%s ends: %s", f.name, what)
		}})
	}
	slices.SortStableFunc(steps, func(a, b step) int { return int(a.at - b.at) })
	begin := time.Now()
	for _, s := range steps {
		time.Sleep(s.at - time.Since(begin))
		s.do()
	}
}
