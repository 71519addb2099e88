// Package discovery tells a node which other nodes there are, and tells them
// about it.
//
// It is the phone book, not the register: who is a voter is decided by Raft
// alone. What is read here may be old, incomplete or wrong, and losing the
// registry altogether changes nothing for nodes that already know each other.
// So a node that is listed is somebody to call and ask, and a node that is not
// listed is gone only where [Snapshot.Trusted] says that the list is complete,
// and even then only if Raft has not heard from it either.
//
// How it is used:
//
//	d, err := consul.New(cfg)         // or discovery.NewStatic(addresses)
//	go func() { ended <- d.Run(ctx) }()
//	d.Announce(discovery.Registration{Node: self, Status: discovery.Passing})
//	for {
//		changed := d.Changed()    // before Latest, or a change is missed
//		s := d.Latest()
//		// call s.Nodes; conclude that somebody left only if s.Trusted
//		select {
//		case <-changed:
//		case <-ctx.Done():
//			return <-ended    // deregistered
//		}
//	}
package discovery

import (
	"context"
	"slices"
	"time"
)

// State is where a node is in its life.
type State string

// The states of a node.
const (
	// Fresh is a node without Raft state: it waits to found a cluster or to be
	// added to one.
	Fresh State = "fresh"
	// Member is a node that has Raft state.
	Member State = "member"
	// Leaving is a node that asks to be taken out of the cluster.
	Leaving State = "leaving"
	// Removed is a node that was taken out and does not come back by itself.
	Removed State = "removed"
)

// Role is what a node is in Raft, as it last said itself: a hint. Where two
// claim to lead, the one with the higher term is more likely right.
type Role string

// The roles of a node.
const (
	NoRole   Role = "" // no Raft yet, or it does not know
	Leader   Role = "leader"
	Follower Role = "follower"
	Nonvoter Role = "nonvoter"
)

// Status is how well a node says it is.
type Status string

// The states of health, as in Consul. A node that is not critical can be
// found by name.
const (
	Passing  Status = "passing"
	Warning  Status = "warning"
	Critical Status = "critical"
)

// Node is one node as the registry knows it. With static discovery only
// Address is known, and perhaps ID.
type Node struct {
	// ID belongs to the node's data: a UUID.
	ID string
	// Name is for people and may change.
	Name string
	// Address is the host:port of the RPC port.
	Address string

	// Cluster is the name of the cluster it is configured for, ClusterID the id
	// of the one it is in, empty until it is in one.
	Cluster   string
	ClusterID string

	State State
	Role  Role
	// Term is the Raft term in which it had Role.
	Term uint64
	// Expect is how many nodes it was told to wait for before a cluster is
	// founded; 0 when it was told nothing.
	Expect int

	Zone    string
	Version string
	// HTTP is the host:port of its HTTP port, empty where others cannot reach it.
	HTTP string

	// Critical says that the registry takes it for unhealthy. It is not part of
	// an announcement: see Registration.Status.
	Critical bool
}

// Snapshot is the registry as last seen. Whoever gets one may keep and change
// it.
type Snapshot struct {
	// Nodes that are registered for our cluster, critical ones too, ourselves
	// among them; sorted by ID, then Address.
	Nodes []Node
	// At is when the registry last answered. Zero: never.
	At time.Time
	// Trusted says that Nodes is complete enough to conclude from it that
	// somebody is absent. It is false before the first answer, from the first
	// failed query until the next answer, when no answer has come for too long,
	// when the answer lacks ourselves or was filtered by permissions, and
	// always with static discovery. Nodes is then the last known list, which is
	// still good for finding somebody to call.
	Trusted bool
	// Why it is not trusted, for people. Empty when it is.
	Why string
}

// Find returns the node with an id.
func (s Snapshot) Find(id string) (Node, bool) {
	i := slices.IndexFunc(s.Nodes, func(n Node) bool { return n.ID == id })
	if i < 0 {
		return Node{}, false
	}
	return s.Nodes[i], true
}

// Same tells whether two snapshots say the same, whenever they were taken.
func (s Snapshot) Same(o Snapshot) bool {
	return s.Trusted == o.Trusted && s.Why == o.Why && slices.Equal(s.Nodes, o.Nodes)
}

// Registration is what a node says about itself.
type Registration struct {
	Node
	// Status of Raft on this node. Empty means Critical.
	Status Status
	// Output explains Status in a line for people.
	Output string
}

// Discovery finds nodes and makes this one findable. Its methods may be called
// from several goroutines.
type Discovery interface {
	// Run registers what is announced and watches the registry until ctx ends;
	// then it deregisters, which takes a few seconds at most, and returns. Only
	// an unclean end is an error: a registry that is down is tried again and
	// again, and shows in Latest. It owns its goroutines and is called once.
	Run(ctx context.Context) error
	// Announce says what is to be registered from now on. The last one counts:
	// it is put in place soon, and again whenever the registry forgets it. An
	// announcement with another id replaces the earlier registration. It never
	// blocks. Nothing is registered before the first one.
	Announce(Registration)
	// Latest returns the registry as last seen. It never blocks.
	Latest() Snapshot
	// Changed returns a channel that is closed when Latest changes in more than
	// its time. Take it before calling Latest.
	Changed() <-chan struct{}
	// Bootstrap is the record that decides who founds the cluster, nil where
	// the registry cannot keep one.
	Bootstrap() Record
}

// Record is one permanent value that the whole cluster shares. Every call goes
// to the registry's own quorum, and fails when that is out of reach: an error
// means that nothing is known, after Create and Replace not even whether the
// value was written.
type Record interface {
	// Get returns the value and its version. Version 0 means that there is none.
	Get(ctx context.Context) (value []byte, version uint64, err error)
	// Create writes the value if there is none, and tells whether it did.
	Create(ctx context.Context, value []byte) (won bool, err error)
	// Replace writes the value if it still has that version, and tells whether
	// it did.
	Replace(ctx context.Context, version uint64, value []byte) (won bool, err error)
}

// Wait returns the first snapshot for which ok is true, which may be the
// present one, or ctx's error and the last snapshot. It looks again at every
// change.
func Wait(ctx context.Context, d Discovery, ok func(Snapshot) bool) (Snapshot, error) {
	for {
		changed := d.Changed()
		s := d.Latest()
		if ok(s) {
			return s, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return s, ctx.Err()
		}
	}
}
