package replica

import (
	"context"
	"errors"
	"time"

	"github.com/diurnalog/diurna/logstore"
)

const (
	// scrubMax bounds the scrub's rate, in bytes per second.
	scrubMax = 32 << 20
	// scrubPause is between two passes, and after a failed read.
	scrubPause = time.Second
)

// errReplaced ends the scrub of a log that another has taken the place of.
var errReplaced = errors.New("the log was replaced")

// scrub reads the whole log, again and again, at a pace at which one time takes
// Config.ScrubInterval, so that damage to what nobody reads is found while the
// other replicas still have it. It runs until the replica closes.
func (r *Replica) scrub() {
	if r.cfg.ScrubInterval < 0 {
		return
	}
	from := uint64(0)
	for r.rest(min(scrubPause, r.cfg.ScrubInterval)) == nil {
		from = r.scrubFrom(from)
	}
}

// rest waits, and returns an error when the replica ends.
func (r *Replica) rest(d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-r.failed:
		return r.Err()
	case <-r.closing:
		return ErrClosed
	}
}

// scrubFrom checks the log from an index on and returns where to go on.
func (r *Replica) scrubFrom(from uint64) uint64 {
	gen := r.gens.use()
	defer r.gens.release(gen)
	segments := gen.log.Segments()
	total := int64(0)
	for _, s := range segments {
		total += s.Bytes
	}
	rate := min(float64(total)/r.cfg.ScrubInterval.Seconds(), scrubMax) + 1
	next, err := gen.log.Verify(context.Background(), from, func(bytes int) error {
		if r.gens.now.Load() != gen {
			return errReplaced
		}
		return r.rest(time.Duration(float64(bytes) / rate * float64(time.Second)))
	})
	switch {
	case err == nil, errors.Is(err, errReplaced), errors.Is(err, logstore.ErrClosed), r.Err() != nil:
		return 0
	case isDamage(err):
		r.damaged(err)
		// What follows may be whole. Verify begins with a whole segment.
		for _, s := range segments {
			if s.FirstIndex > next {
				return s.FirstIndex
			}
		}
		return 0
	default:
		select {
		case <-r.closing:
		default:
			r.cfg.Logger.Warn("scrub: the log could not be read", "index", next, "error", err)
		}
		return next
	}
}
