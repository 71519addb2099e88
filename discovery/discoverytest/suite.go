package discoverytest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/diurnalog/diurna/discovery"
)

// Harness is a registry under test. Functions that cannot do their work fail
// the test.
type Harness struct {
	// New returns the handle of one node of a cluster, not running yet.
	New func(t testing.TB, cluster string) discovery.Discovery
	// Filtered is New for a node that may register but is not shown everybody.
	Filtered func(t testing.TB, cluster string) discovery.Discovery
	// Address returns an address at which the registry finds somebody healthy
	// as long as the test runs.
	Address func(t testing.TB) string
	// Nodes asks the registry itself who is registered.
	Nodes func(t testing.TB, cluster string) []discovery.Node
	// Forget drops a node behind its back.
	Forget func(t testing.TB, cluster, id string)
	// Down makes the registry answer nobody; Up ends that and nothing is lost.
	Down, Up func(t testing.TB)
	// Wipe makes it lose everything, as a restart without its data does.
	Wipe func(t testing.TB)
}

// limit is how long anything may take on a machine that has a lot to do.
const limit = 90 * time.Second

var clusters atomic.Int64

// Run tests a registry: what package discovery promises of every one that keeps
// records. Tests use clusters of their own, so that newHarness may give all of
// them the same registry.
func Run(t *testing.T, newHarness func(t *testing.T) Harness) {
	for _, tc := range []struct {
		name string
		test func(t *testing.T, s *suite)
	}{
		{"TwoNodesSeeEachOther", testSeeEachOther},
		{"WatchingOnly", testWatchingOnly},
		{"Update", testUpdate},
		{"Status", testStatus},
		{"States", testStates},
		{"OtherCluster", testOtherCluster},
		{"NewID", testNewID},
		{"NotRegistrable", testNotRegistrable},
		{"Deregistration", testDeregistration},
		{"Forgotten", testForgotten},
		{"Filtered", testFiltered},
		{"Record", testRecord},
		{"RecordRaces", testRecordRaces},
		{"Outage", testOutage},
		{"Wiped", testWiped},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cluster := fmt.Sprintf("cluster-%d", clusters.Add(1))
			tc.test(t, &suite{Harness: newHarness(t), cluster: cluster})
		})
	}
}

type suite struct {
	Harness
	cluster string
}

// node is a handle that runs.
type node struct {
	discovery.Discovery
	self discovery.Registration
	// stop ends Run and returns its error.
	stop func() error
}

// start runs a handle; a registration without an id is not announced.
func start(t *testing.T, d discovery.Discovery, self discovery.Registration) *node {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		err = d.Run(ctx)
	}()
	n := &node{Discovery: d, self: self, stop: func() error { cancel(); <-done; return err }}
	t.Cleanup(func() { _ = n.stop() }) // tests that are about its error ask themselves
	if self.ID != "" {
		d.Announce(self)
	}
	return n
}

func (s *suite) join(t *testing.T, name string) *node {
	t.Helper()
	return start(t, s.New(t, s.cluster), s.registration(t, name))
}

// registration says something in every field.
func (s *suite) registration(t *testing.T, name string) discovery.Registration {
	t.Helper()
	return discovery.Registration{
		Node: discovery.Node{
			ID: uuid.NewString(), Name: name, Address: s.Address(t), Cluster: s.cluster, ClusterID: uuid.NewString(),
			State: discovery.Member, Role: discovery.Follower, Term: 1<<63 + 7, Expect: 3,
			Zone: "eu-1a", Version: "1.2.3+dev", HTTP: "192.0.2.1:8402",
		},
		Status: discovery.Passing, Output: "all is well",
	}
}

// await waits until a node sees what it should.
func await(t *testing.T, d discovery.Discovery, what string, ok func(discovery.Snapshot) bool) discovery.Snapshot {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	s, err := discovery.Wait(ctx, d, ok)
	if err != nil {
		t.Fatalf("%s: not within %s; the last snapshot: %+v", what, limit, s)
	}
	return s
}

// trusted is a trusted snapshot of exactly these nodes, none of them critical.
func trusted(nodes ...*node) func(discovery.Snapshot) bool {
	return func(s discovery.Snapshot) bool { return s.Trusted && exactly(s.Nodes, nodes...) }
}

func exactly(got []discovery.Node, nodes ...*node) bool {
	var want []discovery.Node
	for _, n := range nodes {
		want = append(want, n.self.Node)
	}
	slices.SortFunc(want, discovery.Compare)
	return slices.Equal(got, want)
}

func testSeeEachOther(t *testing.T, s *suite) {
	a, b := s.join(t, "a"), s.join(t, "b")
	for _, n := range []*node{a, b} {
		began := time.Now()
		got := await(t, n, "both see both", trusted(a, b))
		if got.Why != "" || got.At.Before(began.Add(-limit)) || got.At.After(time.Now()) {
			t.Errorf("trusted, at %s, but why is %q", got.At, got.Why)
		}
		got.Nodes[0] = discovery.Node{} // must be the caller's
		if !exactly(n.Latest().Nodes, a, b) {
			t.Error("a snapshot shares its nodes")
		}
	}
	if err := a.Run(t.Context()); err == nil {
		t.Error("Run can be called twice")
	}
}

func testWatchingOnly(t *testing.T, s *suite) {
	watcher := start(t, s.New(t, s.cluster), discovery.Registration{})
	if first := s.New(t, s.cluster).Latest(); first.Trusted || first.Why == "" || !first.At.IsZero() {
		t.Errorf("before the first answer: %+v", first)
	}
	a := s.join(t, "a")
	got := await(t, watcher, "somebody unknown sees a node", func(sn discovery.Snapshot) bool { return exactly(sn.Nodes, a) })
	if got.Trusted || got.Why == "" {
		t.Errorf("an answer is trusted that cannot hold ourselves: %+v", got)
	}
}

func testUpdate(t *testing.T, s *suite) {
	a, b := s.join(t, "a"), s.join(t, "b")
	await(t, b, "both are there", trusted(a, b))
	for _, change := range []func(*discovery.Node){
		func(n *discovery.Node) { n.Role, n.Term = discovery.Leader, n.Term+1 },
		func(n *discovery.Node) { n.Name = "another" },
		func(n *discovery.Node) { n.Role = discovery.Nonvoter },
		func(n *discovery.Node) {
			n.Role, n.State, n.ClusterID, n.HTTP, n.Zone = "", discovery.Fresh, "", "", ""
		},
		func(n *discovery.Node) { n.Address = s.Address(t) },
	} {
		change(&a.self.Node)
		a.Announce(a.self)
		moved := false
		await(t, b, "a change is seen", func(sn discovery.Snapshot) bool {
			n, ok := sn.Find(a.self.ID)
			moved = moved || ok && n.Address == a.self.Address
			if !ok || n.Critical {
				t.Error("a node that changes was gone, or unhealthy")
			}
			return trusted(a, b)(sn)
		})
		if !moved {
			t.Error("never seen at its address")
		}
	}
}

func testStatus(t *testing.T, s *suite) {
	a, b := s.join(t, "a"), s.join(t, "b")
	await(t, b, "both are well", trusted(a, b))
	for _, step := range []struct {
		status   discovery.Status
		critical bool
	}{{discovery.Critical, true}, {discovery.Warning, false}, {"", true}, {discovery.Passing, false}} {
		a.self.Status = step.status
		a.Announce(a.self)
		want := a.self.Node
		want.Critical = step.critical
		await(t, b, fmt.Sprintf("after status %q", step.status), func(sn discovery.Snapshot) bool {
			got, _ := sn.Find(want.ID)
			return got == want && sn.Trusted
		})
	}
}

func testStates(t *testing.T, s *suite) {
	a, b := s.join(t, "a"), s.join(t, "b")
	for _, state := range []discovery.State{discovery.Fresh, discovery.Member, discovery.Leaving, discovery.Removed} {
		a.self.State = state
		a.Announce(a.self)
		await(t, b, string(state), trusted(a, b))
	}
	if err := a.stop(); err != nil {
		t.Error(err)
	}
	await(t, b, "a removed node that ended is gone", trusted(b))
}

func testOtherCluster(t *testing.T, s *suite) {
	a := s.join(t, "a")
	other := *s
	other.cluster += "-b"
	b := other.join(t, "b")
	await(t, a, "a sees itself", trusted(a))
	await(t, b, "b sees itself", trusted(b))
	if !trusted(a)(a.Latest()) {
		t.Errorf("a sees another cluster: %+v", a.Latest())
	}
}

func testNewID(t *testing.T, s *suite) {
	a, b := s.join(t, "a"), s.join(t, "b")
	await(t, b, "both are there", trusted(a, b))
	await(t, a, "both are there", trusted(a, b))
	a.self.ID = uuid.NewString()
	a.Announce(a.self)
	got := a.Latest()
	if _, ok := got.Find(a.self.ID); got.Trusted && !ok {
		t.Errorf("an answer is trusted that cannot hold the new id: %+v", got)
	}
	await(t, b, "the new id alone", trusted(a, b))
	await(t, a, "the new id alone", trusted(a, b))
}

// testNotRegistrable announces what cannot be registered, or only after it is
// mended; nothing else may suffer from it.
func testNotRegistrable(t *testing.T, s *suite) {
	reg := s.registration(t, "a")
	a := start(t, s.New(t, s.cluster), discovery.Registration{})
	b := s.join(t, "b")
	bad := reg
	bad.ID = ""
	a.Announce(bad)
	a.self = reg
	a.Announce(reg)
	await(t, b, "mended", trusted(a, b))
}

func testDeregistration(t *testing.T, s *suite) {
	a, b := s.join(t, "a"), s.join(t, "b")
	await(t, b, "both are there", trusted(a, b))
	began := time.Now()
	if err := a.stop(); err != nil {
		t.Errorf("Run: %v", err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("deregistration took %s", took)
	}
	if got := a.Latest(); got.Trusted || got.Why == "" {
		t.Errorf("trusted after the end: %+v", got)
	}
	await(t, b, "a is gone", trusted(b))
	if got := s.Nodes(t, s.cluster); !exactly(got, b) {
		t.Errorf("registered: %+v", got)
	}
}

func testForgotten(t *testing.T, s *suite) {
	a, b := s.join(t, "a"), s.join(t, "b")
	await(t, a, "both are there", trusted(a, b))
	await(t, b, "both are there", trusted(a, b))
	for range 2 {
		s.Forget(t, s.cluster, a.self.ID)
		// In the registry: a and b may not have heard yet that it forgot.
		for end := time.Now().Add(limit); !exactly(s.Nodes(t, s.cluster), a, b); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("a does not register again; there are %+v", s.Nodes(t, s.cluster))
			}
		}
		await(t, b, "a is back", trusted(a, b))
		await(t, a, "a sees itself", trusted(a, b))
	}
}

func testFiltered(t *testing.T, s *suite) {
	a := s.join(t, "a")
	// Else there may be nothing to filter yet.
	await(t, a, "somebody is there to be hidden", func(sn discovery.Snapshot) bool { _, ok := sn.Find(a.self.ID); return ok })
	f := start(t, s.Filtered(t, s.cluster), s.registration(t, "f"))
	await(t, f, "an answer", func(sn discovery.Snapshot) bool { return !sn.At.IsZero() })
	await(t, a, "it is registered all the same", func(sn discovery.Snapshot) bool { _, ok := sn.Find(f.self.ID); return ok })
	for range 3 {
		if got := f.Latest(); got.Trusted || got.Why == "" {
			t.Errorf("an answer is trusted that was filtered: %+v", got)
		}
		select {
		case <-f.Changed():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func testOutage(t *testing.T, s *suite) {
	a, b := s.join(t, "a"), s.join(t, "b")
	both := []*node{a, b}
	for _, n := range both {
		await(t, n, "both are there", trusted(a, b))
	}
	s.Down(t)
	for _, n := range both {
		got := await(t, n, "no trust in a registry that is down", func(sn discovery.Snapshot) bool { return !sn.Trusted })
		if got.Why == "" || !exactly(got.Nodes, a, b) {
			t.Errorf("an outage must keep what is known: %+v", got)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if won, err := a.Bootstrap().Create(ctx, []byte("x")); err == nil || won {
		t.Errorf("a record was written to a registry that is down: %t, %v", won, err)
	}
	if _, version, err := a.Bootstrap().Get(ctx); err == nil || version != 0 {
		t.Errorf("a record was read from a registry that is down: %d, %v", version, err)
	}
	// What is announced meanwhile counts when it is back.
	a.self.Role, a.self.Term = discovery.Leader, a.self.Term+1
	a.Announce(a.self)
	s.Up(t)
	for _, n := range both {
		await(t, n, "after the outage", trusted(a, b))
	}
	s.Down(t)
	if err := a.stop(); err == nil {
		t.Error("deregistered from a registry that is down")
	}
	s.Up(t)
	await(t, b, "the other goes on", func(sn discovery.Snapshot) bool {
		_, ok := sn.Find(b.self.ID)
		return sn.Trusted && ok && len(sn.Nodes) == 2
	})
}

func testWiped(t *testing.T, s *suite) {
	a, b := s.join(t, "a"), s.join(t, "b")
	both := []*node{a, b}
	for _, n := range both {
		await(t, n, "both are there", trusted(a, b))
	}
	if won, err := a.Bootstrap().Create(t.Context(), []byte("x")); err != nil || !won {
		t.Fatal(won, err)
	}
	// From the wipe until all are back, no node may conclude that another left.
	ctx, cancel := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	for _, n := range both {
		watching.Go(func() {
			_, err := discovery.Wait(ctx, n, func(sn discovery.Snapshot) bool { return sn.Trusted && len(sn.Nodes) != 2 })
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s trusts an answer that lacks a node: %+v", n.self.Name, n.Latest())
			}
		})
	}
	s.Wipe(t)
	for _, n := range both {
		await(t, n, "the loss is noticed", func(sn discovery.Snapshot) bool { return !sn.Trusted })
	}
	for _, n := range both {
		await(t, n, "all are back", trusted(a, b))
	}
	cancel()
	watching.Wait()
	if v, version, err := a.Bootstrap().Get(t.Context()); err != nil || version != 0 || v != nil {
		t.Errorf("the record outlived the registry: %q, %d, %v", v, version, err)
	}
}
