package agent

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/diurnalog/diurna/discovery/consul/consultest"
	"github.com/diurnalog/diurna/rpc/client"
)

// serviceName is all that clients of nodes in Nomad know.
const serviceName = "diurna.service.consul"

// nomadCluster is nodes that Nomad runs, at ports that nobody knows beforehand.
// nodes are those that DNS lists, as of the last look.
type nomadCluster struct {
	*processCluster
	nomad *nomad
}

// newNomadCluster starts Consul and Nomad, and no node yet. With tls the nodes
// share a throw-away CA.
func newNomadCluster(t testing.TB, tls bool) *nomadCluster {
	t.Helper()
	c := &nomadCluster{processCluster: &processCluster{consul: consultest.Start(t, consultest.Options{}), dir: t.TempDir()}}
	if tls {
		file := func(name string) string { return filepath.Join(c.dir, "data", "tls", name) }
		c.files = &client.TLSFiles{CAFile: file("ca.pem"), CertFile: file("client.pem"), KeyFile: file("client-key.pem")}
	}
	c.nomad = startNomad(t, c.consul, "")
	return c
}

// args are the variables of jobs/diurna-dev.nomad.hcl.
func (c *nomadCluster) args(program string) []string {
	return []string{"-var=diurna=" + program, "-var=data_dir=" + filepath.Join(c.dir, "data"), "-var=consul=" + c.consul.HTTP, fmt.Sprint("-var=tls=", c.files != nil)}
}

// look asks the DNS for all nodes until there are so many, which all vote, and
// returns what they say of themselves.
func (c *nomadCluster) look(t testing.TB, n int) []client.Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var last any
	for {
		_, records, err := c.dns().LookupSRV(ctx, "", "", serviceName+".")
		last = err
		c.nodes = nil
		for _, r := range records {
			addr := net.JoinHostPort("127.0.0.1", fmt.Sprint(r.Port))
			c.nodes = append(c.nodes, &member{name: addr, listen: addr})
			if c.files != nil {
				trusts.Store(addr, *c.files)
			}
		}
		if len(c.nodes) == n {
			servers, err := serversOf(ctx, c.nodes[0].listen)
			if err == nil && healthy(n)(servers) {
				return servers
			}
			last = fmt.Sprintf("%+v, %v", servers, err)
		}
		select {
		case <-time.After(100 * time.Millisecond): // another process's state: nothing to wait for
		case <-ctx.Done():
			t.Fatalf("there are not %d voters in the DNS, but %v; last: %v", n, c.addresses(), last)
		}
	}
}

// byName has a client connect that knows a name only: it asks Consul's DNS for the
// addresses and ports behind it, each time that it connects.
func (c *nomadCluster) byName() []client.Option {
	var opts []client.Option
	if c.files != nil {
		opts = append(opts, client.WithTLS(*c.files))
	}
	r := c.dns()
	return append(opts, client.WithDialer(func(ctx context.Context, addr string) (net.Conn, error) {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		_, records, err := r.LookupSRV(ctx, "", "", host+".")
		if err != nil {
			return nil, err
		}
		err = fmt.Errorf("%s has no SRV records", host)
		for _, record := range records {
			var conn net.Conn
			d := net.Dialer{Resolver: r, Timeout: 2 * time.Second}
			if conn, err = d.DialContext(ctx, "tcp", net.JoinHostPort(record.Target, fmt.Sprint(record.Port))); err == nil {
				return conn, nil
			}
		}
		return nil, err
	}))
}

// load produces all the time, by name, as clients are by default: what they
// repeat by themselves is all that is repeated.
func (c *nomadCluster) load(t testing.TB, name string, n int) *load {
	t.Helper()
	var producers []*steady
	for i := range n {
		s := newSteady(t, fmt.Sprint(name, i), nil)
		s.clients = []*client.Client{dialWith(t, serviceName, c.byName()...)}
		producers = append(producers, s)
	}
	return loadOf(t, producers)
}

// undisturbed ends the load and wants none of its producers to have had an error,
// and every node to have what was acknowledged.
func (c *nomadCluster) undisturbed(t testing.TB, l *load) {
	t.Helper()
	if l.stop(t, c.processCluster) == 0 {
		t.Error("nothing was acknowledged")
	}
	for _, s := range l.producers {
		if s.refused > 0 || len(s.unknown) > 0 {
			t.Errorf("%s: %d errors, %d records in doubt", s.name, s.refused, len(s.unknown))
		}
		t.Logf("%s: %d records, the longest pause was %v", s.name, len(s.acked), s.longest.Round(time.Millisecond))
	}
}

// buildVersion builds the program as another version.
func buildVersion(t testing.TB, version string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "diurna")
	build := exec.CommandContext(t.Context(), "go", "build", "-race=false", "-buildvcs=false",
		"-ldflags", "-X main.version="+version, "-o", path, "github.com/diurnalog/diurna")
	build.Dir = program.home
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build diurna: %v\n%s", err, out)
	}
	return path
}

// versions asks every node which version it is.
func (c *nomadCluster) versions(t testing.TB) (all []string) {
	t.Helper()
	for _, m := range c.nodes {
		list, err := patient(t, m.listen).Servers(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range list.Servers {
			if s.ID == list.AnsweredBy {
				all = append(all, s.Version)
			}
		}
	}
	return all
}

// TestNomadLife: jobs/diurna-dev.nomad.hcl from nothing: it forms a cluster that
// clients find by name; another version of the program is rolled out under load;
// the job is stopped, and run again, with its data.
func TestNomadLife(t *testing.T) {
	t.Parallel()
	const next = "v9.9.9-next"
	program := buildVersion(t, next)
	c := newNomadCluster(t, false)
	c.nomad.runJob(t, "diurna-dev", "diurna-dev.nomad.hcl", c.args(diurna(t))...)
	c.look(t, 3)
	before := c.versions(t)
	all := dialWith(t, serviceName, c.byName()...)
	values := numbered("first", 1000)
	produce(t, all, values...)
	if got := consume(t, all, 0); !slices.Equal(got, values) {
		t.Errorf("%d records", len(got))
	}
	c.example(t)

	l := c.load(t, "p", 2)
	followed := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var seen uint64
	go func() { followed <- follow(ctx, serviceName, &seen, c.byName()...) }()
	c.nomad.run(t, "job run", append(c.args(program), "jobs/diurna-dev.nomad.hcl")...)
	c.look(t, 3)
	after := c.versions(t)
	t.Logf("versions before the update: %q, after it: %q", before, after)
	isNext := func(version string) bool { return strings.Contains(version, next) }
	if len(after) != 3 || slices.ContainsFunc(before, isNext) || !slices.ContainsFunc(after, isNext) || slices.ContainsFunc(after, func(v string) bool { return !isNext(v) }) {
		t.Error("they are not the next one on all nodes")
	}
	c.undisturbed(t, l)
	oneByOne(t, c.nomad.awaitAllocs(t, "diurna-dev", "the update is done", running(3)), 1)
	cancel()
	if err := <-followed; err != nil || seen == 0 {
		t.Errorf("the reader has seen %d records and ended: %v", seen, err)
	}
	log := consume(t, all, 0)

	c.nomad.run(t, "job stop", "diurna-dev")
	c.awaitDNS(t, "diurna", nil)
	c.nomad.exitedCleanly(t, c.nomad.awaitAllocs(t, "diurna-dev", "the job has stopped", allStopped))
	c.nomad.run(t, "job run", append(c.args(program), "jobs/diurna-dev.nomad.hcl")...)
	c.look(t, 3)
	for _, m := range c.nodes {
		if got := consume(t, patient(t, m.listen), 0); !slices.Equal(got, log) {
			t.Errorf("after it was stopped there are %d records; there were %d", len(got), len(log))
		}
	}
}

// example runs jobs/example.nomad.hcl to its end.
func (c *nomadCluster) example(t testing.TB) {
	t.Helper()
	args := []string{"-var=diurna=" + diurna(t), "-var=records=1000"}
	if c.files != nil {
		args = append(args, "-var=tls_dir="+filepath.Dir(c.files.CAFile))
	}
	c.nomad.runJob(t, "diurna-example", "example.nomad.hcl", args...)
	allocs := c.nomad.awaitAllocs(t, "diurna-example", "the example has ended", func(allocs []allocation) bool {
		return len(allocs) > 0 && allStopped(allocs)
	})
	c.nomad.exitedCleanly(t, allocs)
	if out := c.nomad.run(t, "alloc logs", "-task", "consume", "-job", "diurna-example"); !strings.Contains(out, "consumed what was produced: 1000 records") {
		t.Errorf("the example printed %q", out)
	}
}

// TestNomadDrain: a machine is drained under load. Its nodes end cleanly and come
// up elsewhere, and nobody notices. There are three clients of Nomad; being on one
// machine, they see the same data. The nodes have certificates.
func TestNomadDrain(t *testing.T) {
	t.Parallel()
	c := newNomadCluster(t, true)
	c.nomad.addClient(t, c.consul, "second", "")
	c.nomad.addClient(t, c.consul, "third", "")
	c.nomad.runJob(t, "diurna-dev", "diurna-dev.nomad.hcl", c.args(diurna(t))...)
	c.look(t, 3)
	c.example(t)
	l := c.load(t, "p", 2)
	// That of the leader, whose name has the allocation's index.
	leader := c.leads(t)
	allocs := c.nomad.awaitAllocs(t, "diurna-dev", "three nodes run", running(3))
	i := slices.IndexFunc(allocs, func(a allocation) bool {
		return a.Name == fmt.Sprintf("diurna-dev.node[%s]", strings.TrimPrefix(leader, "node-"))
	})
	if i < 0 {
		t.Fatalf("%s leads, and is none of %+v", leader, allocs)
	}
	drained := allocs[i].NodeID
	// The command waits until the machine is empty.
	c.nomad.run(t, "node drain", "-enable", "-yes", "-deadline=5m", drained)
	allocs = c.nomad.awaitAllocs(t, "diurna-dev", "three nodes run again", running(3))
	c.look(t, 3)
	c.undisturbed(t, l)
	ended := slices.DeleteFunc(allocs, func(a allocation) bool { return a.NodeID != drained })
	if len(ended) == 0 || !allStopped(ended) {
		t.Errorf("on the machine that was drained there are %+v", ended)
	}
	c.nomad.exitedCleanly(t, ended)
}

// leads is the name of the node that leads.
func (c *nomadCluster) leads(t testing.TB) (name string) {
	t.Helper()
	c.servers(t, "somebody leads whose name is known", func(servers []client.Server) bool {
		for _, s := range servers {
			if s.Leader {
				name = s.Name
			}
		}
		return name != ""
	})
	return name
}

// running tells whether so many allocations run and are healthy, and no other
// is to come or to go.
func running(n int) func([]allocation) bool {
	return func(allocs []allocation) bool {
		found := 0
		for _, a := range allocs {
			switch {
			case a.ClientStatus == "pending", a.ClientStatus == "running" && a.DesiredStatus != "run":
				return false
			case a.ClientStatus == "running" && (a.DeploymentStatus == nil || a.DeploymentStatus.Healthy == nil || !*a.DeploymentStatus.Healthy):
				return false
			case a.ClientStatus == "running":
				found++
			}
		}
		return found == n
	}
}
