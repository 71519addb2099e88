package consul

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/consul/api"

	"github.com/diurnalog/diurna/discovery"
)

func testConfig(t testing.TB) *Config {
	t.Helper()
	c := &Config{Cluster: "test", Tags: []string{"blue"}}
	if err := c.applyDefaultsAndValidate(); err != nil {
		t.Fatal(err)
	}
	return c
}

func full(id string) discovery.Node {
	return discovery.Node{
		ID: id, Name: "name", Address: "192.0.2.1:8400", Cluster: "test", ClusterID: "cid", State: discovery.Leaving,
		Role: discovery.Leader, Term: 1<<64 - 1, Expect: 5, Zone: "z", Version: "1.0", HTTP: "192.0.2.1:8402",
	}
}

// entry is a node as the catalog shows it.
func entry(t testing.TB, c *Config, n discovery.Node) *api.ServiceEntry {
	t.Helper()
	reg, err := c.registration(n)
	if err != nil {
		t.Fatal(err)
	}
	status := api.HealthPassing
	if n.Critical {
		status = api.HealthCritical
	}
	return &api.ServiceEntry{
		Node:    &api.Node{Node: "host", Address: "198.51.100.1"},
		Service: asService(reg),
		Checks:  api.HealthChecks{{Status: api.HealthPassing}, {Status: status}},
	}
}

func TestRoundTrip(t *testing.T) {
	c := testConfig(t)
	minimal := discovery.Node{ID: "m", Address: "h.example:1", Cluster: "test", State: discovery.Fresh}
	v6 := full("v6")
	v6.Address, v6.Critical = "[2001:db8::1]:65535", true
	for _, n := range []discovery.Node{full("f"), minimal, v6} {
		got, err := c.decode(entry(t, c, n))
		if err != nil || got != n {
			t.Errorf("want %+v\ngot %+v, %v", n, got, err)
		}
	}
	if c.Tags = append(make([]string, 0, 8), "a"); len(c.Tags) == 1 {
		one, err := c.registration(full("a"))
		if err != nil {
			t.Fatal(err)
		}
		other := full("b")
		other.Role = discovery.Follower
		if _, err := c.registration(other); err != nil || one.Tags[1] != "leader" {
			t.Errorf("registrations share their tags: %q, %v", one.Tags, err)
		}
	}
}

// TestChecks is what the agent is asked to check; Consul tells little of it
// again.
func TestChecks(t *testing.T) {
	c := testConfig(t)
	c.HealthTLS = true
	reg, err := c.registration(full("x"))
	if err != nil {
		t.Fatal(err)
	}
	want := api.AgentServiceChecks{
		{CheckID: "diurna-x:raft", Name: "Raft", TTL: "15s", Status: "critical", DeregisterCriticalServiceAfter: "72h0m0s"},
		{CheckID: "diurna-x:grpc", Name: "gRPC", GRPC: "192.0.2.1:8400/diurna.v1.Log", GRPCUseTLS: true, TLSSkipVerify: true,
			Interval: "3s", Timeout: "3s", FailuresBeforeCritical: 3, Status: "critical", DeregisterCriticalServiceAfter: "72h0m0s"},
	}
	for i, got := range reg.Checks {
		got.Notes = ""
		if !reflect.DeepEqual(got, want[i]) {
			t.Errorf("want %+v\ngot %+v", want[i], got)
		}
	}
	if len(reg.Checks) != len(want) || reg.Check != nil {
		t.Errorf("%d checks", len(reg.Checks))
	}
}

func TestNotRegistrable(t *testing.T) {
	c := testConfig(t)
	for name, change := range map[string]func(*discovery.Node){
		"no id":          func(n *discovery.Node) { n.ID = "" },
		"id with slash":  func(n *discovery.Node) { n.ID = "../kv" },
		"long id":        func(n *discovery.Node) { n.ID = strings.Repeat("x", 129) },
		"no address":     func(n *discovery.Node) { n.Address = "" },
		"wildcard":       func(n *discovery.Node) { n.Address = "0.0.0.0:8400" },
		"no host":        func(n *discovery.Node) { n.Address = ":8400" },
		"port 0":         func(n *discovery.Node) { n.Address = "h:0" },
		"no state":       func(n *discovery.Node) { n.State = "" },
		"foreign role":   func(n *discovery.Node) { n.Role = "king" },
		"very long zone": func(n *discovery.Node) { n.Zone = strings.Repeat("z", 513) },
	} {
		n := full("x")
		change(&n)
		if reg, err := c.registration(n); err == nil {
			t.Errorf("%s: %+v", name, reg)
		}
	}
}

// TestDecode reads what others may have written.
func TestDecode(t *testing.T) {
	c := testConfig(t)
	for name, tc := range map[string]struct {
		change func(e *api.ServiceEntry)
		want   string // in the cause; "-" when it is silently not ours
	}{
		"other cluster":     {func(e *api.ServiceEntry) { e.Service.Meta["cluster_name"] = "x" }, "-"},
		"no meta":           {func(e *api.ServiceEntry) { e.Service.Meta = nil }, "lacks cluster_name"},
		"no service":        {func(e *api.ServiceEntry) { e.Service = nil }, "incomplete"},
		"no node":           {func(e *api.ServiceEntry) { e.Node = nil }, "incomplete"},
		"no id":             {func(e *api.ServiceEntry) { delete(e.Service.Meta, "node_id") }, "node_id"},
		"bad id":            {func(e *api.ServiceEntry) { e.Service.Meta["node_id"] = "a\nb" }, "not an id"},
		"id contradicts":    {func(e *api.ServiceEntry) { e.Service.Meta["node_id"] = "y" }, "contradicts"},
		"service id":        {func(e *api.ServiceEntry) { e.Service.ID = "x" }, "contradicts"},
		"no state":          {func(e *api.ServiceEntry) { delete(e.Service.Meta, "state") }, "not a state"},
		"unknown state":     {func(e *api.ServiceEntry) { e.Service.Meta["state"] = "dead" }, "not a state"},
		"term":              {func(e *api.ServiceEntry) { e.Service.Meta["raft_term"] = "-1" }, "raft_term"},
		"term too large":    {func(e *api.ServiceEntry) { e.Service.Meta["raft_term"] = "18446744073709551616" }, "raft_term"},
		"no expect":         {func(e *api.ServiceEntry) { delete(e.Service.Meta, "expect") }, "expect"},
		"expect":            {func(e *api.ServiceEntry) { e.Service.Meta["expect"] = "three" }, "expect"},
		"two roles":         {func(e *api.ServiceEntry) { e.Service.Tags = []string{"leader", "follower"} }, "both leader and follower"},
		"port 0":            {func(e *api.ServiceEntry) { e.Service.Port = 0 }, "not a port"},
		"large port":        {func(e *api.ServiceEntry) { e.Service.Port = 65536 }, "not a port"},
		"negative port":     {func(e *api.ServiceEntry) { e.Service.Port = -1 }, "not a port"},
		"no address at all": {func(e *api.ServiceEntry) { e.Service.Address, e.Node.Address = "", "" }, "dial"},
		"wildcard":          {func(e *api.ServiceEntry) { e.Service.Address = "::" }, "dial"},
		"address":           {func(e *api.ServiceEntry) { e.Service.Address = "a b" }, "not a host"},
	} {
		e := entry(t, c, full("x"))
		tc.change(e)
		nodes, skip := c.decodeAll([]*api.ServiceEntry{e, entry(t, c, full("z"))})
		if len(nodes) != 1 || nodes[0].ID != "z" {
			t.Errorf("%s: nodes %+v", name, nodes)
		}
		switch {
		case tc.want == "-" && len(skip) != 0, tc.want != "-" && (len(skip) != 1 || !strings.Contains(skip[0].why, tc.want)):
			t.Errorf("%s: want %q, got %+v", name, tc.want, skip)
		}
	}

	// Taken as it is.
	for name, change := range map[string]func(e *api.ServiceEntry){
		"tag twice":    func(e *api.ServiceEntry) { e.Service.Tags = []string{"leader", "leader"} },
		"unknown meta": func(e *api.ServiceEntry) { e.Service.Meta["color"] = "red" },
		"protocol":     func(e *api.ServiceEntry) { e.Service.Meta["protocol"] = "99" },
		"unknown tag":  func(e *api.ServiceEntry) { e.Service.Tags = append(e.Service.Tags, "x") },
	} {
		e := entry(t, c, full("x"))
		change(e)
		if got, err := c.decode(e); err != nil || got != full("x") {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	e := entry(t, c, full("x"))
	e.Service.Address = ""
	if got, err := c.decode(e); err != nil || got.Address != "198.51.100.1:8400" {
		t.Errorf("no address: %+v, %v", got, err)
	}
	e.Checks = append(e.Checks, &api.HealthCheck{CheckID: api.NodeMaint, Status: api.HealthCritical})
	if got, err := c.decode(e); err != nil || !got.Critical {
		t.Errorf("in maintenance: %+v, %v", got, err)
	}
}

// TestSameID has one id registered more than once.
func TestSameID(t *testing.T) {
	c := testConfig(t)
	at := func(address string, critical bool, created uint64) *api.ServiceEntry {
		n := full("x")
		n.Address, n.Critical = address, critical
		e := entry(t, c, n)
		e.Service.CreateIndex = created
		return e
	}
	const one, two = "192.0.2.1:1", "192.0.2.2:1"
	for name, tc := range map[string]struct {
		entries []*api.ServiceEntry
		want    string // address; empty: none is used
	}{
		"moved":                  {[]*api.ServiceEntry{at(one, true, 9), at(two, false, 1)}, two},
		"moved, both down":       {[]*api.ServiceEntry{at(one, true, 1), at(two, true, 9)}, two},
		"two agents":             {[]*api.ServiceEntry{at(one, false, 1), at(one, false, 9)}, one},
		"copied":                 {[]*api.ServiceEntry{at(one, false, 1), at(two, false, 9)}, ""},
		"copied, and a dead one": {[]*api.ServiceEntry{at(one, true, 1), at(one, false, 1), at(two, false, 9)}, ""},
	} {
		for range 2 {
			nodes, skip := c.decodeAll(tc.entries)
			switch {
			case tc.want == "" && (len(nodes) != 0 || len(skip) != len(tc.entries) || !strings.Contains(skip[0].why, "copied") || distrustSkipped(skip) == ""):
				t.Errorf("%s: %+v, %+v", name, nodes, skip)
			case tc.want != "" && (len(nodes) != 1 || nodes[0].Address != tc.want || len(skip) != 0):
				t.Errorf("%s: %+v, %+v", name, nodes, skip)
			}
			slices.Reverse(tc.entries)
		}
	}
}

func TestHolds(t *testing.T) {
	c := testConfig(t)
	reg, err := c.registration(full("x"))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(s *api.AgentService){
		"id":       func(s *api.AgentService) { s.ID = "y" },
		"name":     func(s *api.AgentService) { s.Service = "y" },
		"address":  func(s *api.AgentService) { s.Address = "y" },
		"port":     func(s *api.AgentService) { s.Port++ },
		"tags":     func(s *api.AgentService) { s.Tags = s.Tags[:1] },
		"meta":     func(s *api.AgentService) { s.Meta["x"] = "y" },
		"no meta":  func(s *api.AgentService) { s.Meta = nil },
		"override": func(s *api.AgentService) { s.EnableTagOverride = true },
	} {
		s := asService(reg)
		s.Meta = maps.Clone(s.Meta)
		if !holds(s, reg) {
			t.Fatal("not even itself")
		}
		if change(s); holds(s, reg) {
			t.Errorf("%s may differ", name)
		}
	}
	if holds(nil, reg) {
		t.Error("nothing is something")
	}
}

// FuzzDecode reads answers that anybody wrote.
func FuzzDecode(f *testing.F) {
	c := &Config{Cluster: "test"}
	if err := c.applyDefaultsAndValidate(); err != nil {
		f.Fatal(err)
	}
	seed, err := json.Marshal([]*api.ServiceEntry{entry(f, c, full("x")), entry(f, c, full("y"))})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte(`[null,{"Service":{"Meta":{"cluster_name":"test"}}}]`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var entries []*api.ServiceEntry
		if json.Unmarshal(text, &entries) != nil {
			return
		}
		nodes, skip := c.decodeAll(entries)
		if len(nodes)+len(skip) > len(entries) {
			t.Fatalf("%d of %d", len(nodes)+len(skip), len(entries))
		}
		for i, n := range nodes {
			if i > 0 && nodes[i-1].ID >= n.ID {
				t.Fatalf("%q before %q", nodes[i-1].ID, n.ID)
			}
			// What is read can be written, but for texts that are too long.
			if _, err := c.registration(n); err != nil && !strings.Contains(err.Error(), "longer") {
				t.Fatalf("%+v: %v", n, err)
			}
		}
		distrustSkipped(skip)
	})
}
