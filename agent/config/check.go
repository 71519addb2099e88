package config

import (
	"net"
	"regexp"
	"time"
)

// nodeName keeps names fit for labels of metrics, tags and log lines.
var nodeName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?$`)

// check looks at what one value alone cannot tell, and fills in the advertised
// address.
func (l *loader) check(c *Config) {
	if c.DataDir == "" && !c.Dev && !l.bad["data_dir"] && !l.unread {
		l.fail("data_dir", "Missing data_dir",
			`There is no default for where the data is kept: set data_dir = "/some/folder", or give -data-dir. To only try things, -dev uses a temporary folder.`)
	}
	if !l.bad["node.name"] && !nodeName.MatchString(c.Node.Name) {
		l.fail("node.name", "Invalid value for node.name",
			"%q is not a name: up to 128 letters, digits, dots, hyphens and underscores, a letter or digit first and last.", c.Node.Name)
	}
	l.checkAdvertise(c)
	l.checkCluster(c)
	l.checkSecurity(c)
	l.checkTelemetry(c)

	size := func(name string, n int64) operand { return operand{name, n, formatSize(n)} }
	record := operand{"limits.max_record", c.Limits.MaxRecord + RecordFraming,
		formatSize(c.Limits.MaxRecord) + " and " + formatSize(RecordFraming) + " of framing"}
	l.atMost(record, size("limits.max_batch", c.Limits.MaxBatch), "A batch of one largest record must fit.")
	l.atMost(size("limits.max_batch", c.Limits.MaxBatch), size("limits.in_flight", c.Limits.InFlight),
		"Else a largest batch could never be taken in.")
	span := func(name string, d time.Duration) operand { return operand{name, int64(d), d.String()} }
	heartbeat := span("raft.heartbeat_timeout", c.Raft.HeartbeatTimeout)
	l.atMost(heartbeat, span("raft.election_timeout", c.Raft.ElectionTimeout),
		"An election must not be over before the leader is missed.")
	l.atMost(span("raft.leader_lease_timeout", c.Raft.LeaderLeaseTimeout), heartbeat,
		"A leader must step down before others stand for election.")
	l.atMost(span("raft.commit_timeout", c.Raft.CommitTimeout), heartbeat,
		"Followers must hear from an idle leader in time.")
}

// checkCluster looks at how the node finds its cluster. It also takes back the
// pace of a node that is tried out alone where there are others.
func (l *loader) checkCluster(c *Config) {
	for _, k := range []struct{ key, value string }{{"cluster.name", c.Cluster.Name}, {"consul.service", c.Consul.Service}} {
		if !l.bad[k.key] && !nodeName.MatchString(k.value) {
			l.fail(k.key, "Invalid value for "+k.key,
				"%q is not a name: up to 128 letters, digits, dots, hyphens and underscores, a letter or digit first and last.", k.value)
		}
	}
	if !l.bad["discovery.peers"] {
		for _, p := range c.Discovery.Peers {
			if addr, err := parseAddress(p, l.host); err != nil || isWildcard(addr) {
				l.fail("discovery.peers", "Invalid value for discovery.peers", "%q is not the host:port of a node.", p)
				break
			}
		}
	}
	if l.bad["discovery.type"] || l.bad["discovery.peers"] || l.bad["cluster.bootstrap_expect"] {
		return
	}
	_, said := l.given["cluster.bootstrap_expect"]
	n := c.Cluster.BootstrapExpect
	static := c.Discovery.Type == DiscoveryStatic
	const how = "Set cluster.bootstrap_expect, or give -bootstrap-expect: the same number on all nodes that form the cluster, usually 3; 0 on one that is to join an existing cluster."
	switch peers := l.others(c); {
	case !static && len(c.Discovery.Peers) > 0:
		l.fail("discovery.peers", "Values do not fit together", "discovery.peers is for discovery.type = %q. Leave it out: Consul knows the peers.", DiscoveryStatic)
	case !said && !static:
		l.fail("discovery.type", "Missing cluster.bootstrap_expect", "With others to find it is not clear how many nodes form the cluster. %s", how)
	case !said && peers > 0:
		l.fail("discovery.peers", "Missing cluster.bootstrap_expect", "With others to find it is not clear how many nodes form the cluster. %s", how)
	case static && n > 0 && n != peers+1:
		l.fail("cluster.bootstrap_expect", "Values do not fit together",
			"cluster.bootstrap_expect is %d, but discovery.peers names %d other nodes. A static list forms a cluster of all that are on it, this node included; 0 joins one that exists.", n, peers)
	case static && n == 0 && peers == 0:
		l.fail("cluster.bootstrap_expect", "Values do not fit together", "With 0 the node waits to be added to a cluster, but there is nobody to find: set discovery.peers, or discovery.type = %q.", DiscoveryConsul)
	}
	if c.Dev && !c.Alone() {
		patient := defaults(l.host).Raft
		for key, restore := range map[string]func(){
			"raft.heartbeat_timeout":    func() { c.Raft.HeartbeatTimeout = patient.HeartbeatTimeout },
			"raft.election_timeout":     func() { c.Raft.ElectionTimeout = patient.ElectionTimeout },
			"raft.leader_lease_timeout": func() { c.Raft.LeaderLeaseTimeout = patient.LeaderLeaseTimeout },
		} {
			if _, ok := l.given[key]; !ok {
				restore()
			}
		}
	}
}

// others is how many nodes the static list names besides this one.
func (l *loader) others(c *Config) int {
	n := 0
	for _, p := range c.Discovery.Peers {
		if p != c.Listener.Advertise {
			n++
		}
	}
	return n
}

func (l *loader) checkAdvertise(c *Config) {
	if l.bad["listener.rpc"] || l.bad["listener.advertise"] {
		return
	}
	if adv := c.Listener.Advertise; adv != "" {
		if _, port, err := net.SplitHostPort(adv); err != nil || isWildcard(adv) || port == "0" {
			l.fail("listener.advertise", "Invalid value for listener.advertise",
				"Nobody can connect to %s: it must be one address, with a port.", adv)
		}
		return
	}
	_, port, err := net.SplitHostPort(c.Listener.RPC)
	if err != nil {
		l.fail("listener.rpc", "Invalid value for listener.rpc", "%v.", err)
		return
	}
	if !isWildcard(c.Listener.RPC) {
		c.Listener.Advertise = c.Listener.RPC
		return
	}
	const hint = `Set listener.advertise to the address at which other nodes and clients reach this one.`
	ip, err := l.host.privateIP()
	switch {
	case err != nil:
		l.fail("listener.rpc", "No address to advertise", "It listens at every address, and to find one to advertise failed: %v. %s", err, hint)
	case ip == "":
		l.fail("listener.rpc", "No address to advertise", "It listens at every address, and this host has no private one. %s", hint)
	default:
		c.Listener.Advertise = net.JoinHostPort(ip, port)
	}
}

func (l *loader) checkTelemetry(c *Config) {
	endpoint := c.Telemetry.OTLPEndpoint
	if endpoint == "" || l.bad["telemetry.otlp_endpoint"] {
		return
	}
	if host, port, err := net.SplitHostPort(endpoint); err != nil || host == "" || port == "" {
		l.fail("telemetry.otlp_endpoint", "Invalid value for telemetry.otlp_endpoint",
			"%q is not the host:port of a collector that takes OTLP by gRPC, whose port is usually 4317. There is no https:// before it.", endpoint)
	}
}

// operand is one side of a comparison of two keys' values.
type operand struct {
	name  string
	value int64
	text  string
}

// atMost reports it if a is larger than b, at whichever of them was given.
func (l *loader) atMost(a, b operand, why string) {
	if l.bad[a.name] || l.bad[b.name] || a.value <= b.value {
		return
	}
	at := a.name
	if _, ok := l.given[a.name]; !ok {
		at = b.name
	}
	l.add(problem(l.place(at), "Values do not fit together",
		"%s (%s) must be at most %s (%s). %s", a.name, a.text, b.name, b.text, why))
}
