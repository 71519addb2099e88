package peer_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/diurnalog/diurna/agent/peer"
	"github.com/diurnalog/diurna/agent/peer/peertest"
)

const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

func TestClientIsHandedOnAsItCame(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		p := startPort(t, n, "a", peer.PortConfig{})
		c := knock(t, n, "client", "a", preface)
		s := accept(t, p.Clients())
		if s.RemoteAddr().String() != c.LocalAddr().String() || s.LocalAddr().String() != "a:8400" || p.Addr().String() != "a:8400" {
			t.Errorf("%v %v", s.RemoteAddr(), s.LocalAddr())
		}
		if k, err := s.Read(nil); k != 0 || err != nil {
			t.Errorf("read nothing: %d, %v", k, err)
		}
		expect(t, s, preface)
		time.Sleep(time.Hour) // no deadline is left
		write(t, c, "later")
		write(t, s, "answer")
		expect(t, s, "later")
		expect(t, c, "answer")

		// gRPC's deadlines, and rpc's watching of them, have to reach the bottom.
		if err := s.SetDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begin) != time.Second {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		expectEnd(t, c, 0)
	})
}

func TestPeerIsGreeted(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		p := startPort(t, n, "a", peer.PortConfig{})
		c := mustDial(t, newDialer(n, "b"), "n-a", "a:8400")
		s := accept(t, p.Peers())
		want := peer.Hello{ClusterID: "c1", From: "n-b", To: "n-a"}
		if got := s.(*peer.Conn).Hello(); got != want {
			t.Errorf("accepted %+v", got)
		}
		if got := c.(*peer.Conn).Hello(); got != want {
			t.Errorf("dialled %+v", got)
		}
		time.Sleep(time.Hour)
		write(t, c, "there")
		write(t, s, "back")
		expect(t, s, "there")
		expect(t, c, "back")
	})
}

// TestImpatientPeer: what follows a hello at once is the stream's.
func TestImpatientPeer(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		p := startPort(t, n, "a", peer.PortConfig{})
		knock(t, n, "b", "a", hello("diurna-raft/1\n", `{"from":"n-b","to":"n-a"}`)+"stream")
		expect(t, accept(t, p.Peers()), "stream")
	})
}

// hello is the bytes of one.
func hello(magic, json string) string {
	return magic + string([]byte{byte(len(json) >> 8), byte(len(json))}) + json
}

func TestRefusals(t *testing.T) {
	const magic = "diurna-raft/1\n"
	long := strings.Repeat("x", 300)
	for name, tc := range map[string]struct {
		say    string
		reason peer.Reason // empty: closed without a word
		log    string
	}{
		"other cluster":        {hello(magic, `{"cluster_id":"c2","from":"n-b","to":"n-a"}`), peer.ReasonOtherCluster, "in cluster c1, the other in c2"},
		"not me":               {hello(magic, `{"cluster_id":"c1","from":"n-b","to":"n-x"}`), peer.ReasonNotMe, "this is node n-a, not n-x"},
		"itself":               {hello(magic, `{"cluster_id":"c1","from":"n-a","to":"n-a"}`), peer.ReasonSelf, "talk to itself"},
		"unknown node":         {hello(magic, `{"cluster_id":"c1","from":"stranger","to":"n-a"}`), peer.ReasonUnknownNode, "who is stranger"},
		"for other reasons":    {hello(magic, `{"cluster_id":"c1","from":"moody","to":"n-a"}`), peer.ReasonRefused, "not today"},
		"next version":         {hello("diurna-raft/2\n", `{"x":1}`), peer.ReasonVersion, "speaks version 1"},
		"version, much unread": {hello("diurna-raft/20.1\n", strings.Repeat("x", 60000)), peer.ReasonVersion, "the other version 20.1"},
		"no version":           {"diurna-raft/\n", peer.ReasonMalformed, "does not begin like"},
		"endless version":      {"diurna-raft/" + strings.Repeat("1", 100), peer.ReasonMalformed, "does not begin like"},
		"another magic":        {"daytime\n", peer.ReasonMalformed, "does not begin like"},
		"too long":             {magic + "\x10\x01", peer.ReasonMalformed, "longer than any greeting"},
		"no JSON":              {hello(magic, `{"from":`), peer.ReasonMalformed, "not JSON"},
		"empty":                {hello(magic, ``), peer.ReasonMalformed, "not JSON"},
		"no from":              {hello(magic, `{"to":"n-a"}`), peer.ReasonMalformed, "lacks an id"},
		"no to":                {hello(magic, `{"from":"n-b"}`), peer.ReasonMalformed, "lacks an id"},
		"long id":              {hello(magic, `{"from":"`+long+`","to":"n-a"}`), peer.ReasonMalformed, "an id that is none"},
		"control in an id":     {hello(magic, `{"from":"x\u001b[2J","to":"n-a"}`), peer.ReasonMalformed, "an id that is none"},
		"two words":            {hello(magic, `{"from":"n b","to":"n-a"}`), peer.ReasonMalformed, "an id that is none"},
		"TLS":                  {"\x16\x03\x01\x02\x00", "", "this port speaks plaintext; the client tried TLS"},
		"HTTP/1":               {"GET / HTTP/1.1\r\n\r\n", "", "the client tried HTTP/1"},
		"anything":             {"\x00\x01", "", "neither gRPC's nor a peer's"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *peertest.Net) {
				var log logged
				p := startPort(t, n, "a", peer.PortConfig{Logger: log.logger(), Check: func(conn net.Conn, hello peer.Hello) error {
					if conn.LocalAddr().String() != "a:8400" {
						t.Errorf("checked %v", conn.LocalAddr())
					}
					switch hello.From {
					case "stranger":
						return fmt.Errorf("checked: %w", peer.Refuse(peer.ReasonUnknownNode, "who is stranger?"))
					case "moody":
						return errors.New("not today")
					}
					return nil
				}})
				for range 2 {
					c := knock(t, n, "b", "a", tc.say)
					got, _ := io.ReadAll(c)
					if tc.reason == "" {
						if len(got) > 0 {
							t.Errorf("answered %q", got)
						}
					} else if len(got) < 2 || int(got[0])<<8+int(got[1]) != len(got)-2 {
						t.Fatalf("answered %q", got)
					}
					for _, part := range []string{`"ok":false`, `"reason":"` + string(tc.reason) + `"`, `"cluster_id":"c1","node_id":"n-a","version":"1"`} {
						if tc.reason != "" && !strings.Contains(string(got), part) {
							t.Errorf("answered %q, without %s", got, part)
						}
					}
					c.Close()
					synctest.Wait()
				}
				if got := log.count(tc.log); got != 1 {
					t.Errorf("logged %d times, want once:\n%s", got, log.text())
				}
				_ = mustDial(t, newDialer(n, "b"), "n-a", "a:8400").Close()
				_ = accept(t, p.Peers()).Close()
			})
		})
	}
}

// TestRefusedWhileTalking: who is refused may finish what it says, and then
// reads why; but not for ever.
func TestRefusedWhileTalking(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		startPort(t, n, "a", peer.PortConfig{})
		c := knock(t, n, "b", "a", "diurna-raft/2\n")
		for range 9 {
			time.Sleep(100 * time.Millisecond)
			write(t, c, strings.Repeat("x", 1000))
		}
		if got, err := io.ReadAll(c); err != nil || !strings.Contains(string(got), "the other version 2") {
			t.Errorf("read %q, %v", got, err)
		}
		time.Sleep(200 * time.Millisecond)
		write(t, c, "x")
		if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("talks on: %v", err)
		}
	})
}

// TestLoggedOnce: again after ten minutes, and for each host.
func TestLoggedOnce(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		var log logged
		startPort(t, n, "a", peer.PortConfig{Logger: log.logger()})
		try := func(host string) {
			c, err := n.Host(host).Dial(t.Context(), "a:8400")
			if err != nil {
				t.Fatal(err)
			}
			if err := tls.Client(c, &tls.Config{ServerName: "a"}).Handshake(); err == nil {
				t.Error("TLS succeeded")
			}
			c.Close()
			synctest.Wait()
		}
		expect := func(want int) {
			t.Helper()
			if got := log.count("the client tried TLS"); got != want {
				t.Errorf("logged %d times, want %d", got, want)
			}
		}
		for range 20 {
			try("b")
		}
		expect(1)
		try("c")
		expect(2)
		time.Sleep(10*time.Minute - time.Second)
		try("b")
		expect(2)
		time.Sleep(time.Second)
		try("b")
		try("b")
		expect(3)
	})
}

// TestSilenceHoldsNothing: who says nothing, or too little, is closed in time,
// and in nobody's way meanwhile.
func TestSilenceHoldsNothing(t *testing.T) {
	for name, say := range map[string]string{"nothing": "", "a byte": "d", "no hello": "diurna-raft/1\n", "half a hello": "diurna-raft/1\n\x00\x10{"} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *peertest.Net) {
				var log logged
				p := startPort(t, n, "a", peer.PortConfig{Logger: log.logger()})
				c := knock(t, n, "x", "a", say)
				begin := time.Now()
				mustDial(t, newDialer(n, "b"), "n-a", "a:8400")
				accept(t, p.Peers())
				knock(t, n, "client", "a", preface)
				accept(t, p.Clients())
				if took := time.Since(begin); took != 0 {
					t.Errorf("others waited %v", took)
				}
				expectEnd(t, c, 10*time.Second)
				if log.text() != "" {
					t.Errorf("logged %s", log.text())
				}
			})
		})
	}
	t.Run("byte by byte", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *peertest.Net) {
			startPort(t, n, "a", peer.PortConfig{HandshakeTimeout: 3 * time.Second})
			c := knock(t, n, "x", "a", "")
			for _, b := range "diu" {
				write(t, c, string(b))
				time.Sleep(999 * time.Millisecond)
			}
			write(t, c, "r")
			expectEnd(t, c, 3*time.Millisecond)
		})
	})
}

// TestCrowd: with too many silent connections, the oldest makes room.
func TestCrowd(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		var log logged
		p := startPort(t, n, "a", peer.PortConfig{MaxHandshakes: 3, Logger: log.logger()})
		var silent []net.Conn
		for range 5 {
			silent = append(silent, knock(t, n, "x", "a", ""))
			synctest.Wait()
		}
		expectEnd(t, silent[0], 0)
		expectEnd(t, silent[1], 0)
		mustDial(t, newDialer(n, "b"), "n-a", "a:8400")
		accept(t, p.Peers())
		expectEnd(t, silent[2], 0)
		write(t, silent[3], preface)
		expect(t, accept(t, p.Clients()), preface)
		if log.count("too many connections") != 1 {
			t.Error(log.text())
		}
	})
}

// TestFullBacklog: clients that nobody accepts are closed when there are too
// many, and are in no peer's way.
func TestFullBacklog(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		var log logged
		p := startPort(t, n, "a", peer.PortConfig{Backlog: 2, Logger: log.logger()})
		var clients []net.Conn
		for range 3 {
			clients = append(clients, knock(t, n, "client", "a", preface))
			synctest.Wait()
		}
		expectEnd(t, clients[2], 0)
		if log.count("too many wait already") != 1 {
			t.Error(log.text())
		}
		mustDial(t, newDialer(n, "b"), "n-a", "a:8400")
		accept(t, p.Peers())
		expect(t, accept(t, p.Clients()), preface)
		knock(t, n, "client", "a", preface)
		expect(t, accept(t, p.Clients()), preface)
		expect(t, accept(t, p.Clients()), preface)
	})
}

// TestLanesCloseAlone: each listener closes like any other, without the rest,
// and can be had again.
func TestLanesCloseAlone(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		p := startPort(t, n, "a", peer.PortConfig{})
		clients, peers := p.Clients(), p.Peers()
		if p.Clients() != clients || p.Peers() != peers {
			t.Error("an open listener was replaced")
		}
		waiting := knock(t, n, "client", "a", preface)
		synctest.Wait()
		accepted := accept(t, clients)
		queued := knock(t, n, "client", "a", preface)
		synctest.Wait()
		if err := clients.Close(); err != nil {
			t.Error(err)
		}
		if err := clients.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed twice: %v", err)
		}
		if _, err := clients.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("accept after close: %v", err)
		}
		expectEnd(t, queued, 0)
		expectEnd(t, knock(t, n, "client", "a", preface), 0)
		expect(t, accepted, preface)
		write(t, accepted, "still")
		expect(t, waiting, "still")

		b := newDialer(n, "b")
		mustDial(t, b, "n-a", "a:8400")
		accept(t, peers)
		again := p.Clients()
		knock(t, n, "client", "a", preface)
		expect(t, accept(t, again), preface)

		done := make(chan error, 1)
		go func() {
			_, err := peers.Accept()
			done <- err
		}()
		synctest.Wait()
		if err := peers.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("accept while closing: %v", err)
		}
		// Not a refusal: whoever dials comes back as soon as it likes.
		_, err := b.Dial(t.Context(), "n-a", "a:8400")
		var refused *peer.RefusedError
		if errors.As(err, &refused) {
			t.Error(err)
		}
		peers = p.Peers()
		mustDial(t, b, "n-a", "a:8400")
		accept(t, peers)
	})
}

func TestPortClose(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		p := startPort(t, n, "a", peer.PortConfig{})
		clients, peers := p.Clients(), p.Peers()
		done := make(chan error, 2)
		client := knock(t, n, "client", "a", preface)
		accepted := accept(t, clients)
		queued := mustDial(t, newDialer(n, "b"), "n-a", "a:8400")
		silent := knock(t, n, "x", "a", "diurna")
		go func() { _, err := clients.Accept(); done <- err }()
		synctest.Wait()
		begin := time.Now()
		var closers sync.WaitGroup
		for range 3 {
			closers.Go(func() {
				if err := p.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		closers.Wait()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if _, err := peers.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if _, err := p.Peers().Accept(); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		expectEnd(t, queued, 0)
		expectEnd(t, silent, 0)
		if _, err := n.Host("b").Dial(t.Context(), "a:8400"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
		expect(t, accepted, preface)
		write(t, accepted, "owned")
		expect(t, client, "owned")
		if time.Since(begin) != 0 {
			t.Errorf("took %v", time.Since(begin))
		}
	})
}

// troubled is a listener whose Accept fails as told before it accepts.
type troubled struct {
	net.Listener
	mu   sync.Mutex
	errs []error
}

func (l *troubled) Accept() (net.Conn, error) {
	l.mu.Lock()
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		l.mu.Unlock()
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.Addr(), Err: os.NewSyscallError("accept4", err)}
	}
	l.mu.Unlock()
	return l.Listener.Accept()
}

func TestAcceptFails(t *testing.T) {
	listen := func(t *testing.T, n *peertest.Net, errs ...error) *troubled {
		l, err := n.Host("a").Listen(":8400")
		if err != nil {
			t.Fatal(err)
		}
		return &troubled{Listener: l, errs: errs}
	}
	t.Run("for now", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *peertest.Net) {
			var log logged
			var errs []error
			for range 10 {
				errs = append(errs, syscall.EMFILE)
			}
			begin := time.Now()
			p := peer.NewPort(listen(t, n, errs...), peer.PortConfig{Self: selfIs("n-a", ""), Logger: log.logger()})
			knock(t, n, "client", "a", preface)
			accept(t, p.Clients())
			// 5, 10, 20, … 640 ms, 1 s, 1 s
			if got, want := time.Since(begin), 1275*time.Millisecond+2*time.Second; got != want {
				t.Errorf("accepted after %v, want %v", got, want)
			}
			if log.count("too many open files") != 1 {
				t.Error(log.text())
			}
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("while closing", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *peertest.Net) {
			p := peer.NewPort(listen(t, n, syscall.EMFILE), peer.PortConfig{Self: selfIs("n-a", "")})
			synctest.Wait()
			begin := time.Now()
			if err := p.Close(); err != nil || time.Since(begin) != 0 {
				t.Errorf("%v after %v", err, time.Since(begin))
			}
		})
	})
	t.Run("for good", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *peertest.Net) {
			var log logged
			p := peer.NewPort(listen(t, n, syscall.EBADF), peer.PortConfig{Self: selfIs("n-a", ""), Logger: log.logger()})
			for _, l := range []net.Listener{p.Clients(), p.Peers(), p.Clients()} {
				if _, err := l.Accept(); !errors.Is(err, syscall.EBADF) {
					t.Error(err)
				}
			}
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			if log.count("accepts nothing any more") != 1 {
				t.Error(log.text())
			}
		})
	})
}
