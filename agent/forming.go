package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/logstore/replica"
)

// forming makes the first cluster of nodes that have nothing yet.
//
// All that matters is that it happens once, however many nodes try, crash or
// see different things: two clusters of the same nodes would each acknowledge
// records. So there is exactly one first configuration:
//
//   - With a permanent record (Consul), the one that stands there. The record
//     is created by compare-and-set, by the node with the lowest id of those
//     that it lists; every node that it lists, as long as it has nothing, may
//     start Raft with it, so that a node that crashes half-way stops nobody.
//   - Without one, the list of peers: all of them, and only all of them. The
//     one with the lowest id starts Raft with it; the others wait for it.
//
// A node with Raft state, one that was renewed, and one that sees a node with
// state, forms nothing: it waits until the leader adds it.
type forming struct {
	data      *dataDir
	self      func() discovery.Node
	discovery discovery.Discovery
	probe     probe
	// started tells whether the replica has Raft state: then all is said.
	started func() bool
	// found starts Raft with a first configuration.
	found func(clusterID string, servers []replica.Server) error
	// again has the node started again.
	again  func(error)
	logger hclog.Logger

	waiting string // what was logged last
	failed  int    // attempts to found, in a row
}

// founding is the permanent record, as JSON.
type founding struct {
	ClusterID string    `json:"cluster_id"`
	Servers   []founder `json:"servers"`
	// Done: the cluster exists, and the record is history.
	Done bool `json:"done"`
}

type founder struct {
	ID      string `json:"id"`
	Address string `json:"address"`
}

// run returns once this node has Raft state, by its own doing or the leader's,
// or when ctx ends.
func (f *forming) run(ctx context.Context) {
	for !f.started() {
		changed := f.discovery.Changed()
		why, err := f.try(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			f.say(err.Error())
		case why != "":
			f.say(why)
		}
		// Not only on changes: whether the others answer is not in the catalog.
		timer := time.NewTimer(time.Second + rand.N(time.Second))
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// say logs what the node waits for when that changes.
func (f *forming) say(why string) {
	if why != f.waiting {
		f.waiting = why
		f.logger.Info("waiting to be part of a cluster", "for", why)
	}
}

// try does the next step, and says what it waits for.
func (f *forming) try(ctx context.Context) (waitFor string, err error) {
	id := f.data.identity()
	self := f.self()
	switch {
	case id.lives > 1:
		return "the leader to take this node in again, under its new id", nil
	case self.Expect == 0:
		return "the leader of the existing cluster to add this node", nil
	}
	snapshot := f.discovery.Latest()
	for _, n := range snapshot.Nodes {
		if n.ID != self.ID && (n.State == discovery.Member || n.State == discovery.Leaving) {
			return fmt.Sprintf("the leader to add this node: node %s has a cluster already", n.ID), nil
		}
	}
	record := f.discovery.Bootstrap()
	if record == nil {
		return f.tryList(ctx, snapshot)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	value, _, err := record.Get(ctx)
	if err != nil {
		return "", fmt.Errorf("the registry to say whether there is a cluster: %w", err)
	}
	if value != nil {
		return f.follow(value)
	}
	if !snapshot.Trusted {
		return "a catalog that can be relied on: " + snapshot.Why, nil
	}
	founders, waitFor := f.fresh(ctx, snapshot, self.Expect)
	if len(founders) < self.Expect {
		return waitFor, nil
	}
	founders = founders[:self.Expect]
	if founders[0].ID != self.ID {
		return fmt.Sprintf("node %s, which has the lowest id, to write down who founds the cluster", founders[0].ID), nil
	}
	draft := founding{ClusterID: cmp.Or(id.cluster, uuid.NewString()), Servers: founders}
	if value, err = json.Marshal(draft); err != nil {
		return "", err
	}
	if _, err := record.Create(ctx, value); err != nil {
		return "", fmt.Errorf("the registry to keep the record of who founds the cluster: %w", err)
	}
	// What counts is what stands there now, whoever wrote it.
	if value, _, err = record.Get(ctx); err != nil || value == nil {
		return "", fmt.Errorf("the registry to show the record of who founds the cluster: %w", cmp.Or(err, errors.New("it is gone again")))
	}
	return f.follow(value)
}

// follow does what the record says.
func (f *forming) follow(value []byte) (waitFor string, err error) {
	var r founding
	if err := json.Unmarshal(value, &r); err != nil || r.ClusterID == "" || len(r.Servers) == 0 {
		return "", fmt.Errorf("somebody to mend or delete the registry's record of who founds the cluster, which is not what Diurna wrote: %q", value)
	}
	self := f.self().ID
	switch {
	case r.Done:
		return "the leader to add this node: the registry says that the cluster exists", nil
	case !slices.ContainsFunc(r.Servers, func(s founder) bool { return s.ID == self }):
		return "the leader to add this node: others found the cluster", nil
	}
	return "", f.start(r)
}

func (f *forming) start(r founding) error {
	// First the id, so that a leader without one cannot be.
	if err := f.data.join(r.ClusterID); err != nil {
		return err
	}
	var servers []replica.Server
	for _, s := range r.Servers {
		servers = append(servers, replica.Server{ID: s.ID, Address: s.Address, Voter: true})
	}
	f.logger.Info("founding a cluster", "cluster", r.ClusterID, "servers", len(servers))
	err := f.found(r.ClusterID, servers)
	if f.failed++; errors.Is(err, replica.ErrNotFounded) && f.failed > foundingTries {
		// Nobody else has founded it either.
		f.again(fmt.Errorf("%w: %w", replica.ErrRestart, err))
	}
	return err
}

// foundingTries, a second or two apart, are the others' time to send a node that
// heard of them first what they have founded.
const foundingTries = 5

// tryList forms a cluster of a fixed list of nodes.
func (f *forming) tryList(ctx context.Context, snapshot discovery.Snapshot) (waitFor string, err error) {
	self := f.self()
	founders, waitFor := f.fresh(ctx, snapshot, self.Expect)
	switch {
	case len(founders) < self.Expect:
		return waitFor, nil
	case len(founders) > self.Expect:
		return fmt.Sprintf("a list of peers of the right length: %d nodes answer, bootstrap_expect is %d", len(founders), self.Expect), nil
	case founders[0].ID != self.ID:
		return fmt.Sprintf("node %s, which has the lowest id, to found the cluster", founders[0].ID), nil
	}
	return "", f.start(founding{ClusterID: cmp.Or(f.data.identity().cluster, uuid.NewString()), Servers: founders})
}

// fresh asks all listed nodes, and returns those that have nothing and expect
// the same, ourselves included, by id. If one of them has a cluster, or says
// something else than the others, there are none.
func (f *forming) fresh(ctx context.Context, snapshot discovery.Snapshot, expect int) (founders []founder, waitFor string) {
	self := f.self()
	founders = []founder{{ID: self.ID, Address: self.Address}}
	others := slices.DeleteFunc(snapshot.Nodes, func(n discovery.Node) bool { return n.Address == self.Address || n.ID == self.ID && n.ID != "" })
	cluster := f.data.identity().cluster
	for _, a := range ask(ctx, f.probe, others) {
		n, s := a.node, a.status
		switch {
		case a.err != nil:
			waitFor = fmt.Sprintf("the node at %s to answer (%v)", n.Address, a.err)
			continue
		case s.NodeID == self.ID:
			continue // an address of ours
		case s.Cluster != self.Cluster:
			return nil, fmt.Sprintf("the node at %s to have the same cluster.name: it has %q, this one %q", n.Address, s.Cluster, self.Cluster)
		case s.State != string(discovery.Fresh) || len(s.FormerIDs) > 0:
			return nil, fmt.Sprintf("the leader to add this node: node %s has a cluster already", s.NodeID)
		case s.Expect != expect:
			waitFor = fmt.Sprintf("the node at %s to expect the same: its bootstrap_expect is %d, this one's %d", n.Address, s.Expect, expect)
			continue
		case cluster != "" && s.ClusterID != "" && s.ClusterID != cluster:
			return nil, fmt.Sprintf("node %s to be of the same cluster: it belongs to %s", s.NodeID, s.ClusterID)
		}
		cluster = cmp.Or(cluster, s.ClusterID)
		founders = append(founders, founder{ID: s.NodeID, Address: n.Address})
	}
	slices.SortFunc(founders, func(a, b founder) int { return cmp.Compare(a.ID, b.ID) })
	founders = slices.CompactFunc(founders, func(a, b founder) bool { return a.ID == b.ID })
	if waitFor == "" {
		waitFor = fmt.Sprintf("%d nodes, of which there are %d", expect, len(founders))
	}
	return founders, waitFor
}

// closeRecord marks the record as history, by the leader of the cluster that it
// founded, or of one that was recovered from that. Where there is none, because
// the registry was wiped or the cluster was restored from a snapshot, it writes
// one: nodes that have nothing must not found another cluster beside this one.
func closeRecord(ctx context.Context, record discovery.Record, clusterID, supersedes string, servers []replica.Server) error {
	value, version, err := record.Get(ctx)
	if err != nil {
		return err
	}
	ours := founding{ClusterID: clusterID, Done: true}
	for _, s := range servers {
		ours.Servers = append(ours.Servers, founder{ID: s.ID, Address: s.Address})
	}
	if value == nil {
		if value, err = json.Marshal(ours); err != nil {
			return err
		}
		_, err = record.Create(ctx, value)
		return err
	}
	var r founding
	if err := json.Unmarshal(value, &r); err != nil {
		return err
	}
	switch {
	case r.ClusterID == supersedes && supersedes != "":
		r = ours
	case r.Done || r.ClusterID != clusterID:
		return nil
	}
	r.Done = true
	if value, err = json.Marshal(r); err != nil {
		return err
	}
	_, err = record.Replace(ctx, version, value)
	return err
}
