package replica

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

// Control entries are Raft commands without records: they change the state
// machine's small state, on all replicas alike.
const (
	// kindClusterID gives the group its id. The first one counts.
	kindClusterID = "cluster_id"
	// kindLogStart raises the first offset that readers may read.
	kindLogStart = "log_start"
	// kindTombstone remembers a server that was removed; kindUntombstone
	// forgets it.
	kindTombstone   = "tombstone"
	kindUntombstone = "untombstone"
)

// maxTombstones bounds the state; beyond, the oldest is forgotten. It is part
// of what replicas have to agree on, so it never changes.
const maxTombstones = 4096

// maxControlString bounds ids in control entries, and with them the state.
const maxControlString = 512

// controlEntry is the payload of a control entry, as JSON.
type controlEntry struct {
	Kind      string `json:"kind"`
	ClusterID string `json:"cluster_id,omitempty"`
	Offset    uint64 `json:"offset,omitempty"`
	ID        string `json:"id,omitempty"`   // of a server
	Time      int64  `json:"time,omitempty"` // nanoseconds since 1970 UTC, by the leader's clock
}

// Tombstone is what remains of a server that was removed.
type Tombstone struct {
	ID    string    `json:"id"`
	Index uint64    `json:"index"` // of the entry that removed it
	Time  time.Time `json:"time"`
}

// fsmState is all that the state machine knows, and all that a local snapshot
// stores: the records stay where they are.
type fsmState struct {
	// NextOffset is the high watermark: the offset after the last committed
	// record.
	NextOffset uint64 `json:"next_offset"`
	// FirstOffset is the log's start: records before it are not read any more.
	FirstOffset uint64 `json:"first_offset,omitempty"`
	// ClusterID is the group's, once its first leader has committed it.
	ClusterID string `json:"cluster_id,omitempty"`
	// Tombstones by index; at most maxTombstones.
	Tombstones []Tombstone `json:"tombstones,omitempty"`
	// Seam is the index of the entry by which the log was given to a new group, 0
	// where it never was: see seam.go.
	Seam uint64 `json:"seam,omitempty"`
	// Supersedes is the id of the cluster that this one was recovered from, "" for
	// all others.
	Supersedes string `json:"supersedes,omitempty"`
}

// parseControl refuses what this version does not know: a replica that goes on
// without having applied an entry is not a replica any more.
func parseControl(index uint64, data []byte) (c controlEntry, err error) {
	err = unmarshalStrictly(data, &c)
	switch {
	case err != nil:
		err = fmt.Errorf("a control entry that it cannot read: %w", err)
	case !slices.Contains([]string{kindClusterID, kindLogStart, kindTombstone, kindUntombstone}, c.Kind):
		err = fmt.Errorf("a control entry of the kind %q", c.Kind)
	default:
		return c, nil
	}
	return c, &VersionError{fmt.Sprintf("entry %d", index), err.Error()}
}

// control applies one entry to the state. It returns what the proposer is told;
// the state is changed, or not, on all replicas alike. It never changes what
// a copy of the state shares with it.
func (s *fsmState) control(index uint64, c *controlEntry) error {
	switch c.Kind {
	case kindClusterID:
		if s.ClusterID != "" && s.ClusterID != c.ClusterID {
			return &ForeignClusterError{Ours: c.ClusterID, Theirs: s.ClusterID}
		}
		s.ClusterID = c.ClusterID
	case kindLogStart:
		s.FirstOffset = max(s.FirstOffset, min(c.Offset, s.NextOffset))
	case kindTombstone, kindUntombstone:
		kept := slices.DeleteFunc(slices.Clone(s.Tombstones), func(t Tombstone) bool { return t.ID == c.ID })
		if c.Kind == kindTombstone {
			kept = append(kept, Tombstone{ID: c.ID, Index: index, Time: time.Unix(0, c.Time).UTC()})
		}
		s.Tombstones = kept[max(0, len(kept)-maxTombstones):]
	}
	return nil
}

// control commits a control entry and waits until it is applied here. Only the
// leader can. Errors other than ErrUnknownOutcome mean that nothing was, or
// will be, changed.
func (r *Replica) control(ctx context.Context, c controlEntry) error {
	if len(c.ID) > maxControlString || len(c.ClusterID) > maxControlString {
		return fmt.Errorf("an id is longer than %d bytes", maxControlString)
	}
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if err := r.Err(); err != nil {
		return err
	}
	// Raft may leave it unanswered when it shuts down.
	err = r.ask(ctx, func() error {
		future := r.raft.ApplyLog(raft.Log{Data: data}, 0)
		if err := future.Error(); err != nil {
			return r.seq.outcome(err)
		}
		if refused, is := future.Response().(error); is {
			return refused
		}
		return nil
	})
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrUnknownOutcome), errors.Is(err, ErrClosed), ctx.Err() == nil && r.Err() == nil:
		return err
	}
	// It was asked, and nobody waited for the answer.
	return fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
}

// ClusterID returns the id of the group that this replica belongs to, as the
// group has agreed on it; "" before that.
func (r *Replica) ClusterID() string { return r.machine.view().ClusterID }

// Supersedes returns the id of the cluster that this one was recovered from, see
// Recover; "" for all others.
func (r *Replica) Supersedes() string { return r.machine.view().Supersedes }

// Tombstones returns what remains of servers that were removed, by their id.
func (r *Replica) Tombstones() map[string]Tombstone {
	all := map[string]Tombstone{}
	for _, t := range r.machine.view().Tombstones {
		all[t.ID] = t
	}
	return all
}

// believe notes which cluster this server is told to be in; the first word
// counts.
func (r *Replica) believe(clusterID string) {
	if clusterID != "" && r.belief.CompareAndSwap(nil, &clusterID) {
		r.founding <- struct{}{}
	}
}

func (r *Replica) believed() string {
	if id := r.belief.Load(); id != nil {
		return *id
	}
	return ""
}

// mindClusterID sees to it that the group has an id, and tells it on: the first
// leader commits the one that it was given. It runs until the replica closes.
func (r *Replica) mindClusterID() {
	const again = time.Second
	for {
		known := r.believed()
		changed := r.machine.changes()
		id := r.ClusterID()
		if id != "" {
			if id != known {
				r.cfg.OnClusterID(id)
			}
			return // it never changes again
		}
		if known == "" {
			select {
			case <-changed:
				continue
			case <-r.founding:
				continue
			case <-r.closing:
				return
			}
		}
		if wait := r.seq.whenReady(); wait != nil {
			select {
			case <-wait:
			case <-changed:
			case <-r.closing:
				return
			}
			continue
		}
		if err := r.control(context.Background(), controlEntry{Kind: kindClusterID, ClusterID: known}); err == nil {
			continue
		}
		select {
		case <-time.After(again):
		case <-changed:
		case <-r.closing:
			return
		}
	}
}
