package replica

import (
	"errors"
	"time"

	"github.com/diurnalog/diurna/logstore"
)

const (
	// scrubStep is how often the scrub reads a little.
	scrubStep = time.Second
	// scrubMax bounds what it reads in a step.
	scrubMax = 32 << 20
)

// scrub reads the whole log, again and again, at a pace at which one time takes
// Config.ScrubInterval, so that damage to what nobody reads is found while the
// other replicas still have it. It runs until the replica closes.
func (r *Replica) scrub() {
	if r.cfg.ScrubInterval < 0 {
		return
	}
	step := min(scrubStep, r.cfg.ScrubInterval)
	ticker := time.NewTicker(step)
	defer ticker.Stop()
	var buf []byte
	next := uint64(0)
	for {
		select {
		case <-ticker.C:
		case <-r.failed:
			return
		case <-r.closing:
			return
		}
		var total int64
		for _, s := range r.gens.log().Segments() {
			total += s.Bytes
		}
		share := int64(float64(total) * step.Seconds() / r.cfg.ScrubInterval.Seconds())
		next, buf = r.scrubSome(next, min(share, scrubMax)+1, buf)
	}
}

// scrubSome reads some bytes from an index on, and returns where to go on.
func (r *Replica) scrubSome(next uint64, bytes int64, buf []byte) (uint64, []byte) {
	gen := r.gens.use()
	defer r.gens.release(gen)
	next = max(next, gen.log.FirstIndex())
	for bytes > 0 {
		var err error
		_, buf, err = gen.log.Entry(next, buf)
		switch {
		case errors.Is(err, logstore.ErrClosed):
			return next, buf
		case errors.Is(err, logstore.ErrNotFound):
			return 0, buf // from the start again
		case err != nil && !isDamage(err):
			r.cfg.Logger.Warn("scrub: an entry could not be read", "index", next, "error", err)
		case err != nil:
			r.damaged(err)
		}
		bytes -= int64(len(buf)) + logstore.HeaderSize
		next++
	}
	return next, buf
}
