package rpc

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// peerService serves v1.Peer to the other nodes. It never passes anything on:
// what it does, it does to this node's own log.
type peerService struct {
	v1.UnimplementedPeerServer
	s *Service
}

func (p *peerService) authorize(ctx context.Context) error {
	return p.s.permit(ctx, ActionPeer, DefaultLog)
}

// Status implements v1.PeerServer.
func (p *peerService) Status(ctx context.Context, _ *v1.StatusRequest) (*v1.StatusResponse, error) {
	if err := p.authorize(ctx); err != nil {
		return nil, err
	}
	st, err := p.s.peer.Status(ctx)
	if err != nil {
		return nil, err
	}
	if st.Version == "" {
		st.Version = p.s.version
	}
	return statusMessage(&st), nil
}

// ReadIndex implements v1.PeerServer.
func (p *peerService) ReadIndex(ctx context.Context, req *v1.ReadIndexRequest) (*v1.ReadIndexResponse, error) {
	if err := p.authorize(ctx); err != nil {
		return nil, err
	}
	if err := p.sameCluster(ctx, req.GetClusterId()); err != nil {
		return nil, err
	}
	index, err := p.s.peer.ReadIndex(ctx)
	if err != nil {
		return nil, err
	}
	return &v1.ReadIndexResponse{Index: index}, nil
}

// Propose implements v1.PeerServer.
func (p *peerService) Propose(stream grpc.BidiStreamingServer[v1.ProposeRequest, v1.ProposeResponse]) error {
	if err := p.authorize(stream.Context()); err != nil {
		return statusWith(err, map[string]string{MetaRequest: "0"})
	}
	return p.propose(stream)
}

// sameCluster refuses what is meant for another cluster's node that had this
// address before. A cluster that is not known yet differs from none.
func (p *peerService) sameCluster(ctx context.Context, theirs string) error {
	if theirs == "" {
		return nil
	}
	st, err := p.s.peer.Status(ctx)
	if err != nil {
		return err
	}
	if st.ClusterID != "" && st.ClusterID != theirs {
		return &ForeignClusterError{Ours: st.ClusterID, Theirs: theirs}
	}
	return nil
}

func statusMessage(st *NodeStatus) *v1.StatusResponse {
	m := &v1.StatusResponse{
		NodeId:        st.NodeID,
		Name:          st.Name,
		Cluster:       st.Cluster,
		ClusterId:     st.ClusterID,
		Supersedes:    st.Supersedes,
		State:         st.State,
		Version:       st.Version,
		Expect:        uint32(max(st.Expect, 0)),
		FormerIds:     st.FormerIDs,
		Role:          st.Role,
		Term:          st.Term,
		LastIndex:     st.LastIndex,
		LastTerm:      st.LastTerm,
		AppliedIndex:  st.AppliedIndex,
		LeaderId:      st.LeaderID,
		LeaderAddress: st.LeaderAddress,
		FirstOffset:   st.FirstOffset,
		NextOffset:    st.NextOffset,
		DiskFull:      st.DiskFull,
	}
	if st.LastContact >= 0 {
		m.LastContact = durationpb.New(st.LastContact)
	}
	if !st.CertificateExpires.IsZero() {
		m.CertificateExpires = timestamppb.New(st.CertificateExpires)
	}
	return m
}

func statusFromMessage(m *v1.StatusResponse) NodeStatus {
	st := NodeStatus{
		NodeID:        m.GetNodeId(),
		Name:          m.GetName(),
		Cluster:       m.GetCluster(),
		ClusterID:     m.GetClusterId(),
		Supersedes:    m.GetSupersedes(),
		State:         m.GetState(),
		Version:       m.GetVersion(),
		Expect:        int(m.GetExpect()),
		FormerIDs:     m.GetFormerIds(),
		Role:          m.GetRole(),
		Term:          m.GetTerm(),
		LastIndex:     m.GetLastIndex(),
		LastTerm:      m.GetLastTerm(),
		AppliedIndex:  m.GetAppliedIndex(),
		LastContact:   -1,
		LeaderID:      m.GetLeaderId(),
		LeaderAddress: m.GetLeaderAddress(),
		FirstOffset:   m.GetFirstOffset(),
		NextOffset:    m.GetNextOffset(),
		DiskFull:      m.GetDiskFull(),
	}
	if m.GetLastContact() != nil {
		st.LastContact = m.GetLastContact().AsDuration()
	}
	if m.GetCertificateExpires() != nil {
		st.CertificateExpires = m.GetCertificateExpires().AsTime()
	}
	return st
}
