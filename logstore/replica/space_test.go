package replica

import (
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// sizedFS is a filesystem with as much free space as the test says.
type sizedFS struct {
	vfs.FS
	free *atomic.Uint64
}

func (s sizedFS) Free(string) (uint64, error) { return s.free.Load(), nil }

// TestFullDisk: a leader with too little space takes no more records and hands
// leadership over; it goes on by itself when there is more. One that has nobody
// to hand it to refuses, and keeps leading.
func TestFullDisk(t *testing.T) {
	for _, n := range []int{1, 3} {
		synctest.Test(t, func(t *testing.T) {
			free := map[string]*atomic.Uint64{}
			g := newGroup(t, n, func(c *Config) {
				free[c.ID] = &atomic.Uint64{}
				free[c.ID].Store(1000)
				c.FS, c.MinFreeBytes = sizedFS{c.FS, free[c.ID]}, 100
			})
			defer g.stop()
			ctx, cancel := g.within(100)
			defer cancel()
			old := g.settled(ctx)
			mustPropose(t, old, "x", 1)
			free[old.cfg.ID].Store(99)
			time.Sleep(2 * time.Second)
			var elsewhere *NotLeaderError
			if _, err := old.Propose(ctx, batchOf(1, 1), true); n == 1 && !errors.Is(err, ErrDiskFull) || n > 1 && !errors.As(err, &elsewhere) {
				t.Errorf("%d: %v", n, err)
			}
			if n > 1 {
				mustPropose(t, g.leader(ctx, g.others(old.cfg.ID)...), "y", 1)
			} else if old.raft.State().String() != "Leader" {
				t.Error("nobody leads")
			}
			if _, err := old.Read(0, make([]byte, 100), nil); err != nil {
				t.Errorf("read: %v", err)
			}
			// Not at the very limit, where it would change all the time.
			free[old.cfg.ID].Store(110)
			time.Sleep(2 * time.Second)
			if !old.space.full.Load() {
				t.Error("resumed too soon")
			}
			free[old.cfg.ID].Store(125)
			time.Sleep(2 * time.Second)
			if n > 1 {
				if err := g.settled(ctx).TransferLeadership(ctx, old.cfg.ID); err != nil {
					t.Fatal(err)
				}
			}
			mustPropose(t, g.leader(ctx, old.cfg.ID), "z", 1)
			// All of them: nobody takes records, and leadership does not go round.
			for _, f := range free {
				f.Store(1)
			}
			time.Sleep(5 * time.Second)
			term := old.raft.CurrentTerm()
			time.Sleep(50 * time.Second)
			if now := old.raft.CurrentTerm(); now > term+1 {
				t.Errorf("from term %d to %d in a minute", term, now)
			}
			for _, f := range free {
				f.Store(1000)
			}
			time.Sleep(2 * time.Second)
			mustPropose(t, g.leader(ctx), "z", 1)
		})
	}
}
