package rpc

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// Action is what a caller wants to do with a log.
type Action string

// The actions that are asked permission for.
const (
	ActionProduce Action = "produce"
	ActionConsume Action = "consume"
	// ActionAdmin is every call of the service Admin, ActionPeer every call of
	// the service Peer, which only nodes of the cluster should be allowed.
	// Both are asked for DefaultLog. A node that passes an Admin call on has
	// asked for permission, and makes the call in its own name.
	ActionAdmin Action = "admin"
	ActionPeer  Action = "peer"
)

// Config says what a Service serves and how. Log and Cluster are required.
type Config struct {
	// Log is the log named DefaultLog.
	Log Log
	// Cluster answers GetServers.
	Cluster Cluster
	// Admin, if set, is what the service Admin does; without it there is none.
	Admin Admin
	// Peer, if set, is what the service Peer tells other nodes; without it
	// there is none.
	Peer Peer
	// Forward, if set, takes what this node cannot do because it does not lead
	// to the leader: batches to append, linearizable reads, Admin calls. It
	// needs Peer. Whoever made it closes it, after Shutdown.
	Forward *Forwarder
	// Limits bound what clients can use; zero values mean defaults.
	Limits Limits
	// Caller, if set, says that the listeners hand out connections past their
	// TLS handshake (others are closed), and tells who is at the other end, once
	// for each that has shown a verified certificate. CallerFrom then has it in
	// every call, calls without such a certificate are refused, save for the
	// health service, and the service Peer is for nodes only. nil is plaintext.
	Caller func(tls.ConnectionState) Caller
	// Authorize, if set, is asked before a call touches the named log: once
	// for a read or a Produce, once per log name for a ProduceStream. For
	// GetServers, which is for whoever may do anything, it is asked for one
	// action after the other until one is allowed. A *DeniedError refuses; who
	// the caller is, CallerFrom(ctx) tells. It is not asked about nodes of the
	// cluster (Caller.Server).
	Authorize func(ctx context.Context, action Action, log string) error
	// Probe, if set, tells what Authorize would say, without consequences: where
	// any of several actions will do, that one of them is denied is no denial.
	// Default: Authorize.
	Probe func(ctx context.Context, action Action, log string) (allowed bool)
	// Audit, if set, is told of every call of the service Admin once it is over,
	// also of those that were refused. It must not block.
	Audit func(ctx context.Context, e AuditEvent)
	// Observer, if set, is told of every call.
	Observer Observer
	// Options are further options for the gRPC server: credentials, statistics
	// handlers, interceptors (which run inside of the Service's own). They
	// must not replace the codec.
	Options []grpc.ServerOption
	// Logger defaults to none.
	Logger hclog.Logger
	// Version is this node's, for GetServers.
	Version string
}

// Service is Diurna's gRPC server: New, then Serve for each listener, then, in
// any case, Shutdown. All methods are safe for concurrent use.
type Service struct {
	log       Log // what clients use: local, or local and what forwards
	local     Log
	cluster   Cluster
	admin     Admin
	peer      Peer
	forward   *Forwarder
	limits    Limits
	known     bool // callers are known by certificates
	authorize func(context.Context, Action, string) error
	probe     func(context.Context, Action, string) bool
	audit     func(context.Context, AuditEvent)
	observer  Observer
	logger    hclog.Logger
	version   string

	grpc   *grpc.Server
	health *health.Server
	chunks chunkPool
	conns  connTracker
	calls  callCounter
	// snapshots has a token for each that is under way.
	snapshots chan struct{}
	// consumers is how many ConsumeStreams are open.
	consumers atomic.Int64
	// background counts goroutines that outlive the call that started them,
	// if only by a moment.
	background sync.WaitGroup

	// stopping ends when Shutdown begins, drained when Diurna's own calls are
	// over and only foreign streams, such as health watches, may be left.
	stopping, drained context.Context
	stop, drain       context.CancelFunc
}

var _ grpc.ServiceRegistrar = (*Service)(nil)

// New prepares a Service. It does not listen yet, but some goroutines stand by
// until Shutdown.
func New(cfg Config) (*Service, error) {
	if cfg.Log == nil || cfg.Cluster == nil {
		return nil, errors.New("rpc needs a Log and a Cluster")
	}
	if cfg.Forward != nil && cfg.Peer == nil {
		return nil, errors.New("rpc needs a Peer to forward")
	}
	limits, err := cfg.Limits.withDefaults()
	if err != nil {
		return nil, err
	}
	codec, err := newCodec()
	if err != nil {
		return nil, err
	}
	s := &Service{
		log:       cfg.Log,
		local:     cfg.Log,
		cluster:   cfg.Cluster,
		admin:     cfg.Admin,
		peer:      cfg.Peer,
		forward:   cfg.Forward,
		limits:    limits,
		known:     cfg.Caller != nil,
		authorize: cfg.Authorize,
		probe:     cfg.Probe,
		audit:     cfg.Audit,
		observer:  cfg.Observer,
		logger:    cfg.Logger,
		version:   cfg.Version,
		health:    health.NewServer(),
		snapshots: make(chan struct{}, limits.Snapshots),
		calls:     callCounter{limit: limits.OpenCalls, idle: make(chan struct{})},
	}
	if s.logger == nil {
		s.logger = hclog.NewNullLogger()
	}
	if s.forward != nil {
		s.log = newForwardingLog(s.local, s.peer, s.forward)
	}
	s.stopping, s.stop = context.WithCancel(context.Background())
	s.drained, s.drain = context.WithCancel(context.Background())

	options := append([]grpc.ServerOption{
		grpc.ForceServerCodecV2(codec),
		grpc.ChainUnaryInterceptor(s.unary),
		grpc.ChainStreamInterceptor(s.streaming),
		// Not less than another node may send, whatever its limits: a message
		// that is not received ends the stream with all that is on it.
		grpc.MaxRecvMsgSize(max(limits.maxRequestBytes(), HardBatchBytes+64<<10)),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.MaxConcurrentStreams(uint32(limits.StreamsPerConnection)),
		grpc.ConnectionTimeout(limits.HandshakeTimeout),
		// Static, because what a stream that is not read may make us buffer
		// is part of the limits; gRPC would let it grow to 16 MiB.
		grpc.StaticStreamWindowSize(streamWindowBytes),
		grpc.StaticConnWindowSize(connWindowBytes),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: time.Hour,
			Time:              30 * time.Second,
			Timeout:           20 * time.Second,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime:             10 * time.Second,
			PermitWithoutStream: true,
		}),
	}, cfg.Options...)
	if cfg.Caller != nil {
		// TLS has a buffer of its own; another would be one more copy.
		options = append(options, grpc.Creds(acceptedTLS{who: cfg.Caller}), grpc.ReadBufferSize(0))
	}
	s.grpc = grpc.NewServer(options...)
	s.grpc.RegisterService(logServiceDesc(), s)
	if s.admin != nil {
		v1.RegisterAdminServer(s.grpc, s.audited(&adminService{s: s}))
	}
	if s.peer != nil {
		v1.RegisterPeerServer(s.grpc, &peerService{s: s})
	}
	healthpb.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	s.SetServing(true)
	return s, nil
}

const (
	maxHeaderBytes    = 64 << 10
	streamWindowBytes = 1 << 20
	connWindowBytes   = 8 << 20
	// streamWorkers is how many goroutines stand by for calls; those of more
	// calls than that are made anew. A new goroutine's stack starts small, and
	// growing it, by copying, to what gRPC needs was a sixth of the processor
	// time of a small call. They cost 8 KiB each.
	streamWorkers = 64
)

// RegisterService adds a service to the port, before the first Serve.
func (s *Service) RegisterService(desc *grpc.ServiceDesc, impl any) {
	s.grpc.RegisterService(desc, impl)
}

// Services is what the port serves, by name.
func (s *Service) Services() map[string]grpc.ServiceInfo { return s.grpc.GetServiceInfo() }

// SetServing sets what the health service answers, for the server as a whole
// and for the Log service. It is true from New on, and false for good once
// Shutdown has begun.
func (s *Service) SetServing(serving bool) {
	status := healthpb.HealthCheckResponse_NOT_SERVING
	if serving {
		status = healthpb.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", status)
	s.health.SetServingStatus(v1.Log_ServiceDesc.ServiceName, status)
}

// Serve accepts connections from l until Shutdown, then returns nil, or until
// l fails. It closes l.
func (s *Service) Serve(l net.Listener) error {
	l = newTrackingListener(l, s.limits.Connections, &s.conns)
	if err := s.grpc.Serve(l); err != nil && s.stopping.Err() == nil {
		return fmt.Errorf("serve gRPC on %s: %w", l.Addr(), err)
	}
	return nil
}

// hardStopWait is how long calls may take to notice that their context has
// ended.
const hardStopWait = 5 * time.Second

// Shutdown stops the server without losing an answer. The health service says
// NOT_SERVING, clients are told to go elsewhere; reads end with UNAVAILABLE
// and the offset to go on at; produce streams take nothing more, finish what
// is under way, acknowledge it, and end with UNAVAILABLE. When ctx ends first,
// whatever is left is cut off and ctx's error returned.
func (s *Service) Shutdown(ctx context.Context) error {
	s.health.Shutdown()
	s.stop()

	graceful := make(chan struct{})
	go func() {
		defer close(graceful)
		s.grpc.GracefulStop()
	}()
	// GracefulStop waits for every handshake that is under way before it so
	// much as tells the others; a silent connection would delay them all.
	s.conns.closeUnready()

	select {
	case <-s.calls.close():
	case <-ctx.Done():
	}
	s.drain()

	select {
	case <-graceful:
		s.background.Wait()
		return nil
	case <-ctx.Done():
	}
	s.logger.Warn("calls were cut off by the shutdown's deadline", "calls", s.calls.count())
	s.conns.closeAll()
	s.grpc.Stop()
	timer := time.NewTimer(hardStopWait)
	defer timer.Stop()
	select {
	case <-graceful:
		s.background.Wait()
		return fmt.Errorf("shut down gRPC: %w", ctx.Err())
	case <-timer.C:
		return fmt.Errorf("shut down gRPC: %d calls ignore that they were cut off: %w", s.calls.count(), ctx.Err())
	}
}
