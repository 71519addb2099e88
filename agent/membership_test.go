package agent

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/rpc"
)

// fakeGroup has Raft's rule that no two servers have one address, and the
// replica's way to keep it.
type fakeGroup struct {
	servers []replica.Server
	removed []string
}

func (g *fakeGroup) Servers() ([]replica.Server, error)       { return slices.Clone(g.servers), nil }
func (g *fakeGroup) Tombstones() map[string]replica.Tombstone { return nil }

func (g *fakeGroup) AddNonvoter(ctx context.Context, id, address string) error {
	for _, s := range slices.Clone(g.servers) {
		if s.Address == address && s.ID != id {
			if err := g.RemoveServer(ctx, s.ID); err != nil {
				return err
			}
		}
	}
	at := slices.IndexFunc(g.servers, func(s replica.Server) bool { return s.ID == id })
	if at < 0 {
		g.servers = append(g.servers, replica.Server{ID: id, Address: address})
		return nil
	}
	g.servers[at].Address = address
	return nil
}

func (g *fakeGroup) RemoveServer(_ context.Context, id string) error {
	g.removed = append(g.removed, id)
	g.servers = slices.DeleteFunc(g.servers, func(s replica.Server) bool { return s.ID == id })
	return nil
}

func (g *fakeGroup) addresses() (list []string) {
	for _, s := range g.servers {
		list = append(list, s.Address)
	}
	return list
}

// groupOf has voters a, b, c at addresses 0, 1, 2, the first of them the leader.
// Those that are unreachable are unhealthy.
func groupOf(unreachable ...string) *fakeGroup {
	g := &fakeGroup{}
	for i, id := range []string{"a", "b", "c"} {
		health := &replica.ServerHealth{Healthy: !slices.Contains(unreachable, id)}
		g.servers = append(g.servers, replica.Server{ID: id, Address: fmt.Sprint(i), Voter: true, Leader: i == 0, Health: health})
	}
	return g
}

func answersAt(ids []string, address func(id string) string) (answers []answer) {
	for _, id := range ids {
		answers = append(answers, answer{
			node:   discovery.Node{ID: id, Address: address(id)},
			status: rpc.NodeStatus{NodeID: id, State: string(discovery.Member)},
		})
	}
	return answers
}

func permutations(of []string) [][]string {
	if len(of) == 0 {
		return [][]string{nil}
	}
	var all [][]string
	for i := range of {
		rest := slices.Delete(slices.Clone(of), i, i+1)
		for _, p := range permutations(rest) {
			all = append(all, append([]string{of[i]}, p...))
		}
	}
	return all
}

// TestExchangedAddresses: nodes that come back at one another's addresses, as
// containers do, stay members, whatever the order in which they answer, and
// although the others do not know them by their new addresses.
func TestExchangedAddresses(t *testing.T) {
	ids := []string{"a", "b", "c"}
	for _, now := range permutations(ids) { // who lives at 0, 1, 2
		for _, order := range permutations(ids) {
			g := groupOf("b", "c")
			m := &membership{group: g, logger: hclog.NewNullLogger()}
			address := func(id string) string { return fmt.Sprint(slices.Index(now, id)) }
			answers := answersAt(order, address)
			for range 2 {
				m.settleAll(t.Context(), answers)
			}
			want := []string{address("a"), address("b"), address("c")}
			if len(g.removed) > 0 || !slices.Equal(g.addresses(), want) {
				t.Errorf("%v at 0, 1 and 2, answering as %v: removed %v, they are listed at %v, want %v", now, order, g.removed, g.addresses(), want)
			}
		}
	}
}

// TestAddressOfOneThatIsDown: a member that lives where another one was does not
// have that one removed, which may be on its way up. A new node does: that is how
// a lost disk is replaced.
func TestAddressOfOneThatIsDown(t *testing.T) {
	g := groupOf("c")
	m := &membership{group: g, logger: hclog.NewNullLogger()}
	m.settleAll(t.Context(), answersAt([]string{"a", "b"}, func(id string) string { return map[string]string{"a": "0", "b": "2"}[id] }))
	if len(g.removed) > 0 || !slices.Equal(g.addresses(), []string{"0", "2", nowhere("c")}) {
		t.Errorf("removed %v, listed at %v", g.removed, g.addresses())
	}
	m.settleAll(t.Context(), answersAt([]string{"a", "b", "c"}, func(id string) string { return map[string]string{"a": "0", "b": "2", "c": "1"}[id] }))
	if len(g.removed) > 0 || !slices.Equal(g.addresses(), []string{"0", "2", "1"}) {
		t.Errorf("with all of them: removed %v, listed at %v", g.removed, g.addresses())
	}

	g = groupOf("c")
	m = &membership{group: g, logger: hclog.NewNullLogger()}
	m.settleAll(t.Context(), answersAt([]string{"a", "b", "d"}, func(id string) string { return map[string]string{"a": "0", "b": "1", "d": "2"}[id] }))
	if !slices.Equal(g.removed, []string{"c"}) || !slices.Equal(g.addresses(), []string{"0", "1", "2"}) {
		t.Errorf("a new one: removed %v, listed at %v", g.removed, g.addresses())
	}
}
