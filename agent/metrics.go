package agent

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	ident "github.com/diurnalog/diurna/agent/identity"
	"github.com/diurnalog/diurna/rpc"
)

// metricSources is where metrics come from. Each is asked when somebody looks
// at the metrics, and left out where it is nil.
type metricSources struct {
	// Status is the node itself. Required.
	Status func(context.Context) (rpc.NodeStatus, error)
	// Ready tells whether the node can be sent to. Required.
	Ready func() bool
	// Segments is how many files the log has.
	Segments func() int
	// Certificate is the node's own.
	Certificate func() (certificateStatus, bool)
	// Policy is what permissions are decided by.
	Policy func() ident.PolicyStats
}

// newMetrics makes the node's registry, which has nothing to do with the
// process's global one: a process may run several nodes.
func newMetrics(sources metricSources) (*prometheus.Registry, error) {
	r := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{
		&nodeCollector{sources: sources},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// scrape is one look at the node.
type scrape struct {
	node        *rpc.NodeStatus
	ready       bool
	segments    *int
	certificate *certificateStatus
	policy      *ident.PolicyStats
}

func (s *metricSources) look() (scrape, error) {
	sc := scrape{ready: s.Ready()}
	status, err := s.Status(context.Background())
	if err == nil {
		sc.node = &status
	}
	if s.Segments != nil {
		n := s.Segments()
		sc.segments = &n
	}
	if s.Certificate != nil {
		if c, ok := s.Certificate(); ok {
			sc.certificate = &c
		}
	}
	if s.Policy != nil {
		p := s.Policy()
		sc.policy = &p
	}
	return sc, err
}

// emit is one value of a metric.
type emit func(value float64, labels ...string)

// metric is one row of docs/metrics.md.
type metric struct {
	name, help string
	kind       prometheus.ValueType
	labels     []string
	collect    func(s *scrape, emit emit)
}

const (
	gauge   = prometheus.GaugeValue
	counter = prometheus.CounterValue
)

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// ofNode, ofLog, ofCertificate and ofPolicy are metrics of what may not be there.
func ofNode(value func(*rpc.NodeStatus) float64) func(*scrape, emit) {
	return func(s *scrape, emit emit) {
		if s.node != nil {
			emit(value(s.node))
		}
	}
}

func ofLog(value func(*rpc.NodeStatus) float64) func(*scrape, emit) {
	return func(s *scrape, emit emit) {
		if s.node != nil {
			emit(value(s.node), rpc.DefaultLog)
		}
	}
}

func ofCertificate(value func(*certificateStatus) float64) func(*scrape, emit) {
	return func(s *scrape, emit emit) {
		if s.certificate != nil {
			emit(value(s.certificate))
		}
	}
}

func ofPolicy(value func(*ident.PolicyStats) float64) func(*scrape, emit) {
	return func(s *scrape, emit emit) {
		if s.policy != nil {
			emit(value(s.policy))
		}
	}
}

var perLog = []string{"log"}

var metrics = []metric{
	{"diurna_node_info", "What the node is; always 1.", gauge, []string{"id", "name", "cluster", "version"}, func(s *scrape, emit emit) {
		if s.node != nil {
			emit(1, s.node.NodeID, s.node.Name, s.node.Cluster, s.node.Version)
		}
	}},
	{"diurna_ready", "Whether the node can be sent to: 1 or 0.", gauge, nil, func(s *scrape, emit emit) { emit(truth(s.ready)) }},

	{"diurna_raft_term", "The term that the node is in. It rises with every election.", gauge, nil,
		ofNode(func(n *rpc.NodeStatus) float64 { return float64(n.Term) })},
	{"diurna_raft_last_index", "Index of the last entry in the node's log.", gauge, nil,
		ofNode(func(n *rpc.NodeStatus) float64 { return float64(n.LastIndex) })},
	{"diurna_raft_applied_index", "Index of the last entry that is committed and readable at the node.", gauge, nil,
		ofNode(func(n *rpc.NodeStatus) float64 { return float64(n.AppliedIndex) })},
	{"diurna_raft_is_leader", "Whether the node leads: 1 or 0.", gauge, nil,
		ofNode(func(n *rpc.NodeStatus) float64 { return truth(n.Role == "leader") })},
	{"diurna_raft_last_contact_seconds", "Seconds since the node heard from the leader; missing on the leader, and where it never did.", gauge, nil,
		func(s *scrape, emit emit) {
			if s.node != nil && s.node.LastContact >= 0 {
				emit(s.node.LastContact.Seconds())
			}
		}},

	{"diurna_log_first_offset", "The lowest offset that is kept.", gauge, perLog,
		ofLog(func(n *rpc.NodeStatus) float64 { return float64(n.FirstOffset) })},
	{"diurna_log_next_offset", "The offset after the last committed record.", gauge, perLog,
		ofLog(func(n *rpc.NodeStatus) float64 { return float64(n.NextOffset) })},
	{"diurna_log_segments", "Files that the log consists of.", gauge, perLog, func(s *scrape, emit emit) {
		if s.segments != nil {
			emit(float64(*s.segments), rpc.DefaultLog)
		}
	}},
	{"diurna_disk_full", "Whether the node refuses records for want of space: 1 or 0.", gauge, nil,
		ofNode(func(n *rpc.NodeStatus) float64 { return truth(n.DiskFull) })},

	{"diurna_certificate_not_before_timestamp_seconds", "When the node's certificate begins to be valid, as Unix time.", gauge, nil,
		ofCertificate(func(c *certificateStatus) float64 { return float64(c.NotBefore.Unix()) })},
	{"diurna_certificate_expiry_timestamp_seconds", "When the node's certificate ends to be valid, as Unix time.", gauge, nil,
		ofCertificate(func(c *certificateStatus) float64 { return float64(c.NotAfter.Unix()) })},
	{"diurna_certificate_renewals_total", "Certificates got since the start, the first one included; one from the cache is not.", counter, nil,
		ofCertificate(func(c *certificateStatus) float64 { return float64(c.Renewals) })},
	{"diurna_certificate_renew_failures_total", "Attempts to get a certificate that failed.", counter, nil,
		ofCertificate(func(c *certificateStatus) float64 { return float64(c.RenewFailures) })},
	{"diurna_vault_up", "Whether Vault answered when it was asked last: 1 or 0; missing where certificates come from elsewhere.", gauge, nil,
		func(s *scrape, emit emit) {
			if s.certificate != nil && s.certificate.VaultUp != nil {
				emit(truth(*s.certificate.VaultUp))
			}
		}},

	{"diurna_authorization_decisions_total", "Decisions of the policy, by action and by result: allowed or denied.", counter, []string{"action", "result"},
		func(s *scrape, emit emit) {
			if s.policy == nil {
				return
			}
			for _, d := range s.policy.Decisions {
				emit(float64(d.Allowed), d.Action, "allowed")
				emit(float64(d.Denied), d.Action, "denied")
			}
		}},
	{"diurna_policy_rules", "Rules of the policy in force.", gauge, nil,
		ofPolicy(func(p *ident.PolicyStats) float64 { return float64(p.Rules) })},
	{"diurna_policy_loaded_timestamp_seconds", "When the policy in force was read, as Unix time.", gauge, nil,
		ofPolicy(func(p *ident.PolicyStats) float64 { return float64(p.Loaded.Unix()) })},
	{"diurna_policy_refused", "Whether the policy's file has errors, so that an older policy is in force: 1 or 0.", gauge, nil,
		ofPolicy(func(p *ident.PolicyStats) float64 { return truth(p.Refused) })},
	{"diurna_policy_reloads_total", "Policies read after the first.", counter, nil,
		ofPolicy(func(p *ident.PolicyStats) float64 { return float64(p.Reloads) })},
	{"diurna_policy_reload_failures_total", "Attempts to read the policy that failed.", counter, nil,
		ofPolicy(func(p *ident.PolicyStats) float64 { return float64(p.ReloadFailures) })},
}

// metricDescs are those of metrics, at the same places.
var metricDescs = func() (descs []*prometheus.Desc) {
	for _, m := range metrics {
		descs = append(descs, prometheus.NewDesc(m.name, m.help, m.labels, nil))
	}
	return descs
}()

// nodeCollector looks at the node when it is asked.
type nodeCollector struct{ sources metricSources }

// Describe implements prometheus.Collector.
func (c *nodeCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range metricDescs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *nodeCollector) Collect(ch chan<- prometheus.Metric) {
	s, err := c.sources.look()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(metricDescs[0], err)
	}
	for i, m := range metrics {
		m.collect(&s, func(value float64, labels ...string) {
			v, err := prometheus.NewConstMetric(metricDescs[i], m.kind, value, labels...)
			if err != nil {
				v = prometheus.NewInvalidMetric(metricDescs[i], err)
			}
			ch <- v
		})
	}
}
