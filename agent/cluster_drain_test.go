package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/diurnalog/diurna/rpc/client"
)

// TestClusterDrain: the leader is asked to end, by SIGTERM, under load. It hands
// leadership over, answers what it was given, leaves Consul's catalog, exits 0,
// and is a voter when it is back. Clients with their defaults see no error, and a
// reader misses nothing.
func TestClusterDrain(t *testing.T) {
	t.Parallel()
	c := startNodes(t, 3, "")
	c.servers(t, "three nodes vote", healthy(3))
	for round := range 3 {
		leader := c.leader(t)
		// The leader first: what is under way is under way there.
		addresses := append([]string{leader.listen}, slices.DeleteFunc(c.addresses(), func(a string) bool { return a == leader.listen })...)
		all := strings.Join(addresses, ",")
		var producers []*steady
		for i := range 8 {
			s := newSteady(t, fmt.Sprintf("r%d-p%d", round, i), nil)
			s.clients = []*client.Client{dialWith(t, all)}
			producers = append(producers, s)
		}
		before := consume(t, patient(t, leader.listen), 0)
		l := loadOf(t, producers)
		ctx, cancel := context.WithCancel(t.Context())
		seen, followed := uint64(0), make(chan error, 1)
		go func() { followed <- follow(ctx, all, &seen) }()
		// Not before there is something under way.
		c.servers(t, "records come in", func([]client.Server) bool {
			list, err := serversOf(ctx, leader.listen)
			if err != nil {
				return false
			}
			return slices.ContainsFunc(list, func(s client.Server) bool { return s.HighWatermark > uint64(len(before)+100) })
		})

		leader.terminate(t) // wants exit 0
		// One that hands over follows whom it made leader before it ends.
		lines, handedOver := leader.log(t), false
		i := slices.IndexFunc(lines, func(l logLine) bool { return l.message() == "stopping" })
		for _, l := range lines[i:] {
			handedOver = handedOver || l.message() == "entering follower state"
			if m := l.message(); strings.Contains(m, "could not be handed over") || strings.Contains(m, "cut off") || strings.Contains(m, "deregister") {
				t.Errorf("%s says %v", leader.name, l)
			}
		}
		if !handedOver {
			t.Errorf("%s ended as the leader: the others had to notice", leader.name)
		}
		others := slices.DeleteFunc(slices.Clone(c.nodes), func(m *member) bool { return m == leader })
		c.awaitDNS(t, "diurna", ports(others...))
		c.servers(t, "two lead on, and it is still a voter", func(servers []client.Server) bool {
			return healthy(3)(servers) && slices.ContainsFunc(servers, func(s client.Server) bool {
				return s.Leader && s.Address != leader.listen
			})
		})
		c.launch(t, leader)
		leader.awaitReady(t)
		l.stop(t, c)
		for _, s := range producers {
			if s.refused > 0 || len(s.unknown) > 0 {
				t.Errorf("%s: %d errors, %d records in doubt", s.name, s.refused, len(s.unknown))
			}
		}
		cancel()
		if err := <-followed; err != nil || seen <= uint64(len(before)) {
			t.Errorf("the reader has seen %d records and ended: %v", seen, err)
		}
	}
}
