package consul

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"

	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/discovery/consul/consultest"
	"github.com/diurnalog/diurna/discovery/discoverytest"
)

// real is a Consul that denies what no token allows, with tokens for a node's
// documented policy and for one that lacks a part of it.
type real struct {
	*consultest.Server
	api          *api.Client
	node, narrow string // tokens
}

func startReal(t *testing.T) *real {
	t.Helper()
	r := &real{Server: consultest.Start(t, consultest.Options{ACL: true}), node: uuid.NewString(), narrow: uuid.NewString()}
	cfg := api.DefaultConfig()
	cfg.Address, cfg.Token = r.HTTP, r.Token
	var err error
	if r.api, err = api.NewClient(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cfg.Transport.CloseIdleConnections)
	r.makeTokens(t)
	return r
}

func (r *real) makeTokens(t testing.TB) {
	t.Helper()
	const services, keys = `service "diurna" { policy = "write" }`, `key_prefix "diurna/" { policy = "write" }`
	r.MakeTokenAs(t, r.node, services+keys+`node_prefix "" { policy = "read" }`)
	r.MakeTokenAs(t, r.narrow, services+keys)
}

// handle returns a node's discovery, not running.
func (r *real) handle(t testing.TB, change func(*Config)) (*Discovery, *logs) {
	t.Helper()
	var l logs
	cfg := Config{Address: r.HTTP, Token: r.node, Cluster: "test", Timing: quick, Logger: l.logger(t, "node")}
	if change != nil {
		change(&cfg)
	}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, secret := range []string{r.Token, r.node, r.narrow} {
			if strings.Contains(l.String(), secret) {
				t.Error("a token was logged")
			}
		}
	})
	return d, &l
}

// run runs a handle until the test ends, or stop is called.
func run(t testing.TB, d *Discovery) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		err = d.Run(ctx)
	}()
	stop = func() error { cancel(); <-done; return err }
	t.Cleanup(func() { _ = stop() })
	return stop
}

func await(t testing.TB, d discovery.Discovery, what string, ok func(discovery.Snapshot) bool) discovery.Snapshot {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	s, err := discovery.Wait(ctx, d, ok)
	if err != nil {
		t.Fatalf("%s: %v; the last snapshot: %+v", what, err, s)
	}
	return s
}

// eventually polls what cannot be waited for.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func member(t testing.TB, name string) discovery.Registration {
	return discovery.Registration{
		Node:   discovery.Node{ID: uuid.NewString(), Name: name, Address: healthy(t), Cluster: "test", State: discovery.Member},
		Status: discovery.Passing, Output: "well",
	}
}

func trusted(n int) func(discovery.Snapshot) bool {
	return func(s discovery.Snapshot) bool {
		return s.Trusted && len(s.Nodes) == n && !slices.ContainsFunc(s.Nodes, func(n discovery.Node) bool { return n.Critical })
	}
}

func (r *real) entries(t testing.TB) []*api.ServiceEntry {
	t.Helper()
	entries, _, err := r.api.Health().Service("diurna", "", false, &api.QueryOptions{RequireConsistent: true})
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

// TestConsul is what every registry promises, by a real Consul that demands
// tokens.
func TestConsul(t *testing.T) {
	r := startReal(t)
	discoverytest.Run(t, func(t *testing.T) discoverytest.Harness {
		handle := func(token string) func(t testing.TB, cluster string) discovery.Discovery {
			return func(t testing.TB, cluster string) discovery.Discovery {
				d, _ := r.handle(t, func(c *Config) { c.Cluster, c.Token = cluster, token })
				return d
			}
		}
		return discoverytest.Harness{
			New:      handle(r.node),
			Filtered: handle(r.narrow),
			Address:  healthy,
			Nodes: func(t testing.TB, cluster string) []discovery.Node {
				nodes, _ := (&Config{Cluster: cluster, Service: "diurna"}).decodeAll(r.entries(t))
				return nodes
			},
			Forget: func(t testing.TB, _, id string) {
				if err := r.api.Agent().ServiceDeregister("diurna-" + id); err != nil {
					t.Fatal(err)
				}
			},
			Down: func(t testing.TB) { r.Kill(t) },
			Up:   func(t testing.TB) { r.Restart(t) },
			Wipe: func(t testing.TB) {
				r.RestartEmpty(t)
				r.makeTokens(t)
			},
		}
	})
}

// TestRegistration looks at what Consul holds, as others see it.
func TestRegistration(t *testing.T) {
	r := startReal(t)
	d, _ := r.handle(t, func(c *Config) { c.Tags = []string{"blue"} })
	reg := member(t, "one")
	reg.Role, reg.Term, reg.Expect, reg.HTTP, reg.Zone, reg.Version, reg.ClusterID = discovery.Leader, 7, 3, "192.0.2.1:8402", "z", "1.0", "c"
	stop := run(t, d)
	d.Announce(reg)
	await(t, d, "registered", trusted(1))
	e := r.entries(t)[0]
	host, port, _ := net.SplitHostPort(reg.Address)
	if e.Service.ID != "diurna-"+reg.ID || e.Service.Address != host || fmt.Sprint(e.Service.Port) != port || e.Service.EnableTagOverride {
		t.Errorf("service: %+v", e.Service)
	}
	if want := []string{"blue", "leader"}; !slices.Equal(e.Service.Tags, want) {
		t.Errorf("tags: %q", e.Service.Tags)
	}
	for key, want := range map[string]string{
		"node_id": reg.ID, "node_name": "one", "cluster_name": "test", "cluster_id": "c", "state": "member", "expect": "3",
		"raft_term": "7", "http_addr": "192.0.2.1:8402", "zone": "z", "version": "1.0", "protocol": "1",
	} {
		if got := e.Service.Meta[key]; got != want {
			t.Errorf("meta %s: want %q, got %q", key, want, got)
		}
	}
	checks := make(map[string]*api.HealthCheck)
	for _, c := range e.Checks {
		checks[c.CheckID] = c
	}
	if c := checks["diurna-"+reg.ID+":raft"]; c == nil || c.Type != "ttl" || c.Output != "well" {
		t.Errorf("TTL check: %+v", c)
	}
	if c := checks["diurna-"+reg.ID+":grpc"]; c == nil || c.Type != "grpc" {
		t.Errorf("gRPC check: %+v", c)
	}

	t.Run("DNS", func(t *testing.T) {
		resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, r.DNS)
		}}
		for _, name := range []string{"diurna.service.consul.", "leader.diurna.service.consul.", "blue.diurna.service.consul."} {
			if got, err := resolver.LookupHost(t.Context(), name); err != nil || !slices.Equal(got, []string{host}) {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
		for service, proto := range map[string]string{"diurna": "tcp", "": "", "diurna ": "leader"} {
			name := "leader.diurna.service.consul."
			if service != "" {
				name = "service.consul."
			}
			_, got, err := resolver.LookupSRV(t.Context(), strings.TrimSpace(service), proto, name)
			if err != nil || len(got) != 1 || fmt.Sprint(got[0].Port) != port {
				t.Errorf("SRV %s %s %s: %+v, %v", service, proto, name, got, err)
			}
		}
		if got, err := resolver.LookupHost(t.Context(), "follower.diurna.service.consul."); err == nil {
			t.Errorf("a follower at %q", got)
		}
		// One that is not well is not found.
		sick := reg
		sick.Status = discovery.Critical
		d.Announce(sick)
		await(t, d, "critical", func(s discovery.Snapshot) bool { n, ok := s.Find(reg.ID); return ok && n.Critical })
		if got, err := resolver.LookupHost(t.Context(), "diurna.service.consul."); err == nil {
			t.Errorf("a critical node is found at %q", got)
		}
		d.Announce(reg)
		await(t, d, "well", trusted(1))
	})

	// A check that somebody removed comes back.
	if err := r.api.Agent().CheckDeregister("diurna-" + reg.ID + ":raft"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the check is back", func() bool {
		checks, err := r.api.Agent().Checks()
		return err == nil && checks["diurna-"+reg.ID+":raft"] != nil
	})
	// So does a tag that somebody changed at the agent.
	if err := r.api.Agent().ServiceRegister(&api.AgentServiceRegistration{ID: "diurna-" + reg.ID, Name: "diurna", Tags: []string{"follower"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the tags are back", func() bool {
		s, _, err := r.api.Agent().Service("diurna-"+reg.ID, nil)
		return err == nil && slices.Equal(s.Tags, []string{"blue", "leader"})
	})
	if err := stop(); err != nil {
		t.Error(err)
	}
	if left := r.entries(t); len(left) != 0 {
		t.Errorf("left: %+v", left)
	}
}

// TestStreaming makes sure that the agent asks the servers: its own copy would
// answer without an error when they are gone.
func TestStreaming(t *testing.T) {
	r := startReal(t)
	run1, _ := r.handle(t, nil)
	run(t, run1)
	run1.Announce(member(t, "one"))
	await(t, run1, "registered", trusted(1))
	for near, want := range map[string]string{"": api.QueryBackendStreaming, "_agent": api.QueryBackendBlockingQuery} {
		_, meta, err := r.api.Health().Service("diurna", "", false, &api.QueryOptions{WaitIndex: 1, WaitTime: time.Second, Near: near})
		if err != nil {
			t.Fatal(err)
		}
		if meta.QueryBackend != want {
			t.Errorf("near %q: want %s, got %s", near, want, meta.QueryBackend)
		}
	}
}

// TestTokens takes a token away, and gives another by the file.
func TestTokens(t *testing.T) {
	r := startReal(t)
	file := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(r.node)
	d, l := r.handle(t, func(c *Config) { c.Token, c.TokenFile = "", file })
	stop := run(t, d)
	reg := member(t, "one")
	d.Announce(reg)
	await(t, d, "the documented policy is enough", trusted(1))
	if won, err := d.Bootstrap().Create(t.Context(), []byte("x")); err != nil || !won {
		t.Fatal(won, err)
	}

	self, _, err := r.api.ACL().TokenReadSelf(&api.QueryOptions{Token: r.node})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.api.ACL().TokenDelete(self.AccessorID, nil); err != nil {
		t.Fatal(err)
	}
	got := await(t, d, "revoked", func(s discovery.Snapshot) bool { return strings.Contains(s.Why, "403") })
	if got.Trusted || len(got.Nodes) != 1 || !strings.Contains(got.Why, r.HTTP) || !strings.Contains(got.Why, file) {
		t.Errorf("revoked: %+v", got)
	}
	_, _, err = d.Bootstrap().Get(t.Context())
	if err == nil || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), r.HTTP) {
		t.Errorf("a revoked token reads the record: %v", err)
	}

	other := uuid.NewString()
	r.MakeTokenAs(t, other, `service "diurna" { policy = "write" } key_prefix "diurna/" { policy = "write" } node_prefix "" { policy = "read" }`)
	write(other)
	await(t, d, "replaced", trusted(1))
	if v, _, err := d.Bootstrap().Get(t.Context()); err != nil || string(v) != "x" {
		t.Errorf("with the new token: %q, %v", v, err)
	}
	if strings.Contains(l.String(), other) {
		t.Error("a token was logged")
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// TestNoPermission has a token that may do nothing.
func TestNoPermission(t *testing.T) {
	r := startReal(t)
	d, l := r.handle(t, func(c *Config) { c.Token = "" })
	one, _ := r.handle(t, nil)
	run(t, one)
	one.Announce(member(t, "one"))
	await(t, one, "registered", trusted(1))
	stop := run(t, d)
	d.Announce(member(t, "two"))
	got := await(t, d, "an answer", func(s discovery.Snapshot) bool { return !s.At.IsZero() })
	if got.Trusted || !strings.Contains(got.Why, "token") || len(got.Nodes) != 0 {
		t.Errorf("an answer without service:read: %+v", got)
	}
	eventually(t, "the log says what is missing", func() bool {
		return strings.Contains(l.String(), `service write on`) && strings.Contains(l.String(), r.HTTP)
	})
	_ = stop() // it cannot tell that nothing is registered
}
