package replica

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
)

// Retention is how much of the log is kept. Zero means everything. The leader
// decides, and commits the log's new start, so that it is the same everywhere;
// each replica then deletes the segments that are wholly before it. What is
// deleted are whole segments, and never the one that is appended to: a log that
// nobody writes to is kept, and so is a segment's worth more than is asked for.
type Retention struct {
	// Age is how long records are kept, by their append times and Config.Now.
	Age time.Duration
	// Bytes is how much of the log is kept.
	Bytes int64
	// Interval is how often that is looked at; besides, it is when a segment
	// becomes full. Default: 1 min.
	Interval time.Duration
}

func (c *Retention) validate() error {
	if c.Age < 0 || c.Bytes < 0 || c.Interval < 0 {
		return fmt.Errorf("retention cannot be negative: %v, %d bytes, every %v", c.Age, c.Bytes, c.Interval)
	}
	if c.Interval == 0 {
		c.Interval = time.Minute
	}
	return nil
}

type retention struct {
	mu   sync.Mutex
	want Retention
	wake chan struct{} // one token
}

func (t *retention) init(want Retention) {
	t.want = want
	t.wake = make(chan struct{}, 1)
}

func (t *retention) poke() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

func (t *retention) get() Retention {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.want
}

// SetRetention changes how much is kept, from now on. It counts on the server
// that leads, so it should be the same on all.
func (r *Replica) SetRetention(want Retention) error {
	if err := want.validate(); err != nil {
		return err
	}
	r.retention.mu.Lock()
	r.retention.want = want
	r.retention.mu.Unlock()
	r.retention.poke()
	return nil
}

// mindRetention moves the log's start, on the leader, and deletes what is before
// it. It runs until the replica closes.
func (r *Replica) mindRetention() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for {
		changed := r.machine.changes()
		if !r.snapshots.streams.hold(r.cfg.Now()) {
			if err := r.moveStart(ctx); err != nil {
				r.cfg.Logger.Warn("retention: the log's start was not moved", "error", err)
			}
			if err := r.deleteBeforeStart(); err != nil {
				r.cfg.Logger.Warn("retention: nothing was deleted", "error", err)
			}
		}
		timer := time.NewTimer(r.retention.get().Interval)
		select {
		case <-timer.C:
		case <-r.retention.wake:
		case <-changed:
		case <-r.failed:
			timer.Stop()
			return
		case <-r.closing:
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// moveStart commits a new start of the log if this server leads and something
// is kept for too long.
func (r *Replica) moveStart(ctx context.Context) error {
	want := r.retention.get()
	if r.seq.ready.Load() == 0 {
		return nil
	}
	segments := r.gens.log().Segments()
	n, why := expired(segments, want, r.cfg.Now())
	if n == 0 {
		return nil
	}
	start := min(segments[n].FirstOffset, r.watermark.load())
	first := r.first()
	if start <= first {
		return nil
	}
	// Loudly: a clock that is wrong by years looks no different.
	r.cfg.Logger.Warn("retention: records are deleted on all nodes", "first", first, "next", start, "why", why)
	err := r.control(ctx, controlEntry{Kind: kindLogStart, Offset: start})
	var other *NotLeaderError
	if errors.As(err, &other) || errors.Is(err, ErrNoLeader) || errors.Is(err, ErrClosed) {
		return nil // the next one decides
	}
	return err
}

// expired returns how many segments from the front need not be kept.
func expired(segments []logstore.SegmentInfo, want Retention, now time.Time) (n int, why string) {
	total := int64(0)
	for _, s := range segments {
		total += s.Bytes
	}
	for n < len(segments)-1 { // the last one is appended to
		s := segments[n]
		switch {
		case want.Age > 0 && now.Sub(time.Unix(0, s.LastAppendTime)) > want.Age:
			why = fmt.Sprintf("their append times, up to %s, are more than %v before %s", time.Unix(0, s.LastAppendTime).UTC().Format(time.RFC3339), want.Age, now.UTC().Format(time.RFC3339))
		case want.Bytes > 0 && total > want.Bytes:
			why = fmt.Sprintf("with them the log has %d bytes, more than %d", total, want.Bytes)
		default:
			return n, why
		}
		total -= s.Bytes
		n++
	}
	return n, why
}

// deleteBeforeStart deletes the segments that are wholly before the log's start,
// but nothing behind the newest snapshot: it stands for what is gone.
func (r *Replica) deleteBeforeStart() error {
	gen := r.gens.use()
	defer r.gens.release(gen)
	below := firstKept(gen.log.Segments(), r.start.Load())
	if below <= gen.log.FirstIndex() {
		return nil
	}
	snap, _, err := gen.snapshots.newest()
	if err != nil {
		return err
	}
	if snap == nil || snap.Index < below {
		if err := r.snapshot(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
			return fmt.Errorf("take a snapshot first: %w", err)
		}
		if snap, _, err = gen.snapshots.newest(); err != nil {
			return err
		}
	}
	if snap == nil {
		return nil
	}
	// The snapshot's own entry stays: it tells whether the two belong together.
	before := gen.log.FirstIndex()
	first, err := gen.log.DeletePrefix(min(below, snap.Index))
	switch {
	case errors.Is(err, logstore.ErrClosed):
		return nil
	case err != nil:
		r.broken(err)
		return err
	}
	if first > before {
		r.cfg.Logger.Info("retention: deleted segments", "first_index", first, "entries", first-before)
	}
	return nil
}

// firstKept returns the first index of the first segment that has something at
// or behind an offset.
func firstKept(segments []logstore.SegmentInfo, start uint64) uint64 {
	n := 0
	for n < len(segments)-1 && segments[n+1].FirstOffset <= start {
		n++
	}
	return segments[n].FirstIndex
}

// snapshot has Raft take one now.
func (r *Replica) snapshot() error {
	return r.ask(context.Background(), func() error { return r.raft.Snapshot().Error() })
}

// streams counts the snapshots that are on their way to other servers. While
// there is one, and until its receiver can have got what follows it, this
// server deletes nothing and does not move the log's start: one that falls
// behind again would be sent snapshots for ever.
type streams struct {
	mu     sync.Mutex
	active int
	began  time.Time // the first of the active ones
	ended  time.Time
	took   time.Duration
}

// A stream that does not end holds for maxStream at most. After one, what is
// deleted waits as long as that took, but not less than minCatchUp, nor more
// than maxCatchUp.
const (
	maxStream  = time.Hour
	minCatchUp = time.Minute
	maxCatchUp = 15 * time.Minute
)

func (s *streams) begin(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active++; s.active == 1 {
		s.began = now
	}
}

func (s *streams) end(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.active--
	s.ended, s.took = now, now.Sub(s.began)
}

func (s *streams) hold(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active > 0 {
		return now.Sub(s.began) < maxStream
	}
	return !s.ended.IsZero() && now.Sub(s.ended) < min(max(s.took, minCatchUp), maxCatchUp)
}
