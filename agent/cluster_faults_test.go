package agent

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
	"github.com/diurnalog/diurna/rpc/client"
)

// load is several steady producers.
type load struct {
	producers []*steady
	cancel    context.CancelFunc
	running   sync.WaitGroup
	errs      []error
}

func startLoad(t testing.TB, n int, addresses []string) *load {
	t.Helper()
	var producers []*steady
	for i := range n {
		// Each begins at another node.
		turned := append(slices.Clone(addresses[i%len(addresses):]), addresses[:i%len(addresses)]...)
		producers = append(producers, newSteady(t, fmt.Sprintf("p%d", i), turned))
	}
	return loadOf(t, producers)
}

func loadOf(t testing.TB, producers []*steady) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{producers: producers, cancel: cancel, errs: make([]error, len(producers))}
	for i, s := range producers {
		l.running.Go(func() { l.errs[i] = s.run(ctx) })
	}
	t.Cleanup(func() { cancel(); l.running.Wait() })
	return l
}

// stop ends the load and compares what it was told with what each node has.
func (l *load) stop(t testing.TB, c *processCluster) (acked int) {
	t.Helper()
	l.end(t)
	unknown := 0
	var first []string
	for i, m := range c.nodes {
		log := consume(t, patient(t, m.listen), 0)
		for _, s := range l.producers {
			s.check(t, log)
		}
		if i == 0 {
			first = log
		} else if !slices.Equal(log, first) {
			t.Errorf("%s has another log than %s: %d and %d records", m.name, c.nodes[0].name, len(log), len(first))
		}
	}
	for _, s := range l.producers {
		acked += len(s.acked)
		unknown += len(s.unknown)
	}
	t.Logf("%d records acknowledged, %d in doubt, %d in the log", acked, unknown, len(first))
	return acked
}

// TestClusterWithoutConsul: Consul is stopped for a while, comes back, is wiped.
// Nobody who produces or consumes notices; nobody is removed; no second cluster
// is formed; everybody registers again.
func TestClusterWithoutConsul(t *testing.T) {
	c := startNodes(t, 3, "")
	c.servers(t, "three nodes vote", healthy(3))
	before := clusterIDs(t, c)
	l := startLoad(t, 2, c.addresses())
	followed := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var seen uint64
	go func() { followed <- follow(ctx, c.nodes[2].listen, &seen) }()

	c.consul.Stop(t)
	outage := time.Duration(vfstest.Env(t, "DIURNA_CONSUL_OUTAGE", 10)) * time.Second
	select {
	case <-time.After(outage): // the fault itself
	case err := <-followed:
		t.Fatalf("the reader ended: %v", err)
	}
	c.consul.RestartEmpty(t)
	c.awaitDNS(t, "diurna", ports(c.nodes...))

	if got := c.servers(t, "three nodes vote", healthy(3)); len(got) != 3 {
		t.Errorf("%+v", got)
	}
	if after := clusterIDs(t, c); !slices.Equal(before, after) {
		t.Errorf("clusters were %v, are %v", before, after)
	}
	for _, s := range l.producers {
		if len(s.unknown) > 0 {
			t.Errorf("%s noticed: %d records in doubt", s.name, len(s.unknown))
		}
	}
	// A new node, of the same configuration, joins; it does not form anything.
	m := c.add(t)
	m.awaitReady(t)
	c.servers(t, "four nodes vote", healthy(4))
	l.stop(t, c)
	cancel()
	if err := <-followed; err != nil {
		t.Errorf("the reader ended: %v", err)
	}
	if seen == 0 {
		t.Error("the reader has seen nothing")
	}
}

// follow reads from a node until ctx ends, and checks that nothing is missing.
func follow(ctx context.Context, addr string, next *uint64, opts ...client.Option) error {
	c, err := dialNode(addr, opts...)
	if err != nil {
		return err
	}
	defer c.Close()
	r, err := c.Consume(ctx, client.ConsumeOptions{Start: client.AtOffset(0), Follow: true})
	if err != nil {
		return err
	}
	defer r.Close()
	for r.Next() {
		if got := r.Record().Offset; got != *next {
			return fmt.Errorf("offset %d where %d belongs", got, *next)
		}
		*next++
	}
	if ctx.Err() != nil {
		return nil
	}
	return r.Err()
}

// clusterIDs are what the nodes wrote down.
func clusterIDs(t testing.TB, c *processCluster) (ids []string) {
	t.Helper()
	for _, m := range c.nodes {
		id, err := readNodeFile(vfs.OS, m.dir)
		if err != nil {
			t.Fatal(err)
		}
		if id.cluster == "" {
			t.Errorf("%s belongs to no cluster", m.name)
		}
		ids = append(ids, id.cluster)
	}
	if len(slices.Compact(slices.Sorted(slices.Values(ids)))) != 1 {
		t.Errorf("more than one cluster: %v", ids)
	}
	return ids
}

// TestClusterMoves: all nodes come back at other ports, at once.
func TestClusterMoves(t *testing.T) {
	t.Parallel()
	c := startNodes(t, 3, "")
	values := numbered("before", 10)
	produce(t, patient(t, c.nodes[0].listen), values...)
	for _, m := range c.nodes {
		m.signal(t, syscall.SIGKILL)
	}
	for _, m := range c.nodes {
		m.wait(t)
		m.listen = freeAddress(t)
	}
	for _, m := range c.nodes {
		c.launch(t, m)
	}
	for _, m := range c.nodes {
		m.awaitReady(t)
	}
	produce(t, patient(t, c.nodes[0].listen), "after")
	for _, m := range c.nodes {
		if got := consume(t, patient(t, m.listen), 0); !slices.Equal(got, append(slices.Clone(values), "after")) {
			t.Errorf("%s has %d records", m.name, len(got))
		}
	}
	c.awaitDNS(t, "diurna", ports(c.nodes...))
}

// TestClusterKills: nodes are killed under load, one at random at a time, and
// all at once. Nothing that was acknowledged is lost, or moves.
func TestClusterKills(t *testing.T) {
	c := startNodes(t, 3, "")
	rng := vfstest.Rand(t)
	kills := vfstest.Env(t, "DIURNA_CLUSTER_KILLS", 8)
	l := startLoad(t, 4, c.addresses())
	var gaps []time.Duration
	for i := range kills {
		leads := c.leader(t)
		victim := c.nodes[rng.IntN(len(c.nodes))]
		if i%2 == 0 {
			victim = leads
		}
		began := time.Now()
		victim.kill(t)
		if victim == leads {
			gaps = append(gaps, untilAck(t, c, victim).Sub(began))
		}
		c.launch(t, victim)
		victim.awaitReady(t)
		c.servers(t, "three nodes vote", healthy(3))
	}
	for range max(1, kills/3) {
		for _, m := range c.nodes {
			m.signal(t, syscall.SIGKILL)
		}
		for _, m := range c.nodes {
			m.wait(t)
			c.launch(t, m)
		}
		for _, m := range c.nodes {
			m.awaitReady(t)
		}
		produce(t, patient(t, c.nodes[rand.IntN(3)].listen), "together")
	}
	if l.stop(t, c) == 0 {
		t.Error("nothing was acknowledged")
	}
	slices.Sort(gaps)
	t.Logf("%d leaders died; until the next acknowledgement: %v, median %v", len(gaps), gaps, gaps[len(gaps)/2].Round(time.Millisecond))
}

// untilAck returns when a producer that tries the nodes that are left was
// acknowledged.
func untilAck(t testing.TB, c *processCluster, dead *member) time.Time {
	t.Helper()
	var left []string
	for _, m := range c.nodes {
		if m != dead {
			left = append(left, m.listen)
		}
	}
	s := newSteady(t, fmt.Sprintf("gap-%d", time.Now().UnixNano()), left)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for n := 0; len(s.acked) == 0; n++ {
		if err := s.one(ctx, fmt.Sprint(s.name, "-", n)); err != nil {
			t.Fatal(err)
		}
	}
	return time.Now()
}

// TestClusterRolling: every node is restarted in turn. A producer that does as
// the errors tell it has nothing in doubt.
func TestClusterRolling(t *testing.T) {
	c := startNodes(t, 3, "")
	l := startLoad(t, 3, c.addresses())
	for range 2 {
		for _, m := range c.nodes {
			m.terminate(t)
			c.launch(t, m)
			m.awaitReady(t)
			c.servers(t, "three nodes vote", healthy(3))
		}
	}
	l.stop(t, c)
	for _, s := range l.producers {
		if len(s.unknown) > 0 {
			t.Errorf("%s: %d records in doubt", s.name, len(s.unknown))
		}
		t.Logf("%s: %d records, the longest pause was %v", s.name, len(s.acked), s.longest.Round(time.Millisecond))
	}
}
