package rpc

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/diurnalog/diurna/agent/peer"
	"github.com/diurnalog/diurna/agent/peer/peertest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// callerOf is what package agent will have from the certificates.
func callerOf(state tls.ConnectionState) Caller {
	uri := state.PeerCertificates[0].URIs[0]
	id, server := strings.CutPrefix(uri.Path, "/server/")
	c := Caller{Subject: uri.String(), Server: server}
	if server {
		c.NodeID = id
	}
	return c
}

// servePort serves cfg behind a port with TLS, of node id of cluster c.
func servePort(t *testing.T, ca *peertest.CA, id string, cfg Config) (address string, svc *Service) {
	t.Helper()
	if cfg.Cluster == nil {
		cfg.Cluster = memCluster{}
	}
	if cfg.Caller == nil {
		cfg.Caller = callerOf
	}
	svc, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := peer.NewPort(l, peer.PortConfig{
		Self: func() (string, string) { return id, "c1" },
		TLS:  peertest.PortTLS(ca, "c", ca.Server(t, "c", id)),
	})
	served := make(chan error, 1)
	go func() { served <- svc.Serve(port.Clients()) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := svc.Shutdown(ctx); err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		if err := port.Close(); err != nil {
			t.Errorf("close the port: %v", err)
		}
	})
	return l.Addr().String(), svc
}

func dialAs(t *testing.T, ca *peertest.CA, address string, cert ...tls.Certificate) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(DialTLS(func() *tls.Config {
		return peertest.DialTLS(ca, "c", cert...)
	})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Errorf("close connection: %v", err)
		}
	})
	return conn
}

// callAll makes one call of every method that a node offers.
func callAll(ctx context.Context, conn *grpc.ClientConn) map[string]error {
	log, admin, node := v1.NewLogClient(conn), v1.NewAdminClient(conn), v1.NewPeerClient(conn)
	records := []*v1.Record{{}}
	got := map[string]error{}
	_, got["Log/Produce"] = log.Produce(ctx, &v1.ProduceRequest{Records: records})
	_, got["Log/Consume"] = log.Consume(ctx, &v1.ConsumeRequest{})
	_, got["Log/GetServers"] = log.GetServers(ctx, &v1.GetServersRequest{})
	_, got["Admin/ListPeers"] = admin.ListPeers(ctx, &v1.ListPeersRequest{})
	_, got["Admin/AddPeer"] = admin.AddPeer(ctx, &v1.AddPeerRequest{Id: "b", Address: "b:1"})
	_, got["Admin/RemovePeer"] = admin.RemovePeer(ctx, &v1.RemovePeerRequest{Id: "b"})
	_, got["Admin/TransferLeadership"] = admin.TransferLeadership(ctx, &v1.TransferLeadershipRequest{})
	_, got["Admin/Leave"] = admin.Leave(ctx, &v1.LeaveRequest{})
	_, got["Peer/Status"] = node.Status(ctx, &v1.StatusRequest{})
	_, got["Peer/ReadIndex"] = node.ReadIndex(ctx, &v1.ReadIndexRequest{})
	_, got["Health/Check"] = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if s, err := log.ConsumeStream(ctx, &v1.ConsumeRequest{}); err == nil {
		_, got["Log/ConsumeStream"] = s.Recv()
	}
	if s, err := log.ProduceStream(ctx); err == nil {
		_ = s.Send(&v1.ProduceRequest{Records: records})
		_ = s.Send(&v1.ProduceRequest{Log: "default", Records: records})
		_ = s.Send(&v1.ProduceRequest{Records: records})
		for range 3 {
			if _, got["Log/ProduceStream"] = s.Recv(); got["Log/ProduceStream"] != nil {
				break
			}
		}
	}
	if s, err := admin.Snapshot(ctx, &v1.SnapshotRequest{Stale: true}); err == nil {
		_, got["Admin/Snapshot"] = s.Recv()
	}
	if s, err := node.Propose(ctx); err == nil {
		_ = s.Send(&v1.ProposeRequest{Records: records})
		_, got["Peer/Propose"] = s.Recv()
	}
	if s, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{}); err == nil {
		_, got["Health/Watch"] = s.Recv()
	}
	if s, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx); err == nil {
		_ = s.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
		_, got["Reflection"] = s.Recv()
	}
	return got
}

// asked is an Authorize that notes what it was asked, and denies all but what is
// allowed.
type asked struct {
	mu    sync.Mutex
	calls []string
	allow map[Action]bool
}

func (a *asked) authorize(ctx context.Context, action Action, log string) error {
	caller, ok := CallerFrom(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls = append(a.calls, string(action)+" "+log)
	if !ok || !a.allow[action] {
		return &DeniedError{Subject: caller.Subject, Object: log, Action: string(action)}
	}
	return nil
}

func (a *asked) took() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	calls := a.calls
	a.calls = nil
	return calls
}

// TestCallers makes every call as everybody.
func TestCallers(t *testing.T) {
	ca := peertest.NewCA(t, "CA")
	_, c := newCluster(t, []string{"a"}, nil)
	a := &asked{allow: map[Action]bool{}}
	address, svc := servePort(t, ca, "a", Config{Log: c["a"], Cluster: c["a"], Admin: c["a"], Peer: c["a"], Authorize: a.authorize})
	methods := 0
	for name, info := range svc.grpc.GetServiceInfo() {
		if !strings.HasPrefix(name, "grpc.reflection") && !strings.HasPrefix(name, "grpc.health") {
			methods += len(info.Methods)
		}
	}
	ctx := testContext(t)
	// denied is who is denied a call, and by which action; "": nobody is.
	for name, tc := range map[string]struct {
		cert   []tls.Certificate
		allow  []Action
		denied func(method string) (code codes.Code, reason, action string)
	}{
		"nobody": {nil, []Action{ActionProduce, ActionConsume, ActionAdmin, ActionPeer}, func(string) (codes.Code, string, string) {
			return codes.Unauthenticated, ReasonNoCertificate, ""
		}},
		"a client that may do nothing": {[]tls.Certificate{ca.Client(t, "c", "alice")}, nil, func(method string) (codes.Code, string, string) {
			action := map[string]Action{"Log/Produce": ActionProduce, "Log/ProduceStream": ActionProduce, "Reflection": ""}
			for _, m := range []string{"Log/Consume", "Log/ConsumeStream", "Log/GetServers"} {
				action[m] = ActionConsume
			}
			for _, m := range []string{"Peer/Status", "Peer/ReadIndex", "Peer/Propose"} {
				action[m] = ActionPeer
			}
			if a, ok := action[method]; ok {
				if a == "" {
					return codes.OK, "", ""
				}
				return codes.PermissionDenied, ReasonDenied, string(a)
			}
			return codes.PermissionDenied, ReasonDenied, string(ActionAdmin)
		}},
		"a client that may do everything": {[]tls.Certificate{ca.Client(t, "c", "root")}, []Action{ActionProduce, ActionConsume, ActionAdmin, ActionPeer}, func(method string) (codes.Code, string, string) {
			if strings.HasPrefix(method, "Peer/") {
				return codes.PermissionDenied, ReasonDenied, string(ActionPeer)
			}
			return codes.OK, "", ""
		}},
		"a node": {[]tls.Certificate{ca.Server(t, "c", "n-b")}, nil, func(string) (codes.Code, string, string) { return codes.OK, "", "" }},
	} {
		t.Run(name, func(t *testing.T) {
			a.allow = map[Action]bool{}
			for _, action := range tc.allow {
				a.allow[action] = true
			}
			before, calls := c["a"].proposals(), len(c["a"].calls())
			c["a"].saved = newBytesSnapshot(1)
			got := callAll(ctx, dialAs(t, ca, address, tc.cert...))
			if len(got) != methods+3 { // and what is foreign
				t.Errorf("made %d calls, the node offers %d", len(got)-3, methods)
			}
			for method, err := range got {
				code, reason, action := tc.denied(method)
				if strings.HasPrefix(method, "Health/") {
					code = codes.OK
				}
				if status.Code(err) != code {
					t.Errorf("%s: %v, want %v", method, err, code)
				} else if code != codes.OK {
					if meta := wantStatus(t, err, code, reason); meta["action"] != action {
						t.Errorf("%s: %v, want action %s", method, meta, action)
					}
				}
			}
			if name == "nobody" || name == "a client that may do nothing" {
				if c["a"].proposals() != before || len(c["a"].calls()) != calls {
					t.Error("something was done without permission")
				}
			}
			if said := a.took(); (len(said) == 0) != (name == "nobody" || name == "a node") {
				t.Errorf("asked %v", said)
			}
		})
	}

	// How often permission is asked for each call.
	conn := dialAs(t, ca, address, ca.Client(t, "c", "bob"))
	log := v1.NewLogClient(conn)
	a.allow = map[Action]bool{ActionAdmin: true}
	if _, err := log.GetServers(ctx, &v1.GetServersRequest{}); err != nil {
		t.Error(err)
	}
	if got := strings.Join(a.took(), ", "); got != "consume default, produce default, admin default" {
		t.Errorf("GetServers asked %s", got)
	}
	a.allow = map[Action]bool{ActionProduce: true}
	stream, err := log.ProduceStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "default", "", "default"} {
		if err := stream.Send(&v1.ProduceRequest{Log: name, Records: []*v1.Record{{}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.Send(&v1.ProduceRequest{Log: "other", Records: []*v1.Record{{}}}); err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	if meta := wantStatus(t, err, codes.NotFound, ReasonLogNotFound); meta[MetaRequest] != "4" {
		t.Errorf("%v", meta)
	}
	if got := strings.Join(a.took(), ", "); got != "produce default, produce other" {
		t.Errorf("a stream asked %s", got)
	}
	_, err = log.Consume(ctx, &v1.ConsumeRequest{})
	wantStatus(t, err, codes.PermissionDenied, ReasonDenied)
	if got := strings.Join(a.took(), ", "); got != "consume default" {
		t.Errorf("Consume asked %s", got)
	}
}

// TestCallerOncePerConnection: not once per call.
func TestCallerOncePerConnection(t *testing.T) {
	ca := peertest.NewCA(t, "CA")
	var mu sync.Mutex
	asked := 0
	address, _ := servePort(t, ca, "a", Config{Log: newMemLog(), Caller: func(state tls.ConnectionState) Caller {
		mu.Lock()
		defer mu.Unlock()
		asked++
		return callerOf(state)
	}})
	for _, cert := range [][]tls.Certificate{{ca.Client(t, "c", "alice")}, nil} {
		conn := dialAs(t, ca, address, cert...)
		for range 20 {
			if _, err := v1.NewLogClient(conn).GetServers(testContext(t), &v1.GetServersRequest{}); (err == nil) != (cert != nil) {
				t.Fatal(err)
			}
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if asked != 1 {
		t.Errorf("asked %d times about one certificate", asked)
	}
}

// TestCallerTakesTLS: a listener without TLS serves nobody where callers are to
// be known, and a caller whose certificate nobody has verified is nobody.
func TestCallerTakesTLS(t *testing.T) {
	f := serve(t, Config{Log: newMemLog(), Caller: callerOf}, false)
	if _, err := f.client.GetServers(testContext(t), &v1.GetServersRequest{}); status.Code(err) != codes.Unavailable {
		t.Error(err)
	}
	state := tls.ConnectionState{HandshakeComplete: true, PeerCertificates: peertestLeaf(t)}
	_, info, err := acceptedTLS{who: callerOf}.ServerHandshake(&stated{state: state})
	if err != nil || info.(*acceptedInfo).verified {
		t.Errorf("%+v, %v", info, err)
	}
	if _, _, err := (acceptedTLS{who: callerOf}).ServerHandshake(&stated{}); err == nil {
		t.Error("accepted before the handshake")
	}
}

// TestConnectionLimit: a connection that closes makes room, and the listener
// closes while one waits for it.
func TestConnectionLimit(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	limited := newTrackingListener(l, 1, new(connTracker))
	accepted := make(chan net.Conn)
	failed := make(chan error)
	go func() {
		for {
			c, err := limited.Accept()
			if err != nil {
				failed <- err
				return
			}
			accepted <- c
		}
	}()
	for range 2 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	first := <-accepted
	select {
	case <-accepted:
		t.Error("accepted two at a time")
	default:
	}
	first.Close()
	first.Close()
	second := <-accepted
	defer second.Close()
	if err := limited.Close(); err != nil {
		t.Error(err)
	}
	if err := <-failed; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// syncBuffer collects a log.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestForwardingOverTLS: a node takes what it is given to the leader in its own
// name, tells for whom, and whom to trust may change while it does.
func TestForwardingOverTLS(t *testing.T) {
	before, after := peertest.NewCA(t, "before"), peertest.NewCA(t, "after")
	var (
		mu        sync.Mutex
		addresses = map[string]string{}
		ca        = before
		dialled   int
		logs      syncBuffer
	)
	_, c := newCluster(t, []string{"a", "b"}, func(m *member, cfg *ForwarderConfig) {
		cfg.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			mu.Lock()
			address = addresses[address]
			dialled++
			mu.Unlock()
			var d net.Dialer
			return d.DialContext(ctx, "tcp", address)
		}
		cfg.Credentials = DialTLS(func() *tls.Config {
			mu.Lock()
			defer mu.Unlock()
			return peertest.DialTLS(ca, "c", ca.Server(t, "c", m.id))
		})
	})
	clients := map[string]*grpc.ClientConn{}
	for id, m := range c {
		address, _ := servePort(t, before, id, Config{
			Log: m, Cluster: m, Admin: m, Peer: m, Forward: m.forward,
			Logger: hclog.New(&hclog.LoggerOptions{Output: &logs, Name: id}),
			Authorize: func(ctx context.Context, action Action, log string) error {
				if caller, _ := CallerFrom(ctx); caller.Subject == "spiffe://c.diurna/client/alice" {
					return nil
				}
				return &DeniedError{Action: string(action)}
			},
		})
		mu.Lock()
		addresses[m.address] = address
		mu.Unlock()
		clients[id] = dialAs(t, before, address, before.Client(t, "c", "alice"))
	}
	ctx := testContext(t)
	produce := func() {
		t.Helper()
		if _, err := v1.NewLogClient(clients["b"]).Produce(ctx, &v1.ProduceRequest{Records: []*v1.Record{{}}}); err != nil {
			t.Fatal(err)
		}
	}
	produce()
	if _, err := v1.NewAdminClient(clients["b"]).RemovePeer(ctx, &v1.RemovePeerRequest{Id: "x"}); err != nil {
		t.Fatal(err)
	}
	if got := logs.String(); !strings.Contains(got, "a: an operator removed a server: id=x by=spiffe://c.diurna/client/alice") {
		t.Errorf("logged %s", got)
	}
	// Nobody but a node is believed that it speaks for another.
	lying := metadata.AppendToOutgoingContext(ctx, forwardedKey, "1", subjectKey, "spiffe://c.diurna/client/bob")
	if _, err := v1.NewAdminClient(clients["a"]).RemovePeer(lying, &v1.RemovePeerRequest{Id: "y"}); err != nil {
		t.Fatal(err)
	}
	if got := logs.String(); !strings.Contains(got, "id=y by=spiffe://c.diurna/client/alice") || strings.Contains(got, "bob") {
		t.Errorf("logged %s", got)
	}
	st, err := c["b"].forward.Status(ctx, "a:1")
	if err != nil || st.NodeID != "a" {
		t.Errorf("%+v, %v", st, err)
	}

	// The open connection goes on, a new one uses what holds now.
	mu.Lock()
	ca = after
	connections := dialled
	mu.Unlock()
	produce()
	mu.Lock()
	if dialled != connections {
		t.Errorf("dialled %d times more", dialled-connections)
	}
	addresses["c:1"] = addresses["a:1"]
	mu.Unlock()
	if _, err := c["b"].forward.Status(ctx, "c:1"); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("a new connection with another CA: %v", err)
	}
}

// stated is a connection that says what its TLS found out.
type stated struct {
	net.Conn
	state tls.ConnectionState
}

func (s *stated) ConnectionState() tls.ConnectionState { return s.state }

func peertestLeaf(t *testing.T) []*x509.Certificate {
	return []*x509.Certificate{peertest.SelfSigned.Server(t, "c", "n-a").Leaf}
}
