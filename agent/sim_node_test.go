package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/agent/peer"
	"github.com/diurnalog/diurna/agent/peer/peertest"
	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/discovery/discoverytest"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// simNode is a machine of a simulated cluster: a disk that outlives processes,
// a host name, and at most one process at a time. Its methods are for the
// goroutine that runs the schedule, but for place and running.
type simNode struct {
	c    *simCluster
	name string
	tune func(*config.Config) // what this node has different; may be nil
	mem  *vfstest.Mem
	// rotten: some of what it stored was damaged, and it may not have noticed.
	rotten bool

	mu      sync.Mutex
	port    int
	life    int
	process *simProcess
}

// simProcess is one run of the program: it starts agents, one after another
// where an agent is to be started again in place, until it is stopped or dies.
type simProcess struct {
	node *simNode
	disk *simDisk
	wire *simWire

	stop  context.Context // ends when it is asked to stop
	ask   context.CancelFunc
	died  chan struct{} // closed when it is dead: power, kill, or its own doing
	dying sync.Once
	ended chan struct{} // closed when nothing of it is left

	mu     sync.Mutex
	agent  *Agent
	clean  bool                  // it was stopped, and could finish
	handle *discoverytest.Handle // its latest connection to the registry
}

// hears is the process's connection to the registry; nil if it has none.
func (p *simProcess) hears() *discoverytest.Handle {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.handle
}

// address is where the node listens in its present or next life.
func (n *simNode) address() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return fmt.Sprintf("%s:%d", n.name, n.port)
}

// move gives the node another address from its next life on.
func (n *simNode) move() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.port += 10
}

// place is the life that the node is in.
func (n *simNode) place() simPlace {
	n.mu.Lock()
	defer n.mu.Unlock()
	return simPlace{n.name, n.life}
}

// running returns the node's process and its agent, nil where there is none.
func (n *simNode) running() (*simProcess, *Agent) {
	n.mu.Lock()
	p := n.process
	n.mu.Unlock()
	if p == nil {
		return nil, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p, p.agent
}

func (n *simNode) config() *config.Config {
	cfg := config.Default()
	cfg.TLS.Source, cfg.Listener.HTTP = config.TLSNone, ""
	cfg.DataDir = "/data"
	cfg.Node.Name = n.name
	cfg.Cluster.Name = "sim"
	cfg.Cluster.BootstrapExpect = n.c.founders
	cfg.Listener.RPC, cfg.Listener.Advertise = n.address(), n.address()
	cfg.Discovery.Type = config.DiscoveryStatic
	for _, other := range n.c.nodes {
		cfg.Discovery.Peers = append(cfg.Discovery.Peers, other.address())
	}
	cfg.Log.SegmentSize = simSegment
	cfg.Disk.MinFree = 0
	cfg.Raft.HeartbeatTimeout = simElection
	cfg.Raft.ElectionTimeout = simElection
	cfg.Raft.LeaderLeaseTimeout = simElection * 3 / 4
	cfg.Raft.CommitTimeout = 20 * time.Millisecond
	cfg.Raft.SnapshotInterval = 5 * time.Second
	cfg.Membership.Stabilization = 2 * time.Second
	cfg.ShutdownTimeout = 10 * time.Second
	if n.tune != nil {
		n.tune(cfg)
	}
	return cfg
}

// simElection is the nodes' election timeout, simSegment the size of their
// segments, so that there are several in every history.
const (
	simElection = time.Second
	simSegment  = 16 << 10
)

// start runs a process on what the disk holds. There must be none.
func (n *simNode) start() *simProcess {
	p := &simProcess{
		node: n, disk: newSimDisk(n.mem), wire: &simWire{net: n.c.net, host: n.name},
		died: make(chan struct{}), ended: make(chan struct{}),
	}
	p.stop, p.ask = context.WithCancel(context.Background())
	n.mu.Lock()
	if n.process != nil {
		n.mu.Unlock()
		panic(n.name + " runs already")
	}
	n.process = p
	n.mu.Unlock()
	cfg := n.config()
	n.c.processes.Go(func() {
		defer close(p.ended)
		p.run(cfg)
	})
	return p
}

// run does what `diurna agent` does.
func (p *simProcess) run(cfg *config.Config) {
	defer p.ask()
	opts := Options{
		Logger:  p.node.c.logger(p.node.name),
		Version: "sim",
		OnFatal: func(err error) { p.die(err) },
		fs:      p.disk,
		network: p.wire,
	}
	if r := p.node.c.registry; r != nil {
		opts.discover = func(cfg *config.Config) (discovery.Discovery, error) {
			h := r.New(cfg.Cluster.Name)
			p.mu.Lock()
			defer p.mu.Unlock()
			p.handle = h
			return h, nil
		}
	}
	for {
		err := p.once(cfg, opts)
		switch {
		case p.dead() || err == nil:
			return
		case !Again(cfg, err):
			p.die(err)
			return
		}
		p.node.c.h.note("%s starts again in place: %v", p.node.name, err)
		// Like a process that is killed while it waits, it ends when it dies.
		ctx, cancel := context.WithCancel(p.stop)
		healed := make(chan error, 1)
		go func() { healed <- Heal(ctx, cfg, opts, err) }()
		select {
		case err = <-healed:
		case <-p.died:
			cancel()
			err = <-healed
		}
		cancel()
		switch {
		case p.dead() || p.stop.Err() != nil:
			return
		case err != nil:
			p.die(fmt.Errorf("heal: %w", err))
			return
		}
	}
}

// once is an agent's life, from its start to its end. No error: it was stopped.
func (p *simProcess) once(cfg *config.Config, opts Options) error {
	p.node.mu.Lock()
	p.node.life++
	p.node.mu.Unlock()
	a, err := Start(context.Background(), cfg, opts)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.agent = a
	p.mu.Unlock()
	select {
	case <-p.stop.Done():
	case <-p.died:
	case err = <-a.Failed():
	}
	p.mu.Lock()
	p.agent = nil
	p.mu.Unlock()
	// Of a dead process, this only ends the goroutines: it has neither disk nor
	// network any more.
	ctx, cancel := context.WithTimeout(context.Background(), cfg.ShutdownTimeout)
	defer cancel()
	stopErr := a.Stop(ctx)
	p.mu.Lock()
	p.clean = err == nil && stopErr == nil && !p.dead()
	p.mu.Unlock()
	switch {
	case errors.Is(err, ErrLeft):
		p.node.c.h.note("%s left the cluster", p.node.name)
		return nil
	case err == nil && stopErr != nil && !p.dead():
		p.node.c.h.note("%s did not stop cleanly: %v", p.node.name, stopErr)
	}
	return err
}

func (p *simProcess) dead() bool {
	select {
	case <-p.died:
		return true
	default:
		return false
	}
}

// die ends the process as os.Exit would: what the kernel has, stays.
func (p *simProcess) die(cause error) {
	p.dying.Do(func() {
		p.wire.cut()
		p.disk.cut()
		close(p.died)
		p.node.c.h.note("%s ends: %v", p.node.name, cause)
	})
}

// end reaps the node's process, which must be dead or asked to stop.
func (n *simNode) end() {
	n.mu.Lock()
	p := n.process
	n.mu.Unlock()
	if p == nil {
		return
	}
	<-p.ended
	n.mu.Lock()
	n.process = nil
	n.mu.Unlock()
}

// kill ends the process at once, as kill -9 does. What it wrote is there, synced
// or not.
func (n *simNode) kill() {
	n.mu.Lock()
	p := n.process
	n.mu.Unlock()
	if p == nil {
		return
	}
	p.dying.Do(func() {
		p.wire.cut()
		p.disk.cut()
		close(p.died)
	})
	n.end()
}

// power ends the process, and with it some of what was not synced.
func (n *simNode) power(rng *rand.Rand, survive vfstest.Survival) {
	n.kill()
	n.mem = n.mem.CrashClone(rng, survive)
}

// shutdown ends the process as SIGTERM does. It returns when it has ended, and
// whether it could finish: what it wrote is known to be on its disk then.
func (n *simNode) shutdown() (clean bool) {
	n.mu.Lock()
	p := n.process
	n.mu.Unlock()
	if p != nil {
		// A process whose disk hangs does not end so: that is killed.
		p.disk.set(nil, nil)
		p.ask()
	}
	n.end()
	if p == nil {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.clean
}

// simWire is the network of one process.
type simWire struct {
	net  *peertest.Net
	host string

	mu  sync.Mutex
	off bool
}

// Listen implements peer.Network.
func (w *simWire) Listen(address string) (net.Listener, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.off {
		return nil, errPower
	}
	return w.net.Host(w.host).Listen(address)
}

// Dial implements peer.Network.
func (w *simWire) Dial(ctx context.Context, address string) (net.Conn, error) {
	w.mu.Lock()
	off := w.off
	w.mu.Unlock()
	if off {
		return nil, errPower
	}
	c, err := w.net.Host(w.host).Dial(ctx, address)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.off {
		return nil, errors.Join(errPower, c.Close())
	}
	return c, nil
}

// cut ends all connections, now and for good.
func (w *simWire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.off = true
	w.net.Crash(w.host)
}

var _ peer.Network = (*simWire)(nil)

// logger prefixes lines with a node's name; their time is the bubble's.
func (c *simCluster) logger(name string) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Name: name, Output: &c.log, Level: c.level, TimeFormat: "04:05.000000"})
}

// leader returns the node that leads in the highest term, nil if none does.
func (c *simCluster) leader() (leader *simNode) {
	var term uint64
	for _, n := range c.nodes {
		if _, a := n.running(); a != nil {
			if st := a.replica.Status(); st.State == "Leader" && st.Ready && st.Term > term {
				leader, term = n, st.Term
			}
		}
	}
	return leader
}

// others are all nodes but some.
func (c *simCluster) others(but ...*simNode) []*simNode {
	return slices.DeleteFunc(slices.Clone(c.nodes), func(n *simNode) bool { return slices.Contains(but, n) })
}
