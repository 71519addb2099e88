package replica

import (
	"context"
	"sync"
	"sync/atomic"
)

// watermark is the high watermark: a number that only grows, and that any
// number of readers can wait for.
type watermark struct {
	value atomic.Uint64

	mu     sync.Mutex
	moved  chan struct{} // closed by the next move; nil while nobody waits
	closed bool
}

func (w *watermark) load() uint64 { return w.value.Load() }

// advance is called by one goroutine.
func (w *watermark) advance(to uint64) {
	if to <= w.value.Load() {
		return
	}
	w.value.Store(to)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.moved != nil {
		close(w.moved)
		w.moved = nil
	}
}

// wait returns once the watermark is above offset.
func (w *watermark) wait(ctx context.Context, offset uint64) error {
	for {
		if w.value.Load() > offset {
			return nil
		}
		w.mu.Lock()
		if w.closed {
			w.mu.Unlock()
			return ErrClosed
		}
		if w.moved == nil {
			w.moved = make(chan struct{})
		}
		moved := w.moved
		w.mu.Unlock()
		// Again: it may have moved between the load above and the lock, and
		// then nobody closes the channel that was made after it.
		if w.value.Load() > offset {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// close ends all waits.
func (w *watermark) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	if w.moved != nil {
		close(w.moved)
		w.moved = nil
	}
}
