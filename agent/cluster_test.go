package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/diurnalog/diurna/discovery/consul/consultest"
	"github.com/diurnalog/diurna/rpc/client"
)

// processCluster is nodes in processes of their own, and a real Consul.
type processCluster struct {
	consul *consultest.Server
	config string // file that all nodes read
	dir    string
	nodes  []*member
	files  *client.TLSFiles // what clients need; nil is plaintext
}

// member is a node that keeps its data, and its port, from one life to the next.
type member struct {
	*node
	name, dir, listen string
	more              []string
	lives             int
}

// startNodes starts n nodes and waits until all of them serve.
func startNodes(t testing.TB, n int, settings string) *processCluster {
	t.Helper()
	c := prepareNodes(t, n, settings)
	c.start(t, n)
	return c
}

// prepareNodes makes all that n nodes need, and starts none yet.
func prepareNodes(t testing.TB, n int, settings string) *processCluster {
	t.Helper()
	c := &processCluster{consul: consultest.Start(t, consultest.Options{}), dir: t.TempDir()}
	c.configure(t, n, fmt.Sprintf("consul { address = %q }\n%s", c.consul.HTTP, settings))
	return c
}

func (c *processCluster) configure(t testing.TB, n int, settings string) {
	t.Helper()
	c.config = filepath.Join(c.dir, "cluster.hcl")
	text := fmt.Sprintf(`
		cluster {
			name             = "test"
			bootstrap_expect = %d
		}
		discovery { type = "consul" }
		membership { stabilization = "1s" }
		disk { min_free = "16MiB" }
		%s
	`, n, settings)
	if err := os.WriteFile(c.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (c *processCluster) start(t testing.TB, n int) {
	t.Helper()
	for range n {
		c.add(t)
	}
	for _, m := range c.nodes {
		m.awaitReady(t)
	}
}

// add launches one more node.
func (c *processCluster) add(t testing.TB, more ...string) *member {
	t.Helper()
	name := fmt.Sprintf("n%d", len(c.nodes)+1)
	m := &member{name: name, dir: c.dataDir(name), listen: freeAddress(t), more: more}
	if c.files != nil {
		trusts.Store(m.listen, *c.files)
	}
	c.nodes = append(c.nodes, m)
	c.launch(t, m)
	return m
}

// dataDir is where a node's data is.
func (c *processCluster) dataDir(name string) string { return filepath.Join(c.dir, name) }

// launch runs a node that does not run. It does not wait for it.
func (c *processCluster) launch(t testing.TB, m *member) {
	t.Helper()
	args := append([]string{"-config-file", c.config, "-node", m.name, "-rpc-addr", m.listen}, m.more...)
	m.node = launchNode(t, m.dir, args...)
	m.addr = m.listen
	m.lives++
	n, name := m.node, fmt.Sprintf("%s-%d.log", m.name, m.lives)
	t.Cleanup(func() { n.keepLog(t, name) })
}

// keepLog writes what a node logged into the folder that DIURNA_CLUSTER_LOGS
// names; without one, the end of it is shown if the test fails.
func (n *node) keepLog(t testing.TB, name string) {
	text := n.stderr.text()
	if dir := os.Getenv("DIURNA_CLUSTER_LOGS"); dir != "" {
		file := filepath.Join(dir, strings.ReplaceAll(t.Name(), "/", "-")+"-"+name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Error(err)
		}
	} else if t.Failed() {
		t.Logf("%s:\n%s", name, text[max(0, len(text)-8<<10):])
	}
}

func (c *processCluster) addresses() (all []string) {
	for _, m := range c.nodes {
		all = append(all, m.listen)
	}
	return all
}

// servers asks the nodes, in turn, who is in the cluster, until one answer
// satisfies ok.
func (c *processCluster) servers(t testing.TB, what string, ok func([]client.Server) bool) []client.Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var last any
	for {
		for _, addr := range c.addresses() {
			servers, err := serversOf(ctx, addr)
			if err == nil && ok(servers) {
				return servers
			}
			last = cmp.Or[any](servers, err)
		}
		select {
		case <-time.After(100 * time.Millisecond): // another process's state: nothing to wait for
		case <-ctx.Done():
			t.Fatalf("waited in vain until %s; last answer: %+v", what, last)
		}
	}
}

func serversOf(ctx context.Context, addr string) ([]client.Server, error) {
	c, err := dialNode(addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	list, err := c.Servers(ctx)
	return list.Servers, err
}

// healthy tells whether there are n voters, all of them well, and a leader.
func healthy(n int) func([]client.Server) bool {
	return func(servers []client.Server) bool {
		voters, leaders := 0, 0
		for _, s := range servers {
			if s.Voter {
				voters++
			}
			if s.Leader {
				leaders++
			}
		}
		return len(servers) == n && voters == n && leaders == 1
	}
}

// leader returns the node that leads, as the nodes say.
func (c *processCluster) leader(t testing.TB) *member {
	t.Helper()
	var found *member
	c.servers(t, "somebody leads", func(servers []client.Server) bool {
		for _, s := range servers {
			for _, m := range c.nodes {
				if s.Leader && s.Address == m.listen && m.running() {
					found = m
					return true
				}
			}
		}
		return false
	})
	return found
}

func (m *member) running() bool {
	select {
	case <-m.ended:
		return false
	default:
		return true
	}
}

// dns asks Consul's own DNS port.
func (c *processCluster) dns() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", c.consul.DNS) // UDP answers stop at three
	}}
}

// awaitDNS waits until Consul's DNS lists exactly these ports.
func (c *processCluster) awaitDNS(t testing.TB, name string, want []string) {
	t.Helper()
	c.awaitLookup(t, name, want, func(ctx context.Context) (got []string, err error) {
		_, records, err := c.dns().LookupSRV(ctx, "", "", name+".service.consul.")
		for _, r := range records {
			got = append(got, fmt.Sprint(r.Port))
		}
		return got, err
	})
}

// awaitLookup waits until a name is answered by just this, in whatever order.
func (c *processCluster) awaitLookup(t testing.TB, name string, want []string, lookup func(context.Context) ([]string, error)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	slices.Sort(want)
	for {
		got, err := lookup(ctx)
		slices.Sort(got)
		if slices.Equal(got, want) {
			return
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("%s: got %v, %v; want %v", name, got, err, want)
		}
	}
}

func ports(members ...*member) (all []string) {
	for _, m := range members {
		_, port, _ := strings.Cut(m.listen, ":")
		all = append(all, port)
	}
	return all
}

// TestClusterLife: three nodes form a cluster; a fourth and a fifth join; one
// dies and is replaced. Consul's catalog and DNS, and Raft, agree on all of it.
func TestClusterLife(t *testing.T) {
	t.Parallel()
	c := startNodes(t, 3, "")
	c.servers(t, "three nodes vote", healthy(3))
	c.awaitDNS(t, "diurna", ports(c.nodes...))
	c.awaitDNS(t, "leader.diurna", ports(c.leader(t)))
	if hosts, err := c.dns().LookupHost(t.Context(), "diurna.service.consul."); err != nil || !slices.Contains(hosts, strings.Split(c.nodes[0].listen, ":")[0]) {
		t.Errorf("diurna.service.consul: %v, %v", hosts, err)
	}
	values := numbered("three", 100)
	produce(t, patient(t, c.nodes[0].listen), values...)

	for n := 4; n <= 5; n++ {
		m := c.add(t, "-bootstrap-expect", "0")
		m.awaitReady(t)
		c.servers(t, fmt.Sprintf("%d nodes vote", n), healthy(n))
		if got := consume(t, patient(t, m.listen), 0); !slices.Equal(got, values) {
			t.Errorf("node %d has %d records", n, len(got))
		}
	}
	c.awaitDNS(t, "diurna", ports(c.nodes...))

	// One dies for good. The operator does not wait for a day to have it removed.
	dead := c.nodes[1]
	dead.kill(t)
	id := nodeID(t, dead)
	var removed bool
	for !removed {
		code, _, stderr := runDiurna(t, "", "operator", "raft", "remove-peer", "-addr", c.leader(t).listen, "-peer-id", id)
		if removed = code == exitOK; !removed && !strings.Contains(stderr, "NO_LEADER") && !strings.Contains(stderr, "leader") {
			t.Fatalf("remove-peer: %s", stderr)
		}
	}
	c.nodes = slices.Delete(c.nodes, 1, 2)
	c.servers(t, "four nodes vote", healthy(4))
	replacement := &member{name: "n6", dir: filepath.Join(c.dir, "n6"), listen: freeAddress(t), more: []string{"-bootstrap-expect", "0"}}
	c.nodes = append(c.nodes, replacement)
	c.launch(t, replacement)
	replacement.awaitReady(t)
	c.servers(t, "five nodes vote", healthy(5))
	produce(t, patient(t, replacement.listen), "last")
	if got := consume(t, patient(t, c.nodes[0].listen), 0); !slices.Equal(got, append(values, "last")) {
		t.Errorf("there are %d records", len(got))
	}
}

// nodeID is the id that a node logged when it started.
func nodeID(t testing.TB, m *member) string {
	t.Helper()
	id := find(m.log(t), "node started").str("id")
	if id == "" {
		t.Fatal("the node did not say who it is")
	}
	return id
}

// steady produces one record after another, each until it is acknowledged, and
// notes what became of them. It is a producer that does what errors tell it.
type steady struct {
	clients []*client.Client
	name    string
	acked   map[uint64]string // by offset
	unknown []string
	refused int // attempts that definitely failed
	last    time.Time
	longest time.Duration // between two acknowledgements
}

func newSteady(t testing.TB, name string, addresses []string) *steady {
	s := &steady{name: name, acked: make(map[uint64]string)}
	for _, a := range addresses {
		s.clients = append(s.clients, dial(t, a))
	}
	return s
}

// run produces until ctx ends; what it has begun then, it brings to an end.
func (s *steady) run(ctx context.Context) error {
	s.last = time.Now()
	for n := 0; ctx.Err() == nil; n++ {
		if err := s.one(context.WithoutCancel(ctx), fmt.Sprintf("%s-%d", s.name, n)); err != nil {
			return err
		}
	}
	return nil
}

func (s *steady) one(ctx context.Context, value string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for try := 0; ctx.Err() == nil; try++ {
		one, cancel := context.WithTimeout(ctx, 5*time.Second)
		ack, err := s.clients[try%len(s.clients)].Produce(one, []*client.Record{{Value: []byte(value)}})
		cancel()
		var failed *client.Error
		switch {
		case err == nil:
			if was, ok := s.acked[ack.BaseOffset]; ok {
				return fmt.Errorf("offset %d was given to %q and to %q", ack.BaseOffset, was, value)
			}
			s.acked[ack.BaseOffset] = value
			s.longest = max(s.longest, time.Since(s.last))
			s.last = time.Now()
			return nil
		case errors.As(err, &failed) && failed.Definite:
			s.refused++
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
		default:
			// It may be in the log. The next one has another name.
			s.unknown = append(s.unknown, value)
			return nil
		}
	}
	return fmt.Errorf("%q was not acknowledged for %v", value, patience)
}

// check compares what was acknowledged with what a node has.
func (s *steady) check(t testing.TB, log []string) {
	t.Helper()
	for offset, value := range s.acked {
		if offset >= uint64(len(log)) || log[offset] != value {
			t.Errorf("%q was acknowledged at offset %d; the log of %d records has %q there", value, offset, len(log), at(log, offset))
		}
	}
	var mine []string
	seen := make(map[string]bool)
	for _, v := range log {
		if strings.HasPrefix(v, s.name+"-") {
			if seen[v] {
				t.Errorf("%q is there twice", v)
			}
			seen[v] = true
			mine = append(mine, v)
		}
	}
	if len(mine) > len(s.acked)+len(s.unknown) {
		t.Errorf("%s: %d records in the log, %d acknowledged, %d in doubt", s.name, len(mine), len(s.acked), len(s.unknown))
	}
}

func at(log []string, offset uint64) string {
	if offset < uint64(len(log)) {
		return log[offset]
	}
	return ""
}
