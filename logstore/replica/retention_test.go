package replica

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

func TestExpired(t *testing.T) {
	now := time.Unix(1000, 0)
	seg := func(seconds, bytes int64) logstore.SegmentInfo {
		return logstore.SegmentInfo{LastAppendTime: seconds * 1e9, Bytes: bytes}
	}
	segments := []logstore.SegmentInfo{seg(100, 10), seg(200, 10), seg(900, 10), seg(950, 10)}
	for name, tc := range map[string]struct {
		segments []logstore.SegmentInfo
		want     Retention
		n        int
	}{
		"everything":        {segments, Retention{}, 0},
		"age":               {segments, Retention{Age: 500 * time.Second}, 2},
		"exactly":           {segments, Retention{Age: 800 * time.Second}, 1},
		"bytes":             {segments, Retention{Bytes: 30}, 1},
		"few bytes":         {segments, Retention{Bytes: 1}, 3}, // the last one is appended to
		"either":            {segments, Retention{Age: 500 * time.Second, Bytes: 10}, 3},
		"short age":         {segments, Retention{Age: 1}, 3},
		"one segment":       {segments[:1], Retention{Age: 1, Bytes: 1}, 0},
		"times not reached": {[]logstore.SegmentInfo{seg(5000, 1), seg(6000, 1)}, Retention{Age: 1}, 0},
		"old behind new":    {[]logstore.SegmentInfo{seg(990, 1), seg(100, 1), seg(999, 1)}, Retention{Age: 500 * time.Second}, 0},
	} {
		if n, why := expired(tc.segments, tc.want, now); n != tc.n || (why == "") != (n == 0) {
			t.Errorf("%s: %d segments (%s), want %d", name, n, why, tc.n)
		}
	}
	if err := (&Retention{Age: -1}).validate(); err == nil {
		t.Error("a negative age is taken")
	}
}

// fakeClock is time that stands still.
type fakeClock struct{ nanos atomic.Int64 }

func newFakeClock() *fakeClock {
	c := &fakeClock{}
	c.nanos.Store(1_700_000_000e9)
	return c
}

func (c *fakeClock) now() time.Time          { return time.Unix(0, c.nanos.Load()) }
func (c *fakeClock) advance(d time.Duration) { c.nanos.Add(int64(d)) }

// TestRetention deletes under readers, on all replicas alike.
func TestRetention(t *testing.T) {
	c := newCluster(t, "a", "b", "c")
	// On a busy machine one of them may fall behind so far that it is sent a
	// snapshot, after which nothing is deleted for a minute. Here time flies.
	began := time.Now()
	c.tweak = func(_ string, cfg *Config) {
		cfg.Retention = Retention{Bytes: 10 * logstore.MinSegmentSize, Interval: 10 * time.Millisecond}
		cfg.Now = func() time.Time { return began.Add(100 * time.Since(began)) }
	}
	c.bootstrap("a", "b", "c")
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	t.Cleanup(func() {
		stop()
		wg.Wait()
	})
	for _, id := range c.ids {
		r := c.nodes[id]
		wg.Go(func() {
			if _, err := follow(ctx, r, 0); err != nil {
				t.Errorf("%s: %v", id, err)
			}
		})
		wg.Go(func() { // from the start, again and again
			for ctx.Err() == nil {
				if _, _, err := readAll(r); err != nil {
					var gone *OffsetOutOfRangeError
					if first, _, _ := r.Bounds(); !errors.As(err, &gone) || gone.First > first {
						t.Errorf("%s: %v", id, err)
					}
				}
				select {
				case <-ctx.Done():
				case <-time.After(5 * time.Millisecond): // the others need the processor, too
				}
			}
		})
	}
	all := c.append(1, 400, 20)
	eventually(t, "all replicas start at the same offset, and the files do", func() bool {
		first, _, _ := c.leader().Bounds()
		for _, id := range c.ids {
			r := c.nodes[id]
			segments := r.gens.log().Segments()
			if got, _, _ := r.Bounds(); got != first || first < 5000 || len(segments) > 12 || segments[1].FirstOffset <= first {
				return false
			}
		}
		return true
	})
	stop()
	wg.Wait()
	for _, id := range c.ids { // from here on it stays
		if err := c.nodes[id].SetRetention(Retention{}); err != nil {
			t.Fatal(err)
		}
	}
	all = append(all, c.append(3000, 2, 20)...)
	var first uint64
	eventually(t, "no start is on its way any more", func() bool {
		first, _, _ = c.leader().Bounds()
		for _, id := range c.ids {
			c.caughtUp(id)
			if got, _, _ := c.nodes[id].Bounds(); got != first {
				return false
			}
		}
		return true
	})
	for _, id := range c.ids {
		r := c.nodes[id]
		var gone *OffsetOutOfRangeError
		if _, err := r.Read(first-1, make([]byte, 64<<10), nil); !errors.As(err, &gone) || gone.First != first {
			t.Errorf("%s: %v, want first offset %d", id, err, first)
		}
		if at, err := r.OffsetAtTime(time.Unix(0, 0)); err != nil || at != first {
			t.Errorf("%s: the first offset by time is %d (%v), want %d", id, at, err, first)
		}
		snap, _, err := r.gens.now.Load().snapshots.newest()
		if err != nil || snap.Index < r.gens.log().FirstIndex() {
			t.Errorf("%s: the newest snapshot is of %+v (%v), the log starts at %d", id, snap, err, r.gens.log().FirstIndex())
		}
	}
	for _, id := range c.ids {
		c.stop(id)
		c.start(id)
		if got, _, _ := c.nodes[id].Bounds(); got < first-20 {
			t.Errorf("%s starts at %d after a restart, not at %d", id, got, first)
		}
	}
	c.append(5000, 1, 1)
	for _, id := range c.ids {
		c.caughtUp(id)
	}
	kept := all[len(all)-10:]
	for _, id := range c.ids {
		if err := checkAcked(c.nodes[id], kept); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// follow reads from an offset on until ctx ends, and returns where it got to. It
// fails if there is a gap, a repetition, or any error but that retention was
// faster.
func follow(ctx context.Context, r *Replica, next uint64) (uint64, error) {
	buf := make([]byte, 64<<10)
	for {
		if err := r.WaitReadable(ctx, next); err != nil {
			if ctx.Err() != nil {
				err = nil
			}
			return next, err
		}
		batches, err := r.Read(next, buf, nil)
		var gone *OffsetOutOfRangeError
		if errors.As(err, &gone) && gone.First > next {
			next = gone.First
			continue
		}
		if err != nil {
			return next, err
		}
		for i, b := range batches {
			// A batch may hold the offset in its middle after a jump.
			if b.BaseOffset > next || i > 0 && b.BaseOffset != next {
				return next, fmt.Errorf("batch at %d where %d belongs", b.BaseOffset, next)
			}
			next = b.BaseOffset + uint64(b.Count)
		}
	}
}

// TestRetentionByAge: a clock that is wrong deletes no more than what is sealed.
func TestRetentionByAge(t *testing.T) {
	clock := newFakeClock()
	cfg := memConfig("data", vfstest.New())
	cfg.Now = clock.now
	r := mustOpen(t, cfg)
	defer mustClose(t, r)
	for i := range uint64(60) {
		p := batchOf(i, 20)
		mustPropose(t, r, string(p.Records), p.Count)
	}
	if err := r.SetRetention(Retention{Age: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if err := r.moveStart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if first, _, _ := r.Bounds(); first != 0 {
		t.Errorf("what is not old is gone up to %d", first)
	}
	clock.advance(100 * 365 * 24 * time.Hour)
	active := r.gens.log().Segments()[r.gens.log().Stats().Segments-1]
	if active.FirstOffset == active.NextOffset {
		t.Fatal("the active segment is empty")
	}
	r.retention.poke()
	eventually(t, "everything but the active segment is deleted", func() bool {
		first, watermark, _ := r.Bounds()
		return first == active.FirstOffset && watermark == 1200 && r.gens.log().FirstOffset() == first
	})
	if err := r.SetRetention(Retention{Bytes: -1}); err == nil {
		t.Error("a negative size is taken")
	}
}

// TestRetentionHolds while a snapshot is on its way, and for a while after.
func TestRetentionHolds(t *testing.T) {
	clock := newFakeClock()
	cfg := memConfig("data", vfstest.New())
	cfg.Now = clock.now
	cfg.Retention = Retention{Interval: time.Millisecond}
	r := mustOpen(t, cfg)
	defer mustClose(t, r)
	for i := range uint64(60) {
		p := batchOf(i, 20)
		mustPropose(t, r, string(p.Records), p.Count)
	}
	if err := r.snapshot(); err != nil {
		t.Fatal(err)
	}
	metas, err := r.snapshots.List()
	if err != nil {
		t.Fatal(err)
	}
	_, stream, err := r.snapshots.Open(metas[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.SetRetention(Retention{Bytes: 1, Interval: time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	s := &r.snapshots.streams
	holds := func(want bool, when string) {
		t.Helper()
		if got := s.hold(clock.now()); got != want {
			t.Errorf("%s: holds %v", when, got)
		}
	}
	clock.advance(maxStream / 2)
	holds(true, "while it streams")
	if first, _, _ := r.Bounds(); first != 0 {
		t.Errorf("the log starts at %d while it streams", first)
	}
	if err := stream.Close(); err != nil {
		t.Fatal(err)
	}
	holds(true, "right after")
	clock.advance(maxCatchUp)
	holds(false, "later")
	eventually(t, "it goes on", func() bool { first, _, _ := r.Bounds(); return first > 0 })
	s.begin(clock.now())
	clock.advance(maxStream + 1)
	holds(false, "when it streams for ever")
	s.end(clock.now())
}

// TestClusterID: the first leader commits the id that it has; those that have
// none learn it; one that has another stops.
func TestClusterID(t *testing.T) {
	c := newCluster(t, "a", "b", "c", "d")
	learned := make(chan string, 10)
	given := map[string]string{"a": "x", "b": "x", "c": "x"}
	c.tweak = func(id string, cfg *Config) {
		cfg.ClusterID = given[id]
		cfg.OnClusterID = func(got string) { learned <- id + " " + got }
	}
	c.bootstrap("a", "b", "c")
	for _, id := range []string{"a", "b", "c"} {
		eventually(t, "it is known", func() bool { return c.nodes[id].ClusterID() == "x" })
	}
	c.start("d")
	c.add("d")
	if got := <-learned; got != "d x" {
		t.Errorf("learned %q", got)
	}
	c.stop("d")
	given["d"] = "y"
	var foreign *ForeignClusterError
	if r, err := Open(c.config("d")); !errors.As(err, &foreign) || foreign.Ours != "y" || foreign.Theirs != "x" {
		t.Errorf("%v", err)
		if r != nil {
			mustClose(t, r)
		}
	}
	// With nothing of its own, it finds out when it is told.
	c.disks["d"] = vfstest.New()
	d := c.start("d")
	<-d.Failed()
	if !errors.As(d.Err(), &foreign) {
		t.Error(d.Err())
	}
	var l *Replica
	c.led(func(leads *Replica) error {
		l = leads
		return l.control(t.Context(), controlEntry{Kind: kindTombstone, ID: "d", Time: 7})
	})
	if got := l.Tombstones()["d"]; got.Index == 0 || !got.Time.Equal(time.Unix(0, 7)) {
		t.Errorf("%+v", got)
	}
	if err := l.control(t.Context(), controlEntry{Kind: kindClusterID, ClusterID: "z"}); !errors.As(err, &foreign) {
		t.Errorf("a second id: %v", err)
	}
	if l.ClusterID() != "x" || l.Err() != nil {
		t.Errorf("%q, %v", l.ClusterID(), l.Err())
	}
	for _, id := range []string{"a", "b", "c"} {
		if r := c.nodes[id]; r != l {
			var other *NotLeaderError
			if err := r.control(t.Context(), controlEntry{Kind: kindLogStart}); !errors.As(err, &other) && !errors.Is(err, ErrNoLeader) {
				t.Errorf("%s: %v", id, err)
			}
		}
	}
}
