package replica

import (
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/raft"
)

// Found makes this server, which waits to be part of a group, one of the first
// voters of a new one, like Config.Bootstrap does for one that is opened. All
// of them may be told so, with the same id and list, or any number of them. It
// does nothing where there is a group already.
func (r *Replica) Found(clusterID string, founders []Server) error {
	if err := r.Err(); err != nil {
		return err
	}
	if len(r.members()) > 0 {
		return nil
	}
	var first raft.Configuration
	for _, s := range founders {
		first.Servers = append(first.Servers, raft.Server{Suffrage: raft.Voter, ID: raft.ServerID(s.ID), Address: raft.ServerAddress(s.Address)})
	}
	r.believe(clusterID)
	err := r.ask(context.Background(), func() error { return r.raft.BootstrapCluster(first).Error() })
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrCantBootstrap) && len(r.members()) > 0:
		return nil // it has just been added
	case errors.Is(err, raft.ErrCantBootstrap):
		// It has heard of a term, and nothing else: from another founder, which
		// will send it the configuration, or from its own attempt that a crash
		// interrupted, which an opening clears.
		return fmt.Errorf("%w: %w", ErrNotFounded, err)
	}
	return fmt.Errorf("found a group: %w", err)
}

// ErrNotFounded: the server has taken part in an election before it had a
// configuration. If it gets none from others, opening it again lets it try again.
var ErrNotFounded = errors.New("the server cannot found a group now")

// Readmit adds a server, see AddNonvoter, also one that was removed.
func (r *Replica) Readmit(ctx context.Context, id, address string) error {
	if err := r.leads(); err != nil {
		return err
	}
	if _, removed := r.Tombstones()[id]; removed {
		if err := r.control(ctx, controlEntry{Kind: kindUntombstone, ID: id}); err != nil {
			return err
		}
	}
	return r.AddNonvoter(ctx, id, address)
}

// HandOver makes another voter that answers the leader, if this server leads.
// It returns nil where it does not, and where there is no other voter.
func (r *Replica) HandOver(ctx context.Context) error {
	if r.Err() != nil || r.raft.State() != raft.Leader || len(r.otherVoters()) == 0 {
		return nil
	}
	return r.TransferLeadership(ctx, "")
}
