package rpc

import (
	"context"
	"io"
	"time"
)

// Admin is what the server needs of the cluster to change it. The agent adapts
// a replica to it. All methods are safe for concurrent use and return once the
// change is made. A node that does not lead returns *NotLeaderError or
// ErrNoLeader; other errors are those of errors.go, and only an ErrUnknownOutcome
// leaves open whether the change was made.
type Admin interface {
	// AddPeer adds a node to the configuration, at first without a vote, or
	// changes its address. It undoes what RemovePeer noted.
	AddPeer(ctx context.Context, id, address string) error
	// RemovePeer removes a node, and notes that it is not to be taken in again.
	RemovePeer(ctx context.Context, id string) error
	// TransferLeadership hands leadership to the voter of this id, or to the
	// one that is furthest along where id is empty.
	TransferLeadership(ctx context.Context, id string) error
	// Leave takes this node out of the cluster, whether it leads or not, and
	// returns when it is out. It must not wait for the server to shut down,
	// since the call that asked for it is still open.
	Leave(ctx context.Context) error
	// Snapshot begins to copy the log: all that this node knew to be committed
	// when it was called. It need not lead.
	Snapshot(ctx context.Context) (Snapshot, error)
}

// Snapshot is a copy of the log on its way: the bytes of a file. It is for one
// goroutine.
type Snapshot interface {
	io.ReadCloser
	// Info says what it holds. SHA256 is nil until Read has returned io.EOF.
	Info() SnapshotInfo
}

// SnapshotInfo says what a Snapshot holds.
type SnapshotInfo struct {
	// ClusterID and Cluster are the cluster's id and configured name, NodeID is
	// this node's.
	ClusterID, Cluster, NodeID string
	// Taken is when, by this node's clock.
	Taken time.Time
	// FirstOffset is that of the first record, NextOffset that after the last one.
	FirstOffset, NextOffset uint64
	// Index and Term are Raft's, of the last entry.
	Index, Term uint64
	// Size is how many bytes there are, SHA256 that of all of them.
	Size   int64
	SHA256 []byte
}
