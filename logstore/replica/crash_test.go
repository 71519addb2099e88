package replica

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// promises is what proposers were told, together.
type promises struct {
	mu  sync.Mutex
	all []acked
}

func (p *promises) add(a acked) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all = append(p.all, a)
}

func (p *promises) sofar() []acked {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clip(p.all)
}

// crashPoint is a disk as a crash left it, and what had been promised before.
type crashPoint struct {
	when     string
	disk     *vfstest.Mem
	promised []acked
}

// TestCrash cuts the power at random operations while batches are proposed,
// segments roll and snapshots are taken: afterwards all that was acknowledged
// is where it was said to be, nothing is there twice, and the log goes on.
func TestCrash(t *testing.T) {
	rng := vfstest.Rand(t)
	want := vfstest.Env(t, "DIURNA_CRASH_POINTS", 400)
	dir := "data"
	for points := 0; points < want; {
		disk := vfstest.New()
		for generation := range 3 { // the second runs on what the first left
			crashes := runUntilCrashed(t, dir, disk, rng, uint64(generation)<<48, 20)
			points += len(crashes)
			for _, c := range crashes {
				if err := checkCrash(t, dir, c); err != nil {
					t.Fatalf("generation %d, %s, %d batches acknowledged: %v", generation, c.when, len(c.promised), err)
				}
			}
			disk = crashes[len(crashes)-1].disk
		}
	}
}

// runUntilCrashed proposes batches and crashes n times, on the side: the
// replica itself lives on until it is closed.
func runUntilCrashed(t *testing.T, dir string, disk *vfstest.Mem, rng *rand.Rand, firstID uint64, n int) []crashPoint {
	t.Helper()
	r := mustOpen(t, memConfig(dir, disk))
	var told promises
	var mu sync.Mutex // of what follows, for the hook
	var crashes []crashPoint
	chance := rand.New(rand.NewPCG(rng.Uint64(), 1))
	enough := make(chan struct{})
	disk.SetHook(func(op vfstest.Op) error {
		mu.Lock()
		defer mu.Unlock()
		if len(crashes) == n || chance.IntN(10) > 0 {
			return nil
		}
		// In this order: what is promised afterwards need not survive.
		promised := told.sofar()
		survive := vfstest.Survival(chance.IntN(3))
		when := fmt.Sprintf("crash before %v, %v survives", op, survive)
		crashes = append(crashes, crashPoint{when, disk.CrashClone(chance, survive), promised})
		if len(crashes) == n {
			close(enough)
		}
		return nil
	})
	var wg sync.WaitGroup
	for w := range uint64(4) {
		sizes := rand.New(rand.NewPCG(rng.Uint64(), 2))
		wg.Go(func() {
			for i := uint64(0); ; i++ {
				select {
				case <-enough:
					return
				default:
				}
				id := firstID | w<<40 | i
				count := 1 + sizes.IntN(30)
				p, err := r.Propose(t.Context(), batchOf(id, count), true)
				if err != nil {
					t.Error(err)
					return
				}
				ack, err := result(p)
				if err != nil {
					t.Error(err)
					return
				}
				told.add(acked{id, count, ack})
			}
		})
	}
	wg.Go(func() {
		for {
			select {
			case <-enough:
				return
			default:
			}
			if err := r.raft.Snapshot().Error(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
				t.Error(err)
				return
			}
		}
	})
	wg.Wait()
	<-enough
	disk.SetHook(nil)
	if err := checkAcked(r, told.all); err != nil {
		t.Fatalf("without a crash: %v", err)
	}
	term := r.raft.CurrentTerm()
	mustClose(t, r)
	if known, err := reopenVote(disk, dir); err != nil || known.term != term {
		t.Fatalf("%+v, %v; the term was %d", known, err, term)
	}
	return crashes
}

// checkCrash starts from what a crash left, compares, appends, and starts again.
func checkCrash(t *testing.T, dir string, c crashPoint) error {
	cfg := memConfig(dir, c.disk)
	for range 2 {
		r, err := Open(cfg)
		if err != nil {
			return err
		}
		if err := r.WaitReady(testContext(t)); err != nil {
			return errors.Join(err, r.Close(t.Context()))
		}
		if err := checkAcked(r, c.promised); err != nil {
			return errors.Join(err, r.Close(t.Context()))
		}
		_, before, end := r.Bounds()
		if before != end {
			return fmt.Errorf("alone it leads, and %d–%d is not committed", before, end)
		}
		id := 1<<56 | before
		ack := mustPropose(t, r, string(batchOf(id, 2).Records), 2)
		if ack.BaseOffset != before {
			return fmt.Errorf("appended at %d, the log ended at %d", ack.BaseOffset, before)
		}
		c.promised = append(c.promised, acked{id, 2, ack})
		if err := checkAcked(r, c.promised); err != nil {
			return err
		}
		if err := r.Close(t.Context()); err != nil {
			return err
		}
	}
	return nil
}

// TestCrashWhileOpening crashes at every operation of a start, and of the start
// after it.
func TestCrashWhileOpening(t *testing.T) {
	rng := vfstest.Rand(t)
	dir := "data"
	c := runUntilCrashed(t, dir, vfstest.New(), rng, 0, 8)[7]
	crash := errors.New("crash")
	for k := 1; ; k++ {
		disk := c.disk.CrashClone(rng, vfstest.All)
		n := 0
		disk.SetHook(func(vfstest.Op) error {
			if n++; n >= k {
				return crash
			}
			return nil
		})
		cfg := memConfig(dir, disk)
		cfg.HeartbeatTimeout, cfg.ElectionTimeout = 3600e9, 3600e9 // no more than opening
		r, err := Open(cfg)
		if err == nil {
			disk.SetHook(nil)
			mustClose(t, r)
			t.Logf("%d operations", k-1)
			return
		}
		if !errors.Is(err, crash) {
			t.Fatal(err)
		}
		for _, survive := range []vfstest.Survival{vfstest.None, vfstest.Some, vfstest.All} {
			again := crashPoint{"", disk.CrashClone(rng, survive), slices.Clone(c.promised)}
			if err := checkCrash(t, dir, again); err != nil {
				t.Fatalf("operation %d, %v survive: %v", k, survive, err)
			}
		}
	}
}

// TestCrashWhileBootstrapping: a first start that was interrupted anywhere is
// followed by one that works.
func TestCrashWhileBootstrapping(t *testing.T) {
	rng := vfstest.Rand(t)
	crash := errors.New("crash")
	for k := 1; ; k++ {
		for _, survive := range []vfstest.Survival{vfstest.None, vfstest.Some, vfstest.All} {
			dir := "data"
			disk := vfstest.New()
			n := 0
			disk.SetHook(func(vfstest.Op) error {
				if n++; n >= k {
					return crash
				}
				return nil
			})
			cfg := memConfig(dir, disk)
			cfg.HeartbeatTimeout, cfg.ElectionTimeout = 3600e9, 3600e9
			r, err := Open(cfg)
			if err == nil {
				disk.SetHook(nil)
				mustClose(t, r)
				t.Logf("%d operations", k-1)
				return
			}
			if !errors.Is(err, crash) {
				t.Fatal(err)
			}
			if err := checkCrash(t, dir, crashPoint{disk: disk.CrashClone(rng, survive)}); err != nil {
				t.Fatalf("operation %d, %v survive: %v", k, survive, err)
			}
		}
	}
}
