package rpc

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func TestAdmin(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b", "c"}, nil)
	ctx := testContext(t)
	for _, at := range []string{"a", "b"} {
		admin := v1.NewAdminClient(c[at].conn)
		c["a"].asked = nil
		added, err := admin.AddPeer(ctx, &v1.AddPeerRequest{Id: "d", Address: "d:1"})
		if err != nil || added.GetVoters() != 3 {
			t.Errorf("AddPeer at %s: %v, %v", at, added, err)
		}
		removed, err := admin.RemovePeer(ctx, &v1.RemovePeerRequest{Id: "d"})
		if err != nil || removed.GetVoters() != 3 {
			t.Errorf("RemovePeer at %s: %v, %v", at, removed, err)
		}
		for _, id := range []string{"", "c"} {
			if _, err := admin.TransferLeadership(ctx, &v1.TransferLeadershipRequest{Id: id}); err != nil {
				t.Errorf("TransferLeadership at %s: %v", at, err)
			}
		}
		if got := strings.Join(c["a"].calls(), ", "); got != "add d d:1, remove d, transfer , transfer c" {
			t.Errorf("at %s, the leader was asked to %s", at, got)
		}
		list, err := admin.ListPeers(ctx, &v1.ListPeersRequest{})
		if err != nil || list.GetAnsweredBy() != "a" || len(list.GetServers()) != 3 {
			t.Errorf("ListPeers at %s: %v, %v", at, list, err)
		}
		list, err = admin.ListPeers(ctx, &v1.ListPeersRequest{Stale: true})
		if err != nil || list.GetAnsweredBy() != at {
			t.Errorf("ListPeers, stale, at %s: %v, %v", at, list, err)
		}
		left, err := admin.Leave(ctx, &v1.LeaveRequest{Id: at})
		if err != nil || left.GetId() != at || !slices.Contains(c[at].calls(), "leave") {
			t.Errorf("Leave at %s: %v, %v", at, left, err)
		}
	}
	if calls := c["b"].calls(); !slices.Equal(calls, []string{"leave"}) {
		t.Errorf("the follower did %v", calls)
	}
	_, err := v1.NewAdminClient(c["c"].conn).Leave(ctx, &v1.LeaveRequest{Id: "b"})
	wantStatus(t, err, codes.InvalidArgument, ReasonInvalidArgument)
	if calls := c["c"].calls(); len(calls) > 0 {
		t.Errorf("the wrong node left: %v", calls)
	}

	// Nobody leads: only what is stale is told.
	c["b"].setLeader("")
	admin := v1.NewAdminClient(c["b"].conn)
	_, err = admin.ListPeers(ctx, &v1.ListPeersRequest{})
	wantStatus(t, err, codes.Unavailable, ReasonNoLeader)
	_, err = admin.RemovePeer(ctx, &v1.RemovePeerRequest{Id: "c"})
	wantStatus(t, err, codes.Unavailable, ReasonNoLeader)
	if _, err = admin.ListPeers(ctx, &v1.ListPeersRequest{Stale: true}); err != nil {
		t.Error(err)
	}
}

// TestAdminDeposed: who takes itself for the leader and no longer is does not
// answer for the cluster.
func TestAdminDeposed(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, nil)
	log := &linearizeFails{member: c["a"]}
	f := serve(t, Config{Log: log, Cluster: c["a"], Admin: c["a"], Peer: c["a"]}, false)
	_, err := v1.NewAdminClient(f.conn).ListPeers(testContext(t), &v1.ListPeersRequest{})
	wantStatus(t, err, codes.Unavailable, ReasonNoLeader)
}

type linearizeFails struct{ *member }

func (linearizeFails) Linearize(context.Context) error { return ErrNoLeader }

func TestAdminErrors(t *testing.T) {
	for _, tc := range []struct {
		err    error
		code   codes.Code
		reason string
	}{
		{&QuorumError{Voters: 2, Healthy: 1}, codes.FailedPrecondition, ReasonWouldLoseQuorum},
		{&UnknownServerError{ID: "d"}, codes.NotFound, ReasonUnknownServer},
		{&NotVoterError{ID: "d"}, codes.FailedPrecondition, ReasonNotAVoter},
		{ErrUnknownOutcome, codes.Unknown, ReasonUnknownOutcome},
		{errors.New("bug"), codes.Internal, ReasonInternal},
	} {
		_, c := newCluster(t, []string{"a", "b"}, nil)
		c["a"].adminErr = tc.err
		for _, at := range []string{"a", "b"} {
			_, err := v1.NewAdminClient(c[at].conn).RemovePeer(testContext(t), &v1.RemovePeerRequest{Id: "d"})
			wantStatus(t, err, tc.code, tc.reason)
		}
	}
}

// TestAdminBroken: a change that was passed on and not answered is in doubt; a
// question is not, nor is what never was passed on.
func TestAdminBroken(t *testing.T) {
	net, c := newCluster(t, []string{"a", "b"}, nil)
	ctx := testContext(t)
	begun, release := make(chan struct{}), make(chan struct{})
	defer close(release)
	slow := &slowAdmin{member: c["a"], begun: begun, release: release}
	f := serve(t, Config{Log: c["a"], Cluster: c["a"], Admin: slow, Peer: c["a"]}, false)
	net.mu.Lock()
	net.nodes["a:1"] = f.listener
	net.mu.Unlock()

	admin := v1.NewAdminClient(c["b"].conn)
	got := make(chan error, 1)
	go func() {
		_, err := admin.RemovePeer(ctx, &v1.RemovePeerRequest{Id: "d"})
		got <- err
	}()
	<-begun
	net.cut("a:1")
	wantStatus(t, <-got, codes.Unknown, ReasonUnknownOutcome)
	_, err := admin.RemovePeer(ctx, &v1.RemovePeerRequest{Id: "d"})
	wantStatus(t, err, codes.Unavailable, ReasonNoLeader)
	_, err = admin.ListPeers(ctx, &v1.ListPeersRequest{})
	wantStatus(t, err, codes.Unavailable, ReasonNoLeader)
}

type slowAdmin struct {
	*member
	begun, release chan struct{}
}

func (s *slowAdmin) RemovePeer(context.Context, string) error {
	close(s.begun)
	<-s.release
	return nil
}

func TestAdminInput(t *testing.T) {
	_, c := newCluster(t, []string{"a"}, nil)
	ctx := testContext(t)
	admin := v1.NewAdminClient(c["a"].conn)
	const uuid = "3d33da75-9e0d-4612-8163-382cf16e54f2"
	for _, tc := range []struct {
		id, address, field string // the field that is wrong; empty: none
	}{
		{uuid, "10.0.0.1:8400", ""},
		{uuid, "[::1]:8400", ""},
		{uuid, "node-1.example:1", ""},
		{strings.Repeat("a", 128), "h:65535", ""},
		{"", "h:1", "id"},
		{strings.Repeat("a", 129), "h:1", "id"},
		{"a b", "h:1", "id"},
		{"a\n", "h:1", "id"},
		{"ä", "h:1", "id"},
		{uuid, "", "address"},
		{uuid, "h", "address"},
		{uuid, ":1", "address"},
		{uuid, "h:", "address"},
		{uuid, "h:0", "address"},
		{uuid, "h:65536", "address"},
		{uuid, "h:http", "address"},
		{uuid, "0.0.0.0:1", "address"},
		{uuid, "[::]:1", "address"},
		{uuid, "http://h:1", "address"},
		{uuid, "h h:1", "address"},
		{uuid, strings.Repeat("h", 300) + ":1", "address"},
	} {
		_, err := admin.AddPeer(ctx, &v1.AddPeerRequest{Id: tc.id, Address: tc.address})
		if tc.field == "" {
			if err != nil {
				t.Errorf("%q at %q: %v", tc.id, tc.address, err)
			}
			continue
		}
		if err == nil {
			t.Errorf("%q at %q is taken", tc.id, tc.address)
			continue
		}
		if meta := wantStatus(t, err, codes.InvalidArgument, ReasonInvalidArgument); meta["field"] != tc.field {
			t.Errorf("%q at %q: %v", tc.id, tc.address, err)
		}
	}
	_, err := admin.RemovePeer(ctx, &v1.RemovePeerRequest{})
	wantStatus(t, err, codes.InvalidArgument, ReasonInvalidArgument)
	_, err = admin.TransferLeadership(ctx, &v1.TransferLeadershipRequest{Id: "a b"})
	wantStatus(t, err, codes.InvalidArgument, ReasonInvalidArgument)
}

func TestAdminAndPeerAskPermission(t *testing.T) {
	_, c := newCluster(t, []string{"a"}, nil)
	var allowed Action
	f := serve(t, Config{Log: c["a"], Cluster: c["a"], Admin: c["a"], Peer: c["a"], Authorize: func(_ context.Context, action Action, log string) error {
		if action != allowed {
			return &DeniedError{Subject: "me", Object: log, Action: string(action)}
		}
		return nil
	}}, false)
	ctx := testContext(t)
	admin, peer := v1.NewAdminClient(f.conn), v1.NewPeerClient(f.conn)
	calls := map[Action][]func() error{
		ActionAdmin: {
			func() error { _, err := admin.ListPeers(ctx, &v1.ListPeersRequest{}); return err },
			func() error { _, err := admin.AddPeer(ctx, &v1.AddPeerRequest{Id: "b", Address: "b:1"}); return err },
			func() error { _, err := admin.RemovePeer(ctx, &v1.RemovePeerRequest{Id: "b"}); return err },
			func() error {
				_, err := admin.TransferLeadership(ctx, &v1.TransferLeadershipRequest{})
				return err
			},
			func() error { _, err := admin.Leave(ctx, &v1.LeaveRequest{}); return err },
		},
		ActionPeer: {
			func() error { _, err := peer.Status(ctx, &v1.StatusRequest{}); return err },
			func() error { _, err := peer.ReadIndex(ctx, &v1.ReadIndexRequest{}); return err },
			func() error {
				stream, err := peer.Propose(ctx)
				if err != nil {
					return err
				}
				// EOF: refused already, and Recv says how.
				if err := stream.Send(&v1.ProposeRequest{Records: []*v1.Record{{}}}); err != nil && err != io.EOF {
					return err
				}
				_, err = stream.Recv()
				return err
			},
		},
	}
	for action, list := range calls {
		for i, call := range list {
			allowed = ActionProduce
			if meta := wantStatus(t, call(), codes.PermissionDenied, ReasonDenied); meta["action"] != string(action) {
				t.Errorf("%s %d: denied with %v", action, i, meta)
			}
			allowed = action
			if err := call(); err != nil {
				t.Errorf("%s %d: %v", action, i, err)
			}
		}
	}
}
