package replica

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// hang makes every write and sync of a disk wait until the test's end.
func hang(t *testing.T, disk *vfstest.Mem) (release func()) {
	t.Helper()
	free := make(chan struct{})
	disk.SetHook(func(op vfstest.Op) error {
		if op.Kind == "sync" || op.Kind == "write" {
			<-free
		}
		return nil
	})
	return sync.OnceFunc(func() { close(free) })
}

// TestLeaderDisk: a leader whose disk hangs, or fails once, is replaced, and
// what it acknowledged is there.
func TestLeaderDisk(t *testing.T) {
	for name, tc := range map[string]struct {
		fail    func(t *testing.T, disk *vfstest.Mem) (release func())
		want    error
		within  int // election timeouts, until the next leader's first acknowledgement
		endless bool
	}{
		"hangs": {hang, ErrStalled, 3, true},
		"fails once": {func(t *testing.T, disk *vfstest.Mem) func() {
			once := sync.OnceValue(func() error { return io.ErrUnexpectedEOF })
			failed := false
			disk.SetHook(func(op vfstest.Op) error {
				if op.Kind == "sync" && strings.HasSuffix(op.Name, ".log") && !failed {
					failed = true
					return once()
				}
				return nil
			})
			return func() {}
		}, logstore.ErrFailed, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGroup(t, 3, nil)
				release := func() {}
				defer func() { release(); g.stop() }()
				ctx, cancel := g.within(10)
				defer cancel()
				old := g.leader(ctx)
				var all []acked
				for id := range uint64(20) {
					b := batchOf(id, 3)
					all = append(all, acked{id, 3, mustPropose(t, old, string(b.Records), 3)})
				}
				release = tc.fail(t, g.disks[old.cfg.ID])
				lost, err := old.Propose(ctx, batchOf(100, 1), true)
				if err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				soon, cancel := g.within(tc.within)
				defer cancel()
				next := g.leader(soon, g.others(old.cfg.ID)...)
				p, err := next.Propose(soon, batchOf(101, 2), true)
				if err != nil {
					t.Fatal(err)
				}
				select {
				case <-p.Done():
				case <-soon.Done():
					t.Fatal("no acknowledgement in time")
				}
				ack, err := p.Result()
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("acknowledged by the next leader after %v", time.Since(begin))
				all = append(all, acked{101, 2, ack})
				<-old.Failed()
				if !errors.Is(old.Err(), tc.want) {
					t.Errorf("the old leader says %v", old.Err())
				}
				if _, err := result(lost); !errors.Is(err, ErrUnknownOutcome) {
					t.Errorf("in flight: %v", err)
				}
				if _, err := old.Propose(ctx, batchOf(102, 1), true); err == nil {
					t.Error("the old leader takes proposals")
				}
				for _, id := range g.others(old.cfg.ID) {
					index, err := next.ReadIndex(ctx)
					if err != nil {
						t.Fatal(err)
					}
					if err := g.nodes[id].WaitApplied(ctx, index); err != nil {
						t.Fatal(err)
					}
					if err := checkAcked(g.nodes[id], all); err != nil {
						t.Errorf("%s: %v", id, err)
					}
				}
				// Not even what its disk does in the end brings it back.
				release()
				time.Sleep(time.Minute)
				if old.raft.State() == raft.Leader && old.seq.ready.Load() > 0 || next.seq.ready.Load() == 0 {
					t.Error("the old leader is back")
				}
			})
		})
	}
}

// TestFollowerDisk: a follower whose disk hangs is no loss to the others.
func TestFollowerDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		ctx, cancel := g.within(10)
		defer cancel()
		leader := g.leader(ctx)
		mustPropose(t, leader, "x", 1)
		term := leader.raft.CurrentTerm()
		victim := g.nodes[g.others(leader.cfg.ID)[0]]
		release := hang(t, g.disks[victim.cfg.ID])
		defer func() { release(); g.stop() }()
		for range 100 {
			mustPropose(t, leader, "x", 1)
			time.Sleep(100 * time.Millisecond)
		}
		<-victim.Failed()
		if !errors.Is(victim.Err(), ErrStalled) {
			t.Error(victim.Err())
		}
		if leader.seq.ready.Load() != term {
			t.Errorf("the leader of term %d leads in %d", term, leader.seq.ready.Load())
		}
	})
}

// TestPausedProcess: a process that did not run for a while has not seen its
// disk hang.
func TestPausedProcess(t *testing.T) {
	w := newWatchdog(time.Second, func(string) {})
	release, returned := make(chan struct{}), make(chan error)
	begun := make(chan struct{})
	go func() {
		returned <- w.do("x", func() error { close(begun); <-release; return nil })
	}()
	<-begun
	for tick := range watchdogTicks {
		if what := w.tick(); what != "" {
			t.Fatalf("tick %d: %s", tick, what)
		}
	}
	if what := w.tick(); what != "x" {
		t.Errorf("not noticed: %q", what)
	}
	if what := w.tick(); what != "" {
		t.Errorf("said twice")
	}
	w.dead.Store(true)
	close(release)
	if err := <-returned; err != errSevered {
		t.Errorf("too late: %v", err)
	}
	if err := w.do("y", func() error { return nil }); err != errSevered {
		t.Errorf("afterwards: %v", err)
	}
}

// TestSlowAlone: a group of one has nobody to hand over to.
func TestSlowAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 1, nil)
		defer g.stop()
		ctx, cancel := g.within(10)
		defer cancel()
		r := g.leader(ctx)
		release := hang(t, g.disks["a"])
		p, err := r.Propose(ctx, batchOf(1, 1), true)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * r.cfg.StallLimit)
		release()
		if _, err := result(p); err != nil || r.Err() != nil {
			t.Errorf("%v, %v", err, r.Err())
		}
	})
}

// TestDeadStores: after a failure nothing is stored, no vote is given, and
// Raft's goroutines end instead of panicking.
func TestDeadStores(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		defer g.stop()
		ctx, cancel := g.within(10)
		defer cancel()
		leader := g.leader(ctx)
		damage := &logstore.CorruptError{File: "x", Detail: "rot"}
		leader.broken(damage)
		leader.broken(errors.New("a second one"))
		<-leader.Failed()
		var corrupt *logstore.CorruptError
		if err := leader.Err(); !errors.Is(err, ErrDamaged) || !errors.As(err, &corrupt) {
			t.Errorf("%v", err)
		}
		store, stable := watchedLog{nil, leader.dog}, watchedStable{nil, leader.dog}
		if err := store.StoreLogs(nil); err != errSevered {
			t.Error(err)
		}
		if err := stable.Set(keyLastVoteCand, nil); err != errSevered {
			t.Error(err)
		}
		for _, f := range []func(){
			func() { _ = stable.SetUint64(keyCurrentTerm, 1) },
			func() { _ = store.GetLog(1, nil) },
		} {
			returned := false
			<-after(func() { f(); returned = true })
			if returned {
				t.Error("returned to Raft")
			}
		}
		begin := time.Now()
		soon, cancel := g.within(1)
		defer cancel()
		mustPropose(t, g.leader(soon, g.others(leader.cfg.ID)...), "y", 1)
		t.Logf("the next leader's first acknowledgement: %v later", time.Since(begin))
	})
}

// TestCloseHandsOver: a leader that closes is not missed, and what it answers in
// the meantime is definite.
func TestCloseHandsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		defer g.stop()
		ctx, cancel := g.within(10)
		defer cancel()
		old := g.leader(ctx)
		others := g.others(old.cfg.ID)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		var mu sync.Mutex
		var all []acked
		for i := range uint64(8) {
			wg.Go(func() {
				for id := i * 1e6; ; id++ {
					select {
					case <-stop:
						return
					case <-time.After(time.Millisecond):
					}
					p, err := old.Propose(context.Background(), batchOf(id, 2), true)
					var ack Ack
					if err == nil {
						ack, err = result(p)
					}
					var elsewhere *NotLeaderError
					switch {
					case err == nil:
						mu.Lock()
						all = append(all, acked{id, 2, ack})
						mu.Unlock()
					case errors.As(err, &elsewhere), errors.Is(err, ErrNoLeader):
					case errors.Is(err, ErrClosed):
						return
					default:
						t.Errorf("%v", err)
						return
					}
				}
			})
		}
		time.Sleep(100 * time.Millisecond)
		begin := time.Now()
		if err := old.Close(ctx); err != nil {
			t.Error(err)
		}
		close(stop)
		wg.Wait()
		soon, cancel := g.within(1)
		defer cancel()
		next := g.leader(soon, others...)
		mustPropose(t, next, string(batchOf(1<<40, 1).Records), 1)
		t.Logf("closed and led by another after %v; %d acknowledged", time.Since(begin), len(all))
		if err := checkAcked(next, all); err != nil {
			t.Error(err)
		}
	})
}

// TestTransferToOneThatHangs: a voter that was to take over and whose disk hangs is
// not asked twice, which Raft's goroutines for it would wait for ever after; the
// choice is then another one.
func TestTransferToOneThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, func(c *Config) {
			c.StallLimit = time.Hour
			c.Autopilot.LastContactThreshold = time.Hour // it seems well
		})
		ctx, cancel := g.within(100)
		defer cancel()
		leader := g.settled(ctx)
		victim := g.others(leader.cfg.ID)[0]
		release := hang(t, g.disks[victim])
		defer func() { release(); g.stop() }()
		mustPropose(t, leader, "x", 1)
		if err := leader.TransferLeadership(ctx, victim); err == nil || errors.Is(err, ErrNoSuccessor) {
			t.Fatalf("the first time: %v", err)
		}
		synctest.Wait() // Raft still clears up
		if err := leader.TransferLeadership(ctx, victim); !errors.Is(err, ErrNoSuccessor) {
			t.Fatalf("the second time: %v", err)
		}
		if err := leader.TransferLeadership(ctx, ""); err != nil {
			t.Fatal(err)
		}
		next := g.leader(ctx, g.others(leader.cfg.ID)...)
		if next.cfg.ID == victim {
			t.Error("the one that hangs leads")
		}
		// When it has caught up it can be asked again.
		release()
		if err := g.nodes[victim].WaitReadable(ctx, 0); err != nil {
			t.Fatal(err)
		}
		if err := g.settled(ctx, next.cfg.ID).TransferLeadership(ctx, victim); err != nil {
			t.Error(err)
		}
	})
}
