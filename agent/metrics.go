package agent

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	ident "github.com/diurnalog/diurna/agent/identity"
	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/rpc"
)

// about is what docs/metrics.md tells of a metric: a row there.
type about struct {
	name string
	kind kind
	// unit is what the values count. Where it is one of Prometheus's base units,
	// the name ends with it.
	unit   string
	labels []string
	help   string
}

// kind is a metric's type, as Prometheus calls it.
type kind string

const (
	gauge     kind = "gauge"
	counter   kind = "counter"
	histogram kind = "histogram"
)

// described is every metric of a node's own, and of Raft's.
func described() []about {
	var all []about
	for _, m := range nodeMetrics {
		all = append(all, m.about)
	}
	all = append(all, liveMetrics()...)
	for _, m := range raftMetrics {
		all = append(all, m.about)
	}
	return append(all, traceMetrics...)
}

// metricSources is where metrics come from that are looked at when somebody asks
// for them. Each is left out where it is nil.
type metricSources struct {
	// Status is the node itself. Required.
	Status func(context.Context) (rpc.NodeStatus, error)
	// Ready tells whether the node can be counted on. Required.
	Ready func() bool
	// Replica is the log, Servers the group's members.
	Replica func() replica.Status
	Servers func() ([]replica.Server, error)
	// Retention is what the log is to keep.
	Retention func() replica.Retention
	// Registry is what is known of other nodes.
	Registry func() discovery.Snapshot
	// Port is what the gRPC port does.
	Port func() rpc.Stats
	// Certificate is the node's own.
	Certificate func() (certificateStatus, bool)
	// Policy is what permissions are decided by.
	Policy func() ident.PolicyStats
}

// newMetrics makes the node's registry, which has nothing to do with the
// process's global one: a process may run several nodes.
func newMetrics(sources metricSources, more ...prometheus.Collector) (*prometheus.Registry, error) {
	r := prometheus.NewRegistry()
	for _, c := range append([]prometheus.Collector{
		&nodeCollector{sources: sources},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	}, more...) {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

var perLog = []string{"log"}
