package agent

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// TestSim runs many short histories of clusters under random mixes of faults,
// and holds each against what is promised and against some sequential order.
// DIURNA_HISTORIES says how many, DIURNA_SEED from which one on.
func TestSim(t *testing.T) {
	histories := vfstest.Env(t, "DIURNA_HISTORIES", 200/simScale)
	if testing.Short() {
		histories = min(histories, 10)
	}
	first := uint64(vfstest.Env(t, "DIURNA_SEED", int(rand.Uint64()>>2)))
	t.Logf("seed: DIURNA_SEED=%d", first)
	var acked, refused, unknown, reads, lives, terms atomic.Int64
	t.Run("histories", func(t *testing.T) {
		next := make(chan uint64)
		for range runtime.GOMAXPROCS(0) {
			t.Run("", func(t *testing.T) {
				t.Parallel()
				for seed := range next {
					t.Run(fmt.Sprint(seed), func(t *testing.T) {
						h := simHistory(t, seed)
						a, r, u, n := h.count()
						acked.Add(int64(a))
						refused.Add(int64(r))
						unknown.Add(int64(u))
						reads.Add(int64(n))
						lives.Add(int64(h.lives))
						terms.Add(int64(h.terms))
					})
				}
			})
		}
		go func() {
			defer close(next)
			for i := range histories {
				next <- first + uint64(i)
			}
		}()
	})
	t.Logf("%d histories: %d appends acknowledged, %d refused, %d in doubt; %d reads; %d lives of nodes, %d terms",
		histories, acked.Load(), refused.Load(), unknown.Load(), reads.Load(), lives.Load(), terms.Load())
	if acked.Load() == 0 || unknown.Load() == 0 {
		t.Error("nothing was acknowledged, or nothing left in doubt")
	}
}

// simHistory is one random history.
func simHistory(t *testing.T, seed uint64) *history {
	rng := rand.New(rand.NewPCG(seed, 0))
	opts := simOptions{nodes: 3, clients: 5, registry: rng.IntN(2) == 0}
	if rng.IntN(8) == 0 {
		opts.nodes = 5
	}
	quick := rng.IntN(3) == 0
	opts.tune = func(_ *simNode, cfg *config.Config) {
		if quick {
			cfg.Raft.CommitTimeout = 5 * time.Millisecond
		}
	}
	faults := 2 + rng.IntN(10)
	return simulate(t, seed, opts, func(c *simCluster) {
		c.awaitReady(c.nodes...)
		c.clients[0].follow, c.clients[1].user = true, true
		for _, cl := range c.clients[1:] {
			cl.limit = 40
		}
		c.work(func() { c.mix(faults, 15*time.Second, simFaults) })
		c.mend()
		c.audit()
		c.h.terms = c.term()
		for _, n := range c.nodes {
			c.h.lives += n.place().life
		}
	})
}
