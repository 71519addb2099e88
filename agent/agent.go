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

	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/agent/config"
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

	fs vfs.FS // where tests have the disk fail; vfs.OS if nil
}

// ErrStopping ends the waits of a node that is being stopped.
var ErrStopping = errors.New("the node is stopping")

// Agent is a running node. Make one with Start, end it with Stop.
type Agent struct {
	logger  hclog.Logger
	listen  net.Listener
	address string // where others reach it
	data    *dataDir
	temp    string // data directory to remove at the end
	replica *replica.Replica
	rpc     *rpc.Service

	serving  sync.WaitGroup
	serveErr chan error

	stopping context.Context // ends when Stop begins
	halt     context.CancelFunc
	stopOnce sync.Once
	stopErr  error

	mu     sync.Mutex
	config *config.Config // as last applied
}

// Start starts a node, in this order: port, data directory, log, service. It
// returns when the node serves; WaitReady tells when it takes records. If
// anything fails, what was started is stopped, and nothing is left behind.
func Start(cfg *config.Config, opts Options) (*Agent, error) {
	if opts.Logger == nil {
		opts.Logger = hclog.NewNullLogger()
	}
	if opts.fs == nil {
		opts.fs = vfs.OS
	}
	a := &Agent{logger: opts.Logger, config: cfg, serveErr: make(chan error, 1)}
	a.stopping, a.halt = context.WithCancel(context.Background())
	if err := a.start(cfg, opts); err != nil {
		ctx, cancel := context.WithTimeout(context.Background(), cfg.ShutdownTimeout)
		defer cancel()
		return nil, errors.Join(err, a.Stop(ctx))
	}
	return a, nil
}

func (a *Agent) start(cfg *config.Config, opts Options) (err error) {
	// First, so that a port that is taken, the most likely mistake, does not
	// leave a new data directory behind.
	if a.listen, err = net.Listen("tcp", cfg.Listener.RPC); err != nil {
		return fmt.Errorf("%w: choose another address with -rpc-addr or listener.rpc", err)
	}
	if a.address, err = advertised(cfg.Listener.Advertise, a.listen.Addr()); err != nil {
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
	a.replica, err = replica.Open(replica.Config{
		Dir:                a.data.log(rpc.DefaultLog),
		FS:                 opts.fs,
		ID:                 a.data.nodeID,
		Address:            a.address,
		Bootstrap:          []replica.Server{{ID: a.data.nodeID, Address: a.address}},
		SegmentSize:        cfg.Log.SegmentSize,
		EntryBytes:         int(max(cfg.Limits.MaxBatch, 1<<20)),
		InFlightBytes:      cfg.Limits.InFlight,
		HeartbeatTimeout:   cfg.Raft.HeartbeatTimeout,
		ElectionTimeout:    cfg.Raft.ElectionTimeout,
		LeaderLeaseTimeout: cfg.Raft.LeaderLeaseTimeout,
		CommitTimeout:      cfg.Raft.CommitTimeout,
		SnapshotInterval:   cfg.Raft.SnapshotInterval,
		Logger:             opts.Logger.Named("raft"),
		OnFatal:            opts.OnFatal,
	})
	if err != nil {
		return err
	}
	a.rpc, err = rpc.New(rpc.Config{
		Log:     newService(a.replica),
		Cluster: &cluster{replica: a.replica, self: a.data.nodeID, name: cfg.Node.Name, address: a.address, version: opts.Version},
		Limits: rpc.Limits{
			MaxRecordBytes: int(cfg.Limits.MaxRecord),
			MaxBatchBytes:  int(cfg.Limits.MaxBatch),
			OpenCalls:      cfg.Listener.MaxStreams,
			Connections:    cfg.Listener.MaxConnections,
		},
		Logger:  opts.Logger.Named("rpc"),
		Version: opts.Version,
	})
	if err != nil {
		return err
	}
	// Not before it can take records.
	a.rpc.SetServing(false)
	listener := a.listen
	a.serving.Go(func() {
		if err := a.rpc.Serve(listener); err != nil {
			a.serveErr <- fmt.Errorf("serve %s: %w", listener.Addr(), err)
		}
	})
	a.logger.Info("node started", "id", a.data.nodeID, "name", cfg.Node.Name, "address", a.address, "data_dir", dir)
	return nil
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
func (a *Agent) NodeID() string { return a.data.nodeID }

// WaitReady returns once the node takes records and says so to health checks,
// or with ctx's error, ErrStopping, or what made the disk fail.
func (a *Agent) WaitReady(ctx context.Context) error {
	begin := time.Now()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(a.stopping, cancel)()
	if err := a.replica.WaitReady(ctx); err != nil {
		if a.stopping.Err() != nil {
			return ErrStopping
		}
		return err
	}
	a.rpc.SetServing(true)
	first, watermark, _ := a.replica.Bounds()
	a.logger.Info("ready", "after", time.Since(begin).Round(time.Millisecond), "first_offset", first, "next_offset", watermark)
	return nil
}

// Failed delivers what ended the service without Stop having been called.
func (a *Agent) Failed() <-chan error { return a.serveErr }

// Stop ends the node cleanly: it takes no more calls, answers those under way,
// and closes the log. It returns when ctx ends at the latest: shortly before
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
	if a.rpc != nil {
		doing("ending calls")
		draining, cancel := whileDraining(ctx)
		err = errors.Join(err, a.rpc.Shutdown(draining))
		cancel()
	}
	if a.listen != nil {
		// The service closes it; this is for a start that failed before.
		if closeErr := a.listen.Close(); closeErr != nil && !errors.Is(closeErr, net.ErrClosed) {
			err = errors.Join(err, closeErr)
		}
	}
	a.serving.Wait()
	if a.replica != nil {
		doing("closing the log")
		if err = errors.Join(err, a.replica.Close(ctx)); errors.Is(err, replica.ErrHangs) {
			// The lock stays: nobody else may have these files yet.
			return err
		}
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
	// What needs a restart stays what it is, so that the next reload says so
	// again.
	a.config = withLive(a.config, cfg)
	return changes
}

func withLive(running, wanted *config.Config) *config.Config {
	c := *running
	c.LogLevel = wanted.LogLevel
	return &c
}
