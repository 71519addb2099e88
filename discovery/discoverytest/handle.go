package discoverytest

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/diurnalog/diurna/discovery"
)

// Handle is one node's connection to a Registry. Faults that are set on it are
// its own; others do not see them.
type Handle struct {
	registry *Registry
	cluster  string
	wake     chan struct{}

	mu        sync.Mutex
	ran       bool
	announced *discovery.Registration
	snap      discovery.Snapshot
	changed   chan struct{}
	settled   time.Time

	down, stale, empty bool
	hidden             func(discovery.Node) bool
}

var _ discovery.Discovery = (*Handle)(nil)

// SetDown cuts this handle off, or ends that. A node that is cut off and ends
// stays registered, as one that crashed.
func (h *Handle) SetDown(down bool) { h.fault(func() { h.down = down }) }

// SetStale freezes what this handle is told, though it is told so with
// confidence: a registry that lags behind.
func (h *Handle) SetStale(stale bool) { h.fault(func() { h.stale = stale }) }

// SetEmpty makes all answers empty, without an error.
func (h *Handle) SetEmpty(empty bool) { h.fault(func() { h.empty = empty }) }

// SetHidden leaves nodes out of the answers, as missing permissions do; nil
// ends that.
func (h *Handle) SetHidden(hidden func(discovery.Node) bool) { h.fault(func() { h.hidden = hidden }) }

func (h *Handle) fault(f func()) {
	h.mu.Lock()
	f()
	h.mu.Unlock()
	h.signal()
}

func (h *Handle) signal() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// Run implements discovery.Discovery.
func (h *Handle) Run(ctx context.Context) error {
	h.mu.Lock()
	again := h.ran
	h.ran = true
	h.mu.Unlock()
	if again {
		return errors.New("run is called once")
	}
	var registered string // the id that is registered
	for ctx.Err() == nil {
		h.registry.mu.Lock()
		changed := h.registry.changed
		h.registry.mu.Unlock()
		var retry bool
		registered, retry = h.work(ctx, registered)
		pause := h.registry.TTL / 3
		if retry {
			pause, changed = h.registry.Retry, nil // not for each attempt of everybody
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-h.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
	defer cancel()
	h.mu.Lock()
	h.publish(h.snap.Nodes, h.snap.At, "discovery has ended")
	h.mu.Unlock()
	if registered == "" {
		return nil
	}
	if err := h.reach(ctx); err != nil {
		return err
	}
	h.registry.Forget(h.cluster, registered)
	return nil
}

// work registers and asks, once. It tells what is registered and whether
// something has to be tried again soon.
func (h *Handle) work(ctx context.Context, registered string) (string, bool) {
	if err := h.reach(ctx); err != nil {
		h.mu.Lock()
		h.publish(h.snap.Nodes, h.snap.At, "no answer: "+err.Error())
		h.mu.Unlock()
		return registered, true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.registry
	r.mu.Lock()
	defer r.mu.Unlock()

	retry := false
	if h.announced != nil {
		id := h.announced.ID
		if registered != "" && registered != id {
			delete(r.instances, key(h.cluster, registered))
			registered = ""
			r.notify()
		}
		have, ok := r.instances[key(h.cluster, id)]
		switch {
		case !ok && registered == id:
			// Forgotten. Whoever registers at once hides that from the others'
			// tests; no real one is that quick.
			registered, retry = "", true
			h.settled = time.Now().Add(r.Settle)
		default:
			want := *h.announced
			want.Cluster = h.cluster
			r.put(h.cluster, want)
			registered = id
			if !ok || have.registration != want || time.Since(have.alive) >= r.TTL {
				r.notify()
			}
		}
	}
	return registered, h.take(r.nodes(h.cluster)) || retry
}

// take publishes an answer, and tells whether to ask again soon. h.mu is held.
func (h *Handle) take(nodes []discovery.Node) bool {
	now := time.Now()
	if h.stale && !h.snap.At.IsZero() {
		nodes = h.snap.Nodes
	}
	if h.empty {
		nodes = nil
	}
	shown := len(nodes)
	if h.hidden != nil {
		nodes = slices.DeleteFunc(slices.Clone(nodes), h.hidden)
	}
	var why string
	var self discovery.Node
	if h.announced != nil {
		self = h.announced.Node
	}
	_, present := discovery.Snapshot{Nodes: nodes}.Find(self.ID)
	switch {
	case len(nodes) < shown:
		why = "nodes were left out that we may not read"
	case h.announced == nil:
		why = "this node is not registered yet"
	case !present:
		why = "the answer lacks this node"
	case now.Before(h.settled):
		why = "the registry forgot its nodes; not everybody may be back"
	}
	h.publish(nodes, now, why)
	return now.Before(h.settled)
}

// reach waits as long as a request takes, and fails if there is no answer.
func (h *Handle) reach(ctx context.Context) error {
	r := h.registry
	r.mu.Lock()
	delay := r.delay
	r.mu.Unlock()
	if delay > 0 {
		timer := time.NewTimer(delay)
		defer timer.Stop()
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
	}
	h.mu.Lock()
	down := h.down
	h.mu.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	if down || r.down {
		return ErrDown
	}
	return ctx.Err()
}

// Announce implements discovery.Discovery.
func (h *Handle) Announce(reg discovery.Registration) {
	if reg.Status == "" {
		reg.Status = discovery.Critical
	}
	h.mu.Lock()
	if h.announced == nil || h.announced.ID != reg.ID {
		h.publish(h.snap.Nodes, h.snap.At, "this node is not registered yet")
	}
	h.announced = &reg
	h.mu.Unlock()
	h.signal()
}

// Latest implements discovery.Discovery.
func (h *Handle) Latest() discovery.Snapshot {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.snap
	s.Nodes = slices.Clone(s.Nodes)
	return s
}

// Changed implements discovery.Discovery.
func (h *Handle) Changed() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.changed
}

// Bootstrap implements discovery.Discovery.
func (h *Handle) Bootstrap() discovery.Record { return record{h} }

// publish is called with h.mu held.
func (h *Handle) publish(nodes []discovery.Node, at time.Time, why string) {
	s := discovery.Snapshot{Nodes: nodes, At: at, Trusted: why == "", Why: why}
	same := h.snap.Same(s)
	h.snap = s
	if !same {
		close(h.changed)
		h.changed = make(chan struct{})
	}
}
