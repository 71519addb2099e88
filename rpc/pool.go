package rpc

import (
	"sync"
	"sync/atomic"
)

// chunkTiers are the capacities in which buffers for reads are kept. The
// smallest is what a reader that follows the tail of the log holds.
var chunkTiers = [...]int{16 << 10, 64 << 10, 256 << 10, 1<<20 + 128<<10, 4 << 20}

// chunkPool is a mem.BufferPool for the buffers that reads fill and responses
// are sent from. Other than gRPC's own pools it does not wipe what it hands
// out: nobody sees more of a buffer than a read has just written.
type chunkPool struct {
	tiers [len(chunkTiers)]sync.Pool
	// out counts buffers handed out and not yet returned. gRPC drops some
	// unreturned when a connection breaks, so nothing may wait for it.
	out atomic.Int64
}

func (p *chunkPool) Get(length int) *[]byte {
	p.out.Add(1)
	for i, size := range chunkTiers {
		if length > size {
			continue
		}
		if b, ok := p.tiers[i].Get().(*[]byte); ok {
			*b = (*b)[:length]
			return b
		}
		b := make([]byte, length, size)
		return &b
	}
	b := make([]byte, length)
	return &b
}

func (p *chunkPool) Put(b *[]byte) {
	p.out.Add(-1)
	for i, size := range chunkTiers {
		if cap(*b) == size {
			p.tiers[i].Put(b)
			return
		}
	}
}
