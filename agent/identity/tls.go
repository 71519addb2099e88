package identity

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
)

// minVersion is that of config's tls.min_version.
func minVersion(name string) (uint16, error) {
	switch name {
	case "", "1.3":
		return tls.VersionTLS13, nil
	case "1.2":
		return tls.VersionTLS12, nil
	}
	return 0, fmt.Errorf(`identity: tls.min_version = %q is neither "1.2" nor "1.3"`, name)
}

// Server is the configuration for a listener that speaks these protocols
// (ALPN). Each handshake uses the certificate and the trust of its moment. A
// client need not show a certificate, but one that it shows has to be good; who
// speaks ALPNRaft has to show that of a server of this cluster.
//
// Give HandshakeFailed the errors of handshakes.
func (i *Identity) Server(protocols ...string) *tls.Config {
	c := i.server(protocols)
	// Go keeps the ClientCAs of a configuration for as long as it lives.
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return i.server(protocols), nil }
	return c
}

func (i *Identity) server(protocols []string) *tls.Config {
	cur := i.cur.Load()
	return &tls.Config{
		Time:         i.opts.now,
		MinVersion:   i.minVersion,
		NextProtos:   protocols,
		Certificates: []tls.Certificate{*cur.pair.cert},
		ClientCAs:    cur.trust.pool,
		ClientAuth:   tls.VerifyClientCertIfGiven,
		// A ticket would carry a verified client past its expiry.
		SessionTicketsDisabled: true,
		VerifyConnection:       i.verifyClient,
	}
}

// Peer is the configuration for one dial to another node. Make it anew for each
// dial: whom to trust is that of the moment. Whoever answers has to be a server
// of this cluster.
//
// Give HandshakeFailed the errors of handshakes.
func (i *Identity) Peer(protocols ...string) *tls.Config {
	cur := i.cur.Load()
	return &tls.Config{
		Time:       i.opts.now,
		MinVersion: i.minVersion,
		NextProtos: protocols,
		RootCAs:    cur.trust.pool,
		ServerName: i.serverName,
		// Whatever CAs the server asks for: it may be about to learn of ours.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return i.cur.Load().pair.cert, nil
		},
		SessionTicketsDisabled: true,
		VerifyConnection:       i.verifyServer,
	}
}

// verifyClient is called at the end of a server's handshake, after the chain of
// the client's certificate, if any, was verified.
func (i *Identity) verifyClient(cs tls.ConnectionState) error {
	raft := cs.NegotiatedProtocol == ALPNRaft
	if len(cs.PeerCertificates) == 0 {
		if raft {
			return ErrNoCertificate
		}
		return nil
	}
	return i.verify(cs, raft)
}

// verifyServer is called at the end of a client's handshake.
func (i *Identity) verifyServer(cs tls.ConnectionState) error { return i.verify(cs, true) }

func (i *Identity) verify(cs tls.ConnectionState, server bool) error {
	if len(cs.VerifiedChains) == 0 {
		return ErrUntrusted
	}
	leaf := cs.VerifiedChains[0][0]
	cur := i.cur.Load()
	if bad := cur.trust.revokedOf(cs.VerifiedChains); bad != nil {
		return fmt.Errorf("%s: %w: serial %s", describe(leaf), ErrRevoked, serialOf(bad))
	}
	// The chain was verified with the CAs of the handshake's begin, and one of
	// them may have been taken back since.
	if !cur.trust.reaches(cs.VerifiedChains) {
		return fmt.Errorf("%s: %w", describe(leaf), ErrUntrusted)
	}
	if server && !holdsDNS(leaf, i.serverName) {
		return fmt.Errorf("%s: %w: it lacks the DNS name %s", describe(leaf), ErrWrongRole, i.serverName)
	}
	i.keep(leaf)
	return nil
}

// reaches tells whether a chain ends at a CA that is trusted now.
func (t *trust) reaches(chains [][]*x509.Certificate) bool {
	for _, chain := range chains {
		last := chain[len(chain)-1]
		for _, a := range t.anchors {
			if a.cert.Equal(last) && !t.revokedAnchor(last) {
				return true
			}
		}
	}
	return false
}
