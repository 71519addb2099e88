package agent

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/rpc"
)

// part is this node's part in the cluster: who it is, what it says of itself,
// and what operators have it do.
type part struct {
	cfg        *config.Config
	data       *dataDir
	replica    *replica.Replica
	neighbours *neighbours
	security   *security
	address    string
	version    string
	// left is closed when the node is out of the cluster, on purpose.
	left chan struct{}

	mu      sync.Mutex
	leaving bool
	removed bool
}

// state is where the node is in its life.
func (p *part) state() discovery.State {
	p.mu.Lock()
	leaving, removed := p.leaving, p.removed
	p.mu.Unlock()
	switch {
	case removed || p.tombstoned():
		return discovery.Removed
	case leaving:
		return discovery.Leaving
	case !p.started():
		return discovery.Fresh
	default:
		return discovery.Member
	}
}

// tombstoned tells whether the group has removed this node, as far as that has
// come through to it.
func (p *part) tombstoned() bool {
	_, ok := p.replica.Tombstones()[p.data.nodeID()]
	return ok
}

// started tells whether the node has Raft state.
func (p *part) started() bool {
	servers, err := p.replica.Servers()
	return err == nil && len(servers) > 0
}

// self is the node as it registers.
func (p *part) self() discovery.Node {
	id, st := p.data.identity(), p.replica.Status()
	return discovery.Node{
		ID: id.node, Name: p.cfg.Node.Name, Address: p.address,
		Cluster: p.cfg.Cluster.Name, ClusterID: id.cluster,
		State: p.state(), Role: p.role(st), Term: st.Term,
		Expect: p.cfg.Cluster.BootstrapExpect, Zone: p.cfg.Cluster.Zone, Version: p.version,
	}
}

func (p *part) role(st replica.Status) discovery.Role {
	switch {
	case st.State == "Leader":
		return discovery.Leader
	case !p.started():
		return discovery.NoRole
	case !p.voter():
		return discovery.Nonvoter
	default:
		return discovery.Follower
	}
}

func (p *part) voter() bool {
	servers, err := p.replica.Servers()
	if err != nil {
		return false
	}
	for _, s := range servers {
		if s.ID == p.data.nodeID() {
			return s.Voter
		}
	}
	return false
}

// health tells whether the node can be sent to, and why not.
func (p *part) health() (serving bool, status discovery.Status, why string) {
	st := p.replica.Status()
	state := p.state()
	stale := 2 * p.cfg.Raft.HeartbeatTimeout
	switch {
	case state == discovery.Removed:
		return false, discovery.Critical, "the node was removed from the cluster"
	case state == discovery.Leaving:
		return false, discovery.Critical, "the node is leaving the cluster"
	case state == discovery.Fresh:
		return false, discovery.Critical, "the node waits to be part of a cluster"
	case st.State == "Leader" && st.Ready:
		if st.DiskFull {
			return true, discovery.Warning, "leads, but the disk is full"
		}
		if soon := p.security.expiresSoon(); soon != "" {
			return true, discovery.Warning, "leads, but " + soon
		}
		return true, discovery.Passing, fmt.Sprintf("leads in term %d", st.Term)
	case st.State == "Leader":
		return false, discovery.Critical, "takes over leadership"
	case st.LeaderID == "":
		return false, discovery.Critical, "knows no leader"
	case st.LastContact.IsZero() || time.Since(st.LastContact) > stale:
		return false, discovery.Critical, fmt.Sprintf("has not heard from leader %s for more than %v", st.LeaderID, stale)
	case !p.voter():
		return false, discovery.Warning, "receives the log, and has no vote yet"
	case st.DiskFull:
		return true, discovery.Warning, "follows, but the disk is full"
	}
	if soon := p.security.expiresSoon(); soon != "" {
		return true, discovery.Warning, "follows, but " + soon
	}
	return true, discovery.Passing, "follows " + st.LeaderID
}

// condition is how the node is, for readiness.
func (p *part) condition() condition {
	serving, _, why := p.health()
	st := p.replica.Status()
	c := condition{
		serving: serving, why: why, leads: st.State == "Leader" && st.Ready,
		term: st.Term, applied: st.Applied, committed: st.Committed,
	}
	if servers, err := p.replica.Servers(); err == nil {
		voters := 0
		for _, s := range servers {
			if s.Voter {
				voters++
			}
		}
		c.alone = voters == 1 && serving // whoever serves is a voter
	}
	return c
}

// Status implements rpc.Peer.
func (p *part) Status(context.Context) (rpc.NodeStatus, error) {
	id, st := p.data.identity(), p.replica.Status()
	first, watermark, _ := p.replica.Bounds()
	role := map[discovery.Role]string{
		discovery.Leader: "leader", discovery.Follower: "follower", discovery.Nonvoter: "nonvoter",
	}[p.role(st)]
	if st.State == "Candidate" {
		role = "candidate"
	}
	s := rpc.NodeStatus{
		NodeID: id.node, Name: p.cfg.Node.Name, Cluster: p.cfg.Cluster.Name, ClusterID: id.cluster, Supersedes: p.replica.Supersedes(),
		State: string(p.state()), Version: p.version, Expect: p.cfg.Cluster.BootstrapExpect, FormerIDs: id.former,
		Role: role, Term: st.Term, LastIndex: st.Last, LastTerm: st.LastTerm, AppliedIndex: st.Applied,
		LastContact: -1, LeaderID: st.LeaderID, LeaderAddress: st.LeaderAddress,
		FirstOffset: first, NextOffset: watermark, DiskFull: st.DiskFull,
	}
	if id.lives > 1 {
		s.Expect = 0
	}
	if c, ok := p.security.certificate(); ok {
		s.CertificateExpires = c.NotAfter
	}
	if !st.LastContact.IsZero() && st.State != "Leader" {
		s.LastContact = time.Since(st.LastContact)
	}
	return s, nil
}

// ReadIndex implements rpc.Peer.
func (p *part) ReadIndex(ctx context.Context) (uint64, error) {
	index, err := p.replica.ReadIndex(ctx)
	return index, p.rpcError(err)
}

// WaitApplied implements rpc.Peer.
func (p *part) WaitApplied(ctx context.Context, index uint64) error {
	return p.rpcError(p.replica.WaitApplied(ctx, index))
}

// addressOf is where a server of the group is now, as far as is known. The
// leader says it with every message, which is news where the address book is not.
func (p *part) addressOf(s replica.Server, st replica.Status) string {
	switch {
	case s.ID == p.data.nodeID():
		return p.address
	case s.ID == st.LeaderID:
		return st.LeaderAddress
	}
	if address, ok := p.neighbours.book.Lookup(s.ID); ok {
		return address
	}
	return s.Address
}

// AddPeer implements rpc.Admin.
func (p *part) AddPeer(ctx context.Context, id, address string) error {
	return p.changeError(p.replica.Readmit(ctx, id, address))
}

// RemovePeer implements rpc.Admin.
func (p *part) RemovePeer(ctx context.Context, id string) error {
	return p.changeError(p.replica.RemoveServer(ctx, id))
}

// changeError is rpcError for a change to the group.
func (p *part) changeError(err error) error {
	if errors.Is(err, replica.ErrUnknownOutcome) {
		return &rpc.UnknownChangeError{Cause: err}
	}
	return p.rpcError(err)
}

// TransferLeadership implements rpc.Admin.
func (p *part) TransferLeadership(ctx context.Context, id string) error {
	return p.changeError(p.replica.TransferLeadership(ctx, id))
}

// Leave implements rpc.Admin: first it says so, so that nobody adds it again;
// then it has itself removed by whoever leads.
func (p *part) Leave(ctx context.Context) error {
	p.mu.Lock()
	again := p.leaving
	p.leaving = true
	p.mu.Unlock()
	if again {
		return fmt.Errorf("%w: this node is leaving already", rpc.ErrNoLeader)
	}
	if err := p.leave(ctx); err != nil {
		p.mu.Lock()
		p.leaving = false
		p.mu.Unlock()
		return err
	}
	p.mu.Lock()
	p.removed = true
	p.mu.Unlock()
	close(p.left)
	return nil
}

func (p *part) leave(ctx context.Context) error {
	id := p.data.nodeID()
	for {
		err := p.changeError(p.replica.RemoveServer(ctx, id))
		var elsewhere *rpc.NotLeaderError
		if errors.As(err, &elsewhere) {
			err = p.neighbours.forward.RemovePeer(ctx, elsewhere.LeaderAddress, id)
		}
		if errors.Is(err, rpc.ErrNoLeader) {
			// A node that is out already, because the leader saw that it leaves,
			// hears from no leader any more.
			if address := p.askForLeader(ctx); address != "" {
				err = p.neighbours.forward.RemovePeer(ctx, address, id)
			}
		}
		var gone *rpc.UnknownServerError
		switch {
		case errors.As(err, &gone) && p.started():
			return nil // since an attempt whose answer was lost
		case !errors.As(err, &elsewhere) && !errors.Is(err, rpc.ErrNoLeader):
			return err
		}
		// Leadership moves, perhaps because this node handed it over.
		timer := time.NewTimer(200 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%w (%w)", err, ctx.Err())
		}
	}
}

// askForLeader asks the other nodes whether they lead, and returns the address
// of one that does; empty if none says so.
func (p *part) askForLeader(ctx context.Context) (address string) {
	for _, a := range ask(ctx, p.neighbours.forward.Status, p.neighbours.known(p.self())) {
		if a.err == nil && a.status.Role == "leader" && a.status.ClusterID == p.data.identity().cluster {
			return a.node.Address
		}
	}
	return ""
}

// Snapshot implements rpc.Admin.
func (p *part) Snapshot(ctx context.Context) (rpc.Snapshot, error) {
	if !p.started() {
		return nil, fmt.Errorf("%w: this node waits to be part of a cluster, and has nothing to save", rpc.ErrNoLeader)
	}
	saved, err := p.replica.Save(ctx, replica.SavedInfo{NodeID: p.data.nodeID(), ClusterName: p.cfg.Cluster.Name, Version: p.version})
	if err != nil {
		return nil, p.rpcError(err)
	}
	return savedSnapshot{saved, p}, nil
}

// savedSnapshot is a snapshot that is being saved as the gRPC server sees it.
type savedSnapshot struct {
	*replica.Saved
	part *part
}

// Read implements rpc.Snapshot.
func (s savedSnapshot) Read(p []byte) (int, error) {
	n, err := s.Saved.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = s.part.rpcError(err)
	}
	return n, err
}

// Info implements rpc.Snapshot.
func (s savedSnapshot) Info() rpc.SnapshotInfo {
	i := &s.Saved.Info
	info := rpc.SnapshotInfo{
		ClusterID: i.ClusterID, Cluster: i.ClusterName, NodeID: i.NodeID, Taken: i.Taken,
		FirstOffset: i.FirstOffset, NextOffset: i.NextOffset, Index: i.Index, Term: i.Term, Size: i.Size,
	}
	if sum, err := hex.DecodeString(i.SHA256); err == nil && len(sum) > 0 {
		info.SHA256 = sum
	}
	return info
}

// Servers implements rpc.Cluster: the group as this node knows it, with what
// the others last said of themselves.
func (p *part) Servers(context.Context) (rpc.ServerList, error) {
	servers, err := p.replica.Servers()
	if err != nil {
		return rpc.ServerList{}, p.rpcError(err)
	}
	self, st := p.self(), p.replica.Status()
	catalog := p.neighbours.discovery.Latest()
	list := rpc.ServerList{Self: self.ID}
	for _, s := range servers {
		server := rpc.Server{ID: s.ID, Address: p.addressOf(s, st), Voter: s.Voter, Leader: s.Leader, LastContact: -1}
		if listed, ok := catalog.Find(s.ID); ok {
			server.CatalogAddress, server.Name, server.State, server.Version = listed.Address, listed.Name, string(listed.State), listed.Version
		}
		if s.Health != nil {
			server.Healthy, server.StableSince = &s.Health.Healthy, s.Health.StableSince
			if !s.Leader {
				server.LastContact = s.Health.LastContact
			}
		}
		said, ok := p.neighbours.said(s.ID)
		if s.ID == self.ID {
			said, err = p.Status(context.Background())
			ok = err == nil
			server.Term = st.Term
		}
		if ok {
			server.Name, server.Version, server.State = said.Name, said.Version, said.State
			server.Term, server.AppliedIndex = said.Term, said.AppliedIndex
			server.FirstOffset, server.HighWatermark = said.FirstOffset, said.NextOffset
			server.CertificateExpires = said.CertificateExpires
			if server.LastContact < 0 && !s.Leader {
				server.LastContact = said.LastContact
			}
		}
		list.Servers = append(list.Servers, server)
	}
	return list, nil
}
