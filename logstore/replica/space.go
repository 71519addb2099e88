package replica

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
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
	// short: there was too little for a segment.
	short atomic.Bool
	// free is how many bytes were free when somebody looked last.
	free atomic.Uint64
	wake chan struct{} // one token: the log found the disk full
}

// hit is told by the log that there was no space.
func (s *space) hit() {
	s.short.Store(true)
	s.full.Store(true)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// enough is how much must be free before a full disk is one no more.
func (r *Replica) enough(least uint64) uint64 {
	if !r.space.short.Load() {
		return least + least/4
	}
	segment := uint64(r.cfg.SegmentSize)
	if segment == 0 {
		segment = logstore.DefaultSegmentSize
	}
	return max(least+least/4, 2*segment)
}

// watchSpace refuses proposals while free space is below Config.MinFreeBytes,
// or the log could not get any, until there is clearly more, and hands
// leadership to somebody else. What it keeps free is for terms, votes and
// snapshots.
func (r *Replica) watchSpace() {
	least := uint64(max(0, r.cfg.MinFreeBytes))
	tick := time.NewTicker(spaceInterval)
	defer tick.Stop()
	var wait time.Duration // until leadership may be passed on again
	said := false
	for {
		free, err := r.cfg.FS.Free(r.cfg.Dir)
		if err == nil {
			r.space.free.Store(free)
		}
		switch full := r.space.full.Load(); {
		case err != nil:
			r.cfg.Logger.Warn("cannot tell how much of the disk is free", "error", err)
		case full && free >= r.enough(least):
			r.space.full.Store(false)
			r.space.short.Store(false)
			said = false
			wait = 0 // the next time it is full is another story
			r.cfg.Logger.Info("there is space on the disk again", "free", free)
		case (full || free < least) && !said:
			r.space.full.Store(true)
			said = true
			r.cfg.Logger.Error("too little space on the disk; taking no more records", "free", free, "needed", r.enough(least))
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
		case <-r.space.wake:
		case <-r.closing:
			return
		case <-r.failed:
			return
		}
	}
}
