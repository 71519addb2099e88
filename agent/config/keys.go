package config

import (
	"strconv"
	"strings"
	"time"
)

// kind is what a key holds, and how it is written.
type kind int

const (
	kindText     kind = iota // a string
	kindChoice               // one of a few strings
	kindFlag                 // true or false
	kindCount                // a whole number
	kindSize                 // bytes, as "64MiB"
	kindDuration             // as "500ms"
	kindAddress              // host:port, a go-sockaddr template
	kindList                 // of strings; by a flag, separated by commas
)

// key is one thing that can be configured.
type key struct {
	// name as in a file: "log_level", or "limits.max_record" for the argument
	// max_record of the block limits.
	name string
	kind kind
	// field points to where a Config keeps it: *string, *[]string, *bool, *int,
	// *int64 or *time.Duration, as kind has it.
	field func(*Config) any
	// min and max bound counts, sizes and durations (in nanoseconds).
	min, max int64
	// oneOf lists a choice's values.
	oneOf []string
	// empty allows "", which then means the default.
	empty bool
	// live says that a running node applies a change at once.
	live bool
	// secret keeps the value out of logs.
	secret bool
}

// keys is every key there is, in the order of config.hcl.
var keys = []key{
	{name: "data_dir", kind: kindText, empty: true, field: func(c *Config) any { return &c.DataDir }},
	{name: "log_level", kind: kindChoice, oneOf: []string{"trace", "debug", "info", "warn", "error"}, live: true,
		field: func(c *Config) any { return &c.LogLevel }},
	{name: "log_json", kind: kindFlag, field: func(c *Config) any { return &c.LogJSON }},
	{name: "shutdown_timeout", kind: kindDuration, min: millis(100), max: int64(10 * time.Minute),
		field: func(c *Config) any { return &c.ShutdownTimeout }},

	{name: "node.name", kind: kindText, field: func(c *Config) any { return &c.Node.Name }},

	{name: "cluster.name", kind: kindText, field: func(c *Config) any { return &c.Cluster.Name }},
	{name: "cluster.bootstrap_expect", kind: kindCount, min: 0, max: 9, field: func(c *Config) any { return &c.Cluster.BootstrapExpect }},
	{name: "cluster.zone", kind: kindText, empty: true, field: func(c *Config) any { return &c.Cluster.Zone }},

	{name: "discovery.type", kind: kindChoice, oneOf: []string{DiscoveryStatic, DiscoveryConsul}, field: func(c *Config) any { return &c.Discovery.Type }},
	{name: "discovery.peers", kind: kindList, field: func(c *Config) any { return &c.Discovery.Peers }},

	{name: "consul.address", kind: kindText, field: func(c *Config) any { return &c.Consul.Address }},
	{name: "consul.token", kind: kindText, empty: true, secret: true, field: func(c *Config) any { return &c.Consul.Token }},
	{name: "consul.token_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.Consul.TokenFile }},
	{name: "consul.ca_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.Consul.CAFile }},
	{name: "consul.cert_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.Consul.CertFile }},
	{name: "consul.key_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.Consul.KeyFile }},
	{name: "consul.service", kind: kindText, field: func(c *Config) any { return &c.Consul.Service }},
	{name: "consul.tags", kind: kindList, field: func(c *Config) any { return &c.Consul.Tags }},

	{name: "membership.stabilization", kind: kindDuration, min: millis(1), max: int64(time.Hour), field: func(c *Config) any { return &c.Membership.Stabilization }},
	{name: "membership.last_contact", kind: kindDuration, min: millis(10), max: int64(time.Hour), field: func(c *Config) any { return &c.Membership.LastContact }},
	{name: "membership.left_after", kind: kindDuration, min: millis(1), max: int64(365 * 24 * time.Hour), field: func(c *Config) any { return &c.Membership.LeftAfter }},
	{name: "membership.dead_after", kind: kindDuration, min: millis(1), max: int64(365 * 24 * time.Hour), field: func(c *Config) any { return &c.Membership.DeadAfter }},
	{name: "membership.cleanup_dead", kind: kindFlag, field: func(c *Config) any { return &c.Membership.CleanupDead }},

	{name: "listener.rpc", kind: kindAddress, field: func(c *Config) any { return &c.Listener.RPC }},
	{name: "listener.advertise", kind: kindAddress, empty: true, field: func(c *Config) any { return &c.Listener.Advertise }},
	{name: "listener.max_connections", kind: kindCount, min: 1, max: 1 << 20, field: func(c *Config) any { return &c.Listener.MaxConnections }},
	{name: "listener.max_streams", kind: kindCount, min: 1, max: 1 << 20, field: func(c *Config) any { return &c.Listener.MaxStreams }},

	{name: "listener.http", kind: kindAddress, field: func(c *Config) any { return &c.Listener.HTTP }},

	{name: "tls.source", kind: kindChoice, oneOf: []string{TLSNone, TLSDev, TLSFiles, TLSVault}, field: func(c *Config) any { return &c.TLS.Source }},
	{name: "tls.cert_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.TLS.CertFile }},
	{name: "tls.key_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.TLS.KeyFile }},
	{name: "tls.ca_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.TLS.CAFile }},
	{name: "tls.dev_dir", kind: kindText, empty: true, field: func(c *Config) any { return &c.TLS.DevDir }},
	{name: "tls.min_version", kind: kindChoice, oneOf: []string{"1.2", "1.3"}, field: func(c *Config) any { return &c.TLS.MinVersion }},
	{name: "tls.names", kind: kindList, field: func(c *Config) any { return &c.TLS.Names }},

	{name: "vault.address", kind: kindText, field: func(c *Config) any { return &c.Vault.Address }},
	{name: "vault.ca_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.Vault.CAFile }},
	{name: "vault.namespace", kind: kindText, empty: true, field: func(c *Config) any { return &c.Vault.Namespace }},
	{name: "vault.auth", kind: kindChoice, oneOf: []string{VaultToken, VaultTokenFile, VaultAppRole, VaultKubernetes, VaultJWT}, field: func(c *Config) any { return &c.Vault.Auth }},
	{name: "vault.auth_mount", kind: kindText, empty: true, field: func(c *Config) any { return &c.Vault.AuthMount }},
	{name: "vault.auth_role", kind: kindText, empty: true, field: func(c *Config) any { return &c.Vault.AuthRole }},
	{name: "vault.token", kind: kindText, empty: true, secret: true, field: func(c *Config) any { return &c.Vault.Token }},
	{name: "vault.token_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.Vault.TokenFile }},
	{name: "vault.role_id", kind: kindText, empty: true, field: func(c *Config) any { return &c.Vault.RoleID }},
	{name: "vault.secret_id", kind: kindText, empty: true, secret: true, field: func(c *Config) any { return &c.Vault.SecretID }},
	{name: "vault.secret_id_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.Vault.SecretIDFile }},
	{name: "vault.jwt_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.Vault.JWTFile }},
	{name: "vault.pki_mount", kind: kindText, field: func(c *Config) any { return &c.Vault.PKIMount }},
	{name: "vault.pki_role", kind: kindText, field: func(c *Config) any { return &c.Vault.PKIRole }},
	{name: "vault.ca_mounts", kind: kindList, field: func(c *Config) any { return &c.Vault.CAMounts }},
	{name: "vault.ttl", kind: kindDuration, min: millis(10_000), max: int64(365 * 24 * time.Hour), field: func(c *Config) any { return &c.Vault.TTL }},

	{name: "acl.enabled", kind: kindFlag, field: func(c *Config) any { return &c.ACL.Enabled }},
	{name: "acl.policy_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.ACL.PolicyFile }},
	{name: "acl.model_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.ACL.ModelFile }},

	// A batch and what is sent around it stays below the 4 MiB that gRPC
	// clients accept unless told otherwise.
	{name: "limits.max_record", kind: kindSize, min: 1, max: 3 * mib, field: func(c *Config) any { return &c.Limits.MaxRecord }},
	{name: "limits.max_batch", kind: kindSize, min: 1, max: 3 * mib, field: func(c *Config) any { return &c.Limits.MaxBatch }},
	{name: "limits.in_flight", kind: kindSize, min: 1, max: 64 * gib, field: func(c *Config) any { return &c.Limits.InFlight }},

	{name: "log.segment_size", kind: kindSize, min: mib, max: gib, field: func(c *Config) any { return &c.Log.SegmentSize }},
	{name: "log.retention_age", kind: kindDuration, empty: true, live: true, min: millis(1000), max: int64(100 * 365 * 24 * time.Hour), field: func(c *Config) any { return &c.Log.RetentionAge }},
	{name: "log.retention_bytes", kind: kindSize, empty: true, live: true, min: mib, max: 1 << 60, field: func(c *Config) any { return &c.Log.RetentionBytes }},
	{name: "log.scrub_interval", kind: kindDuration, min: millis(1000), max: int64(365 * 24 * time.Hour), field: func(c *Config) any { return &c.Log.ScrubInterval }},

	{name: "disk.min_free", kind: kindSize, min: 0, max: 1 << 60, field: func(c *Config) any { return &c.Disk.MinFree }},
	{name: "disk.stall_limit", kind: kindDuration, min: millis(20), max: int64(10 * time.Minute), field: func(c *Config) any { return &c.Disk.StallLimit }},

	{name: "raft.heartbeat_timeout", kind: kindDuration, min: millis(20), max: int64(time.Minute), field: func(c *Config) any { return &c.Raft.HeartbeatTimeout }},
	{name: "raft.election_timeout", kind: kindDuration, min: millis(20), max: int64(time.Minute), field: func(c *Config) any { return &c.Raft.ElectionTimeout }},
	{name: "raft.leader_lease_timeout", kind: kindDuration, min: millis(20), max: int64(time.Minute), field: func(c *Config) any { return &c.Raft.LeaderLeaseTimeout }},
	{name: "raft.commit_timeout", kind: kindDuration, min: millis(1), max: int64(time.Second), field: func(c *Config) any { return &c.Raft.CommitTimeout }},
	{name: "raft.snapshot_interval", kind: kindDuration, min: millis(100), max: int64(24 * time.Hour), field: func(c *Config) any { return &c.Raft.SnapshotInterval }},

	{name: "telemetry.pprof", kind: kindFlag, field: func(c *Config) any { return &c.Telemetry.PProf }},
	{name: "telemetry.otlp_endpoint", kind: kindText, empty: true, field: func(c *Config) any { return &c.Telemetry.OTLPEndpoint }},
	{name: "telemetry.otlp_insecure", kind: kindFlag, field: func(c *Config) any { return &c.Telemetry.OTLPInsecure }},
	{name: "telemetry.otlp_ca_file", kind: kindText, empty: true, field: func(c *Config) any { return &c.Telemetry.OTLPCAFile }},
	{name: "telemetry.sample_one_in", kind: kindCount, min: 1, max: 1 << 30, field: func(c *Config) any { return &c.Telemetry.SampleOneIn }},
}

func millis(n int64) int64 { return n * int64(time.Millisecond) }

// format writes c's value the way a file would, without quotes.
func (k key) format(c *Config) string {
	switch v := k.field(c).(type) {
	case *string:
		return *v
	case *[]string:
		return strings.Join(*v, ",")
	case *bool:
		return strconv.FormatBool(*v)
	case *int:
		return strconv.Itoa(*v)
	case *int64:
		return formatSize(*v)
	case *time.Duration:
		return v.String()
	default:
		panic("config: key " + k.name + " points to a type that no kind has")
	}
}

// Change is a key whose value differs between two configurations.
type Change struct {
	// Key is its name, as "limits.max_record".
	Key string
	// Old and New are the values as a file would give them.
	Old, New string
	// Live says that a running node applies the change at once. Any other
	// takes a restart.
	Live bool
}

// Changes lists what differs between two checked configurations, in the order
// of config.hcl. It leaves out Dev, which no reload can change.
func Changes(old, new *Config) []Change {
	var out []Change
	for _, k := range keys {
		if was, is := k.format(old), k.format(new); was != is {
			if k.secret {
				was, is = "(secret)", "(another secret)"
			}
			out = append(out, Change{Key: k.name, Old: was, New: is, Live: k.live})
		}
	}
	return out
}
