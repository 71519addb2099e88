package replica

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// TestClose: what is in flight is answered, what comes later is refused.
func TestClose(t *testing.T) {
	r := mustOpen(t, testConfig(t, t.TempDir()))
	mustPropose(t, r, "x", 1)
	waiting := make(chan error)
	go func() { waiting <- r.WaitReadable(context.Background(), 1<<40) }()
	mustClose(t, r)
	if err := <-waiting; err != ErrClosed {
		t.Errorf("wait over close: %v", err)
	}
	if err := r.Close(context.Background()); err != nil {
		t.Errorf("second close: %v", err)
	}
	ctx := testContext(t)
	_, readErr := r.Read(0, make([]byte, 1<<10), nil)
	_, timeErr := r.OffsetAtTime(r.cfg.Now())
	_, proposeErr := r.Propose(ctx, batchOf(1, 1), true)
	_, tryErr := r.Propose(ctx, batchOf(1, 1), false)
	for name, err := range map[string]error{
		"propose": proposeErr, "try": tryErr, "read": readErr, "linearize": r.Linearize(ctx),
		"wait": r.WaitReadable(ctx, 1<<40), "ready": r.WaitReady(ctx),
	} {
		if err != ErrClosed {
			t.Errorf("%s: %v", name, err)
		}
	}
	if timeErr != nil && timeErr != ErrClosed {
		t.Errorf("time: %v", timeErr)
	}
	if _, err := r.Servers(); err != nil {
		t.Error(err)
	}
	if st := r.Status(); st.State != "Shutdown" || st.Ready {
		t.Errorf("%+v", st)
	}
	r.Bounds()
}

// TestCloseUnderLoad closes while thousands of batches are in flight and every
// method is being called: each batch gets an answer, and the answers are true.
func TestCloseUnderLoad(t *testing.T) {
	for round := range 20 {
		dir := t.TempDir()
		r := mustOpen(t, testConfig(t, dir))
		ctx, cancel := context.WithCancel(context.Background())
		if round%4 == 3 {
			cancel() // no time at all
		}
		var mu sync.Mutex
		var all []acked
		var id atomic.Uint64
		var wg, started sync.WaitGroup
		started.Add(8)
		for range 8 {
			wg.Go(func() {
				var pending []*Pending
				var ids []uint64
				for n := 0; ; n++ {
					if n == 50 {
						started.Done()
					}
					i := id.Add(1)
					p, err := r.Propose(context.Background(), batchOf(i, 2), true)
					if err != nil {
						if err != ErrClosed {
							t.Errorf("propose: %v", err)
						}
						break
					}
					pending, ids = append(pending, p), append(ids, i)
				}
				for n, p := range pending {
					ack, err := result(p)
					switch {
					case err == nil:
						mu.Lock()
						all = append(all, acked{ids[n], 2, ack})
						mu.Unlock()
					case err == ErrClosed:
					case round%4 != 3 || !errors.Is(err, ErrUnknownOutcome):
						t.Errorf("batch %d: %v", ids[n], err)
					}
				}
			})
		}
		ask := func(f func() error) {
			wg.Go(func() {
				for f() == nil {
				}
			})
		}
		ask(func() error { return r.Linearize(context.Background()) })
		ask(func() error { return r.Linearize(context.Background()) })
		ask(func() error { _, watermark, _ := r.Bounds(); return r.WaitReadable(context.Background(), watermark) })
		ask(func() error { _, err := r.Read(0, make([]byte, 2<<20), nil); r.Status(); return err })
		started.Wait()
		err := r.Close(ctx)
		if round%4 != 3 && err != nil || err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		wg.Wait()
		cancel()
		r = mustOpen(t, testConfig(t, dir))
		if err := checkAcked(r, all); err != nil {
			t.Errorf("after %d acknowledged batches: %v", len(all), err)
		}
		mustClose(t, r)
	}
}

// TestCloseBeforeLeading does not wait for what will never be.
func TestCloseBeforeLeading(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	cfg.Bootstrap = nil // a server that nobody has asked to join
	r, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Propose(t.Context(), batchOf(1, 1), true); !errors.Is(err, ErrNoLeader) {
		t.Errorf("propose: %v", err)
	}
	if err := r.Linearize(t.Context()); !errors.Is(err, ErrNoLeader) {
		t.Errorf("linearize: %v", err)
	}
	if servers, err := r.Servers(); err != nil || len(servers) > 0 {
		t.Errorf("%v, %v", servers, err)
	}
	waiting := make(chan error)
	go func() { waiting <- r.WaitReady(context.Background()) }()
	mustClose(t, r)
	if err := <-waiting; err != ErrClosed {
		t.Errorf("wait: %v", err)
	}
}

// TestDiskFailure fails one write, sync or rename after a while: nothing that
// was acknowledged is lost, nothing is acknowledged later, somebody is told
// once, and nobody waits for ever.
func TestDiskFailure(t *testing.T) {
	broken := errors.New("broken disk")
	for _, kind := range []string{"write", "sync", "rename", "syncdir", "create"} {
		dir := t.TempDir()
		fs := vfstest.New()
		cfg := memConfig(dir, fs)
		var told atomic.Int32
		cfg.OnFatal = func(err error) {
			if told.Add(1); !errors.Is(err, broken) {
				t.Errorf("%s: told of %v", kind, err)
			}
		}
		r := mustOpen(t, cfg)
		var all []acked
		for i := range uint64(20) {
			p := batchOf(i, 3)
			all = append(all, acked{i, 3, mustPropose(t, r, string(p.Records), p.Count)})
		}
		var n atomic.Int32
		fs.SetHook(func(op vfstest.Op) error {
			if strings.Contains(op.Name, "/snapshots") {
				return nil // these can fail without harm
			}
			if op.Kind == kind && n.Add(1) > 3 {
				return broken
			}
			return nil
		})
		var mu sync.Mutex
		var wg sync.WaitGroup
		for w := range uint64(8) {
			wg.Go(func() {
				for i := uint64(0); ; i++ {
					id := w<<32 | i + 1000
					p, err := r.Propose(context.Background(), batchOf(id, 3), true)
					if err != nil {
						if r.Err() == nil && !errors.Is(err, ErrNoLeader) {
							t.Errorf("%s: refused before the failure: %v", kind, err)
						}
						if r.Err() != nil {
							return
						}
						continue
					}
					ack, err := result(p)
					if err == nil {
						mu.Lock()
						all = append(all, acked{id, 3, ack})
						mu.Unlock()
					} else if !errors.Is(err, ErrUnknownOutcome) && !errors.Is(err, ErrNoLeader) {
						t.Errorf("%s: %v", kind, err)
					}
				}
			})
		}
		<-r.Failed()
		wg.Wait()
		if err := r.Err(); !errors.Is(err, broken) {
			t.Errorf("%s: %v", kind, err)
		}
		if err := r.WaitReady(testContext(t)); err == nil && r.gens.log().Err() != nil {
			t.Logf("%s: ready for a moment", kind)
		}
		if err := r.Close(context.Background()); !errors.Is(err, logstore.ErrFailed) {
			t.Errorf("%s: close: %v", kind, err)
		}
		if told.Load() != 1 {
			t.Errorf("%s: told %d times", kind, told.Load())
		}
		fs.SetHook(nil)
		cfg.OnFatal = nil
		rng := vfstest.Rand(t)
		for _, survive := range []vfstest.Survival{vfstest.None, vfstest.Some, vfstest.All} {
			cfg.FS = fs.CrashClone(rng, survive)
			r := mustOpen(t, cfg)
			if err := checkAcked(r, all); err != nil {
				t.Errorf("%s, %v survive: %v", kind, survive, err)
			}
			mustClose(t, r)
		}
	}
}

// TestVoteFailure: a term or vote that could not be written.
func TestVoteFailure(t *testing.T) {
	var told []error
	cfg := testConfig(t, t.TempDir())
	cfg.OnFatal = func(err error) { told = append(told, err) }
	r := mustOpen(t, cfg)
	if err := r.stable.Close(); err != nil {
		t.Fatal(err)
	}
	err := r.stable.Set(keyLastVoteCand, []byte("b"))
	<-r.Failed()
	if err == nil || len(told) != 1 {
		t.Errorf("%v, told %v", err, told)
	}
	if _, err := r.Propose(t.Context(), batchOf(1, 1), true); err != told[0] {
		t.Errorf("propose: %v", err)
	}
	_ = r.Close(context.Background())
}

// TestHungDisk: a sync that does not return keeps neither proposals nor Close
// waiting; what the disk holds in the end is found on the next start.
func TestHungDisk(t *testing.T) {
	dir := t.TempDir()
	fs := vfstest.New()
	cfg := memConfig(dir, fs)
	r := mustOpen(t, cfg)
	first := mustPropose(t, r, string(batchOf(1, 2).Records), 2)
	hung, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	fs.SetHook(func(op vfstest.Op) error {
		if op.Kind == "sync" && strings.HasSuffix(op.Name, ".log") {
			once.Do(func() { close(hung) })
			<-release
		}
		return nil
	})
	p, err := r.Propose(context.Background(), batchOf(2, 2), true)
	if err != nil {
		t.Fatal(err)
	}
	<-hung
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := r.Close(ctx); err == nil || !strings.Contains(err.Error(), "waits for the disk") {
		t.Errorf("close: %v", err)
	}
	if _, err := result(p); !errors.Is(err, ErrUnknownOutcome) {
		t.Errorf("in flight: %v", err)
	}
	// So that the next one can have the files; a process would have ended.
	clone := fs.CrashClone(vfstest.Rand(t), vfstest.None)
	fs.SetHook(nil)
	close(release)
	<-r.abandoned
	cfg.FS = clone
	r = mustOpen(t, cfg)
	defer mustClose(t, r)
	if err := checkAcked(r, []acked{{1, 2, first}}); err != nil {
		t.Error(err)
	}
}
