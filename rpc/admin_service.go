package rpc

import (
	"context"
	"errors"

	"google.golang.org/grpc/metadata"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// adminService serves v1.Admin. What takes the leader is passed on to it by a
// node that does not lead; what was passed on once is not passed on again.
type adminService struct {
	v1.UnimplementedAdminServer
	s *Service
}

// forwardedKey marks, in a call's metadata, that another node has passed it on.
const forwardedKey = "diurna-forwarded"

func (a *adminService) authorize(ctx context.Context) error {
	return a.s.permit(ctx, ActionAdmin, DefaultLog)
}

// audit logs what was done, and for whom where that is known.
func (a *adminService) audit(ctx context.Context, message string, args ...any) {
	if subject := subjectOf(ctx); subject != "" {
		args = append(args, "by", subject)
	}
	a.s.logger.Info(message, args...)
}

// ListPeers implements v1.AdminServer.
func (a *adminService) ListPeers(ctx context.Context, req *v1.ListPeersRequest) (*v1.ListPeersResponse, error) {
	if err := a.authorize(ctx); err != nil {
		return nil, err
	}
	list, err := a.s.cluster.Servers(ctx)
	if err != nil {
		return nil, err
	}
	if !req.GetStale() {
		err := leads(list)
		if err == nil {
			// Who has been deposed a moment ago may not know it yet.
			err = a.s.local.Linearize(ctx)
		}
		if err != nil {
			resp := new(v1.ListPeersResponse)
			return resp, a.passOn(ctx, err, v1.Admin_ListPeers_FullMethodName, req, resp)
		}
	}
	resp := &v1.ListPeersResponse{AnsweredBy: list.Self}
	for i := range list.Servers {
		resp.Servers = append(resp.Servers, a.s.serverMessage(&list, i))
	}
	return resp, nil
}

// leads says, as an error, that the node which made the list does not lead.
func leads(list ServerList) error {
	for _, n := range list.Servers {
		switch {
		case !n.Leader:
		case n.ID == list.Self:
			return nil
		case n.Address != "":
			return &NotLeaderError{LeaderID: n.ID, LeaderAddress: n.Address}
		}
	}
	return ErrNoLeader
}

// AddPeer implements v1.AdminServer.
func (a *adminService) AddPeer(ctx context.Context, req *v1.AddPeerRequest) (*v1.AddPeerResponse, error) {
	if err := a.authorize(ctx); err != nil {
		return nil, err
	}
	if err := checkID("id", req.GetId()); err != nil {
		return nil, err
	}
	if err := checkAddress("address", req.GetAddress()); err != nil {
		return nil, err
	}
	if err := a.s.admin.AddPeer(ctx, req.GetId(), req.GetAddress()); err != nil {
		resp := new(v1.AddPeerResponse)
		return resp, a.passOn(ctx, err, v1.Admin_AddPeer_FullMethodName, req, resp)
	}
	a.audit(ctx, "an operator added a server", "id", req.GetId(), "address", req.GetAddress())
	return &v1.AddPeerResponse{Voters: a.voters(ctx)}, nil
}

// RemovePeer implements v1.AdminServer.
func (a *adminService) RemovePeer(ctx context.Context, req *v1.RemovePeerRequest) (*v1.RemovePeerResponse, error) {
	if err := a.authorize(ctx); err != nil {
		return nil, err
	}
	if err := checkID("id", req.GetId()); err != nil {
		return nil, err
	}
	if err := a.s.admin.RemovePeer(ctx, req.GetId()); err != nil {
		resp := new(v1.RemovePeerResponse)
		return resp, a.passOn(ctx, err, v1.Admin_RemovePeer_FullMethodName, req, resp)
	}
	a.audit(ctx, "an operator removed a server", "id", req.GetId())
	return &v1.RemovePeerResponse{Voters: a.voters(ctx)}, nil
}

// TransferLeadership implements v1.AdminServer.
func (a *adminService) TransferLeadership(ctx context.Context, req *v1.TransferLeadershipRequest) (*v1.TransferLeadershipResponse, error) {
	if err := a.authorize(ctx); err != nil {
		return nil, err
	}
	if req.GetId() != "" {
		if err := checkID("id", req.GetId()); err != nil {
			return nil, err
		}
	}
	if err := a.s.admin.TransferLeadership(ctx, req.GetId()); err != nil {
		resp := new(v1.TransferLeadershipResponse)
		return resp, a.passOn(ctx, err, v1.Admin_TransferLeadership_FullMethodName, req, resp)
	}
	a.audit(ctx, "an operator transferred the leadership", "to", req.GetId())
	return new(v1.TransferLeadershipResponse), nil
}

// Leave implements v1.AdminServer. It is never passed on.
func (a *adminService) Leave(ctx context.Context, req *v1.LeaveRequest) (*v1.LeaveResponse, error) {
	if err := a.authorize(ctx); err != nil {
		return nil, err
	}
	list, err := a.s.cluster.Servers(ctx)
	if err != nil {
		return nil, err
	}
	if id := req.GetId(); id != "" && id != list.Self {
		return nil, &InvalidArgumentError{Field: "id", Detail: "is not that of the node that was asked, which is " + list.Self}
	}
	a.audit(ctx, "an operator asks this node to leave the cluster", "id", list.Self)
	if err := a.s.admin.Leave(ctx); err != nil {
		return nil, err
	}
	return &v1.LeaveResponse{Id: list.Self}, nil
}

// passOn takes a call that failed here with cause to the leader, if that is
// what it takes and if it is the first hop.
func (a *adminService) passOn(ctx context.Context, cause error, method string, req, resp any) error {
	var notLeader *NotLeaderError
	if !errors.As(cause, &notLeader) || notLeader.LeaderAddress == "" || a.s.forward == nil {
		return cause
	}
	if len(metadata.ValueFromIncomingContext(ctx, forwardedKey)) > 0 {
		return cause
	}
	ctx = metadata.AppendToOutgoingContext(ctx, forwardedKey, "1")
	if subject := subjectOf(ctx); subject != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, subjectKey, subject)
	}
	sent, err := a.s.forward.call(ctx, notLeader.LeaderAddress, method, req, resp)
	if err != nil && sent && !isOurs(err) && method != v1.Admin_ListPeers_FullMethodName {
		return &UnknownChangeError{Cause: leaderError(err, notLeader.LeaderAddress)}
	}
	return leaderError(err, notLeader.LeaderAddress)
}

// voters counts them after a change that is made: not knowing it is no reason
// to call that failed.
func (a *adminService) voters(ctx context.Context) *uint32 {
	list, err := a.s.cluster.Servers(ctx)
	if err != nil {
		a.s.logger.Warn("cannot tell how many voters there are now", "error", err)
		return nil
	}
	var n uint32
	for _, s := range list.Servers {
		if s.Voter {
			n++
		}
	}
	return &n
}
