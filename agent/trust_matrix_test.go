package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/agent/peer"
	"github.com/diurnalog/diurna/agent/peer/peertest"
	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/rpc/client"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// startTrusted runs a node with certificates from files, and with a policy if
// there is one.
func startTrusted(t *testing.T, ca *peertest.CA, policy string, change ...func(*x509.Certificate)) *testAgent {
	t.Helper()
	change = append(change, func(c *x509.Certificate) { c.URIs = nil }) // nobody knew its id
	dir := t.TempDir()
	cfg := testConfig(t, filepath.Join(dir, "data"))
	cfg.Cluster.Name = "c"
	cfg.Telemetry.PProf = true
	cfg.TLS.Source = config.TLSFiles
	cfg.TLS.CAFile = peertest.WriteCA(t, dir, ca)
	cfg.TLS.CertFile, cfg.TLS.KeyFile = peertest.WritePair(t, dir, "node", ca.Server(t, "c", "any", change...))
	if policy != "" {
		cfg.ACL.Enabled, cfg.ACL.PolicyFile = true, filepath.Join(dir, "policy.csv")
		if err := os.WriteFile(cfg.ACL.PolicyFile, []byte(policy), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return startReady(t, cfg, Options{})
}

// What a node answers to somebody with a certificate.
const (
	admitted = "served"  // as if nothing were
	refused  = "refused" // in the handshake
	denied   = "denied"  // DENIED
	unknown  = "unknown" // CERTIFICATE_REQUIRED
)

// TestTrustMatrix: every kind of certificate × gRPC, the nodes' own gRPC, Raft and
// HTTP.
func TestTrustMatrix(t *testing.T) {
	ca, other := peertest.NewCA(t, "ours"), peertest.NewCA(t, "another")
	a := startTrusted(t, ca, "")
	wildcard := func(c *x509.Certificate) { c.DNSNames = []string{"*.c.diurna"} }
	noClient := func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }
	type answers struct{ grpc, peer, raft, http string }
	all := func(s string) answers { return answers{s, s, s, s} }
	for name, tc := range map[string]struct {
		cert []tls.Certificate
		want answers
	}{
		"absent":                      {nil, answers{unknown, unknown, refused, unknown}},
		"client":                      {certs(ca.Client(t, "c", "alice")), answers{admitted, denied, refused, admitted}},
		"node":                        {certs(ca.Server(t, "c", "n-1")), all(admitted)},
		"node without an id":          {certs(ca.Server(t, "c", "n-1", func(c *x509.Certificate) { c.URIs = nil })), all(admitted)},
		"node that greets as another": {certs(ca.Server(t, "c", "n-2")), answers{admitted, admitted, denied, admitted}},
		"expired":                     {certs(ca.Server(t, "c", "n-1", peertest.Expired)), all(refused)},
		"expired client":              {certs(ca.Client(t, "c", "alice", peertest.Expired)), all(refused)},
		"not yet valid":               {certs(ca.Server(t, "c", "n-1", peertest.NotYetValid)), all(refused)},
		"of another CA":               {certs(other.Server(t, "c", "n-1")), all(refused)},
		"client of another CA":        {certs(other.Client(t, "c", "alice")), all(refused)},
		"self-signed":                 {certs(peertest.SelfSigned.Server(t, "c", "n-1")), all(refused)},
		"node of another cluster":     {certs(ca.Server(t, "d", "n-1")), answers{admitted, denied, refused, admitted}},
		"wildcard":                    {certs(ca.Server(t, "c", "n-1", wildcard)), answers{admitted, denied, refused, admitted}},
		"not for clients":             {certs(ca.Server(t, "c", "n-1", noClient)), all(refused)},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := peertest.DialTLS(ca, "c", tc.cert...)
			if len(tc.cert) > 0 {
				// Whatever CAs the node asks for.
				cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tc.cert[0], nil }
			}
			got := answers{
				grpc: callAs(t, a.Address(), cfg, func(ctx context.Context, c *grpc.ClientConn) error {
					_, err := v1.NewLogClient(c).Produce(ctx, &v1.ProduceRequest{Records: []*v1.Record{{}}})
					return err
				}),
				peer: callAs(t, a.Address(), cfg, func(ctx context.Context, c *grpc.ClientConn) error {
					_, err := v1.NewPeerClient(c).Status(ctx, &v1.StatusRequest{})
					return err
				}),
				raft: raftAs(t, a, cfg),
				http: httpAs(t, a, cfg, "/v1/status"),
			}
			if got != tc.want {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
			// Who checks whether a node is there need not be anybody.
			if len(tc.cert) == 0 {
				if got := httpAs(t, a, cfg, "/v1/health/ready"); got != admitted {
					t.Errorf("/v1/health/ready: %s", got)
				}
				if got := callAs(t, a.Address(), cfg, func(ctx context.Context, c *grpc.ClientConn) error {
					_, err := healthpb.NewHealthClient(c).Check(ctx, &healthpb.HealthCheckRequest{})
					return err
				}); got != admitted {
					t.Errorf("health: %s", got)
				}
			}
		})
	}
}

func certs(c tls.Certificate) []tls.Certificate { return []tls.Certificate{c} }

// callAs makes a gRPC call with a connection of its own.
func callAs(t *testing.T, addr string, cfg *tls.Config, call func(context.Context, *grpc.ClientConn) error) string {
	t.Helper()
	c, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return verdictOf(call(within(t), c))
}

func verdictOf(err error) string {
	switch code := status.Code(err); {
	case code == codes.PermissionDenied:
		return denied
	case code == codes.Unauthenticated:
		return unknown
	case code == codes.Unavailable && (strings.Contains(err.Error(), "tls: ") || strings.Contains(err.Error(), "error reading server preface")):
		return refused
	case err == nil || code == codes.InvalidArgument || code == codes.NotFound || code == codes.FailedPrecondition || errors.Is(err, io.EOF):
		return admitted // as far as permission goes
	default:
		return err.Error()
	}
}

// raftAs opens a stream of Raft as node n-1.
func raftAs(t *testing.T, a *testAgent, cfg *tls.Config) string {
	t.Helper()
	d := peer.Dialer{
		Self: func() (string, string) { return "n-1", a.data.identity().cluster },
		TLS:  func(string) *tls.Config { return cfg.Clone() },
	}
	conn, err := d.Dial(within(t), a.NodeID(), a.Address())
	var refusal *peer.RefusedError
	switch {
	case err == nil:
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		return admitted
	case errors.As(err, &refusal) && strings.Contains(refusal.Text, "does not accept this node's certificate"):
		return refused
	case errors.As(err, &refusal) && refusal.Reason == peer.ReasonCertificate:
		return denied
	default:
		return err.Error()
	}
}

func httpAs(t *testing.T, a *testAgent, cfg *tls.Config, path string) string {
	t.Helper()
	hc := &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}, Timeout: patience}
	resp, err := hc.Get((&url.URL{Scheme: "https", Host: a.http.Addr(), Path: path, RawQuery: "seconds=1000"}).String())
	var failed *net.OpError
	if err != nil {
		if errors.As(err, &failed) || strings.Contains(err.Error(), "tls: ") {
			return refused
		}
		return err.Error()
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK, http.StatusBadRequest: // a profile for so long, but who asks is not the reason
		return admitted
	case http.StatusUnauthorized:
		return unknown
	case http.StatusForbidden:
		return denied
	}
	return resp.Status
}

// everyCall is every RPC of a node's, and every path of its HTTP endpoint.
var everyCall = map[string]func(context.Context, *grpc.ClientConn) error{
	v1.Log_Produce_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := v1.NewLogClient(c).Produce(ctx, &v1.ProduceRequest{Records: []*v1.Record{{}}})
		return err
	},
	v1.Log_ProduceStream_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		s, err := v1.NewLogClient(c).ProduceStream(ctx)
		if err != nil {
			return err
		}
		if err := s.Send(&v1.ProduceRequest{Records: []*v1.Record{{}}}); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		_, err = s.Recv()
		return err
	},
	v1.Log_Consume_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := v1.NewLogClient(c).Consume(ctx, &v1.ConsumeRequest{})
		return err
	},
	v1.Log_ConsumeStream_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		s, err := v1.NewLogClient(c).ConsumeStream(ctx, &v1.ConsumeRequest{})
		if err != nil {
			return err
		}
		_, err = s.Recv()
		return err
	},
	v1.Log_GetServers_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := v1.NewLogClient(c).GetServers(ctx, &v1.GetServersRequest{})
		return err
	},
	v1.Admin_ListPeers_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := v1.NewAdminClient(c).ListPeers(ctx, &v1.ListPeersRequest{})
		return err
	},
	v1.Admin_AddPeer_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := v1.NewAdminClient(c).AddPeer(ctx, &v1.AddPeerRequest{Id: " "})
		return err
	},
	v1.Admin_RemovePeer_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := v1.NewAdminClient(c).RemovePeer(ctx, &v1.RemovePeerRequest{Id: "nobody"})
		return err
	},
	v1.Admin_TransferLeadership_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := v1.NewAdminClient(c).TransferLeadership(ctx, &v1.TransferLeadershipRequest{Id: "nobody"})
		return err
	},
	v1.Admin_Leave_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := v1.NewAdminClient(c).Leave(ctx, &v1.LeaveRequest{Id: "nobody"})
		return err
	},
	v1.Admin_Snapshot_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		s, err := v1.NewAdminClient(c).Snapshot(ctx, &v1.SnapshotRequest{})
		if err != nil {
			return err
		}
		_, err = s.Recv()
		return err
	},
	v1.Peer_Status_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := v1.NewPeerClient(c).Status(ctx, &v1.StatusRequest{})
		return err
	},
	v1.Peer_ReadIndex_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := v1.NewPeerClient(c).ReadIndex(ctx, &v1.ReadIndexRequest{})
		return err
	},
	v1.Peer_Propose_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		s, err := v1.NewPeerClient(c).Propose(ctx)
		if err == nil {
			err = s.CloseSend()
		}
		if err != nil {
			return err
		}
		_, err = s.Recv()
		return err
	},
	healthpb.Health_Check_FullMethodName: func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := healthpb.NewHealthClient(c).Check(ctx, &healthpb.HealthCheckRequest{})
		return err
	},
}

// TestTrustPolicies: every kind of subject × every RPC and every HTTP path.
func TestTrustPolicies(t *testing.T) {
	ca := peertest.NewCA(t, "ours")
	a := startTrusted(t, ca, `
p, spiffe://c.diurna/client/producer, default, produce
p, spiffe://c.diurna/client/consumer, default, consume
p, spiffe://c.diurna/client/watcher, *, monitor
p, spiffe://c.diurna/client/other, another.log, *
p, role:operator, *, admin
g, spiffe://c.diurna/client/ops-*, role:operator
p, spiffe://c.diurna/client/fallen, *, *
p, spiffe://c.diurna/client/fallen, *, *, deny
`)
	// Who may produce may ask who the nodes are, and has not asked to consume.
	if got := callAs(t, a.Address(), peertest.DialTLS(ca, "c", ca.Client(t, "c", "producer")), everyCall[v1.Log_GetServers_FullMethodName]); got != admitted {
		t.Error(got)
	}
	for _, d := range a.security.policy.Stats().Decisions {
		if d.Denied > 0 || d.Allowed > 0 && d.Action != "produce" {
			t.Errorf("counted %+v", d)
		}
	}
	const open = "/grpc.health.v1.Health/"
	log, admin := "/"+v1.Log_ServiceDesc.ServiceName+"/", "/"+v1.Admin_ServiceDesc.ServiceName+"/"
	subjects := map[string]struct {
		cert tls.Certificate
		may  func(method string) bool
		http bool
	}{
		"producer": {ca.Client(t, "c", "producer"), func(m string) bool {
			return strings.HasPrefix(m, log+"Produce") || m == log+"GetServers"
		}, false},
		"consumer": {ca.Client(t, "c", "consumer"), func(m string) bool {
			return strings.HasPrefix(m, log+"Consume") || m == log+"GetServers"
		}, false},
		"watcher":  {ca.Client(t, "c", "watcher"), func(string) bool { return false }, true},
		"other":    {ca.Client(t, "c", "other"), func(string) bool { return false }, false},
		"operator": {ca.Client(t, "c", "ops-1"), func(m string) bool { return strings.HasPrefix(m, admin) || m == log+"GetServers" }, true},
		"fallen":   {ca.Client(t, "c", "fallen"), func(string) bool { return false }, false},
		"nobody":   {ca.Client(t, "c", "mallory"), func(string) bool { return false }, false},
		"node":     {ca.Server(t, "c", "n-1"), func(string) bool { return true }, true},
	}
	for name, s := range subjects {
		t.Run(name, func(t *testing.T) {
			cfg := peertest.DialTLS(ca, "c", s.cert)
			for method, call := range everyCall {
				want := denied
				if s.may(method) || strings.HasPrefix(method, open) {
					want = admitted
				}
				if got := callAs(t, a.Address(), cfg.Clone(), call); got != want {
					t.Errorf("%s: %s, want %s", method, got, want)
				}
			}
			for _, path := range a.http.paths() {
				want := denied
				switch {
				case strings.HasPrefix(path, "/v1/health/"), s.http && !strings.HasPrefix(path, "/debug/"):
					want = admitted
				case s.http && (s.may(v1.Admin_Leave_FullMethodName)):
					want = admitted // profiles are for those who may do as they like
				}
				if got := httpAs(t, a, cfg.Clone(), path); got != want {
					t.Errorf("%s: %s, want %s", path, got, want)
				}
			}
		})
	}
	if paths := a.http.paths(); !slices.Contains(paths, profilePrefix+"heap") || !slices.Contains(paths, "/v1/metrics") {
		t.Errorf("not all paths were tried: %q", paths)
	}
	// Nothing that the node serves is missing above.
	known := 0
	for service, info := range a.rpc.Services() {
		for _, m := range info.Methods {
			method := fmt.Sprintf("/%s/%s", service, m.Name)
			switch {
			case everyCall[method] != nil:
				known++
			case strings.HasPrefix(service, "grpc.reflection.") || strings.HasPrefix(method, open):
				// Reflection tells what the source does; to whoever has a certificate.
			default:
				t.Errorf("%s is not tried", method)
			}
		}
	}
	if known != len(everyCall) {
		t.Errorf("%d of %d calls are of this node", known, len(everyCall))
	}
	if got := callAs(t, a.Address(), peertest.DialTLS(ca, "c"), func(ctx context.Context, c *grpc.ClientConn) error {
		s, err := grpc_reflection_v1.NewServerReflectionClient(c).ServerReflectionInfo(ctx)
		if err == nil {
			_, err = s.Recv()
		}
		return err
	}); got != unknown {
		t.Errorf("reflection without a certificate: %s", got)
	}
	// Denials are told, and what operators do is written down.
	a.log.mustAwait(t, "spiffe://c.diurna/client/mallory")
	a.log.mustAwait(t, `"@module":"audit"`)

}

// TestTrustExpiry: a certificate that nobody renews shows long before it hurts.
func TestTrustExpiry(t *testing.T) {
	ca := peertest.NewCA(t, "ours")
	end := time.Now().Add(time.Hour).Truncate(time.Second)
	a := startTrusted(t, ca, "", func(c *x509.Certificate) { c.NotBefore, c.NotAfter = end.Add(-10*time.Hour), end })
	if serving, st, why := a.part.health(); !serving || st != discovery.Warning || !strings.Contains(why, "certificate expires in ") {
		t.Errorf("health: %v, %v, %q", serving, st, why)
	}
	dir := t.TempDir()
	certFile, keyFile := peertest.WritePair(t, dir, "alice", ca.Client(t, "c", "alice"))
	trusts.Store(a.Address(), client.TLSFiles{CAFile: peertest.WriteCA(t, dir, ca), CertFile: certFile, KeyFile: keyFile})
	list, err := dial(t, a.Address()).Servers(t.Context())
	if err != nil || len(list.Servers) != 1 || !list.Servers[0].CertificateExpires.Equal(end) {
		t.Errorf("%+v, %v", list, err)
	}
	said, err := a.part.Status(t.Context())
	if err != nil || !said.CertificateExpires.Equal(end) {
		t.Errorf("%+v, %v", said, err)
	}
}
