package rpc

import (
	"context"
	"time"
)

// Peer is what a node tells the other nodes of its cluster, and what it needs
// to serve reads that the leader has to vouch for. All methods are safe for
// concurrent use.
type Peer interface {
	// Status tells who this node is and how far it has come, without waiting.
	Status(ctx context.Context) (NodeStatus, error)
	// ReadIndex returns, on the leader, an index such that a node which has
	// applied it has seen every record acknowledged before the call. Elsewhere
	// it returns *NotLeaderError or ErrNoLeader.
	ReadIndex(ctx context.Context) (index uint64, err error)
	// WaitApplied returns once this node has applied index, so that Bounds and
	// reads show it, or with ctx's error or ErrClosed.
	WaitApplied(ctx context.Context, index uint64) error
}

// NodeStatus is what a node knows about itself. Zero values mean unknown.
type NodeStatus struct {
	// NodeID is the UUID kept with the node's data, Name is for people.
	NodeID, Name string
	// Cluster is the configured name, ClusterID the UUID of the cluster that
	// the node belongs to; empty as long as it belongs to none.
	Cluster, ClusterID string
	// Supersedes is the id of the cluster that the node's was recovered from;
	// empty for all others.
	Supersedes string
	// State is "fresh" (never was in a cluster), "member", "leaving" or
	// "removed" (was taken out of it).
	State   string
	Version string
	// Expect is how many voters the node waits for to form a cluster; 0 where
	// it forms none.
	Expect int
	// FormerIDs are ids that the node had before.
	FormerIDs []string
	// Role is "leader", "follower", "candidate" or "nonvoter".
	Role string
	Term uint64
	// LastIndex and LastTerm are of the last entry in the node's log.
	LastIndex, LastTerm uint64
	AppliedIndex        uint64
	// LastContact is since the node heard from the leader; negative where it
	// never did, and on the leader itself.
	LastContact             time.Duration
	LeaderID, LeaderAddress string
	// FirstOffset is the lowest offset kept, NextOffset the one after the last
	// committed record, of the default log.
	FirstOffset, NextOffset uint64
	// DiskFull: the node refuses to append for want of room.
	DiskFull bool
	// CertificateExpires is when the node's certificate does; zero without one.
	CertificateExpires time.Time
}
