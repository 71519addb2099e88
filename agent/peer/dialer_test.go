package peer_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/diurnalog/diurna/agent/peer"
	"github.com/diurnalog/diurna/agent/peer/peertest"
)

func TestDialWhere(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		p := startPort(t, n, "a", peer.PortConfig{})
		d := newDialer(n, "b")
		known := map[string]string{}
		d.Lookup = func(id string) (string, bool) { address, ok := known[id]; return address, ok }

		if _, err := d.Dial(t.Context(), "n-a", ""); err == nil || !strings.Contains(err.Error(), "address is not known") {
			t.Errorf("no address: %v", err)
		}
		mustDial(t, d, "n-a", "a:8400")
		accept(t, p.Peers())
		known["n-a"] = "a:1"
		if _, err := d.Dial(t.Context(), "n-a", "a:8400"); !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), "dial node n-a at a:1") {
			t.Errorf("the fallback went before what is known: %v", err)
		}
		known["n-a"] = "a:8400"
		mustDial(t, d, "n-a", "a:1")
		accept(t, p.Peers())
		known["n-a"] = ""
		mustDial(t, d, "n-a", "a:8400")
		accept(t, p.Peers())

		// Not reached is not refused: there is no back-off.
		var refused *peer.RefusedError
		if _, err := d.Dial(t.Context(), "n-c", "c:8400"); errors.As(err, &refused) {
			t.Error(err)
		}
		startPort(t, n, "c", peer.PortConfig{})
		mustDial(t, d, "n-c", "c:8400")

		_ = expectRefusal(t, d, "n-b", "b:8400", peer.ReasonSelf)
	})
}

func TestDialRefused(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		startPort(t, n, "a", peer.PortConfig{Check: func(_ net.Conn, hello peer.Hello) error {
			if hello.From == "n-x" {
				return peer.Refuse(peer.ReasonUnknownNode, "who\n%s", strings.Repeat("ä", 5000))
			}
			return nil
		}})
		startPort(t, n, "new", peer.PortConfig{Self: selfIs("n-new", "")})

		err := expectRefusal(t, newDialer(n, "b"), "n-z", "a:8400", peer.ReasonNotMe)
		if err.RemoteCluster != "c1" || !strings.Contains(err.Error(), "node n-z at a:8400 refused (not_me): this is node n-a") {
			t.Errorf("%+v: %v", err, err)
		}
		d := newDialer(n, "b")
		d.Self = selfIs("n-b", "c2")
		if err := expectRefusal(t, d, "n-a", "a:8400", peer.ReasonOtherCluster); err.RemoteCluster != "c1" {
			t.Errorf("%+v", err)
		}
		err = expectRefusal(t, newDialer(n, "x"), "n-a", "a:8400", peer.ReasonUnknownNode)
		if len(err.Text) > 1024 || strings.Contains(err.Text, "\n") || !strings.HasPrefix(err.Text, "who?ä") {
			t.Errorf("%q", err.Text)
		}
		// A copy of a data directory, started elsewhere.
		d = newDialer(n, "b")
		d.Self = selfIs("n-a", "c1")
		if _, err := d.Dial(t.Context(), "n-z", "a:8400"); !strings.Contains(err.Error(), "was copied") {
			t.Error(err)
		}
		// A side without a cluster is up to Check.
		mustDial(t, newDialer(n, "b"), "n-new", "new:8400")
		d = newDialer(n, "b")
		d.Self = selfIs("n-b", "")
		mustDial(t, d, "n-a", "a:8400")
	})
}

// TestDialReset: who was refused is asked again once something has changed here.
func TestDialReset(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		refuse := true
		startPort(t, n, "a", peer.PortConfig{Check: func(net.Conn, peer.Hello) error {
			if refuse {
				return peer.Refuse(peer.ReasonCertificate, "an old one")
			}
			return nil
		}})
		d := newDialer(n, "b")
		_ = expectRefusal(t, d, "n-a", "a:8400", peer.ReasonCertificate)
		refuse = false
		_ = expectRefusal(t, d, "n-a", "a:8400", peer.ReasonCertificate)
		d.Reset()
		mustDial(t, d, "n-a", "a:8400")
	})
}

// TestDialStrangers: whatever answers is judged.
func TestDialStrangers(t *testing.T) {
	yes := `{"ok":true,"cluster_id":"c1","node_id":"n-a"}`
	for name, tc := range map[string]struct {
		answer string
		want   peer.Reason // empty: no refusal
		text   string
	}{
		"yes":              {hello("", yes), "", ""},
		"fields to come":   {hello("", `{"ok":true,"node_id":"n-a","version":"7","mood":[]}`), "", ""},
		"another node":     {hello("", `{"ok":true,"cluster_id":"c1","node_id":"n-z"}`), peer.ReasonNotMe, `node "n-z" answered`},
		"no node":          {hello("", `{"ok":true}`), peer.ReasonNotMe, "answered"},
		"another cluster":  {hello("", `{"ok":true,"cluster_id":"c2","node_id":"n-a"}`), peer.ReasonOtherCluster, "in c2"},
		"unknown reason":   {hello("", `{"ok":false,"reason":"full_moon","text":"wait"}`), "full_moon", "wait"},
		"no reason":        {hello("", `{"ok":false}`), peer.ReasonMalformed, "neither yes nor no"},
		"no JSON":          {hello("", `yes`), peer.ReasonMalformed, "no Diurna"},
		"TLS alert":        {"\x15\x03\x01\x00\x02\x02\x46", peer.ReasonMalformed, "no plaintext port"},
		"HTTP":             {"HTTP/1.1 400 Bad Request\r\n\r\n", peer.ReasonMalformed, "no plaintext port"},
		"nothing":          {"", "", "no answer to the hello"},
		"half":             {hello("", yes)[:9], "", "no answer to the hello"},
		"checked and good": {hello("", `{"ok":true,"node_id":"n-a","cluster_id":"c1"}`), "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *peertest.Net) {
				l, err := n.Host("a").Listen(":8400")
				if err != nil {
					t.Fatal(err)
				}
				heard := make(chan string, 1)
				go func() {
					c, err := l.Accept()
					if err != nil {
						return
					}
					b := make([]byte, 14+2+len(`{"cluster_id":"c1","from":"n-b","to":"n-a"}`))
					_, _ = io.ReadFull(c, b)
					heard <- string(b)
					_, _ = io.WriteString(c, tc.answer)
					c.Close()
				}()
				d := newDialer(n, "b")
				checked := false
				d.Check = func(conn net.Conn, remote peer.Hello) error {
					checked = conn != nil && remote.From == "n-a" && remote.To == "n-b"
					return nil
				}
				conn, err := d.Dial(t.Context(), "n-a", "a:8400")
				if got, want := <-heard, hello("diurna-raft/1\n", `{"cluster_id":"c1","from":"n-b","to":"n-a"}`); got != want {
					t.Errorf("said %q, want %q", got, want)
				}
				var refused *peer.RefusedError
				switch {
				case tc.want != "":
					if !errors.As(err, &refused) || refused.Reason != tc.want || !strings.Contains(refused.Text, tc.text) {
						t.Errorf("%v", err)
					}
					synctest.Wait()
					if k := n.Conns("b", "a"); k != 0 {
						t.Errorf("%d connections are left", k)
					}
				case tc.text != "":
					if errors.As(err, &refused) || err == nil || !strings.Contains(err.Error(), tc.text) {
						t.Errorf("%v", err)
					}
				case err != nil || !checked:
					t.Errorf("%v, checked %v", err, checked)
				default:
					conn.Close()
				}
			})
		})
	}
}

func TestDialerChecks(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		startPort(t, n, "a", peer.PortConfig{})
		d := newDialer(n, "b")
		d.Check = func(net.Conn, peer.Hello) error { return errors.New("a certificate of somebody else") }
		if err := expectRefusal(t, d, "n-a", "a:8400", peer.ReasonRefused); err.RemoteCluster != "c1" || err.Text != "a certificate of somebody else" {
			t.Errorf("%+v", err)
		}
		_ = expectRefusal(t, d, "n-a", "a:8400", peer.ReasonRefused)
	})
}

// TestBackoff: who refuses is left alone, longer each time, until something is
// different.
func TestBackoff(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		var asked atomic.Int64
		var welcome atomic.Bool
		startPort(t, n, "a", peer.PortConfig{Check: func(net.Conn, peer.Hello) error {
			asked.Add(1)
			if welcome.Load() {
				return nil
			}
			return peer.Refuse(peer.ReasonUnknownNode, "who is that?")
		}})
		var cluster atomic.Value
		cluster.Store("c1")
		d := newDialer(n, "b")
		d.Self = func() (string, string) { return "n-b", cluster.Load().(string) }
		refused := func(address string, wantAsked int64) {
			t.Helper()
			_ = expectRefusal(t, d, "n-a", address, peer.ReasonUnknownNode)
			if got := asked.Load(); got != wantAsked {
				t.Fatalf("asked %d times, want %d", got, wantAsked)
			}
		}
		count := int64(0)
		for _, wait := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
			count++
			refused("a:8400", count)
			refused("a:8400", count)
			time.Sleep(wait*time.Second - 1)
			refused("a:8400", count)
			time.Sleep(time.Nanosecond)
		}
		refused("a:8400", count+1)
		l, err := n.Host("a").Listen(":8401")
		if err != nil {
			t.Fatal(err)
		}
		p := peer.NewPort(l, peer.PortConfig{Self: selfIs("n-a", "c1"), Check: func(net.Conn, peer.Hello) error {
			asked.Add(1)
			return peer.Refuse(peer.ReasonUnknownNode, "who is that?")
		}})
		defer p.Close()
		refused("a:8401", count+2) // at once, and from the start
		refused("a:8401", count+2)
		time.Sleep(time.Second)
		refused("a:8401", count+3)
		cluster.Store("")
		refused("a:8401", count+4) // another question
		cluster.Store("c1")

		refused("a:8400", count+5)
		time.Sleep(time.Second)
		refused("a:8400", count+6)
		time.Sleep(2 * time.Second)
		welcome.Store(true)
		_ = mustDial(t, d, "n-a", "a:8400").Close()
		welcome.Store(false)
		refused("a:8400", count+8)
		time.Sleep(time.Second)
		refused("a:8400", count+9) // from the start
	})
}

// TestBackoffJitter: at most half is taken off.
func TestBackoffJitter(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		var asked atomic.Int64
		startPort(t, n, "a", peer.PortConfig{Check: func(net.Conn, peer.Hello) error {
			asked.Add(1)
			return errors.New("no")
		}})
		d := newDialer(n, "b")
		d.Jitter = func() float64 { return 0.5 }
		d.BackoffMin, d.BackoffMax = 8*time.Second, 10*time.Second
		for i, wait := range []time.Duration{6 * time.Second, 7500 * time.Millisecond} {
			_ = expectRefusal(t, d, "n-a", "a:8400", peer.ReasonRefused)
			time.Sleep(wait - 1)
			_ = expectRefusal(t, d, "n-a", "a:8400", peer.ReasonRefused)
			if asked.Load() != int64(i+1) {
				t.Errorf("asked %d times", asked.Load())
			}
			time.Sleep(time.Nanosecond)
		}
	})
}

// TestManyDialAtOnce: all that are under way when the first is refused count
// as one.
func TestManyDialAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		n.SetLinks(peertest.Link{Delay: 100 * time.Millisecond})
		var asked atomic.Int64
		startPort(t, n, "a", peer.PortConfig{Check: func(net.Conn, peer.Hello) error {
			asked.Add(1)
			return errors.New("no")
		}})
		d := newDialer(n, "b")
		var dials sync.WaitGroup
		for range 10 {
			dials.Go(func() { _ = expectRefusal(t, d, "n-a", "a:8400", peer.ReasonRefused) })
		}
		dials.Wait()
		time.Sleep(time.Second)
		_ = expectRefusal(t, d, "n-a", "a:8400", peer.ReasonRefused)
		if got := asked.Load(); got != 11 {
			t.Errorf("asked %d times, want 11: the second back-off began too late or too early", got)
		}
	})
}

// TestDialEnds: with its context or its timeout, wherever it is.
func TestDialEnds(t *testing.T) {
	for name, arrange := range map[string]func(t *testing.T, n *peertest.Net){
		"connecting": func(t *testing.T, n *peertest.Net) {
			startPort(t, n, "a", peer.PortConfig{})
			n.Isolate("a")
		},
		"greeting": func(t *testing.T, n *peertest.Net) {
			if _, err := n.Host("a").Listen(":8400"); err != nil {
				t.Fatal(err)
			}
		},
		"the answer is lost": func(t *testing.T, n *peertest.Net) {
			startPort(t, n, "a", peer.PortConfig{Check: func(net.Conn, peer.Hello) error {
				n.Block("a", "b")
				return nil
			}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *peertest.Net) {
				arrange(t, n)
				try := func(ctx context.Context, d *peer.Dialer, want error, after time.Duration) {
					t.Helper()
					n.Unblock("a", "b")
					begin := time.Now()
					c, err := d.Dial(ctx, "n-a", "a:8400")
					if err == nil {
						c.Close()
					}
					if !errors.Is(err, want) || time.Since(begin) != after {
						t.Errorf("%v after %v, want %v after %v", err, time.Since(begin), want, after)
					}
				}
				d := newDialer(n, "b")
				try(t.Context(), d, context.DeadlineExceeded, 10*time.Second)
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
				defer cancel()
				try(ctx, d, context.DeadlineExceeded, 3*time.Second)
				ctx, cancel = context.WithCancel(t.Context())
				time.AfterFunc(time.Second, cancel)
				try(ctx, d, context.Canceled, time.Second)
				try(ctx, d, context.Canceled, 0)
				d = newDialer(n, "b")
				d.Timeout = 2 * time.Second
				try(t.Context(), d, context.DeadlineExceeded, 2*time.Second)
				n.Close()
			})
		})
	}
}

// TestContextEndsAfterDial: it has no say in the connection any more.
func TestContextEndsAfterDial(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		p := startPort(t, n, "a", peer.PortConfig{})
		ctx, cancel := context.WithCancel(t.Context())
		c, err := newDialer(n, "b").Dial(ctx, "n-a", "a:8400")
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		s := accept(t, p.Peers())
		time.Sleep(time.Hour)
		write(t, s, "x")
		expect(t, c, "x")
	})
}
