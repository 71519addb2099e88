package replica

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// ErrDiskFull: there is too little space on the disk. Nothing was appended, and
// things go on by themselves when there is more.
var ErrDiskFull = errors.New("too little space on the disk")

const (
	// spaceInterval is how often free space is looked at.
	spaceInterval = time.Second
	// passOnInterval is how often, at most, a full leader tries to be rid of it:
	// the others may be full, too.
	passOnInterval = time.Minute
)

// space watches how much of the disk is free.
type space struct {
	full atomic.Bool
}

// freer is a filesystem that knows its free space.
type freer interface {
	Free(dir string) (uint64, error)
}

// watchSpace refuses proposals while free space is below Config.MinFreeBytes,
// with a quarter above it before they are taken again, and hands leadership to
// somebody else. What it keeps free is for terms, votes and snapshots.
func (r *Replica) watchSpace() {
	fsys, ok := r.cfg.FS.(freer)
	if !ok || r.cfg.MinFreeBytes <= 0 {
		return
	}
	least := uint64(r.cfg.MinFreeBytes)
	tick := time.NewTicker(spaceInterval)
	defer tick.Stop()
	var wait time.Duration // until leadership may be passed on again
	for {
		free, err := fsys.Free(r.cfg.Dir)
		switch full := r.space.full.Load(); {
		case err != nil:
			r.cfg.Logger.Warn("cannot tell how much of the disk is free", "error", err)
		case !full && free < least:
			r.space.full.Store(true)
			r.cfg.Logger.Error("too little space on the disk; taking no more records", "free", free, "needed", least)
		case full && free >= least+least/4:
			r.space.full.Store(false)
			wait = 0 // the next time it is full is another story
			r.cfg.Logger.Info("there is space on the disk again", "free", free)
		}
		wait = max(0, wait-spaceInterval)
		if r.space.full.Load() && wait == 0 && r.raft.State() == raft.Leader && len(r.otherVoters()) > 0 {
			wait = passOnInterval
			ctx, cancel := context.WithTimeout(context.Background(), 2*r.cfg.ElectionTimeout)
			if err := r.TransferLeadership(ctx, ""); err != nil {
				r.cfg.Logger.Warn("leadership could not be handed over although the disk is full", "error", err)
			}
			cancel()
		}
		select {
		case <-tick.C:
		case <-r.closing:
			return
		case <-r.failed:
			return
		}
	}
}
