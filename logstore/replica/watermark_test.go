package replica

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

func TestWatermarkWait(t *testing.T) {
	var w watermark
	ctx, cancel := context.WithCancel(context.Background())
	w.advance(3)
	w.advance(2) // Raft applies entries again after a restart
	if w.load() != 3 {
		t.Fatalf("watermark is %d, want 3", w.load())
	}
	if err := w.wait(ctx, 2); err != nil {
		t.Fatal(err)
	}

	waiting := make(chan error)
	go func() { waiting <- w.wait(ctx, 3) }()
	cancel()
	if err := <-waiting; !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled wait: %v", err)
	}
	w.moved = nil // what the cancelled one left

	go func() { waiting <- w.wait(context.Background(), 3) }()
	for inLine := false; !inLine; runtime.Gosched() {
		w.mu.Lock()
		inLine = w.moved != nil
		w.mu.Unlock()
	}
	w.close()
	if err := <-waiting; err != ErrClosed {
		t.Fatalf("wait over close: %v", err)
	}
	if err := w.wait(context.Background(), 3); err != ErrClosed {
		t.Fatalf("wait after close: %v", err)
	}
	if err := w.wait(context.Background(), 2); err != nil {
		t.Fatalf("wait after close for what is there: %v", err)
	}
}

// TestWatermarkWakesEveryone has waiters follow a watermark that another
// goroutine moves as fast as it can: a lost wakeup leaves one waiting for ever.
func TestWatermarkWakesEveryone(t *testing.T) {
	var w watermark
	const moves, waiters = 20000, 16
	ctx := testContext(t)
	var wg sync.WaitGroup
	for i := range waiters {
		wg.Go(func() {
			for next := uint64(0); next < moves; {
				if err := w.wait(ctx, next); err != nil {
					t.Errorf("waiter %d at %d: %v", i, next, err)
					return
				}
				got := w.load()
				if got <= next {
					t.Errorf("waiter %d woke at %d for %d", i, got, next)
					return
				}
				// Some follow closely, some wait for the far end.
				next = got + uint64(i)
			}
		})
	}
	for i := range uint64(moves) {
		w.advance(i + 1)
	}
	wg.Wait()
}

// TestWatermarkRace lets one wait and one move begin at the same moment, again
// and again, so that now and then the move falls between the wait's look at the
// number and its getting in line.
func TestWatermarkRace(t *testing.T) {
	var w watermark
	var round atomic.Uint64
	const rounds = 100000
	ctx := testContext(t)
	done := make(chan error, 1)
	go func() {
		for i := range uint64(rounds) {
			for round.Load() <= i {
				runtime.Gosched()
			}
			for range i % 32 { // shifts the two against each other
				round.Load()
			}
			done <- w.wait(ctx, i)
		}
	}()
	for i := range uint64(rounds) {
		round.Store(i + 1)
		for range i / 32 % 32 {
			round.Load()
		}
		w.advance(i + 1)
		if err := <-done; err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
	}
}

func TestWatermarkCloseWakesEveryone(t *testing.T) {
	for range 200 {
		var w watermark
		var wg sync.WaitGroup
		for i := range uint64(8) {
			wg.Go(func() {
				if err := w.wait(context.Background(), i); i < 4 && err != nil && err != ErrClosed || i >= 4 && err != ErrClosed {
					t.Errorf("waiter for %d: %v", i, err)
				}
			})
		}
		wg.Go(func() { w.advance(4); w.close() })
		wg.Wait()
	}
}
