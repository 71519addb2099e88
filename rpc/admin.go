package rpc

import "context"

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
}
