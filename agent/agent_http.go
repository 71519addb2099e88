package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/rpc"
)

// openHTTP listens, and answers nobody yet: what it tells of is still to be
// made. It returns nil where no address is configured.
func (a *Agent) openHTTP(cfg *config.Config, opts Options) (*httpServer, error) {
	if cfg.Listener.HTTP == "" {
		return nil, nil
	}
	h := httpConfig{
		Address:     cfg.Listener.HTTP,
		Listen:      func(address string) (net.Listener, error) { return listenHTTP(cfg, opts, address) },
		Health:      a.isReady,
		Status:      func(ctx context.Context) (rpc.NodeStatus, error) { return a.part.Status(ctx) },
		Servers:     func(ctx context.Context) (rpc.ServerList, error) { return a.part.Servers(ctx) },
		Advertise:   a.address,
		Certificate: func() (certificateStatus, bool) { return a.security.certificate() },
		Metrics:     prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) { return a.metrics.Gather() }),
		Profiles:    cfg.Telemetry.PProf,
		Logger:      opts.Logger.Named("http"),
	}
	if cfg.TLS.Source != config.TLSNone {
		h.TLS = func() *tls.Config { return a.security.identity.Server() }
		if cfg.ACL.Enabled {
			h.Authorize = func(state *tls.ConnectionState, action string) error { return a.security.overHTTP(state, action) }
		}
	}
	return newHTTP(h)
}

// isReady tells whether the node can be counted on, and why not. It is stricter
// than what the registry and gRPC's health service are told, which only say where
// to send calls: see readiness.
func (a *Agent) isReady() (ready bool, why string) {
	if a.stopping.Err() != nil {
		return false, "the node is stopping"
	}
	return a.readiness.now(a.part.condition(), time.Now())
}

// listenHTTP lets a second node that is tried out on the same machine have
// another port than the first, which it did not ask for.
func listenHTTP(cfg *config.Config, opts Options, address string) (net.Listener, error) {
	l, err := opts.network.Listen(address)
	if cfg.Dev && address == config.Default().Listener.HTTP && errors.Is(err, syscall.EADDRINUSE) {
		return opts.network.Listen("127.0.0.1:0")
	}
	return l, err
}

// openMetrics makes what the HTTP endpoint shows.
func (a *Agent) openMetrics(cfg *config.Config, opts Options) (err error) {
	sources := metricSources{
		Status: a.part.Status,
		Ready: func() bool {
			ready, _ := a.isReady()
			return ready
		},
		Replica: a.replica.Status,
		Servers: a.replica.Servers,
		Retention: func() replica.Retention {
			a.mu.Lock()
			defer a.mu.Unlock()
			return retention(a.config)
		},
		Port:        a.rpc.Stats,
		Certificate: a.security.certificate,
		Policy:      a.security.stats(),
	}
	if cfg.Discovery.Type == config.DiscoveryConsul {
		sources.Registry = a.neighbours.discovery.Latest
	}
	a.metrics, err = newMetrics(sources, slices.Concat(a.live.all, opts.raft.collectors(), a.tracing.collectors())...)
	return err
}
