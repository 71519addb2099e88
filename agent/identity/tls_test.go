package identity

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
)

// memory is a source whose answers a test sets.
type memory struct {
	pair *pair
	from *issuers
}

func (m *memory) fetch(context.Context) (*pair, *issuers, error) { return m.pair, m.from, nil }
func (m *memory) issuers(context.Context) (*issuers, error)      { return m.from, nil }
func (m *memory) changed() bool                                  { return false }
func (m *memory) scheduled() bool                                { return true }
func (m *memory) run(context.Context)                            {}

// of makes an identity with what a source in memory has.
func of(t *testing.T, m *memory, opts options) *Identity {
	t.Helper()
	logger, _ := newLogs(t, nil)
	i := &Identity{
		cfg: Config{Cluster: "Test", TLS: config.TLS{Source: "memory"}}, opts: opts, logger: logger, serverName: ServerName("Test"),
		minVersion: tls.VersionTLS12, src: m, fetching: make(chan struct{}, 1), renewKick: make(chan struct{}, 1),
		trustKick: make(chan struct{}, 1), changed: make(chan struct{}),
	}
	if err := i.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	return i
}

// crl is a revocation list.
func (a *authority) crl(t *testing.T, number int64, revoked ...*x509.Certificate) *x509.RevocationList {
	t.Helper()
	tmpl := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}
	for _, c := range revoked {
		tmpl.RevokedCertificateEntries = append(tmpl.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, tmpl, a.cert, a.key)
	if err != nil {
		t.Fatal(err)
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func nodeNames(id string) names { return serverNames("Test", "diurna", id, "127.0.0.1", nil) }

// TestWhoIsRefused shows every kind of bad certificate to both sides.
func TestWhoIsRefused(t *testing.T) {
	ca, stranger := authorityFor(t, "ours"), authorityFor(t, "strange")
	now := time.Now()
	good := ca.issue(t, nodeNames("n1"), true, time.Hour, now)
	revoked := ca.issue(t, nodeNames("n2"), true, time.Hour, now)
	wildcard, other := nodeNames("n3"), serverNames("Other", "diurna", "n4", "127.0.0.1", nil)
	wildcard.dns = []string{"*.test.diurna", "localhost"}
	selfSigned := authorityFor(t, "self")
	self := selfSigned.issue(t, nodeNames("n5"), true, time.Hour, now)
	self.cert.Certificate = append(self.cert.Certificate, selfSigned.cert.Raw)

	clientOnly := ca.issue(t, nodeNames("n6"), false, time.Hour, now)
	for name, tc := range map[string]struct {
		shown *pair
		// Errors of the side that looks: at a client that calls, at one that
		// wants to be a Raft peer, and at a server that was dialled.
		call, raft, dial error
		caller           Caller
	}{
		"a server":  {shown: good, caller: Caller{"spiffe://test.diurna/server/n1", true, "n1"}},
		"a client":  {shown: ca.issue(t, clientNames("Test", "app"), false, time.Hour, now), raft: ErrWrongRole, dial: errNoNames, caller: Caller{Subject: "spiffe://test.diurna/client/app"}},
		"nobody":    {raft: ErrNoCertificate, caller: Caller{Subject: "anonymous"}},
		"expired":   {shown: ca.issue(t, nodeNames("n1"), true, time.Hour, now.Add(-2*time.Hour)), call: errInvalid, raft: errInvalid, dial: errInvalid},
		"too early": {shown: ca.issue(t, nodeNames("n1"), true, time.Hour, now.Add(30*time.Minute)), call: errInvalid, raft: errInvalid, dial: errInvalid},
		"wrong CA":  {shown: stranger.issue(t, nodeNames("n1"), true, time.Hour, now), call: errUnknown, raft: errUnknown, dial: errUnknown},
		"self-made": {shown: self, call: errUnknown, raft: errUnknown, dial: errUnknown},
		"revoked":   {shown: revoked, call: ErrRevoked, raft: ErrRevoked, dial: ErrRevoked},
		"a server of another cluster": {shown: ca.issue(t, other, true, time.Hour, now), raft: ErrWrongRole, dial: errHost,
			caller: Caller{Subject: "spiffe://other.diurna/server/n4"}},
		"a wildcard": {shown: ca.issue(t, wildcard, true, time.Hour, now), raft: ErrWrongRole, dial: ErrWrongRole, caller: Caller{Subject: "spiffe://test.diurna/server/n3"}},
		"not for servers": {shown: clientOnly, dial: errBadUsage,
			caller: Caller{"spiffe://test.diurna/server/n6", true, "n6"}},
	} {
		t.Run(name, func(t *testing.T) {
			i := of(t, &memory{good, &issuers{certs: []*x509.Certificate{ca.cert}, crls: []*x509.RevocationList{ca.crl(t, 1, revoked.leaf)}, complete: true}}, hurried())
			trusted := i.cur.Load().trust.pool
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				for proto, want := range map[string]error{"h2": tc.call, ALPNRaft: tc.raft} {
					srv := serve(t, i.Server("h2", ALPNRaft))
					client := &tls.Config{RootCAs: trusted, ServerName: ServerName("Test"), NextProtos: []string{proto}, MinVersion: version, MaxVersion: version}
					if tc.shown != nil {
						client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return tc.shown.cert, nil }
					}
					conn, err := srv.handshake(t, client)
					if !matches(err, want) {
						t.Errorf("TLS %x, %s: error %v, not %v", version, proto, err, want)
					}
					if err == nil {
						if c := i.Caller(conn.ConnectionState()); c != tc.caller {
							t.Errorf("TLS %x, %s: caller %+v, not %+v", version, proto, c, tc.caller)
						}
					}
				}
			}
			if tc.shown == nil {
				return
			}
			srv := serve(t, &tls.Config{Certificates: []tls.Certificate{*tc.shown.cert}, NextProtos: []string{ALPNRaft}})
			if _, err := srv.dial(t, i.Peer(ALPNRaft)); !matches(err, tc.dial) {
				t.Errorf("dialled: error %v, not %v", err, tc.dial)
			}
		})
	}
}

// What the standard library says.
var (
	errInvalid  = errors.New("has expired or is not yet valid")
	errUnknown  = errors.New("signed by unknown authority")
	errBadUsage = errors.New("incompatible key usage")
	errHost     = errors.New("certificate is valid for")
	errNoNames  = errors.New("is not valid for any names")
)

func matches(err, want error) bool {
	if err == nil || want == nil {
		return err == want
	}
	return errors.Is(err, want) || strings.Contains(err.Error(), want.Error())
}

// handshake returns the server's view: the connection, or its error.
func (s *server) handshake(t *testing.T, c *tls.Config) (*tls.Conn, error) {
	t.Helper()
	seen := make(chan *tls.Conn, 1)
	s.seen.Store(&seen)
	d := &tls.Dialer{Config: c}
	conn, err := d.DialContext(t.Context(), "tcp", s.addr)
	if err == nil {
		t.Cleanup(func() { _ = conn.Close() })
	}
	if err := <-s.errs; err != nil {
		return nil, err
	}
	return <-seen, nil
}

// TestCallerNames has names that could be taken for others name nobody.
func TestCallerNames(t *testing.T) {
	ca := authorityFor(t, "ca")
	i := of(t, &memory{ca.issue(t, nodeNames("n1"), true, time.Hour, time.Now()), &issuers{certs: []*x509.Certificate{ca.cert}}}, hurried())
	uri := func(text string) *url.URL {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	for _, tc := range []struct {
		n    names
		want Caller
	}{
		{names{common: "alice"}, Caller{Subject: "alice"}},
		{names{}, Caller{Subject: "anonymous"}},
		{names{common: "spiffe://test.diurna/client/admin"}, Caller{Subject: "anonymous"}},
		{names{common: "role:admin"}, Caller{Subject: "anonymous"}},
		{names{common: "bob", uris: []*url.URL{uri("role:admin")}}, Caller{Subject: "bob"}},
		{names{common: "bob", uris: []*url.URL{uri("role:admin"), uri("spiffe://x/y")}}, Caller{Subject: "spiffe://x/y"}},
		{names{common: "bob", uris: []*url.URL{uri("spiffe://test.diurna/server/n9")}}, Caller{Subject: "spiffe://test.diurna/server/n9"}},
		{names{dns: []string{"SERVER.test.diurna"}, uris: []*url.URL{uri("spiffe://TEST.diurna/server/n9")}}, Caller{Subject: "spiffe://TEST.diurna/server/n9", Server: true, NodeID: "n9"}},
		{names{dns: []string{"server.test.diurna"}, uris: []*url.URL{uri("spiffe://other.diurna/server/n9")}}, Caller{Subject: "spiffe://other.diurna/server/n9", Server: true}},
	} {
		leaf := ca.issue(t, tc.n, true, time.Hour, time.Now()).leaf
		if got := i.Caller(tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{leaf, ca.cert}}}); got != tc.want {
			t.Errorf("%v: caller %+v, not %+v", tc.n, got, tc.want)
		}
		if got := i.Caller(tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}); got.Subject != anonymous || got.Server {
			t.Errorf("not verified, and caller %+v", got)
		}
	}
}

// TestRotation changes the certificate, and then the CA, under open
// connections.
func TestRotation(t *testing.T) {
	old, next := authorityFor(t, "old"), authorityFor(t, "new")
	certs := func(as ...*authority) *issuers {
		from := &issuers{complete: true}
		for _, a := range as {
			from.certs = append(from.certs, a.cert)
		}
		return from
	}
	now := time.Now()
	ms, mc := &memory{old.issue(t, nodeNames("s"), true, time.Hour, now), certs(old)}, &memory{old.issue(t, nodeNames("c"), true, time.Hour, now), certs(old)}
	s, c := of(t, ms, hurried()), of(t, mc, hurried())
	listener := s.Server("h2", ALPNRaft)
	srv := serve(t, listener)
	var conns []*tls.Conn
	connect := func(what string, want *pair) {
		t.Helper()
		conn, err := srv.dial(t, c.Peer(ALPNRaft))
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		conns = append(conns, conn)
		if got := serialSeen(conn); got != serialOf(want.leaf) {
			t.Errorf("%s: serial %s, not %s", what, got, serialOf(want.leaf))
		}
		for k, open := range conns {
			if err := echo(open); err != nil {
				t.Errorf("%s: connection %d: %v", what, k, err)
			}
		}
	}
	set := func(i *Identity, m *memory, p *pair, from *issuers) {
		t.Helper()
		changed := i.Changed()
		m.pair, m.from = p, from
		if err := i.renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-changed
	}
	connect("at first", ms.pair)
	set(s, ms, old.issue(t, nodeNames("s"), true, time.Hour, now), certs(old))
	connect("another certificate", ms.pair)

	// A new CA, in two orders: a server with it before the client knows, and
	// the reverse.
	set(s, ms, next.issue(t, nodeNames("s"), true, time.Hour, now), certs(old, next))
	if _, err := srv.dial(t, c.Peer(ALPNRaft)); !matches(err, errUnknown) {
		t.Errorf("a CA that the client does not know: %v", err)
	}
	set(c, mc, mc.pair, certs(old, next))
	connect("the server is of the new CA", ms.pair)
	set(c, mc, next.issue(t, nodeNames("c"), true, time.Hour, now), certs(next))
	connect("both are", ms.pair)

	// The old one is kept for as long as its certificates live.
	if n := c.cur.Load().trust.size; n != 2 {
		t.Errorf("%d CAs are trusted, not 2", n)
	}
}

// TestTakenBackMeanwhile refuses whom a CA vouches for that was trusted when
// the handshake began, and is not when it ends.
func TestTakenBackMeanwhile(t *testing.T) {
	ours, theirs := authorityFor(t, "ours"), authorityFor(t, "theirs")
	m := &memory{ours.issue(t, nodeNames("n1"), true, time.Hour, time.Now()), &issuers{certs: certs(ours, theirs), complete: true, exact: true}}
	i := of(t, m, hurried())
	began := i.Server(ALPNRaft)
	peer := theirs.issue(t, nodeNames("n2"), true, time.Hour, time.Now())
	chain := tls.ConnectionState{
		NegotiatedProtocol: ALPNRaft, PeerCertificates: []*x509.Certificate{peer.leaf},
		VerifiedChains: [][]*x509.Certificate{{peer.leaf, theirs.cert}},
	}
	if err := began.VerifyConnection(chain); err != nil {
		t.Errorf("at first: %v", err)
	}
	m.from = &issuers{certs: certs(ours), complete: true, exact: true}
	if err := i.refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := began.VerifyConnection(chain); !errors.Is(err, ErrUntrusted) {
		t.Errorf("afterwards: %v", err)
	}
}
