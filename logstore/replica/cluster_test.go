package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// cluster is some replicas in this process, connected in memory.
type cluster struct {
	t     testing.TB
	ids   []string
	disks map[string]*vfstest.Mem
	nodes map[string]*Replica
	links map[string]*raft.InmemTransport
	down  map[string]bool // not connected
	tweak func(id string, cfg *Config)
}

func newCluster(t testing.TB, ids ...string) *cluster {
	c := &cluster{
		t: t, ids: ids, disks: map[string]*vfstest.Mem{}, nodes: map[string]*Replica{},
		links: map[string]*raft.InmemTransport{}, down: map[string]bool{},
		tweak: func(string, *Config) {},
	}
	for _, id := range ids {
		c.disks[id] = vfstest.New()
	}
	t.Cleanup(func() {
		for _, id := range ids {
			c.stop(id)
		}
	})
	return c
}

func (c *cluster) config(id string) Config {
	const tick = 250 * time.Millisecond
	cfg := memConfig("data", c.disks[id])
	cfg.ID, cfg.Address = id, id+":1"
	cfg.Bootstrap = nil
	cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout = tick, tick, tick
	cfg.ScrubInterval = -1
	c.tweak(id, &cfg)
	_, link := raft.NewInmemTransport(raft.ServerAddress(cfg.Address))
	c.links[id] = link
	cfg.transport = onePerTrip{link}
	return cfg
}

// bootstrap starts replicas as the first voters.
func (c *cluster) bootstrap(ids ...string) {
	c.t.Helper()
	tweak := c.tweak
	defer func() { c.tweak = tweak }()
	c.tweak = func(id string, cfg *Config) {
		for _, voter := range ids {
			cfg.Bootstrap = append(cfg.Bootstrap, Server{ID: voter, Address: voter + ":1"})
		}
		tweak(id, cfg)
	}
	for _, id := range ids {
		c.start(id)
	}
}

func (c *cluster) start(id string) *Replica {
	c.t.Helper()
	r, err := Open(c.config(id))
	if err != nil {
		c.t.Fatal(err)
	}
	c.nodes[id] = r
	c.connect()
	return r
}

// connect makes the links what down says.
func (c *cluster) connect() {
	for a, from := range c.links {
		for b, to := range c.links {
			if a == b || c.nodes[a] == nil || c.nodes[b] == nil || c.down[a] || c.down[b] {
				from.Disconnect(raft.ServerAddress(b + ":1"))
			} else {
				from.Connect(to.LocalAddr(), to)
			}
		}
	}
}

func (c *cluster) isolate(id string) {
	c.down[id] = true
	c.connect()
}

func (c *cluster) heal(id string) {
	c.down[id] = false
	c.connect()
}

func (c *cluster) stop(id string) {
	c.t.Helper()
	r := c.nodes[id]
	if r == nil {
		return
	}
	delete(c.nodes, id)
	c.connect()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := r.Close(ctx); err != nil && r.Err() == nil {
		c.t.Errorf("close %s: %v", id, err)
	}
}

// eventually waits until f holds.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for !f() {
		select {
		case <-deadline:
			t.Fatalf("it did not come to be that %s", what)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// leader waits for one among those that are connected.
func (c *cluster) leader() *Replica {
	c.t.Helper()
	var found *Replica
	eventually(c.t, "somebody leads", func() bool {
		for id, r := range c.nodes {
			if !c.down[id] && r.seq.ready.Load() > 0 {
				found = r
				return true
			}
		}
		return false
	})
	return found
}

// append has the leader append batches with ids from first on.
func (c *cluster) append(first uint64, n, count int) []acked {
	c.t.Helper()
	var all []acked
	for id := first; len(all) < n; {
		p, err := c.leader().Propose(c.t.Context(), batchOf(id, count), true)
		if err == nil {
			var ack Ack
			if ack, err = result(p); err == nil {
				all = append(all, acked{id, count, ack})
				id++
				continue
			}
		}
		switch other := (*NotLeaderError)(nil); {
		case errors.Is(err, ErrUnknownOutcome):
			id++ // it may be there
		case !errors.Is(err, ErrNoLeader) && !errors.As(err, &other):
			c.t.Fatal(err)
		}
	}
	return all
}

// caughtUp waits until a replica has applied what the leader has.
func (c *cluster) caughtUp(id string) {
	c.t.Helper()
	l := c.leader()
	want := l.applied.Load()
	_, watermark, _ := l.Bounds()
	eventually(c.t, fmt.Sprintf("%s has applied %d", id, want), func() bool {
		r := c.nodes[id]
		_, got, _ := r.Bounds()
		return r.Err() != nil || got >= watermark && r.raft.AppliedIndex() >= want
	})
	if err := c.nodes[id].Err(); err != nil {
		c.t.Fatal(err)
	}
}

// same compares what two replicas have from the later one's start on.
func (c *cluster) same(a, b string) {
	c.t.Helper()
	firstA, recordsA, errA := readAll(c.nodes[a])
	firstB, recordsB, errB := readAll(c.nodes[b])
	if err := errors.Join(errA, errB); err != nil {
		c.t.Fatal(err)
	}
	if firstA != firstB {
		c.t.Errorf("%s starts at %d, %s at %d", a, firstA, b, firstB)
	}
	if !slices.Equal(recordsA, recordsB) {
		c.t.Errorf("%s has %d records, %s has %d, and they differ", a, len(recordsA), b, len(recordsB))
	}
}

// led does something on the leader, again where that has changed.
func (c *cluster) led(f func(l *Replica) error) {
	c.t.Helper()
	for {
		err := f(c.leader())
		other := (*NotLeaderError)(nil)
		if err == nil {
			return
		}
		if !errors.As(err, &other) && !errors.Is(err, ErrNoLeader) && !errors.Is(err, ErrUnknownOutcome) &&
			!errors.Is(err, raft.ErrNotLeader) && !errors.Is(err, raft.ErrLeadershipLost) {
			c.t.Fatal(err)
		}
	}
}

// cutFront takes the front of the leader's log away, as retention does, so that
// whoever needs it has to be sent a snapshot.
func (c *cluster) cutFront() {
	c.t.Helper()
	c.led(func(l *Replica) error {
		segments := l.gens.log().Segments()
		start := segments[len(segments)/2].FirstOffset
		if err := l.control(c.t.Context(), controlEntry{Kind: kindLogStart, Offset: start}); err != nil {
			return err
		}
		if err := errors.Join(l.raft.Snapshot().Error(), l.deleteBeforeStart()); err != nil {
			return err
		}
		if first, _, _ := l.Bounds(); first != start || l.gens.log().FirstIndex() == 1 {
			return fmt.Errorf("first offset %d, want %d; first index %d", first, start, l.gens.log().FirstIndex())
		}
		return nil
	})
}

// add adds a server that does not vote.
func (c *cluster) add(id string) {
	c.t.Helper()
	c.led(func(l *Replica) error {
		return l.raft.AddNonvoter(raft.ServerID(id), raft.ServerAddress(id+":1"), 0, 0).Error()
	})
}

func generationsOn(fs *vfstest.Mem) []string {
	seen := map[string]bool{}
	for _, name := range fs.Names() {
		if parts := strings.Split(name, "/"); len(parts) > 2 {
			seen[parts[1]] = true
		}
	}
	var all []string
	for name := range seen {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

// TestInstallOverRetention: a server that is new, and one that was away, get a
// log whose front is gone.
func TestInstallOverRetention(t *testing.T) {
	c := newCluster(t, "a", "b", "c", "d")
	c.bootstrap("a", "b", "c")
	all := c.append(1, 60, 20)
	c.caughtUp("c")
	l := c.leader()
	away := "c"
	if l.cfg.ID == "c" {
		away = "b"
	}
	oldGen := c.nodes[away].gens.now.Load()
	// Readers that do not notice that the log under them is another one.
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	t.Cleanup(func() {
		stop()
		wg.Wait()
	})
	for range 3 {
		r := c.nodes[away]
		wg.Go(func() {
			next, err := follow(ctx, r, 0)
			if _, watermark, _ := r.Bounds(); err != nil || next != watermark {
				t.Errorf("a reader got to %d of %d: %v", next, watermark, err)
			}
		})
		wg.Go(func() {
			for ctx.Err() == nil {
				first, watermark, end := r.Bounds()
				if first > watermark || watermark > end {
					t.Errorf("bounds %d, %d, %d", first, watermark, end)
				}
				if _, _, err := readAll(r); err != nil && !strings.Contains(err.Error(), "is not in") {
					t.Error(err)
				}
			}
		})
	}
	c.isolate(away)
	all = append(all, c.append(100, 120, 20)...)
	c.cutFront()
	c.heal(away)
	c.start("d")
	c.add("d")
	all = append(all, c.append(1000, 20, 20)...)
	for _, id := range []string{away, "d"} {
		c.caughtUp(id)
		c.same(c.leader().cfg.ID, id)
		r := c.nodes[id]
		if r.gens.now.Load().number != 2 {
			t.Errorf("%s was not sent a snapshot", id)
		}
		first, _, _ := r.Bounds()
		kept := slices.DeleteFunc(slices.Clone(all), func(a acked) bool { return a.ack.BaseOffset < first })
		if err := checkAcked(r, kept); err != nil {
			t.Errorf("%s: %v", id, err)
		}
		eventually(t, "the old generation is removed", func() bool {
			return slices.Equal(generationsOn(c.disks[id]), []string{"gen-2"})
		})
	}
	stop()
	wg.Wait()
	if _, _, err := oldGen.log.Entry(oldGen.log.LastIndex(), nil); err == nil {
		t.Error("the old log is still open")
	}
	// What was installed is what is opened.
	for _, id := range []string{away, "d"} {
		c.stop(id)
		c.start(id)
		c.append(2000, 1, 1)
		c.caughtUp(id)
		c.same(c.leader().cfg.ID, id)
	}
}

// onePerTrip does not pipeline: Raft's goroutine that reads a pipeline's answers
// outlives one that ends, which the real transport prevents.
type onePerTrip struct{ *raft.InmemTransport }

func (onePerTrip) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, raft.ErrPipelineReplicationNotSupported
}
