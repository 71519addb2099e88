package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/rpc"
	"github.com/diurnalog/diurna/rpc/cli"
)

// httpFixture is an endpoint of a node that is made up.
type httpFixture struct {
	*httpServer
	ready  atomic.Bool
	broken atomic.Bool // Status and Servers fail
	client *http.Client
	scheme string
	log    *output
}

func serveHTTP(t *testing.T, change func(*httpConfig)) *httpFixture {
	t.Helper()
	f := &httpFixture{client: &http.Client{Transport: &http.Transport{}}, scheme: "http", log: newOutput()}
	f.ready.Store(true)
	cfg := httpConfig{
		Address: "127.0.0.1:0",
		Health: func() (bool, string) {
			if f.ready.Load() {
				return true, "leads in term 3"
			}
			return false, "knows no leader"
		},
		Status: func(context.Context) (rpc.NodeStatus, error) {
			if f.broken.Load() {
				return rpc.NodeStatus{}, rpc.ErrClosed
			}
			return rpc.NodeStatus{
				NodeID: "n1", Name: "one", Cluster: "orders", ClusterID: "c1", State: "member", Version: "1.2.3", Role: "follower", Term: 3,
				LastIndex: 12, LastTerm: 3, AppliedIndex: 11, LastContact: 20 * time.Millisecond, LeaderID: "n2", LeaderAddress: "b:1", FirstOffset: 4, NextOffset: 9,
			}, nil
		},
		Servers: func(context.Context) (rpc.ServerList, error) {
			if f.broken.Load() {
				return rpc.ServerList{}, rpc.ErrNoLeader
			}
			return rpc.ServerList{Self: "n1", Servers: []rpc.Server{
				{ID: "n1", Name: "one", Address: "a:1", Voter: true, LastContact: -1},
				{ID: "n2", Name: "two", Address: "b:1", Voter: true, Leader: true, HighWatermark: 9},
				{ID: "n3", Name: "three", Address: "c:1", LastContact: time.Second},
			}}, nil
		},
		Advertise: "a:1",
		Logger:    hclog.New(&hclog.LoggerOptions{Output: f.log, Level: hclog.Debug}),
	}
	if change != nil {
		change(&cfg)
	}
	if cfg.Metrics == nil {
		var err error
		if cfg.Metrics, err = newMetrics(metricSources{Status: cfg.Status, Ready: f.ready.Load, Certificate: cfg.Certificate}); err != nil {
			t.Fatal(err)
		}
	}
	if cfg.TLS != nil {
		f.scheme = "https"
	}
	var err error
	if f.httpServer, err = newHTTP(cfg); err != nil {
		t.Fatal(err)
	}
	f.Start(func(err error) { t.Error(err) })
	t.Cleanup(func() {
		f.client.CloseIdleConnections()
		if err := f.Shutdown(within(t)); err != nil {
			t.Error(err)
		}
	})
	return f
}

// answered is a response without its body, which is read and closed.
type answered struct {
	StatusCode int
	Proto      string
	Header     http.Header
}

func (f *httpFixture) do(t *testing.T, client *http.Client, method, path string, body io.Reader) (answered, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(within(t), method, f.scheme+"://"+f.Addr()+path, body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answered{resp.StatusCode, resp.Proto, resp.Header}, string(text)
}

func (f *httpFixture) get(t *testing.T, path string) (int, string) {
	t.Helper()
	resp, text := f.do(t, f.client, http.MethodGet, path, nil)
	return resp.StatusCode, text
}

// wantJSON fails unless an answer has these fields, and more perhaps.
func wantJSON(t *testing.T, text, want string) {
	t.Helper()
	var got, fields map[string]any
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatalf("%v: %q", err, text)
	}
	if err := json.Unmarshal([]byte(want), &fields); err != nil {
		t.Fatal(err)
	}
	for name, w := range fields {
		a, _ := json.Marshal(got[name])
		if b, _ := json.Marshal(w); !bytes.Equal(a, b) {
			t.Errorf("%s is %s, want %s", name, a, b)
		}
	}
}

func TestHTTP(t *testing.T) {
	until := time.Now().Add(time.Hour)
	f := serveHTTP(t, func(c *httpConfig) {
		c.Certificate = func() (certificateStatus, bool) {
			return certificateStatus{Source: "vault", Subject: "spiffe://orders.diurna/server/n1", Serial: "0a:1b", NotAfter: until, Renewals: 2}, true
		}
	})
	expect := func(path string, status int, want string) {
		t.Helper()
		got, text := f.get(t, path)
		if got != status {
			t.Errorf("%s: status %d, want %d: %s", path, got, status, text)
		}
		wantJSON(t, text, want)
	}
	expect("/v1/health/live", 200, `{"live":true}`)
	expect("/v1/health/ready", 200, `{"ready":true,"message":"leads in term 3"}`)
	expect("/v1/status", 200, `{"ready":true,"message":"leads in term 3","address":"a:1","id":"n1","name":"one","cluster":"orders","cluster_id":"c1","version":"1.2.3",
		"state":"member","role":"follower","term":3,"last_index":12,"last_term":3,"applied_index":11,"last_contact":"20ms",
		"leader":{"id":"n2","address":"b:1"},"first_offset":4,"high_watermark":9,"disk_full":false,"servers":3,"voters":2}`)
	_, text := f.get(t, "/v1/status")
	var status statusJSON
	if err := json.Unmarshal([]byte(text), &status); err != nil {
		t.Fatal(err)
	}
	if c := status.Certificate; c == nil || c.Source != "vault" || c.Subject != "spiffe://orders.diurna/server/n1" || c.Serial != "0a:1b" || c.Renewals != 2 ||
		!c.NotAfter.Equal(until) || c.ExpiresIn < 3000 || c.ExpiresIn > 3600 || c.VaultUp != nil {
		t.Errorf("the certificate is %+v", c)
	}
	expect("/v1/servers", 200, `{"answered_by":"n1","servers":[
		{"id":"n1","name":"one","address":"a:1","role":"voter","leader":false,"first_offset":0,"high_watermark":0},
		{"id":"n2","name":"two","address":"b:1","role":"voter","leader":true,"first_offset":0,"high_watermark":9},
		{"id":"n3","name":"three","address":"c:1","role":"nonvoter","leader":false,"last_contact":"1s"}]}`)
	if got, text := f.get(t, "/v1/metrics"); got != 200 || !strings.Contains(text, "\ndiurna_raft_term 3\n") || !strings.Contains(text, "\ngo_goroutines ") || !strings.Contains(text, "\nprocess_open_fds ") {
		t.Errorf("metrics: %d %s", got, text)
	}

	expect("/", 404, `{"reason":"NOT_FOUND"}`)
	expect("/v1/status/", 404, `{"reason":"NOT_FOUND"}`)
	expect("/v1/../v1/status", 404, `{"reason":"NOT_FOUND"}`)
	resp, text := f.do(t, f.client, http.MethodPost, "/v1/status", strings.NewReader("x"))
	if resp.StatusCode != 405 || resp.Header.Get("Allow") != "GET, HEAD" {
		t.Errorf("POST: %d %v", resp.StatusCode, resp.Header)
	}
	wantJSON(t, text, `{"reason":"METHOD_NOT_ALLOWED"}`)
	resp, text = f.do(t, f.client, http.MethodHead, "/v1/health/ready", nil)
	if resp.StatusCode != 200 || text != "" || resp.Header.Get("Content-Type") != "application/json" || resp.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("HEAD: %d %q %v", resp.StatusCode, text, resp.Header)
	}

	f.ready.Store(false)
	expect("/v1/health/live", 200, `{"live":true}`)
	expect("/v1/health/ready", 503, `{"ready":false,"reason":"NOT_READY","message":"knows no leader"}`)
	expect("/v1/status", 200, `{"ready":false,"message":"knows no leader"}`)

	// Errors have the reasons that gRPC has for them.
	f.broken.Store(true)
	expect("/v1/status", 503, `{"reason":"SHUTTING_DOWN","message":"log is closed","advice":"This server is going away. Go on with another one."}`)
	expect("/v1/servers", 503, `{"reason":"NO_LEADER","message":"no leader"}`)
	if got, text := f.get(t, "/v1/metrics"); got != 200 || !strings.Contains(text, "\ndiurna_ready 0\n") || strings.Contains(text, "diurna_raft") {
		t.Errorf("metrics: %d %s", got, text)
	}
	f.log.mustAwait(t, "metrics are incomplete")
}

// TestHTTPServersAreTheVerbs: /v1/servers and `diurna servers -json` say the
// same of a real node.
func TestHTTPServersAreTheVerbs(t *testing.T) {
	a := startReady(t, testConfig(t, t.TempDir()), Options{Version: "1.2.3"})
	f := serveHTTP(t, func(c *httpConfig) {
		c.Servers, c.Status = a.part.Servers, a.part.Status
	})
	canonical := func(text []byte) string {
		var v any
		if err := json.Unmarshal(text, &v); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	args := []string{"servers", "-addr", a.Address(), "-json", "-local"}
	for {
		_, before := f.get(t, "/v1/servers")
		var out, errs bytes.Buffer
		if code := (&cli.Meta{Stdout: &out, Stderr: &errs}).Run(args, nil); code != 0 {
			t.Fatalf("exit %d: %s", code, errs.String())
		}
		_, after := f.get(t, "/v1/servers")
		if before != after {
			continue // a new leader has some entries of its own to write
		}
		if x, y := canonical([]byte(after)), canonical(out.Bytes()); x != y {
			t.Errorf("HTTP says\n%s, the verb\n%s", x, y)
		}
		return
	}
}

// testCA makes certificates.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newTestCA(t *testing.T) *testCA {
	t.Helper()
	ca := &testCA{pool: x509.NewCertPool()}
	ca.cert, ca.key = ca.make(t, &x509.Certificate{Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	ca.pool.AddCert(ca.cert)
	return ca
}

func (ca *testCA) make(t *testing.T, c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := ca.cert, ca.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func (ca *testCA) server(t *testing.T) *tls.Config {
	cert, key := ca.make(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "n1"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	return &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}}, ClientCAs: ca.pool, MinVersion: tls.VersionTLS13,
		// As the gRPC port has it.
		NextProtos: []string{"h2", "diurna-raft/1"}, ClientAuth: tls.VerifyClientCertIfGiven,
	}
}

// client is one that trusts ca, with a certificate by signer, if there is one.
func (ca *testCA) client(t *testing.T, signer *testCA, name string) *http.Client {
	t.Helper()
	cfg := &tls.Config{RootCAs: ca.pool}
	if signer != nil {
		id, err := url.Parse("spiffe://orders.diurna/client/" + name)
		if err != nil {
			t.Fatal(err)
		}
		cert, key := signer.make(t, &x509.Certificate{Subject: pkix.Name{CommonName: name}, URIs: []*url.URL{id}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}, nil
		}
	}
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, ForceAttemptHTTP2: true}}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

func TestHTTPTLS(t *testing.T) {
	ca := newTestCA(t)
	server := ca.server(t)
	health, rest := []string{"/v1/health/live", "/v1/health/ready"}, []string{"/v1/status", "/v1/servers", "/v1/metrics"}
	authorize := func(state *tls.ConnectionState, action string) error {
		subject := state.PeerCertificates[0].URIs[0].String()
		if action != "monitor" || !strings.HasSuffix(subject, "/prometheus") {
			return &rpc.DeniedError{Subject: subject, Object: rpc.DefaultLog, Action: action}
		}
		return nil
	}
	for name, tt := range map[string]struct {
		client    *http.Client
		authorize func(*tls.ConnectionState, string) error
		status    int // of what is not health
		reason    string
	}{
		"nobody":                 {ca.client(t, nil, ""), nil, 401, rpc.ReasonNoCertificate},
		"anybody":                {ca.client(t, ca, "shop"), nil, 200, ""},
		"nobody, permissions":    {ca.client(t, nil, ""), authorize, 401, rpc.ReasonNoCertificate},
		"who may not":            {ca.client(t, ca, "shop"), authorize, 403, "DENIED"},
		"who may":                {ca.client(t, ca, "prometheus"), authorize, 200, ""},
		"who may, configuration": {ca.client(t, ca, "prometheus"), authorize, 200, ""},
	} {
		t.Run(name, func(t *testing.T) {
			f := serveHTTP(t, func(c *httpConfig) {
				c.TLS, c.Authorize = func() *tls.Config { return server }, tt.authorize
				if strings.HasSuffix(name, "configuration") {
					// A source may want to choose for each connection itself.
					c.TLS = func() *tls.Config {
						return &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return server, nil }}
					}
				}
			})
			for _, path := range health {
				if resp, text := f.do(t, tt.client, http.MethodGet, path, nil); resp.StatusCode != 200 || resp.Proto != "HTTP/1.1" {
					t.Errorf("%s: %s %d %s", path, resp.Proto, resp.StatusCode, text)
				}
			}
			for _, path := range rest {
				resp, text := f.do(t, tt.client, http.MethodGet, path, nil)
				if resp.StatusCode != tt.status {
					t.Errorf("%s: %d %s", path, resp.StatusCode, text)
				}
				if tt.reason != "" {
					wantJSON(t, text, `{"reason":"`+tt.reason+`"}`)
				}
			}
			tt.client.CloseIdleConnections()
		})
	}

	// Whoever shows a certificate of somebody else's is not spoken to at all.
	f := serveHTTP(t, func(c *httpConfig) { c.TLS = func() *tls.Config { return server } })
	if resp, err := ca.client(t, newTestCA(t), "prometheus").Get("https://" + f.Addr() + "/v1/health/live"); err == nil {
		resp.Body.Close()
		t.Error("a foreign certificate is taken")
	}
	f.log.mustAwait(t, "TLS handshake error")
}

// TestHTTPNewCertificate: a connection gets the certificate there is now.
func TestHTTPNewCertificate(t *testing.T) {
	ca := newTestCA(t)
	var current atomic.Pointer[tls.Config]
	f := serveHTTP(t, func(c *httpConfig) { c.TLS = current.Load })
	serial := func() *big.Int {
		c := ca.client(t, nil, "")
		defer c.CloseIdleConnections()
		resp, err := c.Get("https://" + f.Addr() + "/v1/health/live")
		if err != nil {
			return nil
		}
		defer resp.Body.Close()
		return resp.TLS.PeerCertificates[0].SerialNumber
	}
	if serial() != nil {
		t.Error("served without a certificate")
	}
	current.Store(ca.server(t))
	first := serial()
	current.Store(ca.server(t))
	if second := serial(); first == nil || second == nil || first.Cmp(second) == 0 {
		t.Errorf("certificates %v and %v", first, second)
	}
}

func TestHTTPConfig(t *testing.T) {
	f := serveHTTP(t, nil)
	good := f.cfg
	for name, change := range map[string]func(*httpConfig){
		"permissions without TLS": func(c *httpConfig) { c.Authorize = func(*tls.ConnectionState, string) error { return nil } },
		"no health":               func(c *httpConfig) { c.Health = nil },
		"port taken":              func(c *httpConfig) { c.Address = f.Addr() },
	} {
		c := good
		change(&c)
		h, err := newHTTP(c)
		if err == nil {
			t.Errorf("%s: no error", name)
			_ = h.Shutdown(within(t))
		}
		if name == "port taken" && !strings.Contains(err.Error(), "choose another address with -http-addr or listener.http") {
			t.Errorf("%v", err)
		}
	}
	// One that was never started leaves nothing behind either.
	h, err := newHTTP(good)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Shutdown(within(t)); err != nil {
		t.Fatal(err)
	}
	if l, err := net.Listen("tcp", h.Addr()); err != nil {
		t.Error(err)
	} else {
		l.Close()
	}
}

// TestHTTPShutdown answers what is under way, and cuts off what takes too long.
func TestHTTPShutdown(t *testing.T) {
	for _, patient := range []bool{true, false} {
		asked, answer := make(chan struct{}), make(chan struct{})
		f := serveHTTP(t, func(c *httpConfig) {
			servers := c.Servers
			c.Servers = func(ctx context.Context) (rpc.ServerList, error) {
				close(asked)
				<-answer
				return servers(ctx)
			}
		})
		got := make(chan error, 1)
		go func() {
			resp, err := f.client.Get("http://" + f.Addr() + "/v1/servers")
			if err == nil {
				err = errors.Join(resp.Body.Close(), map[bool]error{false: errors.New("refused")}[resp.StatusCode == 200])
			}
			got <- err
		}()
		<-asked
		ctx, cancel := context.WithCancel(within(t))
		stopped := make(chan error, 1)
		go func() { stopped <- f.Shutdown(ctx) }()
		// It takes nothing new from now on.
		for {
			c, err := net.Dial("tcp", f.Addr())
			if err != nil {
				break
			}
			c.Close()
		}
		if patient {
			close(answer)
			if err := <-got; err != nil {
				t.Errorf("what was under way got %v", err)
			}
			if err := <-stopped; err != nil {
				t.Error(err)
			}
		} else {
			cancel()
			if err := <-stopped; !errors.Is(err, context.Canceled) {
				t.Errorf("shut down with %v", err)
			}
			if err := <-got; err == nil {
				t.Error("what took too long was answered")
			}
			close(answer)
		}
		cancel()
	}
}

// TestHTTPConnections: one connection too many waits, and is served once there
// is room.
func TestHTTPConnections(t *testing.T) {
	f := serveHTTP(t, func(c *httpConfig) { c.MaxConnections = 2 })
	var conns []net.Conn
	ask := func(c net.Conn) {
		if _, err := io.WriteString(c, "GET /v1/health/live HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Error(err)
		}
	}
	dial := func() net.Conn {
		c, err := net.Dial("tcp", f.Addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		conns = append(conns, c)
		return c
	}
	read := func(c net.Conn, wait time.Duration) error {
		if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
	for range 2 {
		c := dial()
		ask(c)
		if err := read(c, patience); err != nil {
			t.Fatal(err)
		}
	}
	third := dial()
	ask(third)
	if err := read(third, 50*time.Millisecond); err == nil {
		t.Error("a third connection is served")
	}
	if err := conns[0].Close(); err != nil {
		t.Fatal(err)
	}
	if err := read(third, patience); err != nil {
		t.Errorf("there is room, but: %v", err)
	}
}

// TestHTTPLimits: what is too large or panics is answered, and the server lives.
func TestHTTPLimits(t *testing.T) {
	var panics atomic.Bool
	f := serveHTTP(t, func(c *httpConfig) {
		health := c.Health
		c.Health = func() (bool, string) {
			if panics.Load() {
				panic("for the test")
			}
			return health()
		}
	})
	req, err := http.NewRequestWithContext(within(t), http.MethodGet, "http://"+f.Addr()+"/v1/health/live", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Large", strings.Repeat("x", 2*httpHeaderBytes))
	resp, err := f.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("large headers: %d", resp.StatusCode)
	}
	panics.Store(true)
	status, text := f.get(t, "/v1/health/ready")
	if status != 500 {
		t.Errorf("a panic: %d", status)
	}
	wantJSON(t, text, `{"reason":"INTERNAL"}`)
	panics.Store(false)
	if status, _ := f.get(t, "/v1/health/ready"); status != 200 {
		t.Errorf("afterwards: %d", status)
	}
	if want := []string{"/v1/health/live", "/v1/health/ready", "/v1/metrics", "/v1/servers", "/v1/status"}; !slices.Equal(f.paths(), want) {
		t.Errorf("paths are %q", f.paths())
	}
}
