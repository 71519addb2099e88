package consul

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/diurnalog/diurna/discovery"
)

// The keys of an instance's meta. More may be added; what a key means never
// changes.
const (
	metaNodeID    = "node_id"
	metaNodeName  = "node_name"
	metaCluster   = "cluster_name"
	metaClusterID = "cluster_id"
	metaState     = "state"
	metaExpect    = "expect"
	metaTerm      = "raft_term"
	metaHTTP      = "http_addr"
	metaZone      = "zone"
	metaVersion   = "version"
	metaProtocol  = "protocol"
)

// protocol numbers what the meta says; higher ones say more.
const protocol = "1"

// metaLimit is the longest value that Consul takes, in bytes to be safe.
const metaLimit = 512

func (c *Config) serviceID(nodeID string) string { return c.Service + "-" + nodeID }
func raftCheckID(serviceID string) string        { return serviceID + ":raft" }
func grpcCheckID(serviceID string) string        { return serviceID + ":grpc" }

// registration is what the agent is asked to hold for a node. Both checks are
// inside it: an instance without checks would count as healthy.
func (c *Config) registration(n discovery.Node) (*api.AgentServiceRegistration, error) {
	if !idRE.MatchString(n.ID) {
		return nil, fmt.Errorf("%q cannot be a node's id in Consul: up to 128 letters, digits, dots, hyphens and underscores", n.ID)
	}
	if err := discovery.CheckAddress(n.Address); err != nil {
		return nil, err
	}
	host, portText, err := net.SplitHostPort(n.Address)
	if err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(portText)
	if err != nil {
		return nil, err
	}
	if !validState(n.State) {
		return nil, fmt.Errorf("%q is not a node's state", n.State)
	}
	tags := slices.Clone(c.Tags)
	switch n.Role {
	case discovery.NoRole:
	case discovery.Leader, discovery.Follower, discovery.Nonvoter:
		tags = append(tags, string(n.Role))
	default:
		return nil, fmt.Errorf("%q is not a node's role", n.Role)
	}
	meta := map[string]string{
		metaNodeID:   n.ID,
		metaCluster:  c.Cluster,
		metaState:    string(n.State),
		metaExpect:   strconv.Itoa(n.Expect),
		metaTerm:     strconv.FormatUint(n.Term, 10),
		metaProtocol: protocol,
	}
	for key, value := range map[string]string{metaNodeName: n.Name, metaClusterID: n.ClusterID, metaHTTP: n.HTTP, metaZone: n.Zone, metaVersion: n.Version} {
		if value != "" {
			meta[key] = value
		}
	}
	for key, value := range meta {
		if len(value) > metaLimit {
			return nil, fmt.Errorf("%s is longer than the %d bytes that Consul takes", key, metaLimit)
		}
	}
	id, t := c.serviceID(n.ID), c.Timing
	return &api.AgentServiceRegistration{
		ID: id, Name: c.Service, Tags: tags, Meta: meta, Address: host, Port: port,
		Checks: api.AgentServiceChecks{
			{
				CheckID: raftCheckID(id), Name: "Raft", Notes: "What the node says about itself.",
				TTL: t.TTL.String(), Status: api.HealthCritical,
				DeregisterCriticalServiceAfter: t.DeregisterAfter.String(),
			},
			{
				CheckID: grpcCheckID(id), Name: "gRPC", Notes: "Whether the node's RPC port answers that it serves.",
				GRPC: n.Address + "/" + c.HealthService, GRPCUseTLS: c.HealthTLS, TLSSkipVerify: c.HealthTLS,
				Interval: t.GRPCInterval.String(), Timeout: t.GRPCTimeout.String(),
				Status: api.HealthCritical, FailuresBeforeCritical: 3,
				DeregisterCriticalServiceAfter: t.DeregisterAfter.String(),
			},
		},
	}, nil
}

// holds tells whether the agent has what it is asked to hold. What it says about
// checks is too little to compare; updates of the TTL check notice when they
// are gone.
func holds(s *api.AgentService, r *api.AgentServiceRegistration) bool {
	return s != nil && s.ID == r.ID && s.Service == r.Name && s.Address == r.Address && s.Port == r.Port &&
		s.EnableTagOverride == r.EnableTagOverride && slices.Equal(s.Tags, r.Tags) && maps.Equal(s.Meta, r.Meta)
}

func validState(s discovery.State) bool {
	switch s {
	case discovery.Fresh, discovery.Member, discovery.Leaving, discovery.Removed:
		return true
	}
	return false
}

// errOther is an instance of another cluster: none of our business, and no
// mistake.
var errOther = errors.New("another cluster")

// decode reads an instance. Anybody who may write the catalog may have written
// it.
func (c *Config) decode(e *api.ServiceEntry) (discovery.Node, error) {
	if e == nil || e.Service == nil || e.Node == nil {
		return discovery.Node{}, errors.New("it is incomplete")
	}
	meta := e.Service.Meta
	switch cluster, ok := meta[metaCluster]; {
	case !ok:
		return discovery.Node{}, &foreignError{fmt.Errorf("its meta lacks %s", metaCluster)}
	case cluster != c.Cluster:
		return discovery.Node{}, errOther
	}
	n := discovery.Node{
		ID: meta[metaNodeID], Name: meta[metaNodeName], Cluster: meta[metaCluster], ClusterID: meta[metaClusterID],
		State: discovery.State(meta[metaState]), HTTP: meta[metaHTTP], Zone: meta[metaZone], Version: meta[metaVersion],
	}
	if !idRE.MatchString(n.ID) {
		return n, fmt.Errorf("its meta's %s %q is not an id", metaNodeID, clip(n.ID, 40))
	}
	if e.Service.ID != c.serviceID(n.ID) {
		return n, fmt.Errorf("its meta's %s %q contradicts its own id", metaNodeID, n.ID)
	}
	if !validState(n.State) {
		return n, fmt.Errorf("its meta's %s %q is not a state", metaState, clip(string(n.State), 40))
	}
	var err error
	if n.Term, err = strconv.ParseUint(meta[metaTerm], 10, 64); err != nil {
		return n, fmt.Errorf("its meta's %s %q is not a number", metaTerm, clip(meta[metaTerm], 40))
	}
	if expect, err := strconv.ParseUint(meta[metaExpect], 10, 16); err == nil {
		n.Expect = int(expect)
	} else {
		return n, fmt.Errorf("its meta's %s %q is not a number of nodes", metaExpect, clip(meta[metaExpect], 40))
	}
	for _, tag := range e.Service.Tags {
		if !slices.Contains(roleTags, tag) {
			continue
		}
		if n.Role != discovery.NoRole && n.Role != discovery.Role(tag) {
			return n, fmt.Errorf("its tags say both %s and %s", n.Role, tag)
		}
		n.Role = discovery.Role(tag)
	}
	host := e.Service.Address
	if host == "" {
		host = e.Node.Address // as Consul's DNS does
	}
	n.Address = net.JoinHostPort(strings.Trim(host, "[]"), strconv.Itoa(e.Service.Port))
	if err := discovery.CheckAddress(n.Address); err != nil {
		return n, err
	}
	status := e.Checks.AggregatedStatus()
	n.Critical = status != api.HealthPassing && status != api.HealthWarning
	return n, nil
}

// foreignError is an instance that no node of ours has written: they all name
// their cluster.
type foreignError struct{ error }

// skipped is an instance that is not used, and why.
type skipped struct {
	service, node string // ids of the instance and of the Consul node that has it
	why           string
	foreign       bool // it cannot be one of our nodes
}

// decodeAll reads an answer. Every node is in the result once, sorted.
func (c *Config) decodeAll(entries []*api.ServiceEntry) (nodes []discovery.Node, skip []skipped) {
	type instance struct {
		node  discovery.Node
		entry *api.ServiceEntry
	}
	byID := make(map[string][]instance)
	for _, e := range entries {
		n, err := c.decode(e)
		var foreign *foreignError
		switch {
		case err == nil:
			byID[n.ID] = append(byID[n.ID], instance{n, e})
		case !errors.Is(err, errOther):
			skip = append(skip, newSkipped(e, err.Error(), errors.As(err, &foreign)))
		}
	}
	for id, all := range byID {
		// A node that moved is registered twice until the old agent forgets it.
		// The one that is alive is right; of dead ones, the one that came last.
		// Two that are alive are a copied disk, and calling either is a gamble.
		slices.SortFunc(all, func(a, b instance) int {
			return cmp.Or(
				compareBool(a.node.Critical, b.node.Critical),
				-cmp.Compare(a.entry.Service.CreateIndex, b.entry.Service.CreateIndex),
				cmp.Compare(a.entry.Node.Node, b.entry.Node.Node))
		})
		best := all[0]
		clash := slices.ContainsFunc(all[1:], func(o instance) bool {
			return !o.node.Critical && o.node.Address != best.node.Address
		})
		if !clash {
			nodes = append(nodes, best.node)
			continue
		}
		for _, i := range all {
			skip = append(skip, newSkipped(i.entry, fmt.Sprintf("nodes at different addresses claim the id %s: was a data directory copied?", id), false))
		}
	}
	slices.SortFunc(nodes, discovery.Compare)
	return nodes, skip
}

func newSkipped(e *api.ServiceEntry, why string, foreign bool) skipped {
	s := skipped{why: why, foreign: foreign}
	if e != nil && e.Service != nil {
		s.service = clip(e.Service.ID, 200)
	}
	if e != nil && e.Node != nil {
		s.node = clip(e.Node.Node, 200)
	}
	return s
}

// compareBool puts false first.
func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}
