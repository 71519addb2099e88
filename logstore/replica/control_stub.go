package replica

import "context"

// controlEntry changes the state machine's small state.
type controlEntry struct {
	Kind string `json:"kind"`
	ID   string `json:"id,omitempty"`
}

const kindTombstone = "tombstone"

// control commits a control entry.
func (r *Replica) control(context.Context, controlEntry) error { return nil }
