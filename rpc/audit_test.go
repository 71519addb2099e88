package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// auditLog collects events.
type auditLog struct {
	mu     sync.Mutex
	events []string
}

func (l *auditLog) record(_ context.Context, e AuditEvent) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, strings.TrimSpace(fmt.Sprintf("%s %s for=%s %s", e.Verb, e.Target, e.OnBehalfOf, e.Reason)))
	if (e.Reason == "") != (e.Err == nil) || e.Took < 0 {
		l.events = append(l.events, fmt.Sprintf("and oddly %+v", e))
	}
}

func (l *auditLog) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	got := l.events
	l.events = nil
	return got
}

// TestAudit calls all that the service Admin has.
func TestAudit(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, nil)
	var log auditLog
	denied := false
	s := serve(t, Config{
		Log: c["a"], Cluster: c["a"], Admin: c["a"], Peer: c["a"], Audit: log.record,
		Authorize: func(context.Context, Action, string) error {
			if denied {
				return &DeniedError{Subject: "mallory", Object: "default", Action: "admin"}
			}
			return nil
		},
	}, false)
	admin := v1.NewAdminClient(s.conn)
	ctx := testContext(t)
	all := func() (errs []error) {
		_, e1 := admin.ListPeers(ctx, &v1.ListPeersRequest{Stale: true})
		_, e2 := admin.AddPeer(ctx, &v1.AddPeerRequest{Id: "d", Address: "d:1"})
		_, e3 := admin.RemovePeer(ctx, &v1.RemovePeerRequest{Id: "d"})
		_, e4 := admin.TransferLeadership(ctx, &v1.TransferLeadershipRequest{Id: "b"})
		_, e5 := admin.Leave(ctx, &v1.LeaveRequest{Id: "a"})
		c["a"].saved = newBytesSnapshot(1)
		saved, e6 := admin.Snapshot(ctx, &v1.SnapshotRequest{Stale: true})
		for e6 == nil {
			_, e6 = saved.Recv()
		}
		if errors.Is(e6, io.EOF) {
			e6 = nil
		}
		return []error{e1, e2, e3, e4, e5, e6}
	}
	want := []string{"list-peers  for=", "add-peer d for=", "remove-peer d for=", "transfer-leadership b for=", "leave a for=", "snapshot-save  for="}
	if n := len(v1.Admin_ServiceDesc.Methods) + len(v1.Admin_ServiceDesc.Streams); n != len(want) {
		t.Fatalf("the service has %d methods; are all audited?", n)
	}
	for _, err := range all() {
		if err != nil {
			t.Error(err)
		}
	}
	if got := log.take(); !slices.Equal(got, want) {
		t.Errorf("recorded %q, want %q", got, want)
	}
	denied = true
	for _, err := range all() {
		wantStatus(t, err, codes.PermissionDenied, ReasonDenied)
	}
	for i := range want {
		want[i] += " " + ReasonDenied
	}
	if got := log.take(); !slices.Equal(got, want) {
		t.Errorf("recorded %q, want %q", got, want)
	}
}

// panickingAdmin panics where an operator's call comes to.
type panickingAdmin struct{ Admin }

func (panickingAdmin) RemovePeer(context.Context, string) error { panic("for the test") }

func TestAuditOfAPanic(t *testing.T) {
	_, c := newCluster(t, []string{"a"}, nil)
	var log auditLog
	s := serve(t, Config{Log: c["a"], Cluster: c["a"], Admin: panickingAdmin{c["a"]}, Peer: c["a"], Audit: log.record}, false)
	_, err := v1.NewAdminClient(s.conn).RemovePeer(testContext(t), &v1.RemovePeerRequest{Id: "d"})
	wantStatus(t, err, codes.Internal, ReasonInternal)
	if got := log.take(); !slices.Equal(got, []string{"remove-peer d for= " + ReasonInternal}) {
		t.Errorf("recorded %q", got)
	}
}
