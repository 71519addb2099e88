// Package discoverytest is a registry in memory for tests, with the faults that
// a real one has, and the tests that every registry passes.
//
//	registry := discoverytest.NewRegistry()
//	one, two := registry.New("test"), registry.New("test")
//	go one.Run(ctx)
//	registry.SetDown(true)
//
// It has no goroutines but those that call Run, and keeps time by package time
// alone, so it can be used inside testing/synctest.
package discoverytest

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/diurnalog/diurna/discovery"
)

// ErrDown is what a registry that is down answers.
var ErrDown = errors.New("the registry is down")

// Registry is what all handles share. Its methods may be called from several
// goroutines; its fields are set before the first handle is made.
type Registry struct {
	// Retry is how long a handle waits before it registers again what was
	// forgotten, and asks again what failed. Default: 100 ms.
	Retry time.Duration
	// TTL is how long an instance is well without a sign of life. Default: 15 s.
	TTL time.Duration
	// Settle is how long a handle trusts nothing after the registry forgot it.
	// Default: 2 s.
	Settle time.Duration

	mu        sync.Mutex
	instances map[string]instance // by cluster and id
	records   map[string]value    // by cluster
	version   uint64              // of the last write to records
	down      bool
	delay     time.Duration
	changed   chan struct{}
}

type instance struct {
	registration discovery.Registration
	alive        time.Time
}

type value struct {
	bytes   []byte
	version uint64
}

// NewRegistry returns an empty registry.
func NewRegistry() *Registry {
	return &Registry{
		Retry:     100 * time.Millisecond,
		TTL:       15 * time.Second,
		Settle:    2 * time.Second,
		instances: make(map[string]instance),
		records:   make(map[string]value),
		changed:   make(chan struct{}),
	}
}

// New returns the handle of one node of a cluster.
func (r *Registry) New(cluster string) *Handle {
	return &Handle{
		registry: r,
		cluster:  cluster,
		wake:     make(chan struct{}, 1),
		changed:  make(chan struct{}),
		snap:     discovery.Snapshot{Why: "the registry has not answered yet"},
	}
}

// SetDown makes every request fail, or ends that. What is registered stays.
func (r *Registry) SetDown(down bool) { r.change(func() { r.down = down }) }

// SetDelay makes every answer take that long.
func (r *Registry) SetDelay(d time.Duration) { r.change(func() { r.delay = d }) }

// Wipe forgets everything, records too.
func (r *Registry) Wipe() {
	r.change(func() {
		clear(r.instances)
		clear(r.records)
	})
}

// Forget drops a node's instance, behind its back.
func (r *Registry) Forget(cluster, id string) {
	r.change(func() { delete(r.instances, key(cluster, id)) })
}

// Put registers a node that has no handle. It is well until TTL is over, and
// stays until it is forgotten.
func (r *Registry) Put(reg discovery.Registration) {
	r.change(func() { r.put(reg.Cluster, reg) })
}

// Nodes is what is registered for a cluster, whatever faults there are.
func (r *Registry) Nodes(cluster string) []discovery.Node {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.nodes(cluster)
}

func key(cluster, id string) string { return cluster + "/" + id }

func (r *Registry) change(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	r.notify()
}

// notify wakes all handles. r.mu is held.
func (r *Registry) notify() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// put is called with r.mu held.
func (r *Registry) put(cluster string, reg discovery.Registration) {
	reg.Cluster = cluster
	r.instances[key(cluster, reg.ID)] = instance{reg, time.Now()}
}

// nodes is called with r.mu held.
func (r *Registry) nodes(cluster string) []discovery.Node {
	var nodes []discovery.Node
	for _, i := range r.instances {
		n := i.registration.Node
		if n.Cluster != cluster {
			continue
		}
		n.Critical = i.registration.Status == discovery.Critical || time.Since(i.alive) >= r.TTL
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, discovery.Compare)
	return nodes
}

// record is a cluster's, through one handle.
type record struct{ h *Handle }

func (c record) call(ctx context.Context, f func(v value, r *Registry)) error {
	if err := c.h.reach(ctx); err != nil {
		return err
	}
	r := c.h.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	f(r.records[c.h.cluster], r)
	return nil
}

func (c record) Get(ctx context.Context) (bytes []byte, version uint64, err error) {
	err = c.call(ctx, func(v value, _ *Registry) { bytes, version = slices.Clone(v.bytes), v.version })
	return bytes, version, err
}

func (c record) Create(ctx context.Context, bytes []byte) (won bool, err error) {
	return c.put(ctx, 0, bytes)
}

func (c record) Replace(ctx context.Context, version uint64, bytes []byte) (won bool, err error) {
	if version == 0 {
		return false, errors.New("version 0 is no value: create it")
	}
	return c.put(ctx, version, bytes)
}

func (c record) put(ctx context.Context, version uint64, bytes []byte) (won bool, err error) {
	err = c.call(ctx, func(v value, r *Registry) {
		if won = v.version == version; won {
			r.version++
			r.records[c.h.cluster] = value{slices.Clone(bytes), r.version}
		}
	})
	return won, err
}
