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
