package agent

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	ident "github.com/diurnalog/diurna/agent/identity"
	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/rpc"
)

// scrape is one look at the node. What cannot be told is nil.
type scrape struct {
	ready       bool
	node        *rpc.NodeStatus
	replica     *replica.Status
	servers     *serverCount
	retention   *replica.Retention
	registry    *discovery.Snapshot
	port        *rpc.Stats
	certificate *certificateStatus
	policy      *ident.PolicyStats
}

// serverCount is the members of the group, counted.
type serverCount struct {
	members, voters int
	// judged: this node is the leader, who alone knows how the others are.
	judged                   bool
	unhealthy, healthyVoters int
}

func count(servers []replica.Server) *serverCount {
	var c serverCount
	for _, s := range servers {
		c.members++
		if s.Voter {
			c.voters++
		}
		switch {
		case s.Health == nil:
		case !s.Health.Healthy:
			c.judged = true
			c.unhealthy++
		default:
			c.judged = true
			if s.Voter {
				c.healthyVoters++
			}
		}
	}
	return &c
}

func (s *metricSources) look() (scrape, error) {
	sc := scrape{
		ready: s.Ready(), replica: told(s.Replica), retention: told(s.Retention),
		registry: told(s.Registry), port: told(s.Port), policy: told(s.Policy),
	}
	status, err := s.Status(context.Background())
	if err == nil {
		sc.node = &status
	}
	if s.Servers != nil {
		if servers, err := s.Servers(); err == nil {
			sc.servers = count(servers)
		}
	}
	if s.Certificate != nil {
		if c, ok := s.Certificate(); ok {
			sc.certificate = &c
		}
	}
	return sc, err
}

// told is what a source says, nil if there is none.
func told[T any](source func() T) *T {
	if source == nil {
		return nil
	}
	v := source()
	return &v
}

// emit is one value of a metric.
type emit func(value float64, labels ...string)

// nodeMetric is a metric that is looked at when somebody asks for it.
type nodeMetric struct {
	about
	collect func(s *scrape, emit emit)
}

// The following make metrics of what may not be there.

func ofNode(value func(*rpc.NodeStatus) float64, labels ...string) func(*scrape, emit) {
	return of(func(s *scrape) *rpc.NodeStatus { return s.node }, value, labels...)
}

func ofLog(value func(*rpc.NodeStatus) float64) func(*scrape, emit) {
	return ofNode(value, rpc.DefaultLog)
}

func ofReplica(value func(*replica.Status) float64, labels ...string) func(*scrape, emit) {
	return of(func(s *scrape) *replica.Status { return s.replica }, value, labels...)
}

func ofHealth(value func(*serverCount) float64) func(*scrape, emit) {
	return of(func(s *scrape) *serverCount {
		if s.servers == nil || !s.servers.judged {
			return nil
		}
		return s.servers
	}, value)
}

func ofRegistry(value func(*discovery.Snapshot) float64) func(*scrape, emit) {
	return of(func(s *scrape) *discovery.Snapshot { return s.registry }, value)
}

func ofPort(value func(*rpc.Stats) float64) func(*scrape, emit) {
	return of(func(s *scrape) *rpc.Stats { return s.port }, value)
}

func ofCertificate(value func(*certificateStatus) float64) func(*scrape, emit) {
	return of(func(s *scrape) *certificateStatus { return s.certificate }, value)
}

func ofPolicy(value func(*ident.PolicyStats) float64) func(*scrape, emit) {
	return of(func(s *scrape) *ident.PolicyStats { return s.policy }, value)
}

func of[T any](part func(*scrape) *T, value func(*T) float64, labels ...string) func(*scrape, emit) {
	return func(s *scrape, emit emit) {
		if p := part(s); p != nil {
			emit(value(p), labels...)
		}
	}
}

var nodeMetrics = []nodeMetric{
	{about{"diurna_node_info", gauge, "—", []string{"id", "name", "cluster", "version"}, "What the node is; always 1."}, func(s *scrape, emit emit) {
		if s.node != nil {
			emit(1, s.node.NodeID, s.node.Name, s.node.Cluster, s.node.Version)
		}
	}},
	{about{"diurna_ready", gauge, "0 or 1", nil, "Whether the node can be counted on, as /v1/health/ready says: 1 or 0."}, func(s *scrape, emit emit) { emit(truth(s.ready)) }},

	{about{"diurna_raft_term", gauge, "terms", nil, "The term that the node is in. It rises with every election."},
		ofNode(func(n *rpc.NodeStatus) float64 { return float64(n.Term) })},
	{about{"diurna_raft_last_index", gauge, "entries", nil, "Index of the last entry in the node's log."},
		ofNode(func(n *rpc.NodeStatus) float64 { return float64(n.LastIndex) })},
	{about{"diurna_raft_applied_index", gauge, "entries", nil, "Index of the last entry that is committed and readable at the node."},
		ofNode(func(n *rpc.NodeStatus) float64 { return float64(n.AppliedIndex) })},
	{about{"diurna_raft_committed_index", gauge, "entries", nil, "Index of the last entry that the leader has committed, as far as the node was told. What it is more than the applied index is what the node lags behind."},
		ofReplica(func(r *replica.Status) float64 { return float64(r.Committed) })},
	{about{"diurna_raft_is_leader", gauge, "0 or 1", nil, "Whether the node leads: 1 or 0."},
		ofNode(func(n *rpc.NodeStatus) float64 { return truth(n.Role == "leader") })},
	{about{"diurna_raft_last_contact_seconds", gauge, "seconds", nil, "Seconds since the node heard from the leader; missing on the leader, and where it never did."},
		func(s *scrape, emit emit) {
			if s.node != nil && s.node.LastContact >= 0 {
				emit(s.node.LastContact.Seconds())
			}
		}},
	{about{"diurna_raft_servers", gauge, "nodes", []string{"role"}, "Members of the cluster, as the node knows them, by role: voter or nonvoter."},
		func(s *scrape, emit emit) {
			if s.servers != nil {
				emit(float64(s.servers.voters), "voter")
				emit(float64(s.servers.members-s.servers.voters), "nonvoter")
			}
		}},
	{about{"diurna_raft_unhealthy_servers", gauge, "nodes", nil, "Members that the leader finds too far behind, or does not hear from; only at the leader."},
		ofHealth(func(s *serverCount) float64 { return float64(s.unhealthy) })},
	{about{"diurna_raft_failure_tolerance", gauge, "nodes", nil, "Voters that may fail now before nothing can be appended any more; negative once it cannot. Only at the leader."},
		ofHealth(func(s *serverCount) float64 { return float64(s.healthyVoters - (s.voters/2 + 1)) })},

	{about{"diurna_log_first_offset", gauge, "records", perLog, "The lowest offset that is kept."},
		ofLog(func(n *rpc.NodeStatus) float64 { return float64(n.FirstOffset) })},
	{about{"diurna_log_next_offset", gauge, "records", perLog, "The offset after the last committed record."},
		ofLog(func(n *rpc.NodeStatus) float64 { return float64(n.NextOffset) })},
	{about{"diurna_log_segments", gauge, "files", perLog, "Files that the log consists of."},
		ofReplica(func(r *replica.Status) float64 { return float64(r.Log.Segments) }, rpc.DefaultLog)},
	{about{"diurna_log_bytes", gauge, "bytes", perLog, "What the log's files take of the disk, with the space that is reserved in the last one."},
		ofReplica(func(r *replica.Status) float64 { return float64(r.Log.Bytes) }, rpc.DefaultLog)},
	{about{"diurna_log_retention_bytes", gauge, "bytes", perLog, "How large the log may be before the oldest segments are deleted, as configured at this node; missing where there is no limit."},
		func(s *scrape, emit emit) {
			if s.retention != nil && s.retention.Bytes > 0 {
				emit(float64(s.retention.Bytes), rpc.DefaultLog)
			}
		}},
	{about{"diurna_log_retention_seconds", gauge, "seconds", perLog, "How old a record has to be to be deleted, as configured at this node; missing where there is no limit."},
		func(s *scrape, emit emit) {
			if s.retention != nil && s.retention.Age > 0 {
				emit(s.retention.Age.Seconds(), rpc.DefaultLog)
			}
		}},
	{about{"diurna_disk_free_bytes", gauge, "bytes", nil, "What is free of the disk that the data is on, as of a second ago."},
		ofReplica(func(r *replica.Status) float64 { return float64(r.DiskFree) })},
	{about{"diurna_disk_full", gauge, "0 or 1", nil, "Whether the node refuses records for want of space: 1 or 0."},
		ofNode(func(n *rpc.NodeStatus) float64 { return truth(n.DiskFull) })},

	{about{"diurna_grpc_connections", gauge, "connections", nil, "Connections to the gRPC port that are open, those of other nodes' Raft not counted."},
		ofPort(func(p *rpc.Stats) float64 { return float64(p.Connections) })},
	{about{"diurna_grpc_received_bytes_total", counter, "bytes", nil, "Received over these connections, without TLS."},
		ofPort(func(p *rpc.Stats) float64 { return float64(p.Received) })},
	{about{"diurna_grpc_sent_bytes_total", counter, "bytes", nil, "Sent over these connections, without TLS."},
		ofPort(func(p *rpc.Stats) float64 { return float64(p.Sent) })},

	{about{"diurna_registry_trusted", gauge, "0 or 1", nil, "Whether the node believes that Consul's list of nodes is complete: 1 or 0; missing without Consul."},
		ofRegistry(func(r *discovery.Snapshot) float64 { return truth(r.Trusted) })},
	{about{"diurna_registry_nodes", gauge, "nodes", nil, "Nodes of the cluster on Consul's last list; missing without Consul."},
		ofRegistry(func(r *discovery.Snapshot) float64 { return float64(len(r.Nodes)) })},
	{about{"diurna_registry_answered_timestamp_seconds", gauge, "seconds", nil, "When Consul last answered, as Unix time; missing without Consul, and where it never did. A question waits for news for up to some minutes."},
		func(s *scrape, emit emit) {
			if s.registry != nil && !s.registry.At.IsZero() {
				emit(float64(s.registry.At.UnixMilli()) / 1000)
			}
		}},

	{about{"diurna_certificate_not_before_timestamp_seconds", gauge, "seconds", nil, "When the node's certificate begins to be valid, as Unix time."},
		ofCertificate(func(c *certificateStatus) float64 { return float64(c.NotBefore.Unix()) })},
	{about{"diurna_certificate_expiry_timestamp_seconds", gauge, "seconds", nil, "When the node's certificate ends to be valid, as Unix time."},
		ofCertificate(func(c *certificateStatus) float64 { return float64(c.NotAfter.Unix()) })},
	{about{"diurna_certificate_renewals_total", counter, "certificates", nil, "Certificates got since the start, the first one included; one from the cache is not."},
		ofCertificate(func(c *certificateStatus) float64 { return float64(c.Renewals) })},
	{about{"diurna_certificate_renew_failures_total", counter, "attempts", nil, "Attempts to get a certificate that failed."},
		ofCertificate(func(c *certificateStatus) float64 { return float64(c.RenewFailures) })},
	{about{"diurna_vault_up", gauge, "0 or 1", nil, "Whether Vault answered when it was asked last: 1 or 0; missing where certificates come from elsewhere."},
		func(s *scrape, emit emit) {
			if s.certificate != nil && s.certificate.VaultUp != nil {
				emit(truth(*s.certificate.VaultUp))
			}
		}},

	{about{"diurna_authorization_decisions_total", counter, "decisions", []string{"action", "result"}, "Decisions of the policy, by action and by result: allowed or denied."},
		func(s *scrape, emit emit) {
			if s.policy == nil {
				return
			}
			for _, d := range s.policy.Decisions {
				emit(float64(d.Allowed), d.Action, "allowed")
				emit(float64(d.Denied), d.Action, "denied")
			}
		}},
	{about{"diurna_policy_rules", gauge, "rules", nil, "Rules of the policy in force."},
		ofPolicy(func(p *ident.PolicyStats) float64 { return float64(p.Rules) })},
	{about{"diurna_policy_loaded_timestamp_seconds", gauge, "seconds", nil, "When the policy in force was read, as Unix time."},
		ofPolicy(func(p *ident.PolicyStats) float64 { return float64(p.Loaded.Unix()) })},
	{about{"diurna_policy_refused", gauge, "0 or 1", nil, "Whether the policy's file has errors, so that an older policy is in force: 1 or 0."},
		ofPolicy(func(p *ident.PolicyStats) float64 { return truth(p.Refused) })},
	{about{"diurna_policy_reloads_total", counter, "policies", nil, "Policies read after the first."},
		ofPolicy(func(p *ident.PolicyStats) float64 { return float64(p.Reloads) })},
	{about{"diurna_policy_reload_failures_total", counter, "attempts", nil, "Attempts to read the policy that failed."},
		ofPolicy(func(p *ident.PolicyStats) float64 { return float64(p.ReloadFailures) })},
}

// nodeDescs are those of nodeMetrics, at the same places.
var nodeDescs = func() (descs []*prometheus.Desc) {
	for _, m := range nodeMetrics {
		descs = append(descs, prometheus.NewDesc(m.name, m.help, m.labels, nil))
	}
	return descs
}()

// nodeCollector looks at the node when it is asked.
type nodeCollector struct{ sources metricSources }

// Describe implements prometheus.Collector.
func (c *nodeCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range nodeDescs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *nodeCollector) Collect(ch chan<- prometheus.Metric) {
	s, err := c.sources.look()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(nodeDescs[0], err)
	}
	for i, m := range nodeMetrics {
		m.collect(&s, func(value float64, labels ...string) {
			v, err := prometheus.NewConstMetric(nodeDescs[i], kinds[m.kind], value, labels...)
			if err != nil {
				v = prometheus.NewInvalidMetric(nodeDescs[i], err)
			}
			ch <- v
		})
	}
}

var kinds = map[kind]prometheus.ValueType{gauge: prometheus.GaugeValue, counter: prometheus.CounterValue}
