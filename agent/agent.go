package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/agent/peer"
	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/rpc"
)

// Options are what an agent needs besides its configuration.
type Options struct {
	// Logger gets what the node has to say. Default: none.
	Logger hclog.Logger
	// Version is the program's, for those who ask.
	Version string
	// OnFatal is called when the disk failed and the process has to end, from
	// wherever that was noticed. Default: nothing; see Agent.Failed.
	OnFatal func(error)

	// raft is what the process's Raft tells of itself; nil where it has several.
	raft *raftSink

	// Where tests have the disk, the network or the registry fail.
	fs       vfs.FS
	network  peer.Network
	discover func(*config.Config) (discovery.Discovery, error)
	// and where they have less patience with a collector of traces.
	traceRetry time.Duration
}

func (o Options) withDefaults() Options {
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	if o.OnFatal == nil {
		o.OnFatal = func(error) {}
	}
	if o.fs == nil {
		o.fs = vfs.OS
	}
	if o.traceRetry == 0 {
		o.traceRetry = traceRetry
	}
	if o.network == nil {
		o.network = peer.TCP
	}
	return o
}

var (
	// ErrStopping ends the waits of a node that is being stopped.
	ErrStopping = errors.New("the node is stopping")
	// ErrLeft: the node has left the cluster, as it was asked to. It should be
	// stopped; its data is of no more use.
	ErrLeft = errors.New("the node has left the cluster")
)

// Agent is a running node. Make one with Start, end it with Stop.
type Agent struct {
	logger     hclog.Logger
	listen     net.Listener
	port       *peer.Port
	dialer     *peer.Dialer
	address    string // where others reach it
	data       *dataDir
	temp       string // data directory to remove at the end
	security   *security
	neighbours *neighbours
	replica    *replica.Replica
	rpc        *rpc.Service
	http       *httpServer // nil: there is none
	metrics    *prometheus.Registry
	live       *live
	tracing    *tracing // nil: nobody asked for traces
	part       *part
	readiness  readiness
	members    *membership

	failed  chan error // see Failed
	failing sync.Once

	// background is what runs beside the service; it ends with stopping, but
	// for the registration, which ends with registered.
	background, registering sync.WaitGroup
	stopping, registered    context.Context
	halt, deregister        context.CancelFunc
	stopOnce                sync.Once
	stopErr                 error

	ready     chan struct{} // closed when the node first serves
	readyOnce sync.Once

	mu     sync.Mutex
	config *config.Config // as last applied
}

// Start starts a node, in this order: ports, data directory, certificate, log,
// service, and what finds the others. It returns when the node answers; WaitReady
// tells when it takes records. Only its certificate it may have to wait for, for
// as long as ctx lets it. If anything fails, what was started is stopped, and
// nothing is left behind. See Again for errors after which to try again.
func Start(ctx context.Context, cfg *config.Config, opts Options) (*Agent, error) {
	opts = opts.withDefaults()
	a := &Agent{logger: opts.Logger, config: cfg, live: newLive(), failed: make(chan error, 1), ready: make(chan struct{})}
	a.readiness.stable = cfg.Raft.HeartbeatTimeout
	a.stopping, a.halt = context.WithCancel(context.Background())
	a.registered, a.deregister = context.WithCancel(context.Background())
	if err := a.start(ctx, cfg, opts); err != nil {
		ctx, cancel := context.WithTimeout(context.Background(), cfg.ShutdownTimeout)
		defer cancel()
		return nil, errors.Join(err, a.Stop(ctx))
	}
	return a, nil
}

func (a *Agent) start(ctx context.Context, cfg *config.Config, opts Options) (err error) {
	// First, so that a port that is taken, the most likely mistake, does not
	// leave a new data directory behind.
	if a.listen, err = opts.network.Listen(cfg.Listener.RPC); err != nil {
		return fmt.Errorf("%w: choose another address with -rpc-addr or listener.rpc", err)
	}
	if a.address, err = advertised(cfg.Listener.Advertise, a.listen.Addr()); err != nil {
		return err
	}
	if a.http, err = a.openHTTP(cfg, opts); err != nil {
		return err
	}

	dir := cfg.DataDir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "diurna-dev-"); err != nil {
			return fmt.Errorf("make a temporary data directory: %w", err)
		}
		a.temp = dir
	}
	if a.data, err = openDataDir(opts.fs, dir); err != nil {
		return err
	}
	if a.security, err = openSecurity(ctx, cfg, opts, a.data, a.address); err != nil {
		return err
	}
	if a.neighbours, err = openNeighbours(cfg, opts, a.data, a.security); err != nil {
		return err
	}
	self := func() (nodeID, clusterID string) {
		id := a.data.identity()
		return id.node, id.cluster
	}
	a.port = peer.NewPort(a.listen, peer.PortConfig{Self: self, Check: a.admit, TLS: a.security.port(), Failed: a.security.failed, Logger: opts.Logger.Named("port")})
	a.members = &membership{neighbours: a.neighbours, probe: a.neighbours.forward.Status, data: a.data, logger: opts.Logger.Named("membership"), fail: a.fail}
	if err := a.openReplica(cfg, opts, self); err != nil {
		return err
	}
	a.part = &part{
		cfg: cfg, data: a.data, replica: a.replica, neighbours: a.neighbours, security: a.security,
		address: a.address, version: opts.Version, left: make(chan struct{}),
	}
	if a.tracing, err = openTracing(cfg, opts, a.data.nodeID()); err != nil {
		return err
	}
	if err := a.serve(cfg, opts); err != nil {
		return err
	}
	if err := a.openMetrics(cfg, opts); err != nil {
		return err
	}
	a.runBeside(cfg, opts)
	id := a.data.identity()
	started := []any{"id", id.node, "name", cfg.Node.Name, "address", a.address, "data_dir", dir, "cluster", id.cluster}
	if was := a.replica.Supersedes(); was != "" {
		started = append(started, "recovered_from", was)
	}
	if a.http != nil {
		a.http.Start(a.fail)
		started = append(started, "http", a.http.Addr())
	}
	if c, ok := a.security.certificate(); ok {
		started = append(started, "certificate", c.Serial, "expires", c.NotAfter)
	}
	a.logger.Info("node started", started...)
	return nil
}

// admit decides about a peer that wants to open a stream. A node without a
// cluster learns from the first leader that greets it which one it is in: the
// leader called it by its id, which it has only from the node itself.
func (a *Agent) admit(conn net.Conn, hello peer.Hello) error {
	if err := a.security.sameNode(conn, hello.From); err != nil {
		return err
	}
	switch {
	case hello.ClusterID == "":
		return &peer.RefusedError{Reason: peer.ReasonUnknownNode, Text: "a node without a cluster has nothing to replicate"}
	case a.data.identity().cluster == "":
		return a.data.join(hello.ClusterID)
	}
	return nil
}

func (a *Agent) openReplica(cfg *config.Config, opts Options, self func() (string, string)) (err error) {
	var founders []replica.Server
	if cfg.Alone() {
		// A group of one needs nobody's consent. The replica ignores it where
		// there is one already.
		if a.data.identity().cluster == "" {
			if err := a.data.join(uuid.NewString()); err != nil {
				return err
			}
		}
		founders = []replica.Server{{ID: a.data.nodeID(), Address: a.address, Voter: true}}
	}
	a.dialer = &peer.Dialer{
		Network: opts.network, Self: self, Lookup: a.neighbours.book.Lookup, TLS: a.security.dial(), Failed: a.security.failed,
		Check: func(conn net.Conn, remote peer.Hello) error { return a.security.sameNode(conn, remote.From) },
	}
	a.replica, err = replica.Open(replica.Config{
		Dir:                a.data.log(rpc.DefaultLog),
		FS:                 opts.fs,
		ID:                 a.data.nodeID(),
		Address:            a.address,
		ClusterID:          a.data.identity().cluster,
		OnClusterID:        a.learn,
		Bootstrap:          founders,
		Network:            &raftNetwork{a.port.Peers(), a.dialer},
		SegmentSize:        cfg.Log.SegmentSize,
		EntryBytes:         int(max(cfg.Limits.MaxBatch, 1<<20)),
		InFlightBytes:      cfg.Limits.InFlight,
		HeartbeatTimeout:   cfg.Raft.HeartbeatTimeout,
		ElectionTimeout:    cfg.Raft.ElectionTimeout,
		LeaderLeaseTimeout: cfg.Raft.LeaderLeaseTimeout,
		CommitTimeout:      cfg.Raft.CommitTimeout,
		SnapshotInterval:   cfg.Raft.SnapshotInterval,
		StallLimit:         cfg.Disk.StallLimit,
		MinFreeBytes:       cfg.Disk.MinFree,
		Retention:          retention(cfg),
		Autopilot: replica.AutopilotConfig{
			KeepDead:                !cfg.Membership.CleanupDead,
			MinQuorum:               max(1, cfg.Cluster.BootstrapExpect),
			LastContactThreshold:    cfg.Membership.LastContact,
			ServerStabilizationTime: cfg.Membership.Stabilization,
			LeftAfter:               cfg.Membership.LeftAfter,
			DeadAfter:               cfg.Membership.DeadAfter,
			Members:                 a.members.witness,
		},
		ScrubInterval: cfg.Log.ScrubInterval,
		Observer:      a.live.observer(),
		Logger:        opts.Logger.Named("raft"),
		OnFatal:       a.fatal(opts.OnFatal),
	})
	return err
}

// learn notes the cluster that the log says the node is in.
func (a *Agent) learn(cluster string) {
	if err := a.data.join(cluster); err != nil {
		a.fail(err)
	}
}

// raftNetwork is the node's port and its dialler as the replica sees them.
type raftNetwork struct {
	net.Listener
	dialer *peer.Dialer
}

// Dial implements replica.Network.
func (n *raftNetwork) Dial(ctx context.Context, id, address string) (net.Conn, error) {
	return n.dialer.Dial(ctx, id, address)
}

func retention(cfg *config.Config) replica.Retention {
	return replica.Retention{Age: cfg.Log.RetentionAge, Bytes: cfg.Log.RetentionBytes}
}

// fatal passes on what ended the replica. After a failure of the disk the
// process has to end; else it is for whoever waits for Failed to act.
func (a *Agent) fatal(die func(error)) func(error) {
	return func(err error) {
		a.fail(err)
		var foreign *replica.ForeignClusterError
		var newer *replica.VersionError
		if !Again(a.config, err) && !errors.As(err, &foreign) && !errors.As(err, &newer) {
			die(err)
		}
	}
}

// fail delivers what Failed does. The first counts.
func (a *Agent) fail(err error) {
	a.failing.Do(func() { a.failed <- err })
}

func (a *Agent) serve(cfg *config.Config, opts Options) (err error) {
	service := rpc.Config{
		Log:     newService(a.replica, a.part, a.live.read, a.tracing),
		Cluster: a.part,
		Admin:   a.part,
		Peer:    a.part,
		Forward: a.neighbours.forward,
		Limits: rpc.Limits{
			MaxRecordBytes: int(cfg.Limits.MaxRecord),
			MaxBatchBytes:  int(cfg.Limits.MaxBatch),
			OpenCalls:      cfg.Listener.MaxStreams,
			Connections:    cfg.Listener.MaxConnections,
		},
		Logger:  opts.Logger.Named("rpc"),
		Version: opts.Version,
		Audit:   a.security.audited,

		Observer: a.live,
		Options:  a.tracing.serverOptions(),
	}
	if a.security.identity != nil {
		service.Caller = a.security.caller
	}
	if a.security.policy != nil {
		service.Authorize, service.Probe = a.security.authorize, a.security.probe
	}
	if a.rpc, err = rpc.New(service); err != nil {
		return err
	}
	// Not before it can take records.
	a.rpc.SetServing(false)
	clients := a.port.Clients()
	a.background.Go(func() {
		if err := a.rpc.Serve(clients); err != nil {
			a.fail(fmt.Errorf("serve %s: %w", a.address, err))
		}
	})
	return nil
}

// runBeside starts what finds the other nodes and tells them about this one.
func (a *Agent) runBeside(cfg *config.Config, opts Options) {
	a.announce()
	a.background.Go(func() { a.security.run(a.stopping, a.dialer.Reset) })
	a.registering.Go(func() {
		if err := a.neighbours.discovery.Run(a.registered); err != nil {
			a.logger.Warn("could not deregister", "error", err)
		}
	})
	if !cfg.Alone() {
		f := &forming{
			data: a.data, self: a.part.self, discovery: a.neighbours.discovery, probe: a.neighbours.forward.Status,
			started: a.part.started, found: a.replica.Found, again: a.fail, logger: opts.Logger.Named("forming"),
		}
		a.background.Go(func() { f.run(a.stopping) })
	}
	kick := make(chan struct{}, 1)
	a.members.group, a.members.self, a.members.supersedes = a.replica, a.part.self, a.replica.Supersedes
	a.background.Go(func() { a.members.run(a.stopping, kick) })
	a.background.Go(func() { a.watch(kick) })
}

// watchInterval is how often the node's health is looked at; changes of
// leadership show at once.
const watchInterval = time.Second

// watch tells clients, health checks and the registry how the node is.
func (a *Agent) watch(kick chan<- struct{}) {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	discarded := false
	for {
		changed := a.replica.LeaderChanges()
		serving := a.announce()
		a.readiness.look(a.part.condition(), time.Now())
		st := a.replica.Status()
		a.live.led(st.LeaderID, st.Term)
		a.rpc.SetServing(serving && a.stopping.Err() == nil)
		if serving {
			a.readyOnce.Do(func() { close(a.ready) })
			if !discarded {
				discarded = true
				a.discardOld()
			}
		}
		select {
		case <-changed:
			select {
			case kick <- struct{}{}:
			default:
			}
		case <-ticker.C:
		case <-a.part.left:
			a.fail(ErrLeft)
			<-a.stopping.Done()
			return
		case <-a.stopping.Done():
			return
		}
	}
}

// announce says in the registry how the node is.
func (a *Agent) announce() (serving bool) {
	serving, status, why := a.part.health()
	a.neighbours.discovery.Announce(discovery.Registration{Node: a.part.self(), Status: status, Output: why})
	return serving
}

// discardOld removes damaged data that has been replaced.
func (a *Agent) discardOld() {
	removed, err := a.data.discard()
	if err != nil {
		a.logger.Warn("cannot remove damaged data that has been replaced", "error", err)
	}
	for _, dir := range removed {
		a.logger.Info("removed damaged data that has been replaced", "dir", dir)
	}
}

// advertised completes the address that others use with the port that the
// kernel chose.
func advertised(advertise string, listen net.Addr) (string, error) {
	host, port, err := net.SplitHostPort(advertise)
	if err != nil {
		return "", fmt.Errorf("advertised address: %w", err)
	}
	if port == "0" {
		if _, port, err = net.SplitHostPort(listen.String()); err != nil {
			return "", err
		}
	}
	return net.JoinHostPort(host, port), nil
}

// Address is where others reach the node's gRPC port, as host:port.
func (a *Agent) Address() string { return a.address }

// NodeID is the node's id, which is kept with its data.
func (a *Agent) NodeID() string { return a.data.nodeID() }

// WaitReady returns once the node takes records, be it to pass them on, and
// says so to health checks; or with ctx's error, ErrStopping, or what ended the
// node.
func (a *Agent) WaitReady(ctx context.Context) error {
	begin := time.Now()
	if a.stopping.Err() != nil {
		return ErrStopping
	}
	select {
	case <-a.ready:
	case <-a.replica.Failed():
		return a.replica.Err()
	case <-a.stopping.Done():
		return ErrStopping
	case <-ctx.Done():
		_, _, why := a.part.health()
		return fmt.Errorf("waiting to be ready (the node %s): %w", why, ctx.Err())
	}
	first, watermark, _ := a.replica.Bounds()
	a.logger.Info("ready", "after", time.Since(begin).Round(time.Millisecond), "first_offset", first, "next_offset", watermark)
	return nil
}

// Failed delivers what ended the node without Stop having been called: see
// Again, and ErrLeft.
func (a *Agent) Failed() <-chan error { return a.failed }

// Stop ends the node cleanly: it hands leadership over, takes no more calls,
// answers those under way, and closes the log. It stays a member. It returns when ctx ends at the latest: shortly before
// that, calls still under way are cut off; and what cannot be ended, because
// the disk hangs, is left behind, with the data directory's lock, for the end
// of the process. Further calls return the first one's result.
func (a *Agent) Stop(ctx context.Context) error {
	a.stopOnce.Do(func() {
		a.halt()
		begin := time.Now()
		var doing atomic.Value // what the goroutine is at
		doing.Store("")
		done := make(chan error, 1)
		go func() { done <- a.stop(ctx, func(what string) { doing.Store(what) }) }()
		select {
		case a.stopErr = <-done:
			if a.rpc != nil { // else it never started
				a.logger.Info("stopped", "after", time.Since(begin).Round(time.Millisecond))
			}
		case <-ctx.Done():
			select {
			case a.stopErr = <-done: // at the last moment
			default:
				a.stopErr = fmt.Errorf("%s takes too long, perhaps because a disk hangs; left as it is, which loses nothing that was acknowledged: %w", doing.Load(), ctx.Err())
			}
		}
	})
	return a.stopErr
}

func (a *Agent) stop(ctx context.Context, doing func(string)) error {
	var err error
	// Those who look for a node find another one from now on.
	a.deregister()
	if a.rpc != nil {
		a.rpc.SetServing(false)
		doing("handing leadership over")
		a.handOver(ctx)
		doing("ending calls")
		draining, cancel := whileDraining(ctx)
		err = errors.Join(err, a.rpc.Shutdown(draining))
		cancel()
	}
	if a.http != nil {
		doing("ending HTTP")
		draining, cancel := whileDraining(ctx)
		err = errors.Join(err, a.http.Shutdown(draining))
		cancel()
	}
	doing("sending the last traces")
	err = errors.Join(err, a.tracing.close(ctx))
	doing("deregistering")
	a.registering.Wait()
	a.background.Wait()
	if a.neighbours != nil {
		err = errors.Join(err, a.neighbours.close(ctx))
	}
	if a.replica != nil {
		doing("closing the log")
		if err = errors.Join(err, a.replica.Close(ctx)); errors.Is(err, replica.ErrHangs) {
			// The lock stays: nobody else may have these files yet.
			return err
		}
	}
	if a.port != nil {
		err = errors.Join(err, a.port.Close())
	} else if a.listen != nil {
		err = errors.Join(err, a.listen.Close())
	}
	if a.data != nil {
		err = errors.Join(err, a.data.Close())
	}
	if a.temp != "" {
		doing("removing the data")
		err = errors.Join(err, os.RemoveAll(a.temp))
	}
	return err
}

// handOver makes another voter the leader before calls are ended, so that
// nobody has to wait for an election.
func (a *Agent) handOver(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*a.config.Raft.ElectionTimeout)
	defer cancel()
	if err := a.replica.HandOver(ctx); err != nil {
		a.logger.Warn("leadership could not be handed over; the others will elect a leader", "error", err)
	}
}

// whileDraining leaves a part of the time to close the log in.
func whileDraining(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, deadline.Add(-min(time.Second, time.Until(deadline)/4)))
}

// Reload applies what a new configuration changes and can be changed while
// running, and returns all changes, those that need a restart included.
func (a *Agent) Reload(cfg *config.Config) []config.Change {
	a.mu.Lock()
	defer a.mu.Unlock()
	changes := config.Changes(a.config, cfg)
	for _, c := range changes {
		if c.Live {
			a.logger.Info("configuration changed", "key", c.Key, "from", c.Old, "to", c.New)
		} else {
			a.logger.Warn("configuration changed, but takes effect with the next start only", "key", c.Key, "from", c.Old, "to", c.New)
		}
	}
	a.logger.SetLevel(hclog.LevelFromString(cfg.LogLevel))
	if err := a.replica.SetRetention(retention(cfg)); err != nil {
		a.logger.Error("retention stays as it is", "error", err)
	}
	// A Vault that does not answer must not hold up what else is reloaded.
	a.background.Go(func() { a.security.reload(a.stopping, a.logger) })
	// What needs a restart stays what it is, so that the next reload says so
	// again.
	a.config = withLive(a.config, cfg)
	return changes
}

func withLive(running, wanted *config.Config) *config.Config {
	c := *running
	c.LogLevel = wanted.LogLevel
	c.Log.RetentionAge, c.Log.RetentionBytes = wanted.Log.RetentionAge, wanted.Log.RetentionBytes
	return &c
}
