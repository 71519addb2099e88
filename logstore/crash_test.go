package logstore

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// promise is what a log may hold after a crash: everything in before, except
// what the operation under way was deleting, and any prefix of what it was
// adding.
type promise struct {
	before model
	append []Entry // under way, or nil
	// cut is the index from which entries are being truncated, 0 if none.
	cut uint64
	// dropBelow is the first index a deletion under way may leave, 0 if none.
	dropBelow uint64
}

// check opens what a crash left and compares it. It returns the log, open.
func (p *promise) check(fsys *vfstest.Mem) (*Log, *model, error) {
	l, err := Open(testDir, smallOptions(fsys))
	if err != nil {
		return nil, nil, fmt.Errorf("start refused: %w", err)
	}
	m, err := p.matches(l)
	if err != nil {
		return nil, nil, errors.Join(err, l.Close())
	}
	return l, m, nil
}

func (p *promise) matches(l *Log) (*model, error) {
	m := p.before.clone()
	first, last := l.FirstIndex(), l.LastIndex()
	switch {
	case first < m.first, first > max(m.first, p.dropBelow):
		return nil, fmt.Errorf("log starts at %d, want %d to %d", first, m.first, max(m.first, p.dropBelow))
	case p.cut == 0 && last < m.last():
		return nil, fmt.Errorf("acknowledged entries lost: log ends at %d, want %d at least", last, m.last())
	case p.cut > 0 && last < p.cut-1:
		return nil, fmt.Errorf("log ends at %d, want %d at least", last, p.cut-1)
	case last > m.last()+uint64(len(p.append)):
		return nil, fmt.Errorf("log ends at %d, want %d at most", last, m.last()+uint64(len(p.append)))
	}
	m.append(p.append)
	m.entries = m.entries[:last+1-m.first]
	m.deletePrefix(first)
	return &m, checkEntriesEqual(l, &m)
}

// workload is a log on a crashable filesystem, with the promise that a crash
// at this moment must find kept.
type workload struct {
	fs      *vfstest.Mem
	l       *Log
	m       model
	promise promise
	rng     *rand.Rand
}

func newWorkload(rng *rand.Rand) *workload {
	w := &workload{fs: vfstest.New(), m: model{first: 1}, rng: rng}
	w.settle()
	return w
}

func (w *workload) settle() { w.promise = promise{before: w.m.clone()} }

func (w *workload) open() (err error) {
	w.l, err = Open(testDir, smallOptions(w.fs))
	return err
}

func (w *workload) append(n, maxPayload int) error {
	entries := w.m.generate(w.rng, n, maxPayload)
	w.promise.append = entries
	if err := w.l.Append(entries); err != nil {
		return err
	}
	w.m.append(entries)
	w.settle()
	return nil
}

func (w *workload) truncate(from uint64) error {
	w.promise.cut = from
	if err := w.l.TruncateSuffix(from); err != nil {
		return err
	}
	w.m.truncate(from)
	w.settle()
	return nil
}

// truncateExported cuts off what an export is about to read.
func (w *workload) truncateExported() error {
	x, err := w.l.Export(w.m.last())
	if err != nil {
		return err
	}
	return errors.Join(w.truncate(w.m.last()-1), x.Close())
}

func (w *workload) deletePrefix(below uint64) error {
	w.promise.dropBelow = below
	first, err := w.l.DeletePrefix(below)
	if err != nil {
		return err
	}
	w.m.deletePrefix(first)
	w.settle()
	return nil
}

func (w *workload) reopen() error {
	if err := w.l.Close(); err != nil {
		return err
	}
	return w.open()
}

func (w *workload) random() error {
	n := uint64(len(w.m.entries))
	switch op := w.rng.IntN(20); {
	case op == 0 && n > 0:
		return w.truncate(w.m.last() + 1 - min(n, 1+w.rng.Uint64N(8)))
	case op == 1 && n > 0:
		return w.truncate(w.m.first + w.rng.Uint64N(n))
	case op <= 3 && n > 6:
		return w.deletePrefix(w.m.first + w.rng.Uint64N(n))
	case op == 4:
		return w.reopen()
	case op == 5:
		return w.l.keeper.recordDurable(false)
	default:
		return w.append(1+w.rng.IntN(6), 1200)
	}
}

var errCrashed = errors.New("crashed")

// TestCrashAtEveryOperation crashes a workload that does everything once at
// each of its writes, syncs and other changes in turn, and the recovery from
// that crash at each of its own.
func TestCrashAtEveryOperation(t *testing.T) {
	rng := vfstest.Rand(t)
	seed := rng.Uint64()
	points := 0
	for k := 1; ; k++ {
		// The same seed each time: the same workload up to the crash.
		w := newWorkload(rand.New(rand.NewPCG(seed, 1)))
		n := 0
		w.fs.SetHook(func(op vfstest.Op) error {
			if n++; n >= k {
				return errCrashed
			}
			return nil
		})
		err := scripted(w)
		if w.l != nil {
			_ = w.l.Close() // crashed, too
		}
		if err == nil {
			t.Logf("%d crash points, %d with those of recovery", k-1, points)
			if k < 100 {
				t.Fatal("the workload has too few operations to mean anything")
			}
			return
		}
		if !errors.Is(err, errCrashed) {
			t.Fatalf("operation %d: %v", k, err)
		}
		for _, survive := range []vfstest.Survival{vfstest.None, vfstest.Some, vfstest.Some, vfstest.All} {
			clone := w.fs.CrashClone(rng, survive)
			points++
			depth := 1
			if rng.IntN(20) == 0 {
				depth = 2
			}
			n, err := crashRecovery(&w.promise, clone, rng, depth)
			if err != nil {
				t.Fatalf("crash at operation %d, %v surviving: %v", k, survive, err)
			}
			points += n
		}
	}
}

// scripted does one of everything, twice.
func scripted(w *workload) error {
	if err := w.open(); err != nil {
		return err
	}
	for range 2 {
		steps := []func() error{
			func() error { return w.append(3, 300) },
			func() error { return w.append(8, 1200) }, // rolls within
			func() error { return w.l.keeper.recordDurable(false) },
			func() error { return w.append(1, 9000) }, // a segment of its own
			func() error { return w.append(2, 10) },
			func() error { return w.truncate(w.m.last()) },     // in the active segment
			func() error { return w.truncate(w.m.last() - 6) }, // across segments
			func() error { return w.append(5, 1200) },          // over what was cut
			w.truncateExported,
			func() error { return w.append(3, 1200) },
			func() error { return w.deletePrefix(w.m.last()) }, // all sealed segments
			func() error { return w.truncate(w.m.first) },      // everything
			func() error { return w.append(6, 1200) },          // and on
			func() error { return w.reopen() },                 // clean
			func() error { return w.append(4, 200) },           // after a clean open
			func() error { return w.l.keeper.recordDurable(false) },
			func() error { return w.append(1, 100) },
		}
		for _, step := range steps {
			if err := step(); err != nil {
				return err
			}
		}
	}
	return w.l.Close()
}

// crashRecovery checks that a crashed filesystem opens as promised, also when
// opening it crashes at any of its own operations, depth times over.
func crashRecovery(p *promise, fsys *vfstest.Mem, rng *rand.Rand, depth int) (points int, err error) {
	if depth > 0 {
		for k := 1; ; k++ {
			again := fsys.CrashClone(rng, vfstest.All)
			n := 0
			again.SetHook(func(vfstest.Op) error {
				if n++; n >= k {
					return errCrashed
				}
				return nil
			})
			l, err := Open(testDir, smallOptions(again))
			if err == nil {
				_ = l.Close() // crashes, perhaps
				break
			}
			if !errors.Is(err, errCrashed) {
				return points, fmt.Errorf("start refused: %w", err)
			}
			points++
			n2, err := crashRecovery(p, again.CrashClone(rng, vfstest.Survival(rng.IntN(3))), rng, depth-1)
			if err != nil {
				return points, fmt.Errorf("crash at operation %d of recovery: %w", k, err)
			}
			points += n2
		}
	}
	l, m, err := p.check(fsys)
	if err != nil {
		return points, err
	}
	return points, useAgain(l, m, fsys, rng)
}

// useAgain shows that a recovered log is one to go on with.
func useAgain(l *Log, m *model, fsys *vfstest.Mem, rng *rand.Rand) error {
	entries := m.generate(rng, 2, 600)
	if err := l.Append(entries); err != nil {
		return errors.Join(fmt.Errorf("append after recovery: %w", err), l.Close())
	}
	m.append(entries)
	// A crash now must keep the append, as before.
	p := promise{before: *m}
	again, _, err := p.check(fsys.CrashClone(rng, vfstest.None))
	if err != nil {
		return errors.Join(fmt.Errorf("second crash: %w", err), l.Close())
	}
	if err := errors.Join(again.Close(), l.Close()); err != nil {
		return err
	}
	l, err = Open(testDir, smallOptions(fsys))
	if err != nil {
		return fmt.Errorf("open after clean close: %w", err)
	}
	return errors.Join(checkEntriesEqual(l, m), l.Close())
}

// TestCrashAnywhere crashes a long random workload at random moments: before
// any operation, with a random part of what was not synced surviving.
func TestCrashAnywhere(t *testing.T) {
	rng := vfstest.Rand(t)
	want := vfstest.Env(t, "DIURNA_CRASH_POINTS", 10000)
	for points := 0; points < want; {
		w := newWorkload(rand.New(rand.NewPCG(rng.Uint64(), 2)))
		crash := rand.New(rand.NewPCG(rng.Uint64(), 3))
		var failure error
		w.fs.SetHook(func(op vfstest.Op) error {
			if failure != nil || crash.IntN(2) == 0 {
				return failure
			}
			survive := vfstest.Survival(crash.IntN(3))
			points++
			depth := 0
			if crash.IntN(50) == 0 {
				depth = 2
			}
			n, err := crashRecovery(&w.promise, w.fs.CrashClone(crash, survive), crash, depth)
			points += n
			if err != nil {
				failure = fmt.Errorf("crash before %v, %v surviving: %w", op, survive, err)
			}
			return failure
		})
		err := w.open()
		for i := 0; err == nil && i < 60; i++ {
			err = w.random()
		}
		if w.l != nil {
			err = errors.Join(err, w.l.Close())
		}
		if err = errors.Join(failure, err); err != nil {
			t.Fatalf("after %d crash points: %v", points, err)
		}
	}
}

// TestFailedSyncIsNotForgotten: a sync fails, the process ends, and the next
// one finds in the kernel's memory what never reached the disk. What it then
// takes for durable has to be.
func TestFailedSyncIsNotForgotten(t *testing.T) {
	fsys := vfstest.New()
	l := mustOpen(t, smallOptions(fsys))
	m := model{first: 1}
	rng := vfstest.Rand(t)
	entries := m.generate(rng, 2, 300)
	must(t, l.Append(entries))
	m.append(entries)
	fsys.SetHook(func(op vfstest.Op) error {
		if op.Kind == "sync" {
			return errors.New("input/output error")
		}
		return nil
	})
	entries = m.generate(rng, 2, 300)
	if err := l.Append(entries); !errors.Is(err, ErrFailed) {
		t.Fatal(err)
	}
	fsys.SetHook(nil)
	if err := l.Close(); !errors.Is(err, ErrFailed) {
		t.Fatal(err)
	}
	m.append(entries)

	l = mustOpen(t, smallOptions(fsys)) // the entries are there: nobody cut the power
	must(t, checkEntriesEqual(l, &m))
	crashed := fsys.CrashClone(rng, vfstest.None)
	must(t, l.Close())
	l = mustOpen(t, smallOptions(crashed))
	must(t, checkEntriesEqual(l, &m))
	must(t, l.Close())
}
