package agent

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/agent/peer"
	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/discovery/consul"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/rpc"
)

const peersFile = "peers"

// neighbours is what the node knows of the others: what the registry says, what
// it remembers itself, and how to ask them.
type neighbours struct {
	discovery discovery.Discovery
	book      *peer.Book
	forward   *rpc.Forwarder
	logger    hclog.Logger

	mu   sync.Mutex
	last map[string]rpc.NodeStatus // what nodes last said, by id
}

// said returns what a node last said of itself.
func (n *neighbours) said(id string) (rpc.NodeStatus, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s, ok := n.last[id]
	return s, ok
}

// probe asks the node at an address who it is.
type probe func(ctx context.Context, address string) (rpc.NodeStatus, error)

// probeTimeout bounds one question to one node.
const probeTimeout = 2 * time.Second

// openNeighbours starts nothing: discovery is to be run, and all to be closed.
func openNeighbours(cfg *config.Config, opts Options, data *dataDir, sec *security) (*neighbours, error) {
	n := &neighbours{logger: opts.Logger}
	var err error
	if n.book, err = peer.OpenBook(opts.fs, filepath.Join(data.path, peersFile)); err != nil {
		opts.Logger.Warn("what was remembered of the other nodes is lost, and will be learned again", "error", err)
	}
	if opts.discover != nil {
		n.discovery, err = opts.discover(cfg)
	} else {
		n.discovery, err = newDiscovery(cfg, opts.Logger.Named("discovery"))
	}
	if err != nil {
		return nil, err
	}
	n.forward, err = rpc.NewForwarder(rpc.ForwarderConfig{
		Dial:        opts.network.Dial,
		Credentials: sec.credentials(),
		ClusterID:   func() string { return data.identity().cluster },
		Logger:      opts.Logger.Named("forward"),
	})
	return n, err
}

func newDiscovery(cfg *config.Config, logger hclog.Logger) (discovery.Discovery, error) {
	if cfg.Discovery.Type == config.DiscoveryConsul {
		return consul.New(consul.Config{
			Address:   cfg.Consul.Address,
			Token:     cfg.Consul.Token,
			TokenFile: cfg.Consul.TokenFile,
			CAFile:    cfg.Consul.CAFile,
			CertFile:  cfg.Consul.CertFile,
			KeyFile:   cfg.Consul.KeyFile,
			Service:   cfg.Consul.Service,
			Tags:      cfg.Consul.Tags,
			Cluster:   cfg.Cluster.Name,
			HealthTLS: cfg.TLS.Source != config.TLSNone,
			Logger:    logger,
		})
	}
	return discovery.NewStatic(cfg.Discovery.Peers)
}

func (n *neighbours) close(ctx context.Context) error {
	if n.forward == nil {
		return nil
	}
	return n.forward.Close(ctx)
}

// answer is what a node said when it was asked who it is.
type answer struct {
	// node is what was known of it before: in any case its address.
	node   discovery.Node
	status rpc.NodeStatus
	err    error
}

// ask asks nodes, all at once, who they are. Where somebody else answers than the
// registry lists, that one counts: the registry can be behind, or lack what is
// new there. Unless that one answers where it is listed, too: then the address
// is a mistake.
func ask(ctx context.Context, probe probe, nodes []discovery.Node) []answer {
	answers := make([]answer, len(nodes))
	var asking sync.WaitGroup
	for i, n := range nodes {
		asking.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, probeTimeout)
			defer cancel()
			answers[i].node = n
			answers[i].status, answers[i].err = probe(ctx, n.Address)
		})
	}
	asking.Wait()
	home := make(map[string]bool) // ids that answer where they are listed, or where nobody is
	for _, a := range answers {
		if a.err == nil && (a.node.ID == "" || a.node.ID == a.status.NodeID) {
			home[a.status.NodeID] = true
		}
	}
	for i := range answers {
		a := &answers[i]
		switch n := a.node; {
		case a.err != nil || n.ID == "" || n.ID == a.status.NodeID:
		case home[a.status.NodeID]:
			a.err = fmt.Errorf("node %s is said to be at %s, but there is node %s", n.ID, n.Address, a.status.NodeID)
		default:
			home[a.status.NodeID] = true
			a.node = discovery.Node{Address: n.Address}
		}
	}
	return answers
}

// known lists the nodes that there may be, but for those at this node's own
// address: what the registry lists, and what else is remembered.
func (n *neighbours) known(self discovery.Node) []discovery.Node {
	var nodes []discovery.Node
	listed := map[string]bool{self.Address: true}
	add := func(node discovery.Node) {
		if !listed[node.Address] && (node.ID == "" || node.ID != self.ID) {
			listed[node.Address] = true
			nodes = append(nodes, node)
		}
	}
	for _, node := range n.discovery.Latest().Nodes {
		add(node)
	}
	for _, e := range n.book.All() {
		// Without the id: somebody else may live there now.
		add(discovery.Node{Address: e.Address})
	}
	return nodes
}

// remember notes what nodes said, and where they are.
func (n *neighbours) remember(answers []answer) {
	found := make(map[string]string)
	last := make(map[string]rpc.NodeStatus)
	for _, a := range answers {
		if a.err == nil {
			found[a.status.NodeID] = a.node.Address
			last[a.status.NodeID] = a.status
		}
	}
	n.mu.Lock()
	n.last = last
	n.mu.Unlock()
	if len(found) == 0 {
		return
	}
	if err := n.book.Update(found); err != nil {
		n.logger.Warn("cannot remember where the other nodes are", "error", err)
	}
}

// forgetAfter is how long a node that is in neither Raft's configuration nor the
// registry is still looked for: it may be one that all of them have lost sight of.
const forgetAfter = 24 * time.Hour

// forget drops nodes that have been gone for long, so that nobody asks for them
// for ever.
func (n *neighbours) forget(servers []replica.Server) {
	if len(servers) == 0 {
		return
	}
	listed := n.discovery.Latest()
	var gone []string
	for id, e := range n.book.All() {
		_, there := listed.Find(id)
		if !there && time.Since(e.Seen) > forgetAfter && !slices.ContainsFunc(servers, func(s replica.Server) bool { return s.ID == id }) {
			gone = append(gone, id)
		}
	}
	if len(gone) == 0 {
		return
	}
	if err := n.book.Forget(gone...); err != nil {
		n.logger.Warn("cannot forget nodes that are gone", "error", err)
	}
}
