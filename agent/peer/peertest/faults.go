package peertest

import (
	"maps"
	"net"
	"slices"
	"syscall"
	"time"
)

// SetLinks sets how all hosts reach one another, wherever SetLink has not been
// used, now and in the future. What is under way already is not affected.
func (n *Net) SetLinks(l Link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.common = l
}

// SetLink sets how the packets of one host reach another, in that direction.
func (n *Net) SetLink(from, to string, l Link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.links[way{from, to}] = l
}

// Calm makes every link perfect again. Blocked ones stay blocked: see Heal.
func (n *Net) Calm() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.common = Link{}
	clear(n.links)
	clear(n.busy)
}

// SetPatience sets how long the two sides of a connection that cannot reach each
// other keep it; 0 is for ever. It counts from the next time they cannot.
func (n *Net) SetPatience(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.patience = d
}

// SetResetOnHeal sets the probability with which a connection that was cut is
// reset when the way is free again.
func (n *Net) SetResetOnHeal(p float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.resetOnHeal = p
}

// Block lets packets from one host to another vanish.
func (n *Net) Block(from, to string) {
	n.change(func() { n.blocked[way{from, to}] = true })
}

// Unblock takes back what Block, OneWay or Partition did to one direction.
func (n *Net) Unblock(from, to string) {
	n.change(func() { delete(n.blocked, way{from, to}) })
}

// OneWay lets packets pass from one host to another, and none back.
func (n *Net) OneWay(from, to string) {
	n.change(func() {
		delete(n.blocked, way{from, to})
		n.blocked[way{to, from}] = true
	})
}

// Partition cuts every host of a group off from those of the other groups. Hosts
// in no group, and what was blocked before, are left as they are. A host may be
// in several groups, and then reaches them all: a bridge.
func (n *Net) Partition(groups ...[]string) {
	together := func(a, b string) bool {
		return slices.ContainsFunc(groups, func(g []string) bool { return slices.Contains(g, a) && slices.Contains(g, b) })
	}
	n.change(func() {
		for _, g := range groups {
			for _, a := range g {
				for _, b := range slices.Concat(groups...) {
					if !together(a, b) {
						n.blocked[way{a, b}] = true
						n.blocked[way{b, a}] = true
					}
				}
			}
		}
	})
}

// Isolate cuts a host off from all others, those to come as well.
func (n *Net) Isolate(host string) {
	n.change(func() { n.isolated[host] = true })
}

// Heal takes back every Block, OneWay, Partition and Isolate. Paused hosts stay
// paused.
func (n *Net) Heal() {
	n.change(func() {
		clear(n.blocked)
		clear(n.isolated)
	})
}

// Pause stops everything to and from a host, as if its machine stood still. What
// runs there goes on running, but for its network.
func (n *Net) Pause(host string) {
	n.change(func() { n.paused[host] = true })
}

// Resume takes back Pause.
func (n *Net) Resume(host string) {
	n.change(func() { delete(n.paused, host) })
}

// Refuse sets whether dialling a host is refused although it listens.
func (n *Net) Refuse(host string, refuse bool) {
	n.change(func() { n.refusing[host] = refuse })
}

// Reset breaks every connection of a host, on both sides, at once, even those to
// hosts that it cannot reach.
func (n *Net) Reset(host string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.reset(host)
}

// ResetBetween breaks every connection between two hosts, as Reset does.
func (n *Net) ResetBetween(a, b string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.open() {
		if p.there == (way{a, b}) || p.there == (way{b, a}) {
			p.fail(syscall.ECONNRESET)
		}
	}
}

// Crash is Reset, and closes the host's listeners, so that what runs there can
// be started again at the same addresses without having been stopped.
func (n *Net) Crash(host string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, address := range slices.Sorted(maps.Keys(n.listeners)) {
		if name, _, err := net.SplitHostPort(address); err == nil && name == host {
			n.listeners[address].end()
		}
	}
	n.reset(host)
}

func (n *Net) reset(host string) {
	for _, p := range n.open() {
		if p.there.from == host || p.there.to == host {
			p.fail(syscall.ECONNRESET)
		}
	}
}

// Conns returns how many connections between two hosts are open, whoever dialled.
func (n *Net) Conns(a, b string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	count := 0
	for _, p := range n.conns {
		if p.there == (way{a, b}) || p.there == (way{b, a}) {
			count++
		}
	}
	return count
}

// Reachable tells whether packets pass from one host to another now.
func (n *Net) Reachable(from, to string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.cut(way{from, to})
}

// change changes what is cut, and lets connections and dials follow.
func (n *Net) change(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
	if n.closed {
		return
	}
	for _, p := range n.open() {
		p.follow()
	}
	n.wake()
}
