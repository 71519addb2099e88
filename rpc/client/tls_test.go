package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/diurnalog/diurna/agent/peer"
	"github.com/diurnalog/diurna/agent/peer/peertest"
	"github.com/diurnalog/diurna/rpc"
	"github.com/diurnalog/diurna/rpc/client/clienttest"
)

// secured is a node of cluster c behind a port with TLS, and a client's files.
type secured struct {
	*clienttest.Server
	ca    *peertest.CA
	files TLSFiles
}

func startTLS(t *testing.T, node func(*peertest.CA) tls.Certificate) *secured {
	t.Helper()
	s := &secured{Server: clienttest.New(), ca: peertest.NewCA(t, "cluster CA")}
	if node == nil {
		node = func(ca *peertest.CA) tls.Certificate { return ca.Server(t, "c", "a") }
	}
	cfg := peertest.PortTLS(s.ca, "c", node(s.ca))
	s.StartTLS(t, cfg)
	dir := t.TempDir()
	s.files.CAFile = peertest.WriteCA(t, dir, s.ca)
	s.files.CertFile, s.files.KeyFile = peertest.WritePair(t, dir, "client", s.ca.Client(t, "c", "alice"))
	return s
}

func dialTLS(t *testing.T, addr string, opts ...Option) *Client {
	t.Helper()
	c, err := Dial(addr, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c
}

func TestTLS(t *testing.T) {
	s := startTLS(t, nil)
	c := dialTLS(t, s.Addr(), WithTLS(s.files))
	ctx := testContext(t)
	if _, err := c.Produce(ctx, values("a")); err != nil {
		t.Fatal(err)
	}
	r, err := c.Consume(ctx, ConsumeOptions{Start: Earliest()})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if !r.Next() || string(r.Record().Value) != "a" {
		t.Errorf("%v", r.Err())
	}
	// By a name that the certificate has, though it is not dialled by it.
	files := s.files
	files.ServerName = peertest.ServerRole("c")
	if _, err := dialTLS(t, s.Addr(), WithTLS(files)).Servers(ctx); err != nil {
		t.Error(err)
	}
}

// TestTLSFailures: who refused whom, and why.
func TestTLSFailures(t *testing.T) {
	dir := t.TempDir()
	other := peertest.NewCA(t, "another CA")
	pair := func(t *testing.T, f *TLSFiles, cert tls.Certificate) {
		f.CertFile, f.KeyFile = peertest.WritePair(t, t.TempDir(), "x", cert)
	}
	for name, tc := range map[string]struct {
		node  func(*peertest.CA) tls.Certificate
		files func(*testing.T, *secured)
		cause string
		want  string
	}{
		"untrusted": {nil, func(_ *testing.T, s *secured) { s.files.CAFile = peertest.WriteCA(t, dir, other) }, CauseUntrusted,
			"the node's certificate is not trusted: it is not signed by a CA that this client knows: x509: certificate signed by unknown authority"},
		"no CA": {nil, func(_ *testing.T, s *secured) { s.files.CAFile = "" }, CauseUntrusted, "not signed by a CA that this client knows"},
		"self-signed": {func(*peertest.CA) tls.Certificate { return peertest.SelfSigned.Server(t, "c", "a") }, nil, CauseUntrusted,
			"not signed by a CA that this client knows"},
		"wrong name": {nil, func(_ *testing.T, s *secured) { s.files.ServerName = "db1" }, CauseWrongName,
			"the node's certificate is for another name: x509: certificate is valid for server.c.diurna, localhost, not db1"},
		"expired": {func(ca *peertest.CA) tls.Certificate { return ca.Server(t, "c", "a", peertest.Expired) }, nil, CauseNotValid,
			"the node's certificate is not valid: x509: certificate has expired"},
		"not yet valid": {func(ca *peertest.CA) tls.Certificate { return ca.Server(t, "c", "a", peertest.NotYetValid) }, nil, CauseNotValid,
			"is before"},
		"not a server's": {func(ca *peertest.CA) tls.Certificate {
			return ca.Server(t, "c", "a", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] })
		}, nil, CauseNotValid, "incompatible key usage"},
		"refused, expired": {nil, func(t *testing.T, s *secured) { pair(t, &s.files, s.ca.Client(t, "c", "alice", peertest.Expired)) }, CauseRefused,
			"the node refused this client's certificate: remote error: tls: expired certificate"},
		"refused, untrusted": {nil, func(t *testing.T, s *secured) { pair(t, &s.files, other.Client(t, "c", "alice")) }, CauseRefused,
			"remote error: tls: unknown certificate authority"},
		"refused, self-signed": {nil, func(t *testing.T, s *secured) { pair(t, &s.files, peertest.SelfSigned.Client(t, "c", "alice")) }, CauseRefused,
			"the node refused this client's certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			s := startTLS(t, tc.node)
			if tc.files != nil {
				tc.files(t, s)
			}
			// An hour to try again in, which would be of no use.
			c := dialTLS(t, s.Addr(), WithTLS(s.files), WithRetry(time.Hour))
			for call, try := range map[string]func() error{
				"Produce": func() error { _, err := c.Produce(testContext(t), values("a")); return err },
				"Servers": func() error { _, err := c.Servers(testContext(t)); return err },
			} {
				err := try()
				e, ok := errors.AsType[*Error](err)
				if !ok || e.Reason != ReasonTLSFailed || e.Metadata["cause"] != tc.cause || !e.Definite || e.Code != codes.Unavailable || e.Addr != s.Addr() || e.Advice == "" {
					t.Fatalf("%s: %#v", call, err)
				}
				if !strings.Contains(e.Message, "no secure connection to "+s.Addr()+": ") || !strings.Contains(e.Message, tc.want) {
					t.Errorf("%s: %s", call, e.Message)
				}
			}
		})
	}

	t.Run("required", func(t *testing.T) {
		ca := peertest.NewCA(t, "CA")
		cfg := peertest.PortTLS(ca, "c", ca.Server(t, "c", "a"))
		cfg.ClientAuth = tls.RequireAndVerifyClientCert
		s := clienttest.New().StartTLS(t, cfg)
		_, err := dialTLS(t, s.Addr(), WithTLS(TLSFiles{CAFile: peertest.WriteCA(t, t.TempDir(), ca)})).Servers(testContext(t))
		if e, ok := errors.AsType[*Error](err); !ok || e.Metadata["cause"] != CauseRequired {
			t.Errorf("%#v", err)
		}
	})
	t.Run("the node speaks TLS", func(t *testing.T) {
		s := startTLS(t, nil)
		_, err := dialTLS(t, s.Addr()).Servers(testContext(t))
		e, ok := errors.AsType[*Error](err)
		if !ok || e.Reason != ReasonTLSFailed || e.Metadata["cause"] != CauseTLS || !strings.Contains(e.Message, "the node speaks TLS, this client plaintext") {
			t.Errorf("%#v", err)
		}
	})
	t.Run("the node speaks plaintext", func(t *testing.T) {
		s := startTLS(t, nil)
		plain := clienttest.New().StartTCP(t) // gRPC's own server, which speaks first
		_, err := dialTLS(t, plain.Addr(), WithTLS(s.files)).Servers(testContext(t))
		e, ok := errors.AsType[*Error](err)
		if !ok || e.Reason != ReasonTLSFailed || e.Metadata["cause"] != CausePlaintext || !strings.Contains(e.Message, "the node speaks plaintext, this client TLS") {
			t.Errorf("%#v", err)
		}
		port := clienttest.New().StartTLS(t, nil) // a node's, which just closes
		_, err = dialTLS(t, port.Addr(), WithTLS(s.files), WithRetry(0)).Servers(testContext(t))
		e, ok = errors.AsType[*Error](err)
		if !ok || e.Reason != ReasonUnreachable || !strings.Contains(e.Message, "perhaps because the node speaks plaintext") {
			t.Errorf("%#v", err)
		}
	})
	t.Run("not gRPC", func(t *testing.T) {
		ca := peertest.NewCA(t, "CA")
		l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{ca.Server(t, "c", "a")}})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_ = c.(*tls.Conn).Handshake()
				c.Close()
			}
		}()
		defer func() { l.Close(); <-done }()
		_, err = dialTLS(t, l.Addr().String(), WithTLS(TLSFiles{CAFile: peertest.WriteCA(t, t.TempDir(), ca)})).Servers(testContext(t))
		if e, ok := errors.AsType[*Error](err); !ok || e.Reason != ReasonTLSFailed || !strings.Contains(e.Message, "speaks TLS, but not gRPC") {
			t.Errorf("%#v", err)
		}
	})
}

// TestTLSFilesAreChecked: Dial says which file is wrong, and a connection does
// once they have changed.
func TestTLSFilesAreChecked(t *testing.T) {
	s := startTLS(t, nil)
	junk := filepath.Join(t.TempDir(), "junk.pem")
	if err := os.WriteFile(junk, []byte("secret, not PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	good := s.files
	for name, tc := range map[string]struct {
		files TLSFiles
		want  string
	}{
		"no CA file":   {TLSFiles{CAFile: "/nowhere/ca.pem"}, "/nowhere/ca.pem"},
		"no PEM in it": {TLSFiles{CAFile: junk}, junk + " holds no certificate"},
		"half a pair":  {TLSFiles{CertFile: good.CertFile}, "the key to the client certificate " + good.CertFile + " is missing"},
		"other half":   {TLSFiles{KeyFile: good.KeyFile}, "the client certificate to the key " + good.KeyFile + " is missing"},
		"no cert file": {TLSFiles{CertFile: "/nowhere/c.pem", KeyFile: good.KeyFile}, "/nowhere/c.pem"},
		"no key file":  {TLSFiles{CertFile: good.CertFile, KeyFile: "/nowhere/k.pem"}, "/nowhere/k.pem"},
		"no key in it": {TLSFiles{CertFile: good.CertFile, KeyFile: junk}, junk + " are of no use"},
	} {
		_, err := Dial(s.Addr(), WithTLS(tc.files))
		if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestTLSFilesChange: each connection reads the files anew, those that are open
// go on.
func TestTLSFilesChange(t *testing.T) {
	before, after := peertest.NewCA(t, "before"), peertest.NewCA(t, "after")
	var ca atomic.Pointer[peertest.CA]
	ca.Store(before)
	s := clienttest.New().StartTLS(t, &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return peertest.PortTLS(ca.Load(), "c", ca.Load().Server(t, "c", "a")), nil
	}})
	dir := t.TempDir()
	write := func(ca *peertest.CA) (f TLSFiles) {
		f.CAFile = peertest.WriteCA(t, dir, ca)
		f.CertFile, f.KeyFile = peertest.WritePair(t, dir, "client", ca.Client(t, "c", "alice"))
		return f
	}
	files := write(before)
	var conns atomic.Pointer[net.Conn]
	c := dialTLS(t, s.Addr(), WithTLS(files), WithDialer(recordDials(&conns)))
	ctx := testContext(t)
	ask := func() error { _, err := c.Servers(ctx); return err }
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	first := conns.Load()
	ca.Store(after)
	if err := ask(); err != nil || conns.Load() != first {
		t.Fatalf("the open connection does not go on: %v", err)
	}
	eventually := func(reason string) {
		t.Helper()
		for {
			err := ask()
			e, ok := errors.AsType[*Error](err)
			if reason == "" && err == nil || ok && e.Reason == reason {
				return
			}
			if ctx.Err() != nil {
				t.Fatalf("never %q, but %v", reason, err)
			}
			time.Sleep(10 * time.Millisecond) // for gRPC to connect again
		}
	}
	_ = (*first).Close()
	eventually(ReasonTLSFailed)
	write(after)
	eventually("")
	if err := os.WriteFile(files.KeyFile, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_ = (*conns.Load()).Close()
	eventually(ReasonTLSFailed)
	e, _ := errors.AsType[*Error](ask())
	if e == nil || e.Metadata["cause"] != CauseFiles || !strings.Contains(e.Message, files.KeyFile) {
		t.Errorf("%#v", e)
	}
	write(after)
	eventually("")
	if why := c.endpoints[0].dialErr.Load(); why != nil {
		t.Errorf("remembers %v", *why)
	}
}

// TestStaleDialError: why an earlier connection failed does not explain how the
// next one did.
func TestStaleDialError(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	defer func() { l.Close(); <-done }()
	c := dialTLS(t, l.Addr().String(), WithRetry(0))
	stale := errors.New("stale")
	c.endpoints[0].dialErr.Store(&stale)
	_, err = c.Servers(testContext(t))
	if e, ok := errors.AsType[*Error](err); !ok || e.Reason != ReasonUnreachable || strings.Contains(e.Message, "stale") {
		t.Error(err)
	}
}

// TestCertificateRequired: the server's own refusal is definite, and not tried
// again.
func TestCertificateRequired(t *testing.T) {
	ca := peertest.NewCA(t, "CA")
	svc, err := rpc.New(rpc.Config{
		Log: &memoryLog{grown: make(chan struct{})}, Cluster: oneNode{},
		Caller: func(tls.ConnectionState) rpc.Caller { return rpc.Caller{Subject: "alice"} },
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := peer.NewPort(l, peer.PortConfig{TLS: peertest.PortTLS(ca, "c", ca.Server(t, "c", "a")), Self: func() (string, string) { return "a", "c1" }})
	served := make(chan error, 1)
	go func() { served <- svc.Serve(port.Clients()) }()
	defer func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_ = svc.Shutdown(ctx) // hard, so it says that ctx ended
		if err := errors.Join(<-served, port.Close()); err != nil {
			t.Error(err)
		}
	}()
	files := TLSFiles{CAFile: peertest.WriteCA(t, t.TempDir(), ca)}
	nobody := dialTLS(t, l.Addr().String(), WithTLS(files))
	_, err = nobody.Produce(testContext(t), values("a"))
	if e, ok := errors.AsType[*Error](err); !ok || e.Reason != ReasonNoCertificate || e.Code != codes.Unauthenticated || !e.Definite || e.Retryable() || e.Advice == "" {
		t.Errorf("%#v", err)
	}
	p, err := nobody.NewProducer(testContext(t), ProducerOptions{})
	if err == nil {
		_ = p.Append(testContext(t), values("a")[0]) // Close tells
		var outcome Outcome
		if outcome, err = p.Close(testContext(t)); outcome.NotAppended != 1 {
			t.Errorf("%+v", outcome)
		}
	}
	if e, ok := errors.AsType[*Error](err); !ok || e.Reason != ReasonNoCertificate {
		t.Errorf("%#v", err)
	}
	if serving, _, err := nobody.Health(testContext(t)); !serving || err != nil {
		t.Errorf("%v, %v", serving, err)
	}
	files.CertFile, files.KeyFile = peertest.WritePair(t, t.TempDir(), "me", ca.Client(t, "c", "alice"))
	if _, err := dialTLS(t, l.Addr().String(), WithTLS(files)).Produce(testContext(t), values("a")); err != nil {
		t.Error(err)
	}
}

// TestTLSElsewhere: one node's trouble with its certificate sends the client on
// to the next.
func TestTLSElsewhere(t *testing.T) {
	s := startTLS(t, nil)
	bad := clienttest.New().StartTLS(t, peertest.PortTLS(s.ca, "c", s.ca.Server(t, "c", "b", peertest.Expired)))
	c := dialTLS(t, bad.Addr()+","+s.Addr(), WithTLS(s.files))
	if _, err := c.Produce(testContext(t), values("a")); err != nil {
		t.Error(err)
	}
	if c.Addr() != s.Addr() {
		t.Errorf("talks to %s", c.Addr())
	}
	c = dialTLS(t, bad.Addr()+","+s.Addr(), WithTLS(s.files))
	if err := c.TransferLeadership(testContext(t), ""); err != nil {
		t.Error(err)
	}
}

// recordDials dials TCP and keeps the last connection.
func recordDials(last *atomic.Pointer[net.Conn]) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, addr string) (net.Conn, error) {
		conn, err := dialTCP(ctx, addr)
		if err == nil {
			last.Store(&conn)
		}
		return conn, err
	}
}
