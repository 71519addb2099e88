package replica

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// TestConcurrentProposers: every acknowledged batch has its own offsets, all
// offsets are taken, contents are where they were acknowledged, and batches of
// one proposer are in its order.
func TestConcurrentProposers(t *testing.T) {
	rng := vfstest.Rand(t)
	cfg := testConfig(t, t.TempDir())
	cfg.EntryBytes = 4 << 10
	cfg.SegmentSize = 64 << 10
	r := mustOpen(t, cfg)
	defer mustClose(t, r)
	const proposers, batches = 16, 150
	results := make([][]acked, proposers)
	var wg sync.WaitGroup
	for p := range proposers {
		counts := make([]int, batches)
		for i := range counts {
			counts[i] = 1 + rng.IntN(20)
		}
		wg.Go(func() {
			var pending []*Pending
			for i, count := range counts {
				handle, err := r.Propose(t.Context(), batchOf(uint64(p*batches+i), count), true)
				if err != nil {
					t.Error(err)
					return
				}
				pending = append(pending, handle)
			}
			for i, handle := range pending {
				ack, err := result(handle)
				if err != nil {
					t.Error(err)
					continue
				}
				// Readable as soon as it is acknowledged.
				if _, watermark, end := r.Bounds(); watermark < ack.NextOffset || end < watermark {
					t.Errorf("acknowledged up to %d, readable up to %d, stored up to %d", ack.NextOffset, watermark, end)
				}
				results[p] = append(results[p], acked{uint64(p*batches + i), counts[i], ack})
			}
		})
	}
	wg.Wait()
	var all []acked
	total := uint64(0)
	for p, acks := range results {
		for i, a := range acks {
			if i > 0 && (a.ack.BaseOffset < acks[i-1].ack.NextOffset || a.ack.AppendTime.Before(acks[i-1].ack.AppendTime)) {
				t.Errorf("proposer %d: batch %d at %+v, the one before at %+v", p, i, a.ack, acks[i-1].ack)
			}
			total += uint64(a.count)
		}
		all = append(all, acks...)
	}
	if err := checkAcked(r, all); err != nil {
		t.Error(err)
	}
	if first, watermark, end := r.Bounds(); first != 0 || watermark != total || end != total {
		t.Errorf("bounds %d, %d, %d; want 0, %d, %d", first, watermark, end, total, total)
	}
}

// TestCompareAndAppend: of proposers that race for an offset one gets it, and
// the others learn of a next offset that is not the past.
func TestCompareAndAppend(t *testing.T) {
	r := mustOpen(t, testConfig(t, t.TempDir()))
	defer mustClose(t, r)
	const proposers, wins = 8, 40
	var won sync.Map
	var wg sync.WaitGroup
	for p := range uint64(proposers) {
		wg.Go(func() {
			expected := uint64(0)
			for n := 0; n < wins; {
				b := batchOf(p<<32|uint64(n), 3)
				b.Expected = &expected
				handle, err := r.Propose(t.Context(), b, true)
				if err != nil {
					t.Error(err)
					return
				}
				_, before, _ := r.Bounds()
				ack, err := result(handle)
				var mismatch *OffsetMismatchError
				switch {
				case err == nil:
					if other, taken := won.LoadOrStore(expected, p); taken || ack.BaseOffset != expected {
						t.Errorf("%d won offset %d (%+v), and so did %v", p, expected, ack, other)
					}
					expected = ack.NextOffset
					n++
				case errors.As(err, &mismatch):
					if mismatch.Expected != expected || mismatch.Next <= expected || mismatch.Next > before+4*wins*proposers {
						t.Errorf("%d lost offset %d: %+v", p, expected, mismatch)
					}
					expected = mismatch.Next
				default:
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if _, watermark, _ := r.Bounds(); watermark != proposers*wins*3 {
		t.Errorf("watermark %d, want %d", watermark, proposers*wins*3)
	}
	if err := checkAcked(r, nil); err != nil {
		t.Error(err)
	}
	ahead := batchOf(1, 1)
	ahead.Expected = at(1 << 40)
	p, err := r.Propose(t.Context(), ahead, true)
	if err != nil {
		t.Fatal(err)
	}
	var mismatch *OffsetMismatchError
	if _, err := result(p); !errors.As(err, &mismatch) || mismatch.Next != proposers*wins*3 {
		t.Errorf("an offset of the future: %v", err)
	}
}

func TestRefusedProposals(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	cfg.EntryBytes = 2 << 10
	r := mustOpen(t, cfg)
	defer mustClose(t, r)
	if _, err := r.Propose(t.Context(), Proposal{Records: []byte("x")}, true); err == nil {
		t.Error("a batch without records was taken")
	}
	var large *TooLargeError
	if _, err := r.Propose(t.Context(), Proposal{Records: make([]byte, 2<<10+1), Count: 1}, true); !errors.As(err, &large) || *large != (TooLargeError{2<<10 + 1, 2 << 10}) {
		t.Errorf("a batch too large: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Propose(ctx, batchOf(1, 1), true); !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
	if ack := mustPropose(t, r, string(make([]byte, 2<<10)), 1); ack.BaseOffset != 0 {
		t.Errorf("something was appended: %+v", ack)
	}
}

// TestRoom: in-flight bytes are bounded, with and without waiting.
func TestRoom(t *testing.T) {
	n := newFakeNode()
	s := serving(t, n, 1)
	one := s.entryBytes
	var pending []*Pending
	for {
		p, err := s.propose(t.Context(), Proposal{Records: make([]byte, one), Count: 1}, false)
		if err != nil {
			if !errors.Is(err, ErrOverloaded) {
				t.Error(err)
			}
			break
		}
		pending = append(pending, p)
	}
	if len(pending) != 63 { // of 64, since each costs a little more than its bytes
		t.Errorf("%d batches in flight", len(pending))
	}
	ctx, cancel := context.WithCancel(t.Context())
	waiting := make(chan error)
	wait := func(ctx context.Context) {
		p, err := s.propose(ctx, Proposal{Records: make([]byte, one), Count: 1}, true)
		if err == nil {
			pending = append(pending, p)
		}
		waiting <- err
	}
	go wait(ctx)
	cancel()
	if err := <-waiting; !errors.Is(err, context.Canceled) {
		t.Errorf("a wait that was cancelled: %v", err)
	}
	go wait(t.Context())
	select {
	case err := <-waiting:
		t.Errorf("no wait: %v", err)
	default:
	}
	(<-n.applied).answer(nil)
	if err := <-waiting; err != nil {
		t.Errorf("with room again: %v", err)
	}
	go func() {
		for f := range n.applied {
			f.answer(nil)
		}
	}()
	for _, p := range pending {
		if _, err := result(p); err != nil {
			t.Error(err)
		}
	}
	close(n.applied) // nothing is in flight any more
}

// TestAppendTimes: they never fall, whatever the clock does, also over a restart.
func TestAppendTimes(t *testing.T) {
	dir := t.TempDir()
	start := time.Now().Add(time.Hour)
	var clock atomic.Int64
	cfg := testConfig(t, dir)
	cfg.Now = func() time.Time { return start.Add(time.Duration(clock.Load())) }
	var acks []Ack
	for range 2 {
		r := mustOpen(t, cfg)
		for _, at := range []time.Duration{0, 5, 3, -time.Hour, 5, 9} {
			clock.Store(int64(at))
			acks = append(acks, mustPropose(t, r, "0123456789abcdef", 1))
		}
		mustClose(t, r)
		clock.Store(0)
	}
	want := []time.Duration{0, 5, 5, 5, 5, 9, 9, 9, 9, 9, 9, 9}
	for i, ack := range acks {
		if got := ack.AppendTime.Sub(start.Round(0)); got != want[i] {
			t.Errorf("batch %d was appended at %d, want %d", i, got, want[i])
		}
	}
	r := mustOpen(t, cfg)
	defer mustClose(t, r)
	for at, want := range map[time.Duration]uint64{-time.Hour: 0, 0: 0, 1: 1, 5: 1, 6: 5, 9: 5, 10: 12, 1 << 40: 12} {
		if got, err := r.OffsetAtTime(start.Add(at)); err != nil || got != want {
			t.Errorf("offset at %d is %d (%v), want %d", at, got, err, want)
		}
	}
	for _, far := range []time.Time{{}, time.Unix(-1, 0), time.Unix(1<<40, 0)} {
		want := uint64(0)
		if far.After(start) {
			want = 12
		}
		if got, err := r.OffsetAtTime(far); err != nil || got != want {
			t.Errorf("offset at %v is %d (%v), want %d", far, got, err, want)
		}
	}
}

func TestReads(t *testing.T) {
	r := mustOpen(t, testConfig(t, t.TempDir()))
	defer mustClose(t, r)
	buf := make([]byte, 1<<10)
	var outside *OffsetOutOfRangeError
	if _, err := r.Read(0, buf, nil); !errors.As(err, &outside) || *outside != (OffsetOutOfRangeError{}) {
		t.Errorf("read of an empty log: %v", err)
	}
	waiting := make(chan error)
	go func() { waiting <- r.WaitReadable(t.Context(), 4) }()
	mustPropose(t, r, "abc", 3)
	select {
	case err := <-waiting:
		t.Errorf("woke for offset 4 at 3: %v", err)
	default:
	}
	mustPropose(t, r, "de", 2)
	if err := <-waiting; err != nil {
		t.Error(err)
	}
	batches, err := r.Read(1, buf, nil)
	if err != nil || len(batches) != 2 || batches[0].BaseOffset != 0 || !bytes.Equal(buf[batches[1].Start:batches[1].End], []byte("de")) {
		t.Errorf("%+v, %v", batches, err)
	}
	if _, err := r.Read(5, buf, nil); !errors.As(err, &outside) || *outside != (OffsetOutOfRangeError{5, 0, 5}) {
		t.Errorf("read at the end: %v", err)
	}
	if err := r.Linearize(t.Context()); err != nil {
		t.Error(err)
	}
	servers, err := r.Servers()
	if err != nil || len(servers) != 1 || servers[0].ID != "a" || servers[0].Address != "a:1" || !servers[0].Voter || !servers[0].Leader {
		t.Errorf("%+v, %v", servers, err)
	}
	st := r.Status()
	if st.State != "Leader" || !st.Ready || st.LeaderID != "a" || st.Log.NextOffset != 5 || st.Applied != st.Last || st.Term == 0 {
		t.Errorf("%+v", st)
	}
}

// TestLinearize: a term that was settled vouches for no other.
func TestLinearize(t *testing.T) {
	r := mustOpen(t, testConfig(t, t.TempDir()))
	defer mustClose(t, r)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	// Either is right: the answer may be there as soon as the end of ctx.
	if err := r.Linearize(ctx); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	term := r.seq.ready.Swap(1 << 40)
	if err := r.Linearize(t.Context()); !errors.Is(err, ErrNoLeader) {
		t.Errorf("settled in another term: %v", err)
	}
	r.seq.ready.Store(0)
	if err := r.Linearize(t.Context()); !errors.Is(err, ErrNoLeader) {
		t.Errorf("not settled: %v", err)
	}
	r.seq.ready.Store(term)
	// Leadership is asked for now, not remembered.
	for range 100 {
		if err := r.Linearize(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
