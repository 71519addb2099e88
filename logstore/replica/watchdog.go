package replica

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// watchdog stands between Raft and its two stores. It ends this server's part
// in the group when an operation takes too long: hashicorp/raft sends
// heartbeats beside the goroutine that waits for the disk, so that a leader
// whose disk hangs leads for ever, and appends nothing (upstream issue 503).
//
// Once it is dead, nothing is stored any more and nothing that was stored since
// is reported to Raft: what comes back late is neither acknowledged nor voted
// with.
type watchdog struct {
	limit time.Duration
	// stalled is called once, with what was being done.
	stalled func(what string)

	dead atomic.Bool

	mu      sync.Mutex
	running map[*operation]struct{}
	barked  bool
}

// operation is a call of Raft's that has not returned.
type operation struct {
	what  string
	ticks int
}

// watchdogTicks is in how many parts the limit is counted. A process that was
// stopped for a while counts one part, not the whole time: nothing shows that
// its disk hangs.
const watchdogTicks = 8

func newWatchdog(limit time.Duration, stalled func(what string)) *watchdog {
	return &watchdog{limit: limit, stalled: stalled, running: map[*operation]struct{}{}}
}

// run counts until done is closed.
func (w *watchdog) run(done <-chan struct{}) {
	tick := time.NewTicker(max(w.limit/watchdogTicks, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if what := w.tick(); what != "" {
				w.stalled(what)
			}
		case <-done:
			return
		}
	}
}

// tick returns what takes too long, once.
func (w *watchdog) tick() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	for op := range w.running {
		if op.ticks++; op.ticks > watchdogTicks && !w.barked {
			w.barked = true
			return op.what
		}
	}
	return ""
}

// calm lets it bark again, after a stall that was let pass.
func (w *watchdog) calm() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.barked = false
	for op := range w.running {
		op.ticks = 0
	}
}

// do times an operation.
func (w *watchdog) do(what string, f func() error) error {
	if w.dead.Load() {
		return errSevered
	}
	op := &operation{what: what}
	w.mu.Lock()
	w.running[op] = struct{}{}
	w.mu.Unlock()
	// Also when f ends the goroutine.
	defer func() {
		w.mu.Lock()
		delete(w.running, op)
		w.mu.Unlock()
	}()
	err := f()
	if err == nil && w.dead.Load() {
		return errSevered
	}
	return err
}

// watchedLog is a raft.LogStore under the watchdog. It is deliberately not a
// raft.MonotonicLogStore, see logStore.
type watchedLog struct {
	raft.LogStore
	dog *watchdog
}

func (l watchedLog) GetLog(index uint64, out *raft.Log) error {
	err := l.dog.do("read an entry", func() error { return l.LogStore.GetLog(index, out) })
	if errors.Is(err, errSevered) {
		// Raft would take it for a disagreement between two logs.
		runtime.Goexit()
	}
	return err
}

func (l watchedLog) StoreLog(log *raft.Log) error { return l.StoreLogs([]*raft.Log{log}) }

func (l watchedLog) StoreLogs(logs []*raft.Log) error {
	return l.dog.do(fmt.Sprintf("append %d entries", len(logs)), func() error { return l.LogStore.StoreLogs(logs) })
}

func (l watchedLog) DeleteRange(from, to uint64) error {
	return l.dog.do("cut off entries", func() error { return l.LogStore.DeleteRange(from, to) })
}

// watchedStable is a raft.StableStore under the watchdog. Raft panics when it
// cannot store its term; the goroutine ends instead.
type watchedStable struct {
	raft.StableStore
	dog *watchdog
}

func (s watchedStable) set(key []byte, f func() error) error {
	err := s.dog.do("store "+string(key), f)
	if err != nil && bytes.Equal(key, keyCurrentTerm) {
		runtime.Goexit()
	}
	return err
}

func (s watchedStable) Set(key, value []byte) error {
	return s.set(key, func() error { return s.StableStore.Set(key, value) })
}

func (s watchedStable) SetUint64(key []byte, value uint64) error {
	return s.set(key, func() error { return s.StableStore.SetUint64(key, value) })
}

var (
	_ raft.LogStore    = watchedLog{}
	_ raft.StableStore = watchedStable{}
)
