package peer_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/diurnalog/diurna/agent/peer"
	"github.com/diurnalog/diurna/agent/peer/peertest"
)

// secureNet is a port of node n-a of cluster c, and what belongs to it.
type secureNet struct {
	*peertest.Net
	t    *testing.T
	ca   *peertest.CA
	port *peer.Port
	log  logged
}

func startSecure(t *testing.T, n *peertest.Net, change func(*peer.PortConfig)) *secureNet {
	t.Helper()
	s := &secureNet{Net: n, t: t, ca: peertest.NewCA(t, "cluster CA")}
	cfg := peer.PortConfig{TLS: peertest.PortTLS(s.ca, "c", s.ca.Server(t, "c", "n-a")), Logger: s.log.logger()}
	if change != nil {
		change(&cfg)
	}
	s.port = startPort(t, n, "a", cfg)
	return s
}

// dialer is a node at host b that shows cert.
func (s *secureNet) dialer(cert ...tls.Certificate) *peer.Dialer {
	d := newDialer(s.Net, "b")
	d.TLS = func(protocol string) *tls.Config {
		if protocol != peer.ProtocolRaft {
			s.t.Errorf("asked for %q", protocol)
		}
		return peertest.DialTLS(s.ca, "c", cert...)
	}
	return d
}

// client opens a connection of gRPC. err is what the handshake said, or the
// first read, by which a client of TLS 1.3 learns what became of its certificate.
func (s *secureNet) client(cfg *tls.Config, protocols ...string) (*tls.Conn, error) {
	s.t.Helper()
	raw, err := s.Host("client").Dial(s.t.Context(), "a:8400")
	if err != nil {
		s.t.Fatal(err)
	}
	cfg.NextProtos = protocols
	c := tls.Client(raw, cfg)
	return c, c.Handshake()
}

func (s *secureNet) logs(want string, times int) {
	s.t.Helper()
	synctest.Wait()
	if got := s.log.count(want); got != times {
		s.t.Errorf("logged %q %d times, want %d:\n%s", want, got, times, s.log.text())
	}
}

func TestTLSClient(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		s := startSecure(t, n, nil)
		for name, cert := range map[string][]tls.Certificate{"alice": {s.ca.Client(t, "c", "alice")}, "": nil} {
			c, err := s.client(peertest.DialTLS(s.ca, "c", cert...), peer.ProtocolClients)
			if err != nil {
				t.Fatal(err)
			}
			served := accept(t, s.port.Clients())
			state, ok := peer.ConnectionState(served)
			if !ok || state.NegotiatedProtocol != "h2" || len(state.PeerCertificates) != len(cert) {
				t.Errorf("%v %+v", ok, state)
			}
			if name != "" && state.PeerCertificates[0].Subject.CommonName != name {
				t.Errorf("%v", state.PeerCertificates[0].Subject)
			}
			time.Sleep(time.Hour) // no deadline is left
			write(t, c, preface)
			expect(t, served, preface)
			write(t, served, "answer")
			expect(t, c, "answer")
			if err := served.Close(); err != nil {
				t.Error(err)
			}
			expectEnd(t, c, 0)
		}
		s.logs("remote", 0)
	})
}

func TestTLSPeer(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		var checked []string
		named := func(s tls.ConnectionState) string {
			return strings.TrimPrefix(s.PeerCertificates[0].URIs[0].Path, "/server/")
		}
		s := startSecure(t, n, func(cfg *peer.PortConfig) {
			cfg.Check = func(conn net.Conn, hello peer.Hello) error {
				checked = append(checked, hello.From)
				return peer.SameNode(conn, hello.From, named)
			}
		})
		d := s.dialer(s.ca.Server(t, "c", "n-b"))
		d.Check = func(conn net.Conn, remote peer.Hello) error { return peer.SameNode(conn, remote.From, named) }
		c := mustDial(t, d, "n-a", "a:8400").(*peer.Conn)
		p := accept(t, s.port.Peers()).(*peer.Conn)
		if p.Hello().From != "n-b" || c.Hello().To != "n-a" {
			t.Errorf("%+v %+v", p.Hello(), c.Hello())
		}
		for who, conn := range map[string]*peer.Conn{"n-b": p, "n-a": c} {
			state, ok := conn.ConnectionState()
			if !ok || state.NegotiatedProtocol != peer.ProtocolRaft || named(state) != who {
				t.Errorf("%s: %v %+v", who, ok, state)
			}
		}
		time.Sleep(time.Hour)
		write(t, c, "there")
		write(t, p, "back")
		expect(t, p, "there")
		expect(t, c, "back")
		// One direction ends, the other goes on.
		if err := c.CloseWrite(); err != nil {
			t.Error(err)
		}
		expectEnd(t, p, 0)
		write(t, p, "still")
		expect(t, c, "still")

		// Another node's certificate.
		d = s.dialer(s.ca.Server(t, "c", "n-z"))
		err := expectRefusal(t, d, "n-a", "a:8400", peer.ReasonCertificate)
		if !strings.Contains(err.Text, "the certificate is node n-z's, the greeting says n-b") {
			t.Error(err)
		}
		if len(checked) != 2 {
			t.Errorf("checked %v", checked)
		}
		s.logs("the certificate is node n-z's", 1)
	})
	t.Run("plaintext", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *peertest.Net) {
			p := startPort(t, n, "a", peer.PortConfig{})
			c := mustDial(t, newDialer(n, "b"), "n-a", "a:8400").(*peer.Conn)
			if _, ok := c.ConnectionState(); ok {
				t.Error("TLS without TLS")
			}
			if err := peer.SameNode(accept(t, p.Peers()), "n-b", nil); err != nil {
				t.Error(err)
			}
		})
	})
}

// TestTLSCertificates shows every wrong certificate to a port, as a client and as
// a node, and the port's to both.
func TestTLSCertificates(t *testing.T) {
	other := func(t *testing.T) *peertest.CA { return peertest.NewCA(t, "another CA") }
	type cert = []tls.Certificate
	for name, tc := range map[string]struct {
		cert func(*testing.T, *peertest.CA) cert
		raft string // what refuses a stream of Raft; empty: it is accepted
		grpc string // the same of gRPC
		// said is what the refused side gets to hear.
		said string
	}{
		"a node's":           {func(t *testing.T, ca *peertest.CA) cert { return cert{ca.Server(t, "c", "n-b")} }, "", "", ""},
		"a client's":         {func(t *testing.T, ca *peertest.CA) cert { return cert{ca.Client(t, "c", "alice")} }, "not one of a node of cluster c", "", "bad certificate"},
		"absent":             {func(*testing.T, *peertest.CA) cert { return nil }, "a node has to show a certificate", "", "bad certificate"},
		"expired":            {func(t *testing.T, ca *peertest.CA) cert { return cert{ca.Server(t, "c", "n-b", peertest.Expired)} }, "expired or is not yet valid", "expired or is not yet valid", "expired certificate"},
		"not yet valid":      {func(t *testing.T, ca *peertest.CA) cert { return cert{ca.Server(t, "c", "n-b", peertest.NotYetValid)} }, "expired or is not yet valid", "expired or is not yet valid", "expired certificate"},
		"of another CA":      {func(t *testing.T, _ *peertest.CA) cert { return cert{other(t).Server(t, "c", "n-b")} }, "unknown authority", "unknown authority", "unknown certificate authority"},
		"self-signed":        {func(t *testing.T, _ *peertest.CA) cert { return cert{peertest.SelfSigned.Server(t, "c", "n-b")} }, "unknown authority", "unknown authority", "unknown certificate authority"},
		"of another cluster": {func(t *testing.T, ca *peertest.CA) cert { return cert{ca.Server(t, "d", "n-b")} }, "not one of a node of cluster c", "", "bad certificate"},
		"for servers only": {func(t *testing.T, ca *peertest.CA) cert {
			return cert{ca.Server(t, "c", "n-b", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] })}
		}, "incompatible key usage", "incompatible key usage", "certificate"},
	} {
		t.Run("to the port/"+name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *peertest.Net) {
				s := startSecure(t, n, nil)
				shown := tc.cert(t, s.ca)
				show := func(cfg *tls.Config) *tls.Config {
					if len(shown) > 0 { // whatever the port asks for
						cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &shown[0], nil }
					}
					return cfg
				}
				d := s.dialer()
				d.TLS = func(string) *tls.Config { return show(peertest.DialTLS(s.ca, "c")) }
				if tc.raft == "" {
					mustDial(t, d, "n-a", "a:8400")
					accept(t, s.port.Peers())
				} else {
					for range 2 {
						err := expectRefusal(t, d, "n-a", "a:8400", peer.ReasonCertificate)
						if !strings.Contains(err.Text, "the other node does not accept this node's certificate") || !strings.Contains(err.Text, tc.said) {
							t.Error(err)
						}
						time.Sleep(time.Minute) // past the back-off
					}
					s.logs("this node refused the client's certificate", 1)
					s.logs(tc.raft, 1)
				}

				c, err := s.client(show(peertest.DialTLS(s.ca, "c")), peer.ProtocolClients)
				if err != nil {
					t.Fatal(err)
				}
				write(t, c, preface) // as gRPC does, without waiting
				if tc.grpc == "" {
					expect(t, accept(t, s.port.Clients()), preface)
					return
				}
				// Nor is what it says then in the way of the alert.
				for range 3 {
					time.Sleep(100 * time.Millisecond)
					write(t, c, preface)
				}
				if _, err := c.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "remote error: tls: ") || !strings.Contains(err.Error(), tc.said) {
					t.Errorf("read %v", err)
				}
				c.Close()
				s.logs(tc.grpc, 2) // another host's
			})
		})
	}

	for name, tc := range map[string]struct {
		cert   func(*testing.T, *peertest.CA) tls.Certificate
		want   string
		logged string
	}{
		"expired": {func(t *testing.T, ca *peertest.CA) tls.Certificate { return ca.Server(t, "c", "n-a", peertest.Expired) }, "expired or is not yet valid", "bad certificate"},
		"not yet valid": {func(t *testing.T, ca *peertest.CA) tls.Certificate {
			return ca.Server(t, "c", "n-a", peertest.NotYetValid)
		}, "expired or is not yet valid", "bad certificate"},
		"of another CA":      {func(t *testing.T, _ *peertest.CA) tls.Certificate { return other(t).Server(t, "c", "n-a") }, "unknown authority", "bad certificate"},
		"self-signed":        {func(t *testing.T, _ *peertest.CA) tls.Certificate { return peertest.SelfSigned.Server(t, "c", "n-a") }, "unknown authority", "bad certificate"},
		"of another cluster": {func(t *testing.T, ca *peertest.CA) tls.Certificate { return ca.Server(t, "d", "n-a") }, "server.c.diurna", "bad certificate"},
		"a client's":         {func(t *testing.T, ca *peertest.CA) tls.Certificate { return ca.Client(t, "c", "alice") }, "", "bad certificate"},
	} {
		t.Run("of the port/"+name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *peertest.Net) {
				s := startSecure(t, n, nil)
				s.port = startPort(t, n, "x", peer.PortConfig{
					Self: selfIs("n-a", "c1"), Logger: s.log.logger(),
					TLS: peertest.PortTLS(s.ca, "c", tc.cert(t, s.ca)),
				})
				err := expectRefusal(t, s.dialer(s.ca.Server(t, "c", "n-b")), "n-a", "x:8400", peer.ReasonCertificate)
				if !strings.Contains(err.Text, "this node does not accept the other's certificate") || !strings.Contains(err.Text, tc.want) {
					t.Error(err)
				}
				s.logs("the client refused this node's certificate", 1)
				s.logs(tc.logged, 1)
			})
		})
	}
}

// TestTLSProtocols: what ALPN does not settle is refused.
func TestTLSProtocols(t *testing.T) {
	for name, tc := range map[string]struct {
		offer []string
		want  string // in the log; empty: accepted
	}{
		"gRPC":           {[]string{"h2"}, ""},
		"gRPC and older": {[]string{"h2", "http/1.1"}, ""},
		"none":           {nil, "did not say by ALPN"},
		"HTTP/1":         {[]string{"http/1.1"}, "ALPN"},
		"next version":   {[]string{"diurna-raft/2"}, "unsupported application protocols"},
		"anything":       {[]string{"spdy\n"}, "unsupported application protocols"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *peertest.Net) {
				s := startSecure(t, n, nil)
				for range 2 {
					c, err := s.client(peertest.DialTLS(s.ca, "c", s.ca.Server(t, "c", "n-b")), tc.offer...)
					if tc.want == "" {
						if err != nil {
							t.Fatal(err)
						}
						write(t, c, preface)
						expect(t, accept(t, s.port.Clients()), preface)
						return
					}
					if err == nil {
						_, err = c.Read(make([]byte, 1))
					}
					if err == nil {
						t.Error("accepted")
					}
					c.Close()
				}
				s.logs(tc.want, 1)
			})
		})
	}
	// A node that agrees to another protocol, or none, is no node.
	t.Run("of the other side", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *peertest.Net) {
			s := startSecure(t, n, nil)
			l, err := n.Host("x").Listen(":8400")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_ = tls.Server(c, peertest.PortTLS(s.ca, "c", s.ca.Server(t, "c", "n-a"))).Handshake()
			}()
			_, err = s.dialer(s.ca.Server(t, "c", "n-b")).Dial(t.Context(), "n-a", "x:8400")
			if err == nil || !strings.Contains(err.Error(), "dial node n-a at x:8400: what listens there speaks TLS, but not diurna-raft/1") {
				t.Error(err)
			}
		})
	})
}

// TestTLSMismatch: one side speaks TLS, the other does not.
func TestTLSMismatch(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		s := startSecure(t, n, nil)
		for name, tc := range map[string]struct{ say, answer, log string }{
			"gRPC":     {preface, "\x15\x03\x01\x00\x02\x02\x46", "this port speaks TLS; the client tried plaintext"},
			"HTTP/1":   {"GET / HTTP/1.1\r\n\r\n", "", "the client tried HTTP/1 without it"},
			"anything": {"\x00\x01\x02\x03\x04\x05", "", "the first bytes are not TLS's"},
		} {
			for range 2 {
				c := knock(t, n, "client", "a", tc.say)
				if tc.answer != "" {
					for range 3 {
						time.Sleep(100 * time.Millisecond)
						write(t, c, "it talks on")
					}
				}
				if got, _ := io.ReadAll(c); string(got) != tc.answer {
					t.Errorf("%s: answered %q", name, got)
				}
				c.Close()
			}
			s.logs(tc.log, 1)
		}
		plain := newDialer(n, "b")
		err := expectRefusal(t, plain, "n-a", "a:8400", peer.ReasonMalformed)
		if !strings.Contains(err.Text, "no plaintext port of Diurna, but perhaps one with TLS") {
			t.Error(err)
		}
		s.logs("the client tried plaintext", 2) // another host

		// Not refused: there is no back-off.
		startPort(t, n, "x", peer.PortConfig{Self: selfIs("n-a", "c1")})
		d := s.dialer(s.ca.Server(t, "c", "n-b"))
		_, derr := d.Dial(t.Context(), "n-a", "x:8400")
		if _, refused := errors.AsType[*peer.RefusedError](derr); refused || derr == nil || !strings.Contains(derr.Error(), "dial node n-a at x:8400: ") || !strings.Contains(derr.Error(), "perhaps because what listens there speaks plaintext") {
			t.Error(derr)
		}
		d.TLS = func(string) *tls.Config { return nil }
		if _, err := d.Dial(t.Context(), "n-a", "a:8400"); err == nil || !strings.Contains(err.Error(), "no certificate yet") {
			t.Error(err)
		}
	})
}

// TestTLSConfigChanges: every handshake uses what holds then, and what is open
// goes on.
func TestTLSConfigChanges(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		before, after := peertest.NewCA(t, "before"), peertest.NewCA(t, "after")
		ca := before
		s := startSecure(t, n, func(cfg *peer.PortConfig) {
			cfg.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
				return peertest.PortTLS(ca, "c", ca.Server(t, "c", "n-a")), nil
			}}
		})
		d := newDialer(n, "b")
		d.TLS = func(string) *tls.Config { return peertest.DialTLS(ca, "c", ca.Server(t, "c", "n-b")) }
		old := mustDial(t, d, "n-a", "a:8400")
		accepted := accept(t, s.port.Peers())
		ca = after
		mustDial(t, d, "n-a", "a:8400")
		state, _ := peer.ConnectionState(accept(t, s.port.Peers()))
		if err := state.PeerCertificates[0].CheckSignatureFrom(after.Cert); err != nil {
			t.Error(err)
		}
		write(t, old, "goes on")
		expect(t, accepted, "goes on")
		// Verdicts of a chosen config are refusals, too.
		d.TLS = func(string) *tls.Config { return peertest.DialTLS(ca, "c", ca.Client(t, "c", "alice")) }
		_ = expectRefusal(t, d, "n-a", "a:8400", peer.ReasonCertificate)
		s.logs("this node refused the client's certificate", 1)
	})
}

// TestTLSRefusal: a refusal reaches the dialler as it does in plaintext, and the
// stream ends.
func TestTLSRefusal(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		s := startSecure(t, n, nil)
		d := s.dialer(s.ca.Server(t, "c", "n-b"))
		err := expectRefusal(t, d, "n-z", "a:8400", peer.ReasonNotMe)
		if !strings.Contains(err.Text, "this is node n-a") || err.RemoteCluster != "c1" {
			t.Errorf("%+v", err)
		}
		// One that talks on while it is refused reads why, and then the end.
		c, herr := s.client(peertest.DialTLS(s.ca, "c", s.ca.Server(t, "c", "n-b")), peer.ProtocolRaft)
		if herr != nil {
			t.Fatal(herr)
		}
		write(t, c, hello("diurna-raft/1\n", `{"from":"n-b","to":"n-x"}`))
		for range 9 {
			time.Sleep(100 * time.Millisecond)
			write(t, c, strings.Repeat("x", 1000))
		}
		begin := time.Now()
		if got, err := io.ReadAll(c); err != nil || time.Since(begin) != 0 || !strings.Contains(string(got), `"reason":"not_me"`) {
			t.Errorf("read %q, %v", got, err)
		}
	})
}

// TestTLSSilence: who is slow, silent or stops halfway is closed in time, is in
// nobody's way, and is not worth a line.
func TestTLSSilence(t *testing.T) {
	hello := clientHello(t)
	for name, say := range map[string]string{
		"nothing": "", "a byte": "\x16", "half a hello": hello[:len(hello)/2], "hello": hello,
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *peertest.Net) {
				s := startSecure(t, n, nil)
				c := knock(t, n, "x", "a", say)
				begin := time.Now()
				mustDial(t, s.dialer(s.ca.Server(t, "c", "n-b")), "n-a", "a:8400")
				accept(t, s.port.Peers())
				if took := time.Since(begin); took != 0 {
					t.Errorf("others waited %v", took)
				}
				if err := c.SetReadDeadline(begin.Add(time.Hour)); err != nil {
					t.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, c)
				if took := time.Since(begin); took != 10*time.Second {
					t.Errorf("closed after %v", took)
				}
				s.logs("remote", 0)
			})
		})
	}
	t.Run("after the handshake", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *peertest.Net) {
			s := startSecure(t, n, nil)
			c, err := s.client(peertest.DialTLS(s.ca, "c", s.ca.Server(t, "c", "n-b")), peer.ProtocolRaft)
			if err != nil {
				t.Fatal(err)
			}
			expectEnd(t, c, 10*time.Second)
		})
	})
	t.Run("byte by byte", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *peertest.Net) {
			startSecure(t, n, func(cfg *peer.PortConfig) { cfg.HandshakeTimeout = 3 * time.Second })
			c := knock(t, n, "x", "a", "")
			for _, b := range []byte(hello[:3]) {
				write(t, c, string(rune(b)))
				time.Sleep(999 * time.Millisecond)
			}
			expectEnd(t, c, 3*time.Millisecond)
		})
	})
	t.Run("crowd", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *peertest.Net) {
			s := startSecure(t, n, func(cfg *peer.PortConfig) { cfg.MaxHandshakes = 2 })
			var silent []net.Conn
			for range 3 {
				silent = append(silent, knock(t, n, "x", "a", hello[:9]))
				synctest.Wait()
			}
			expectEnd(t, silent[0], 0)
			mustDial(t, s.dialer(s.ca.Server(t, "c", "n-b")), "n-a", "a:8400")
			accept(t, s.port.Peers())
			s.logs("too many connections", 1)
		})
	})
}

// clientHello is the first that a client says.
func clientHello(t testing.TB) string {
	t.Helper()
	a, b := net.Pipe()
	defer b.Close()
	done := make(chan error, 1)
	go func() { done <- tls.Client(a, &tls.Config{ServerName: "x", NextProtos: []string{"h2"}}).Handshake() }()
	buf := make([]byte, 4096)
	n, err := b.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	if err := <-done; err == nil {
		t.Fatal("nobody answered, and yet the handshake is over")
	}
	return string(buf[:n])
}

// TestTLSGarbage: what follows a good beginning and makes no sense ends the
// connection at once.
func TestTLSGarbage(t *testing.T) {
	hello := clientHello(t)
	for name, say := range map[string]string{
		"after the hello": hello + "\x16\x03\x03\x00\x05garbage",
		"second hello":    hello + hello,
		"oversized":       hello + "\x16\x03\x03\xff\xff",
		"empty records":   hello + strings.Repeat("\x14\x03\x03\x00\x00", 100),
		"cut hello":       hello[:5] + "\x01\x00\x00\x02\x00\x00" + strings.Repeat("\x00", len(hello)-11),
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *peertest.Net) {
				s := startSecure(t, n, nil)
				begin := time.Now()
				for range 2 {
					c := knock(t, n, "x", "a", say)
					_, _ = io.Copy(io.Discard, c)
					c.Close()
				}
				if took := time.Since(begin); took > 2*time.Second { // two of linger's
					t.Errorf("took %v", took)
				}
				s.logs("the TLS handshake failed", 1)
			})
		})
	}
}

// FuzzTLSHandshake: whatever comes before a handshake is over, nothing is handed
// on, and the port goes on to serve others.
func FuzzTLSHandshake(f *testing.F) {
	hello := clientHello(f)
	f.Add([]byte(hello))
	f.Add([]byte(hello + "\x16\x03\x03\x00\x05garbage"))
	f.Add([]byte(preface))
	f.Add([]byte("diurna-raft/1\n"))
	f.Add([]byte("\x80\x2e\x01\x03\x01"))
	f.Add([]byte("\x15\x03\x01\x00\x02\x02\x46"))
	// Made once, and so at another time than is in the bubbles.
	ca := peertest.NewCA(f, "CA")
	now := time.Now()
	own, others := ca.Server(f, "c", "n-a"), ca.Server(f, "c", "n-b")
	at := func(cfg *tls.Config) *tls.Config {
		cfg.Time = func() time.Time { return now }
		return cfg
	}
	f.Fuzz(func(t *testing.T, say []byte) {
		synctest.Test(t, func(t *testing.T) {
			n := peertest.New(rand.New(rand.NewPCG(1, 2)))
			defer n.Close()
			p := startPort(t, n, "a", peer.PortConfig{TLS: at(peertest.PortTLS(ca, "c", own))})
			c := knock(t, n, "x", "a", "")
			_, _ = c.Write(say) // the port may have had enough
			_, _ = io.Copy(io.Discard, c)
			c.Close()
			synctest.Wait()
			d := newDialer(n, "b")
			d.TLS = func(string) *tls.Config { return at(peertest.DialTLS(ca, "c", others)) }
			mustDial(t, d, "n-a", "a:8400")
			if got := accept(t, p.Peers()).(*peer.Conn).Hello().From; got != "n-b" {
				t.Errorf("handed on %q", got)
			}
			clients := p.Clients()
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			if c, err := clients.Accept(); err == nil {
				t.Errorf("handed on %v", c)
			}
		})
	})
}

// TestTLSClose: closing the port waits for nobody who is in a handshake.
func TestTLSClose(t *testing.T) {
	bubble(t, func(t *testing.T, n *peertest.Net) {
		s := startSecure(t, n, nil)
		silent := knock(t, n, "x", "a", clientHello(t)[:20])
		synctest.Wait()
		begin := time.Now()
		if err := s.port.Close(); err != nil {
			t.Error(err)
		}
		expectEnd(t, silent, 0)
		if took := time.Since(begin); took != 0 {
			t.Errorf("took %v", took)
		}
	})
}

// BenchmarkPort moves data through a port, in plaintext and with TLS, in the
// chunks that gRPC and Raft write.
func BenchmarkPort(b *testing.B) {
	ca := peertest.NewCA(b, "CA")
	for _, secured := range []bool{false, true} {
		for _, direction := range []string{"to", "from"} {
			b.Run(fmt.Sprintf("TLS=%v/%s the port", secured, direction), func(b *testing.B) {
				l, err := peer.TCP.Listen("127.0.0.1:0")
				if err != nil {
					b.Fatal(err)
				}
				cfg := peer.PortConfig{Self: selfIs("n-a", "c1")}
				d := &peer.Dialer{Self: selfIs("n-b", "c1")}
				if secured {
					cfg.TLS = peertest.PortTLS(ca, "c", ca.Server(b, "c", "n-a"))
					mine := ca.Server(b, "c", "n-b")
					d.TLS = func(string) *tls.Config { return peertest.DialTLS(ca, "c", mine) }
				}
				p := peer.NewPort(l, cfg)
				defer p.Close()
				from, err := d.Dial(b.Context(), "n-a", p.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				to, err := p.Peers().Accept()
				if err != nil {
					b.Fatal(err)
				}
				if direction == "from" {
					from, to = to, from
				}
				done := make(chan struct{})
				go func() {
					defer close(done)
					_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{to}, make([]byte, 128<<10))
				}()
				chunk := make([]byte, 128<<10)
				b.SetBytes(int64(len(chunk)))
				for b.Loop() {
					if _, err := from.Write(chunk); err != nil {
						b.Fatal(err)
					}
				}
				from.Close()
				<-done
				to.Close()
			})
		}
	}
}
