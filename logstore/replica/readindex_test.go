package replica

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestReadIndex: a follower that has waited for the leader's index has what was
// acknowledged before.
func TestReadIndex(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		defer g.stop()
		ctx, cancel := g.within(100)
		defer cancel()
		leader := g.leader(ctx)
		for i := range 50 {
			ack := mustPropose(t, leader, "x", 1)
			index, err := leader.ReadIndex(ctx)
			if err != nil {
				t.Fatal(err)
			}
			f := g.nodes[g.others(leader.cfg.ID)[i%2]]
			if err := f.WaitApplied(ctx, index); err != nil {
				t.Fatal(err)
			}
			if _, watermark, _ := f.Bounds(); watermark < ack.NextOffset {
				t.Fatalf("readable up to %d, acknowledged up to %d", watermark, ack.NextOffset)
			}
			if _, err := f.ReadIndex(ctx); err == nil {
				t.Fatal("a follower gives an index")
			}
		}
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if err := leader.WaitApplied(short, 1<<40); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

// TestReadIndexAfterRestart: entries that no state machine is shown, at the end
// of a snapshot, are nothing to wait for.
func TestReadIndexAfterRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		defer g.stop()
		ctx, cancel := g.within(100)
		defer cancel()
		mustPropose(t, g.leader(ctx), "x", 1)
		for range 2 {
			for _, id := range g.ids {
				if err := g.nodes[id].Close(ctx); err != nil {
					t.Fatal(err)
				}
				g.start(id)
			}
			leader := g.leader(ctx)
			index, err := leader.ReadIndex(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, id := range g.ids {
				soon, cancel := g.within(3)
				defer cancel()
				if err := g.nodes[id].WaitApplied(soon, index); err != nil {
					t.Errorf("%s at %d, waiting for %d: %v", id, g.nodes[id].applied.Load(), index, err)
				}
			}
		}
	})
}

// TestDeposedLeader: one that was cut off, and that others have replaced, gives no
// index, neither before nor after it learns of that.
func TestDeposedLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		defer g.stop()
		ctx, cancel := g.within(1000)
		defer cancel()
		for range 20 {
			old := g.settled(ctx)
			others := g.others(old.cfg.ID)
			mustPropose(t, old, "x", 1)
			g.net.isolate(old.cfg.ID, true, others...)
			asked := make(chan error, 1)
			go func() {
				var err error
				for err == nil {
					_, err = old.ReadIndex(ctx)
				}
				asked <- err
			}()
			next := g.leader(ctx, others...)
			mustPropose(t, next, "y", 1)
			g.net.isolate(old.cfg.ID, false, others...)
			if err := <-asked; !errors.Is(err, ErrNoLeader) && !errors.As(err, new(*NotLeaderError)) {
				t.Error(err)
			}
			if _, err := old.ReadIndex(ctx); err == nil {
				t.Error("an index from a deposed leader")
			}
		}
	})
}

// TestLateAnswers shows why Raft's own check is not asked: an answer to a
// heartbeat of before the question says nothing of now.
func TestLateAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, func(c *Config) {
			if c.ID == "a" {
				// It can be deposed without noticing, as a process is that was stopped.
				c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = time.Minute, time.Minute, time.Minute
			}
		})
		defer g.stop()
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		defer cancel()
		old := g.settled(ctx)
		if old.cfg.ID != "a" {
			if err := old.TransferLeadership(ctx, "a"); err != nil {
				t.Fatal(err)
			}
			old = g.leader(ctx, "a")
		}
		ack := mustPropose(t, old, "x", 1)
		others := g.others("a")
		time.Sleep(time.Second)
		// The others hear a, and their answers are held back.
		for _, id := range others {
			g.net.set(id, "a", true)
		}
		time.Sleep(20 * time.Second) // at least one heartbeat of a's
		for _, id := range others {
			g.net.set("a", id, true)
		}
		next := g.leader(ctx, others...)
		later := mustPropose(t, next, "y", 1)
		if later.BaseOffset < ack.NextOffset || old.raft.State().String() != "Leader" {
			t.Fatalf("%+v, %+v", later, old.Status())
		}
		asked := make(chan error, 1)
		go func() {
			_, err := old.ReadIndex(ctx)
			asked <- err
		}()
		synctest.Wait()
		for _, id := range others { // now they arrive
			g.net.set(id, "a", false)
		}
		time.Sleep(time.Second)
		select {
		case err := <-asked:
			if err == nil {
				t.Error("an index, though another leads and has acknowledged more")
			}
		default: // it still waits for an answer
		}
		g.net.isolate("a", false, others...)
		if err := <-asked; err == nil {
			t.Error("an index from a deposed leader")
		}
	})
}
