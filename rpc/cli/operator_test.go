package cli

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/diurnalog/diurna/rpc/client"
	"github.com/diurnalog/diurna/rpc/client/clienttest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func TestOperator(t *testing.T) {
	const uuid = "3d33da75-9e0d-4612-8163-382cf16e54f2"
	for _, tc := range []struct {
		args   string
		fail   error // of everything but list
		calls  string
		code   int
		stdout string
		stderr string
	}{
		{args: "add-peer -peer-id " + uuid + " -peer-address h:1", calls: "add " + uuid + " h:1", stdout: "Added " + uuid + " at h:1. It becomes a voter when it has caught up. Now: 2 voters; the cluster stands still if one fails.\n"},
		{args: "remove-peer -peer-id id-c", calls: "list, remove id-c", stdout: "Removed id-c at 10.0.0.3:8400. Left: 2 voters; the cluster stands still if one fails.\n"},
		{args: "remove-peer -peer-id second", calls: "list, remove id-b", stdout: "Removed second (id-b) at 10.0.0.2:8400. Left: 2 voters; the cluster stands still if one fails.\n"},
		{args: "remove-peer -peer-address 10.0.0.2:8400", calls: "list, remove id-b", stdout: "Removed second (id-b) at 10.0.0.2:8400. Left: 2 voters; the cluster stands still if one fails.\n"},
		{args: "remove-peer -peer-id id-c -json", calls: "list, remove id-c", stdout: `"voters": 2`},
		{args: "remove-peer -peer-id nobody", calls: "list", code: 2, stderr: "there is no server \"nobody\" in the cluster. `diurna operator raft list-peers` lists those there are."},
		{args: "remove-peer -peer-id id-c", fail: clienttest.Failure(codes.FailedPrecondition, "WOULD_LOSE_QUORUM", "the quorum would be lost", "Bring servers back."), calls: "list, remove id-c", code: 2, stderr: "Error: the quorum would be lost (WOULD_LOSE_QUORUM). Bring servers back."},
		{args: "remove-peer -peer-id id-c", fail: clienttest.Failure(codes.Unavailable, "NOT_LEADER", "not the leader", "Elsewhere.", "leader_address", "b:1"), calls: "list, remove id-c", code: 2, stderr: "ask the leader with -addr b:1."},
		{args: "transfer-leadership -peer-id first", calls: "list", stdout: "first (id-a) leads already.\n"},
		{args: "transfer-leadership -peer-id nobody", calls: "list", code: 2, stderr: "there is no server"},
		{args: "transfer-leadership", fail: clienttest.Failure(codes.FailedPrecondition, "NOT_A_VOTER", "not a voter", "Wait."), calls: "list, transfer", code: 2, stderr: "not a voter (NOT_A_VOTER). Wait."},
	} {
		t.Run(tc.args, func(t *testing.T) {
			s := clienttest.New()
			s.Nodes = nodes()
			s.OnAdmin = func(call string) error {
				if strings.HasPrefix(call, "list") {
					return nil
				}
				return tc.fail
			}
			s.Start(t)
			sh := newShell(s, nil)
			if code := sh.run(append([]string{"operator", "raft"}, strings.Fields(tc.args)...)...); code != tc.code {
				t.Errorf("exit %d: %s", code, sh.err.String())
			}
			if got := strings.Join(s.AdminCalls(), ", "); got != tc.calls {
				t.Errorf("asked to %s, want %s", got, tc.calls)
			}
			contains(t, "stdout", sh.out.String(), tc.stdout)
			contains(t, "stderr", sh.err.String(), tc.stderr)
		})
	}
}

func TestTransferLeadership(t *testing.T) {
	for _, args := range [][]string{nil, {"-peer-id", "id-b"}} {
		s := clienttest.New()
		s.Nodes = nodes()
		asked := 0
		s.OnAdmin = func(call string) error {
			switch {
			case strings.HasPrefix(call, "transfer"):
				asked++
				none := nodes()
				none.Servers[0].Leader = false
				s.SetNodes(none)
			case asked == 1: // not known yet
				asked++
				return clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", "")
			case asked == 2:
				next := nodes()
				next.Servers[0].Leader, next.Servers[1].Leader = false, true
				s.SetNodes(next)
			}
			return nil
		}
		s.Start(t)
		sh := newShell(s, nil)
		if code := sh.run(append([]string{"operator", "raft", "transfer-leadership"}, args...)...); code != 0 {
			t.Errorf("exit %d: %s", code, sh.err.String())
		}
		if got := sh.out.String(); got != "second (id-b) leads now, at 10.0.0.2:8400.\n" {
			t.Errorf("got %s", got)
		}
	}
}

func TestListPeers(t *testing.T) {
	s := clienttest.New()
	s.Nodes = nodes()
	s.Nodes.Servers[1].Healthy = new(bool)
	s.Nodes.Servers[1].State = "leaving"
	leaderless := false
	s.OnAdmin = func(call string) error {
		if leaderless && call == "list" {
			return clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", "Wait.")
		}
		return nil
	}
	s.Start(t)
	sh := newShell(s, nil)
	if code := sh.run("operator", "raft", "list-peers"); code != 0 {
		t.Fatalf("exit %d: %s", code, sh.err.String())
	}
	want := "" +
		"NAME    ID    ADDRESS        STATE     VOTER  HEALTH              LAST CONTACT  APPLIED\n" +
		"first   id-a  10.0.0.1:8400  leader    yes    -                   -             -\n" +
		"second  id-b  10.0.0.2:8400  follower  yes    unhealthy, leaving  12ms          99\n" +
		"-       id-c  10.0.0.3:8400  follower  no     -                   -             -\n"
	if got := sh.out.String(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	leaderless = true
	sh = newShell(s, nil)
	if code := sh.run("operator", "raft", "list-peers"); code != ExitServer {
		t.Errorf("without a leader: exit %d", code)
	}
	contains(t, "stderr", sh.err.String(), "(NO_LEADER)", "With -stale")
	sh = newShell(s, nil)
	if code := sh.run("operator", "raft", "list-peers", "-stale", "-json"); code != 0 {
		t.Errorf("-stale: exit %d", code)
	}
	var out client.ServersJSON
	if err := json.Unmarshal([]byte(sh.out.String()), &out); err != nil || len(out.Servers) != 3 || *out.Servers[1].Healthy {
		t.Errorf("-json: %v, %s", err, sh.out.String())
	}
}

func TestLeave(t *testing.T) {
	s := clienttest.New().StartTCP(t)
	sh := newShell(nil, nil)
	if code := sh.run("leave", "-addr", s.Addr(), "-id", "a"); code != 0 {
		t.Errorf("exit %d: %s", code, sh.err.String())
	}
	if got, want := sh.out.String(), "a at "+s.Addr()+" has left the cluster and stops.\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := strings.Join(s.AdminCalls(), ", "); got != "leave a" {
		t.Errorf("asked to %s", got)
	}
}

// TestServersOfAll: what the node that is asked does not know comes from the
// others, as far as they can be reached.
func TestServersOfAll(t *testing.T) {
	since := time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)
	asked := nodes() // id-b
	leader := nodes()
	leader.AnsweredBy = "id-a"
	a := leader.Servers[0]
	a.AppliedIndex, a.FirstOffset, a.HighWatermark, a.Build = 100, 5, 43, "abc"
	leader.Servers[1].Healthy, leader.Servers[1].StableSince = ptr(true), timestamppb.New(since)
	leader.Servers[2].Healthy, leader.Servers[2].LastContact = new(bool), durationpb.New(9*time.Second)
	impostor := nodes() // at the third one's address
	impostor.AnsweredBy = "id-z"
	impostor.Servers = append(impostor.Servers, &v1.Server{Id: "id-z", Version: "9"})

	at := map[string]*clienttest.Server{}
	for address, answer := range map[string]*v1.GetServersResponse{"10.0.0.1:8400": leader, "10.0.0.2:8400": asked, "10.0.0.3:8400": impostor} {
		s := clienttest.New()
		s.Nodes = answer
		at[address] = s.Start(t)
	}
	sh := newShell(nil, nil)
	sh.DialOptions = []client.Option{client.WithDialer(func(ctx context.Context, address string) (net.Conn, error) {
		if s := at[address]; s != nil {
			return s.Dialer()(ctx, address)
		}
		return nil, errors.New("nobody there")
	})}
	// The first address is wrong: the next one is tried.
	if code := sh.run("servers", "-addr", "10.0.0.9", "-addr", "10.0.0.2"); code != 0 {
		t.Fatalf("exit %d: %s", code, sh.err.String())
	}
	want := "" +
		"NAME    ID      ADDRESS        ROLE      LEADER  HEALTH     TERM  LAST CONTACT  APPLIED  FIRST  NEXT  VERSION\n" +
		"first   id-a    10.0.0.1:8400  voter     yes     -          7     -             100      5      43    1.0\n" +
		"second  id-b *  10.0.0.2:8400  voter     no      healthy    7     12ms          99       5      42    -\n" +
		"-       id-c    10.0.0.3:8400  nonvoter  no      unhealthy  -     9s            -        -      -     -\n"
	if got := sh.out.String(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	sh.out = buffer{}
	if code := sh.run("servers", "-addr", "10.0.0.2", "-local"); code != 0 || strings.Contains(sh.out.String(), "healthy") {
		t.Errorf("-local: exit %d, %s", code, sh.out.String())
	}
}

func ptr[T any](v T) *T { return &v }
