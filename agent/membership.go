package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/logstore/replica"
)

// group is what membership needs of the replica.
type group interface {
	Servers() ([]replica.Server, error)
	Tombstones() map[string]replica.Tombstone
	AddNonvoter(ctx context.Context, id, address string) error
	RemoveServer(ctx context.Context, id string) error
}

// membership keeps the Raft group in line with what nodes there are. It runs on
// every node, learning where the others are; on the leader it also adds those
// that wait, follows those that move, and removes those that ask for it. When
// a node that is merely gone may be removed, autopilot decides, see witness.
//
// The registry is never believed by itself. It says where to knock; who lives
// there, and in what state, the node has to say itself.
type membership struct {
	group      group
	neighbours *neighbours
	probe      probe
	data       *dataDir
	self       func() discovery.Node
	logger     hclog.Logger
	// fail ends the node.
	fail func(error)
	// supersedes is the id of the cluster that ours was recovered from.
	supersedes func() string
	// recorded: the registry's record of the founding is history.
	recorded bool

	mu sync.Mutex
	// members is what was seen of the group's servers, beside Raft, by id.
	members map[string]replica.Member
	refused map[string]string // what was logged last, by node id
}

const (
	// reconcileInterval is how often everything is looked at again; changes in
	// the registry are looked at at once.
	reconcileInterval = 5 * time.Second
	changeTimeout     = 30 * time.Second
)

// run works until ctx ends. kick asks for another look, as when leadership
// changes.
func (m *membership) run(ctx context.Context, kick <-chan struct{}) {
	for {
		changed := m.neighbours.discovery.Changed()
		m.reconcile(ctx)
		timer := time.NewTimer(reconcileInterval + rand.N(reconcileInterval/5))
		select {
		case <-changed:
		case <-kick:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

func (m *membership) reconcile(ctx context.Context) {
	servers, err := m.group.Servers()
	if err != nil {
		return // it is stopping
	}
	self := m.self()
	nodes := m.neighbours.known(self)
	for _, s := range servers {
		if s.ID != self.ID && s.Address != nowhere(s.ID) && !slices.ContainsFunc(nodes, func(n discovery.Node) bool { return n.Address == s.Address }) {
			nodes = append(nodes, discovery.Node{Address: s.Address})
		}
	}
	answers := ask(ctx, m.probe, nodes)
	if ctx.Err() != nil {
		return
	}
	if err := m.superseded(answers, servers); err != nil {
		m.fail(err)
		return
	}
	answers = m.ours(answers)
	m.neighbours.remember(answers)
	m.neighbours.forget(servers)
	m.watch(servers, answers)
	if !slices.ContainsFunc(servers, func(s replica.Server) bool { return s.Leader && s.ID == self.ID }) {
		m.recorded = false
		return
	}
	if record := m.neighbours.discovery.Bootstrap(); record != nil && !m.recorded {
		within, cancel := context.WithTimeout(ctx, changeTimeout)
		if err := closeRecord(within, record, m.data.identity().cluster, m.supersedes(), servers); err != nil {
			m.complain("record", "cannot mark the registry's record of the founding as done; trying again", err)
		} else {
			m.recorded = true
		}
		cancel()
	}
	m.settleSelf(ctx, self, servers)
	m.settleAll(ctx, answers)
}

// settleAll does what the answers ask of the leader, one after another.
func (m *membership) settleAll(ctx context.Context, answers []answer) {
	for _, a := range answers {
		servers, err := m.group.Servers() // as the one before has left them
		if err != nil {
			return // it is stopping
		}
		m.settle(ctx, a, answers, servers)
	}
}

// settleSelf notes where the leader itself is: a node that was restored begins
// with no address, and nobody else can note it as long as it is alone.
func (m *membership) settleSelf(ctx context.Context, self discovery.Node, servers []replica.Server) {
	at := slices.IndexFunc(servers, func(v replica.Server) bool { return v.ID == self.ID })
	if at < 0 || servers[at].Address == self.Address || slices.ContainsFunc(servers, func(v replica.Server) bool { return v.Address == self.Address }) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	m.change(self.ID, "cannot note where this node is; trying again", m.group.AddNonvoter(ctx, self.ID, self.Address))
}

// ErrSuperseded: the cluster goes on without this node, under another id.
var ErrSuperseded = errors.New("the cluster was recovered without this node")

// superseded tells, as an error, whether this node is left over from a cluster
// that an operator has had go on elsewhere, without a quorum. With others that
// are left over it might be a quorum again, and take records that nobody will ever
// find. While somebody leads our cluster it has not lost its quorum: then it is
// the other one that should not be.
func (m *membership) superseded(answers []answer, servers []replica.Server) error {
	cluster := m.data.identity().cluster
	led := slices.ContainsFunc(servers, func(s replica.Server) bool { return s.Leader })
	var heir *answer
	for i := range answers {
		a := &answers[i]
		switch s := &a.status; {
		case a.err != nil || cluster == "":
		case s.ClusterID == cluster:
			led = led || s.LeaderID != ""
		case s.Supersedes == cluster && s.Cluster == m.self().Cluster && s.State == string(discovery.Member):
			heir = a
		}
	}
	switch {
	case heir == nil:
		return nil
	case led:
		m.complain(heir.status.NodeID, "a node says that it goes on for this cluster, which has a leader: it was recovered though the quorum was not lost; stop it", nil, "address", heir.node.Address, "cluster", heir.status.ClusterID)
		return nil
	}
	return fmt.Errorf("%w: it is cluster %s now, of which there is node %s at %s: remove this node's data directory, and start it as a new node", ErrSuperseded, heir.status.ClusterID, heir.status.NodeID, heir.node.Address)
}

// ours drops the answers of nodes that are not of this cluster.
func (m *membership) ours(answers []answer) []answer {
	cluster, name := m.data.identity().cluster, m.self().Cluster
	return slices.DeleteFunc(answers, func(a answer) bool {
		s := a.status
		switch {
		case a.err != nil:
			if a.node.ID != "" {
				m.complain(a.node.ID, "a listed node does not answer, or is another; not counting on it", a.err)
			}
		case s.Cluster != name:
			m.complain(s.NodeID, "a node has another cluster.name; leaving it alone", nil, "address", a.node.Address, "cluster", s.Cluster)
		case s.ClusterID != "" && cluster != "" && s.ClusterID != cluster:
			m.complain(s.NodeID, "a node belongs to another cluster; leaving it alone", nil, "address", a.node.Address, "cluster", s.ClusterID)
		default:
			return false
		}
		return true
	})
}

// settle does what one node's answer asks of the leader.
func (m *membership) settle(ctx context.Context, a answer, answers []answer, servers []replica.Server) {
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	s := a.status
	at := slices.IndexFunc(servers, func(v replica.Server) bool { return v.ID == s.NodeID })
	leaving := s.State == string(discovery.Leaving)
	switch {
	case at >= 0 && leaving:
		m.logger.Info("a node asks to leave", "id", s.NodeID, "address", a.node.Address)
		m.change(s.NodeID, "cannot let a node leave; trying again", m.group.RemoveServer(ctx, s.NodeID))
		return
	case leaving, s.State == string(discovery.Removed):
		return
	case at < 0 && m.removed(s.NodeID):
		m.complain(s.NodeID, "a node that was removed is back; `diurna operator raft add-peer` takes it in again", nil, "address", a.node.Address)
		return
	case at >= 0 && servers[at].Address == a.node.Address:
		m.forget(s.NodeID)
		m.retire(ctx, a, servers)
		return
	}
	// New, or moved. Raft has no two servers at one address: whoever is listed
	// there has moved, or is no more.
	for _, other := range servers {
		if other.Address != a.node.Address || other.ID == s.NodeID {
			continue
		}
		moved := slices.IndexFunc(answers, func(b answer) bool { return b.status.NodeID == other.ID })
		if moved >= 0 || at >= 0 {
			// That a member lives there now does not say that the other is no more:
			// all may have moved, and the other not be up yet. Where they have exchanged
			// addresses, its new one is listed too, and noting it would remove who is
			// listed there. In both cases it is nowhere until its own turn: nobody needs
			// Raft's addresses to reach it.
			to := nowhere(other.ID)
			if moved >= 0 && !slices.ContainsFunc(servers, func(v replica.Server) bool { return v.Address == answers[moved].node.Address }) {
				to = answers[moved].node.Address
			}
			if !m.change(other.ID, "cannot note where a node has moved; trying again", m.group.AddNonvoter(ctx, other.ID, to)) {
				return
			}
			continue
		}
		if h := other.Health; h == nil || h.Healthy {
			return // Raft reaches it: it has moved, and will be found
		}
		m.logger.Warn("another node lives where this one was; removing it", "id", other.ID, "address", other.Address, "now", s.NodeID)
		if !m.change(other.ID, "cannot remove a node that another has replaced; trying again", m.group.RemoveServer(ctx, other.ID)) {
			return
		}
	}
	if at >= 0 {
		m.logger.Info("a node has moved", "id", s.NodeID, "from", servers[at].Address, "to", a.node.Address)
	} else {
		m.logger.Info("adding a node; it gets a vote once it has caught up", "id", s.NodeID, "address", a.node.Address)
	}
	m.change(s.NodeID, "cannot add a node; trying again", m.group.AddNonvoter(ctx, s.NodeID, a.node.Address))
}

// nowhere stands in Raft's configuration for the address of a node that has yet to
// say where it is. No two nodes may have one address there, and .invalid never
// resolves.
func nowhere(id string) string { return id + ".invalid:1" }

// retire removes the ids that a voter had before: nobody will come back under
// them.
func (m *membership) retire(ctx context.Context, a answer, servers []replica.Server) {
	for _, v := range servers {
		if v.ID == a.status.NodeID && !v.Voter {
			return
		}
	}
	for _, v := range servers {
		if slices.Contains(a.status.FormerIDs, v.ID) {
			m.logger.Info("removing the former id of a node that had to begin anew", "id", a.status.NodeID, "was", v.ID)
			m.change(v.ID, "cannot remove a node's former id; trying again", m.group.RemoveServer(ctx, v.ID))
		}
	}
}

func (m *membership) change(id, what string, err error) bool {
	var elsewhere *replica.NotLeaderError
	switch {
	case err == nil:
		m.forget(id)
		return true
	case errors.Is(err, replica.ErrNoLeader), errors.As(err, &elsewhere), errors.Is(err, replica.ErrClosed):
		return false // leadership is on its way, here or away; there is a look when it has arrived
	}
	m.complain(id, what, err)
	return false
}

// complain logs something once, until it changes or forget.
func (m *membership) complain(about, what string, err error, more ...any) {
	text := what
	if err != nil {
		text += err.Error()
		more = append(more, "error", err)
	}
	m.mu.Lock()
	said := m.refused[about] == text
	if m.refused == nil || len(m.refused) > 1000 {
		m.refused = make(map[string]string)
	}
	m.refused[about] = text
	m.mu.Unlock()
	if !said {
		m.logger.Warn(what, append([]any{"about", about}, more...)...)
	}
}

func (m *membership) forget(about string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.refused, about)
}

// removed tells whether a node was taken out of the group, and not taken in
// again.
func (m *membership) removed(id string) bool {
	_, ok := m.group.Tombstones()[id]
	return ok
}

// watch notes what is known of the members beside Raft: which of them the
// catalog lacks, and since when. A catalog that is not trusted says nothing:
// then what was counted is forgotten.
func (m *membership) watch(servers []replica.Server, answers []answer) {
	snapshot := m.neighbours.discovery.Latest()
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.members
	m.members = make(map[string]replica.Member)
	for _, s := range servers {
		member := replica.Member{Address: s.Address, Trusted: snapshot.Trusted, Critical: true}
		listed, ok := snapshot.Find(s.ID)
		switch {
		case ok:
			member.Version, member.Critical = listed.Version, listed.Critical
		case snapshot.Trusted:
			member.AbsentSince = before[s.ID].AbsentSince
			if member.AbsentSince.IsZero() {
				member.AbsentSince = time.Now()
			}
		}
		for _, a := range answers {
			if a.status.NodeID == s.ID {
				member.Version = a.status.Version
				member.Left = a.status.State == string(discovery.Leaving)
			}
		}
		m.members[s.ID] = member
	}
}

// witness tells autopilot what is known of the members beside Raft.
func (m *membership) witness() map[string]replica.Member {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.members)
}
