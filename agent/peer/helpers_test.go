package peer_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/diurnalog/diurna/agent/peer"
	"github.com/diurnalog/diurna/agent/peer/peertest"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bubble runs a test in a bubble, on a network that it closes at the end.
func bubble(t *testing.T, f func(t *testing.T, n *peertest.Net)) {
	t.Helper()
	rng := vfstest.Rand(t)
	synctest.Test(t, func(t *testing.T) {
		n := peertest.New(rng)
		defer n.Close()
		f(t, n)
	})
}

func selfIs(id, cluster string) func() (string, string) {
	return func() (string, string) { return id, cluster }
}

// logged collects a log.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) logger() hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Output: l, Level: hclog.Info})
}

func (l *logged) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

func (l *logged) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// startPort starts a port at host:8400, of node "n-<host>" in cluster "c1"
// unless cfg says otherwise.
func startPort(t *testing.T, n *peertest.Net, host string, cfg peer.PortConfig) *peer.Port {
	t.Helper()
	l, err := n.Host(host).Listen(":8400")
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Self == nil {
		cfg.Self = selfIs("n-"+host, "c1")
	}
	p := peer.NewPort(l, cfg)
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("close the port: %v", err)
		}
	})
	return p
}

func newDialer(n *peertest.Net, host string) *peer.Dialer {
	return &peer.Dialer{
		Network: n.Host(host),
		Self:    selfIs("n-"+host, "c1"),
		Jitter:  func() float64 { return 0 },
	}
}

// knock connects and says what it is told, byte for byte.
func knock(t *testing.T, n *peertest.Net, from, to, say string) net.Conn {
	t.Helper()
	c, err := n.Host(from).Dial(t.Context(), to+":8400")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, say); err != nil {
		t.Fatal(err)
	}
	return c
}

func accept(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func write(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

func expect(t *testing.T, c net.Conn, text string) {
	t.Helper()
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("read %q and %v, want %q", b, err, text)
	}
}

// expectEnd requires that the connection ends, so long from now, with nothing
// said.
func expectEnd(t *testing.T, c net.Conn, after time.Duration) {
	t.Helper()
	begin := time.Now()
	if err := c.SetReadDeadline(begin.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	var timeout net.Error
	if len(b) > 0 || errors.As(err, &timeout) && timeout.Timeout() {
		t.Fatalf("read %q and %v, want the end", b, err)
	}
	if got := time.Since(begin); got != after {
		t.Fatalf("ended after %v, want %v", got, after)
	}
}

// expectRefusal dials and requires to be refused for a reason.
func expectRefusal(t *testing.T, d *peer.Dialer, id, address string, want peer.Reason) *peer.RefusedError {
	t.Helper()
	c, err := d.Dial(t.Context(), id, address)
	if err == nil {
		c.Close()
		t.Fatalf("was not refused, want %s", want)
	}
	var refused *peer.RefusedError
	if !errors.As(err, &refused) || refused.Reason != want {
		t.Fatalf("%v, want %s", err, want)
	}
	if refused.ID != id || refused.Address != address || refused.Text == "" {
		t.Fatalf("%+v lacks what was dialled, or an explanation", refused)
	}
	return refused
}

func mustDial(t *testing.T, d *peer.Dialer, id, address string) net.Conn {
	t.Helper()
	c, err := d.Dial(t.Context(), id, address)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
