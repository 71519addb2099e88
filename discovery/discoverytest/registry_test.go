package discoverytest

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/diurnalog/diurna/discovery"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRegistry(t *testing.T) {
	Run(t, func(t *testing.T) Harness {
		r := NewRegistry()
		r.Retry, r.TTL, r.Settle = 10*time.Millisecond, 3*time.Second, 300*time.Millisecond
		return Harness{
			New: func(_ testing.TB, cluster string) discovery.Discovery { return r.New(cluster) },
			Filtered: func(_ testing.TB, cluster string) discovery.Discovery {
				h := r.New(cluster)
				h.SetHidden(func(n discovery.Node) bool { return n.Name == "a" })
				return h
			},
			Address: func(testing.TB) string { return "192.0.2.1:8400" },
			Nodes:   func(_ testing.TB, cluster string) []discovery.Node { return r.Nodes(cluster) },
			Forget:  func(_ testing.TB, cluster, id string) { r.Forget(cluster, id) },
			Down:    func(testing.TB) { r.SetDown(true) },
			Up:      func(testing.TB) { r.SetDown(false) },
			Wipe:    func(testing.TB) { r.Wipe() },
		}
	})
}

func member(id string) discovery.Registration {
	return discovery.Registration{
		Node:   discovery.Node{ID: id, Address: "192.0.2.1:8400", Cluster: "test", State: discovery.Member},
		Status: discovery.Passing,
	}
}

// TestFaults goes through the faults on a clock that costs nothing.
func TestFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRegistry()
		run := func(h *Handle, id string) (stop func() error) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- h.Run(ctx) }()
			h.Announce(member(id))
			return func() error { cancel(); return <-done }
		}
		check := func(what string, h *Handle, trusted bool, ids ...string) {
			t.Helper()
			time.Sleep(10 * time.Second) // at once, on this clock
			s := h.Latest()
			var got []string
			for _, n := range s.Nodes {
				id := n.ID
				if n.Critical {
					id += " critical"
				}
				got = append(got, id)
			}
			if s.Trusted != trusted || (s.Why == "") != trusted || len(got) != len(ids) {
				t.Fatalf("%s: want %t %q, got %t %q, %q", what, trusted, ids, s.Trusted, got, s.Why)
			}
			for i := range ids {
				if got[i] != ids[i] {
					t.Fatalf("%s: want %q, got %q", what, ids, got)
				}
			}
		}
		a, b := r.New("test"), r.New("test")
		stopA, stopB := run(a, "a"), run(b, "b")
		check("at first", a, true, "a", "b")

		r.SetDown(true)
		check("down", a, false, "a", "b")
		r.SetDown(false)
		check("up", a, true, "a", "b")

		a.SetDown(true)
		check("a cut off", a, false, "a", "b")
		check("a cut off, for b", b, true, "a critical", "b")
		a.SetDown(false)
		check("a back, for b", b, true, "a", "b")

		a.SetEmpty(true)
		check("empty", a, false)
		a.SetEmpty(false)
		a.SetHidden(func(n discovery.Node) bool { return n.ID == "b" })
		check("filtered", a, false, "a")
		a.SetHidden(nil)
		check("all again", a, true, "a", "b")

		a.SetStale(true)
		r.Put(member("c"))
		check("stale", a, true, "a", "b")
		check("not stale", b, true, "a", "b", "c critical")
		a.SetStale(false)
		check("no more", a, true, "a", "b", "c critical")
		r.Forget("test", "c")
		check("c forgotten", a, true, "a", "b")

		r.Wipe()
		check("wiped", a, true, "a", "b")

		r.SetDelay(time.Second)
		began := time.Now()
		if _, _, err := a.Bootstrap().Get(t.Context()); err != nil || time.Since(began) != time.Second {
			t.Errorf("after %s: %v", time.Since(began), err)
		}
		r.SetDelay(0)

		// One that crashes is taken out by nobody.
		b.SetDown(true)
		if err := stopB(); err == nil {
			t.Error("deregistered while cut off")
		}
		time.Sleep(r.TTL)
		check("b crashed", a, true, "a", "b critical")
		if err := stopA(); err != nil {
			t.Error(err)
		}
		if got := r.Nodes("test"); len(got) != 1 {
			t.Errorf("left: %+v", got)
		}
	})
}
