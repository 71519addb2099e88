package identity

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/agent/identity/identitytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long something that has to happen may take on a machine that
// is busy with something else.
const patience = 60 * time.Second

const testNode = "0d9c2f3e-7f10-4a67-9f0e-6c1d9d5a1b22"

// clock is the machine's, set forward.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

// hurried is usual for those who do not want to wait.
func hurried() options {
	o := usual()
	o.timing = timing{
		call: 20 * time.Second, fetch: 60 * time.Second,
		retryFirst: 5 * time.Millisecond, retryMax: 50 * time.Millisecond, openMax: 50 * time.Millisecond,
		trust: 20 * time.Millisecond, trustLeast: 5 * time.Millisecond,
		poll: 5 * time.Millisecond, look: time.Hour, nag: time.Hour,
	}
	return o
}

// logs keeps what is logged.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *logs) count(text string) int { return strings.Count(l.String(), text) }

// newLogs returns a logger of everything, and what it logged, which no secret
// may be in.
func newLogs(t *testing.T, secrets func() []string) (hclog.Logger, *logs) {
	l := &logs{}
	t.Cleanup(func() {
		noSecrets(t, l.String(), secrets)
		if t.Failed() {
			t.Logf("log:\n%s", l.String())
		}
	})
	return hclog.New(&hclog.LoggerOptions{Output: l, Level: hclog.Trace, Name: "test"}), l
}

// noSecrets fails for a text that holds one.
func noSecrets(t *testing.T, text string, more func() []string) {
	t.Helper()
	secrets := []string{identitytest.FakeSecret, identitytest.RootToken, "PRIVATE KEY", "hvs."}
	if more != nil {
		secrets = append(secrets, more()...)
	}
	for _, s := range secrets {
		if s != "" && strings.Contains(text, s) {
			t.Errorf("the secret %q is in: %s", s, text)
		}
	}
}

// vaultConfig is a node's that uses this Vault.
func vaultConfig(t *testing.T, v config.Vault) (Config, *logs) {
	logger, l := newLogs(t, func() []string { return []string{v.Token, v.SecretID} })
	return Config{
		TLS: config.TLS{Source: config.TLSVault}, Vault: v, Cluster: "Test", Service: "diurna",
		NodeID: testNode, Host: "127.0.0.1", Dir: t.TempDir() + "/tls", Logger: logger,
	}, l
}

func mustOpen(t *testing.T, cfg Config, opts options) *Identity {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	i, err := open(ctx, cfg, opts)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// start runs it until the test ends, or the returned function is called.
func start(t *testing.T, i *Identity) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		i.Run(ctx)
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return stop
}

// await waits until the status is as wanted.
func await(t *testing.T, i *Identity, what string, ok func(Status) bool) Status {
	t.Helper()
	limit := time.After(patience)
	tick := time.NewTicker(2 * time.Millisecond) // failures swap nothing
	defer tick.Stop()
	for {
		changed := i.Changed()
		if s := i.Status(); ok(s) {
			return s
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-limit:
			t.Fatalf("waited in vain until %s: %+v", what, i.Status())
		}
	}
}

// eventually waits for something that nothing tells of.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	limit := time.After(patience)
	for !ok() {
		select {
		case <-time.After(2 * time.Millisecond):
		case <-limit:
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// server answers what it reads, over TLS.
type server struct {
	addr string
	errs chan error // of handshakes
	// seen gets the connection of the next one that succeeds.
	seen atomic.Pointer[chan *tls.Conn]
}

func serve(t *testing.T, c *tls.Config) *server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{addr: l.Addr().String(), errs: make(chan error, 100)}
	var wg sync.WaitGroup
	var conns sync.Map
	wg.Go(func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			conn := tls.Server(raw, c)
			conns.Store(conn, nil)
			wg.Go(func() {
				defer conn.Close() // the test is over
				err := conn.Handshake()
				if seen := s.seen.Swap(nil); seen != nil && err == nil {
					*seen <- conn
				}
				s.errs <- err
				if err == nil {
					_, _ = io.Copy(conn, conn) // ends with the connection
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		conns.Range(func(c, _ any) bool { _ = c.(*tls.Conn).Close(); return true })
		wg.Wait()
	})
	return s
}

// dial connects and checks that both sides are content. The error is that of
// the side that was not.
func (s *server) dial(t *testing.T, c *tls.Config) (*tls.Conn, error) {
	t.Helper()
	d := &tls.Dialer{NetDialer: &net.Dialer{Timeout: patience}, Config: c}
	conn, err := d.DialContext(t.Context(), "tcp", s.addr)
	if err != nil {
		t.Logf("the server says: %v", <-s.errs)
		return nil, err
	}
	tc := conn.(*tls.Conn)
	t.Cleanup(func() { _ = tc.Close() })
	if err := <-s.errs; err != nil {
		return nil, err
	}
	if err := echo(tc); err != nil {
		return nil, err
	}
	return tc, nil
}

func echo(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// serialSeen is the serial of the certificate that the other side showed.
func serialSeen(c *tls.Conn) string { return serialOf(c.ConnectionState().PeerCertificates[0]) }

// authorityFor is a CA in memory.
func authorityFor(t *testing.T, name string) *authority {
	t.Helper()
	ca, err := newCA(name, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// issue makes a pair.
func (a *authority) issue(t *testing.T, n names, server bool, ttl time.Duration, now time.Time) *pair {
	t.Helper()
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := a.sign(key.Public(), n, server, ttl, now)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newPair(key, []*x509.Certificate{leaf})
	if err != nil {
		t.Fatal(err)
	}
	return p
}
