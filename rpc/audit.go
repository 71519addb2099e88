package rpc

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// AuditEvent is a call of the service Admin that is over.
type AuditEvent struct {
	// Verb is what the command line calls it: "remove-peer".
	Verb string
	// Target is the id of the node that it was about; empty for none, and for
	// the node that was asked.
	Target string
	// Subject is who called; empty where nobody is known by name.
	Subject string
	// OnBehalfOf is for whom, where it was a node that passed the call on.
	OnBehalfOf string
	// Reason is that of the error which was answered: ReasonDenied and so on;
	// empty where there was none.
	Reason string
	// Err is that error.
	Err error
	// Took is how long the call took.
	Took time.Duration
}

// audited has the calls of the service Admin recorded, if somebody wants that.
func (s *Service) audited(admin v1.AdminServer) v1.AdminServer {
	if s.audit == nil {
		return admin
	}
	return &auditedAdmin{AdminServer: admin, record: s.audit}
}

type auditedAdmin struct {
	v1.AdminServer
	record func(context.Context, AuditEvent)
}

// errPanicked is what a call that never returned is recorded with.
var errPanicked = errors.New("the call panicked")

func audit[Req, Resp any](a *auditedAdmin, ctx context.Context, verb, target string, call func(context.Context, Req) (Resp, error), req Req) (resp Resp, err error) {
	err = a.during(ctx, verb, target, func() (err error) {
		resp, err = call(ctx, req)
		return err
	})
	return resp, err
}

// during records a call.
func (a *auditedAdmin) during(ctx context.Context, verb, target string, call func() error) error {
	e := AuditEvent{Verb: verb, Target: target, Err: errPanicked}
	caller, _ := CallerFrom(ctx)
	e.Subject = caller.Subject
	if subject := subjectOf(ctx); subject != e.Subject {
		e.OnBehalfOf = subject
	}
	begin := time.Now()
	defer func() {
		if e.Err != nil {
			_, e.Reason, _ = Explain(e.Err)
		}
		e.Took = time.Since(begin)
		a.record(ctx, e)
	}()
	e.Err = call()
	return e.Err
}

// ListPeers implements v1.AdminServer.
func (a *auditedAdmin) ListPeers(ctx context.Context, req *v1.ListPeersRequest) (*v1.ListPeersResponse, error) {
	return audit(a, ctx, "list-peers", "", a.AdminServer.ListPeers, req)
}

// AddPeer implements v1.AdminServer.
func (a *auditedAdmin) AddPeer(ctx context.Context, req *v1.AddPeerRequest) (*v1.AddPeerResponse, error) {
	return audit(a, ctx, "add-peer", req.GetId(), a.AdminServer.AddPeer, req)
}

// RemovePeer implements v1.AdminServer.
func (a *auditedAdmin) RemovePeer(ctx context.Context, req *v1.RemovePeerRequest) (*v1.RemovePeerResponse, error) {
	return audit(a, ctx, "remove-peer", req.GetId(), a.AdminServer.RemovePeer, req)
}

// TransferLeadership implements v1.AdminServer.
func (a *auditedAdmin) TransferLeadership(ctx context.Context, req *v1.TransferLeadershipRequest) (*v1.TransferLeadershipResponse, error) {
	return audit(a, ctx, "transfer-leadership", req.GetId(), a.AdminServer.TransferLeadership, req)
}

// Leave implements v1.AdminServer.
func (a *auditedAdmin) Leave(ctx context.Context, req *v1.LeaveRequest) (*v1.LeaveResponse, error) {
	return audit(a, ctx, "leave", req.GetId(), a.AdminServer.Leave, req)
}

// Snapshot implements v1.AdminServer.
func (a *auditedAdmin) Snapshot(req *v1.SnapshotRequest, stream grpc.ServerStreamingServer[v1.SnapshotResponse]) error {
	return a.during(stream.Context(), "snapshot-save", "", func() error { return a.AdminServer.Snapshot(req, stream) })
}
