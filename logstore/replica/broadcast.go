package replica

import "sync"

// broadcast wakes everybody who waits for the next of many events.
type broadcast struct {
	mu sync.Mutex
	ch chan struct{}
}

// next returns what the next poke closes.
func (b *broadcast) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *broadcast) poke() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}
