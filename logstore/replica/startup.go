package replica

import (
	"errors"
	"fmt"

	"github.com/hashicorp/raft"
)

// launch starts Raft on a goroutine of its own: what it runs into while it
// reads the log may panic, or end that goroutine, and is an error here.
func launch(start func() (*raft.Raft, error)) (r *raft.Raft, err error) {
	done := make(chan struct{})
	err = errors.New("it ended before it began")
	go func() {
		defer close(done)
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("panic: %v", p)
			}
		}()
		r, err = start()
	}()
	<-done
	return r, err
}

// own runs f on a goroutine that Close waits for. f must end when r.closing is
// closed.
func (r *Replica) own(f func()) {
	r.askMu.Lock()
	defer r.askMu.Unlock()
	if !r.closed {
		r.watching.Go(f)
	}
}

// newSnapshots makes Raft's snapshot store of this replica.
func (r *Replica) newSnapshots() *snapshotStore {
	return &snapshotStore{
		cfg:     &r.cfg,
		id:      r.stable.id,
		gens:    r.gens,
		applied: r.applied,
		clusterID: func() string {
			if id := r.believed(); id != "" {
				return id
			}
			return r.ClusterID()
		},
		broken:  r.broken,
		damaged: r.damaged,
		switched: func(gen *generation) {
			r.cfg.Logger.Info("the log was replaced by the leader's", "generation", gen.number)
			r.own(func() { r.mind(gen) })
		},
	}
}

// mind looks after one generation: it notices a failure of the log's own
// background writes, and removes the files once another generation has taken
// its place and its last reader is gone.
func (r *Replica) mind(gen *generation) {
	failed := gen.log.Failed()
	for {
		select {
		case <-failed:
			r.broken(gen.log.Err())
			failed = nil
		case <-gen.unused:
			if err := r.gens.remove(r.cfg.FS, gen); err != nil {
				// The next opening removes what is left.
				r.cfg.Logger.Warn("a replaced log was not removed", "directory", gen.dir, "error", err)
			}
			return
		case <-r.closing:
			return
		}
	}
}
