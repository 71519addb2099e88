package clienttest

import (
	"context"
	"strings"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// admin serves v1.Admin for a Server.
type admin struct {
	v1.UnimplementedAdminServer
	s *Server
}

// AdminCalls are what Admin was asked for so far, such as "remove id-c".
func (s *Server) AdminCalls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.adminCalls...)
}

func (a admin) asked(words ...string) error {
	call := strings.TrimSpace(strings.Join(words, " "))
	a.s.mu.Lock()
	a.s.adminCalls = append(a.s.adminCalls, call)
	a.s.mu.Unlock()
	if a.s.OnAdmin == nil {
		return nil
	}
	return a.s.OnAdmin(call)
}

func (a admin) voters() *uint32 {
	var n uint32
	for _, s := range a.s.nodes().GetServers() {
		if s.GetRole() == v1.Server_ROLE_VOTER {
			n++
		}
	}
	return &n
}

// ListPeers implements v1.AdminServer.
func (a admin) ListPeers(_ context.Context, req *v1.ListPeersRequest) (*v1.ListPeersResponse, error) {
	call := "list"
	if req.GetStale() {
		call = "list stale"
	}
	if err := a.asked(call); err != nil {
		return nil, err
	}
	nodes := a.s.nodes()
	return &v1.ListPeersResponse{Servers: nodes.GetServers(), AnsweredBy: nodes.GetAnsweredBy()}, nil
}

// AddPeer implements v1.AdminServer.
func (a admin) AddPeer(_ context.Context, req *v1.AddPeerRequest) (*v1.AddPeerResponse, error) {
	if err := a.asked("add", req.GetId(), req.GetAddress()); err != nil {
		return nil, err
	}
	return &v1.AddPeerResponse{Voters: a.voters()}, nil
}

// RemovePeer implements v1.AdminServer.
func (a admin) RemovePeer(_ context.Context, req *v1.RemovePeerRequest) (*v1.RemovePeerResponse, error) {
	if err := a.asked("remove", req.GetId()); err != nil {
		return nil, err
	}
	return &v1.RemovePeerResponse{Voters: a.voters()}, nil
}

// TransferLeadership implements v1.AdminServer.
func (a admin) TransferLeadership(_ context.Context, req *v1.TransferLeadershipRequest) (*v1.TransferLeadershipResponse, error) {
	return &v1.TransferLeadershipResponse{}, a.asked("transfer", req.GetId())
}

// Leave implements v1.AdminServer.
func (a admin) Leave(_ context.Context, req *v1.LeaveRequest) (*v1.LeaveResponse, error) {
	return &v1.LeaveResponse{Id: a.s.nodes().GetAnsweredBy()}, a.asked("leave", req.GetId())
}
