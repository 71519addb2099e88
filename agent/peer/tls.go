package peer

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"syscall"
)

// What a TLS connection to a Port is for, as the two sides agree by ALPN.
const (
	ProtocolClients = "h2"
	ProtocolRaft    = magicName + version // "diurna-raft/1"
)

// ConnectionState is what TLS found out about the other side of conn, which may
// be one that a Port or a Dialer made, what they give to a Check, or something
// with NetConn around such. ok is false where conn is plaintext or its handshake
// is not over.
func ConnectionState(conn net.Conn) (state tls.ConnectionState, ok bool) {
	for {
		switch c := conn.(type) {
		case interface{ ConnectionState() tls.ConnectionState }:
			state = c.ConnectionState()
			return state, state.HandshakeComplete
		case interface{ NetConn() net.Conn }:
			conn = c.NetConn()
		default:
			return tls.ConnectionState{}, false
		}
	}
}

// SameNode is for a Check: it refuses a peer whose certificate names another
// node than id, which is what its greeting said. named returns the node id that
// the verified certificate names, empty where it names none; such a one passes, as
// does a connection without TLS. The error is a *RefusedError.
//
//	Check: func(conn net.Conn, hello peer.Hello) error {
//		return peer.SameNode(conn, hello.From, nodeIDOf)
//	}
func SameNode(conn net.Conn, id string, named func(tls.ConnectionState) string) error {
	state, ok := ConnectionState(conn)
	if !ok {
		return nil
	}
	if len(state.PeerCertificates) == 0 {
		return Refuse(ReasonCertificate, "node %s has shown no certificate", id)
	}
	if said := named(state); said != "" && said != id {
		return Refuse(ReasonCertificate, "the certificate is node %s's, the greeting says %s", said, id)
	}
	return nil
}

// withProtocols is a copy of cfg that speaks these protocols only, and whose
// verdicts on certificates can be told from other failures.
func withProtocols(cfg *tls.Config, protocols ...string) *tls.Config {
	cfg = cfg.Clone()
	cfg.NextProtos = protocols
	if verify := cfg.VerifyConnection; verify != nil {
		cfg.VerifyConnection = func(state tls.ConnectionState) error { return verdict(verify(state)) }
	}
	if verify := cfg.VerifyPeerCertificate; verify != nil {
		cfg.VerifyPeerCertificate = func(raw [][]byte, chains [][]*x509.Certificate) error { return verdict(verify(raw, chains)) }
	}
	if choose := cfg.GetConfigForClient; choose != nil {
		cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			chosen, err := choose(hello)
			if err != nil || chosen == nil {
				return nil, err
			}
			return withProtocols(chosen, protocols...), nil
		}
	}
	return cfg
}

// verdictError is a refusal by a config's own verification.
type verdictError struct{ err error }

func (e *verdictError) Error() string { return e.err.Error() }
func (e *verdictError) Unwrap() error { return e.err }

func verdict(err error) error {
	if err == nil {
		return nil
	}
	return &verdictError{err}
}

// certificateAlerts are what the other side sends that refuses a certificate.
// crypto/tls gives alerts no exported type; their texts are the same.
var certificateAlerts = func() (texts []string) {
	for _, code := range []tls.AlertError{42, 43, 44, 45, 46, 48, 49, 116} {
		texts = append(texts, code.Error())
	}
	return texts
}()

// fault is whose certificate was refused in a failed handshake, by whom.
type fault int

const (
	faultNone   fault = iota // something else went wrong
	faultTheirs              // we refused theirs
	faultOurs                // they refused ours
)

// blame says so. In TLS 1.3 the side that dialled learns what became of its own
// certificate only when it reads.
func blame(err error) fault {
	if remote, ok := errors.AsType[*net.OpError](err); ok && remote.Op == "remote error" {
		if slices.Contains(certificateAlerts, remote.Err.Error()) {
			return faultOurs
		}
		return faultNone
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return faultTheirs
	}
	if _, ok := errors.AsType[*verdictError](err); ok {
		return faultTheirs
	}
	return faultNone
}

// broken tells an error of the connection itself: it ended, or took too long.
func broken(err error) bool {
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		return true
	}
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, io.ErrClosedPipe) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// Why a port with TLS closes a connection.
var (
	errPlaintext = errors.New("this port speaks TLS; the client tried plaintext")
	errHTTPTLS   = errors.New("this port speaks gRPC over TLS; the client tried HTTP/1 without it")
	errNoTLS     = errors.New("the first bytes are not TLS's")
	errALPN      = errors.New("the client did not say by ALPN that it speaks " + ProtocolClients + " or " + ProtocolRaft)
)

// handshakeError is a TLS handshake that failed on the accepting side, other
// than by the connection's end. kind is for comparing: it has nothing in it that
// changes between two failures of the same cause.
type handshakeError struct {
	kind, text string
	err        error
}

func (e *handshakeError) Error() string { return e.text + ": " + printable(e.err.Error()) }
func (e *handshakeError) Unwrap() error { return e.err }

// secure does the handshake of TLS with a client or a peer, whichever it turns
// out to be.
func (p *Port) secure(raw net.Conn) (kind, net.Conn, error) {
	conn := tls.Server(raw, p.tls)
	if err := conn.Handshake(); err != nil {
		if p.cfg.Failed != nil {
			p.cfg.Failed(err)
		}
		return 0, nil, p.insecure(raw, err)
	}
	switch conn.ConnectionState().NegotiatedProtocol {
	case ProtocolClients:
		return forClients, conn, nil
	case ProtocolRaft:
		return forPeers, conn, nil
	}
	return 0, nil, errALPN
}

// insecure says why a handshake failed, and sees to it that the other side
// learns so.
func (p *Port) insecure(raw net.Conn, err error) error {
	if header, ok := errors.AsType[tls.RecordHeaderError](err); ok && header.Conn != nil {
		switch header.RecordHeader[0] {
		case 'P', magic[0]:
			// They are ours, most likely, and know an alert when they see one.
			if _, werr := raw.Write(alertNotTLS); werr == nil {
				linger(raw)
			}
			return errPlaintext
		case 'G', 'H', 'O', 'D', 'C', 'T':
			return errHTTPTLS
		}
		return errNoTLS
	}
	if broken(err) {
		return fmt.Errorf("%w: %w", errSilent, err)
	}
	failure := &handshakeError{kind: "TLS", text: "the TLS handshake failed", err: err}
	switch blame(err) {
	case faultTheirs:
		failure.text = "this node refused the client's certificate"
		failure.kind = "certificate " + certificateFault(err)
	case faultOurs:
		failure.text = "the client refused this node's certificate"
		failure.kind = "own certificate " + err.Error()
	}
	// An alert is on its way. What the client has sent in the meantime would
	// reset the connection, and the alert be lost with it.
	linger(raw)
	return failure
}

// alertNotTLS is a fatal alert, "protocol version", as TLS servers answer to
// something else.
var alertNotTLS = []byte{0x15, 0x03, 0x01, 0x00, 0x02, 0x02, 0x46}

// certificateFault names what was wrong with a certificate, without the times
// and names that the error's text has.
func certificateFault(err error) string {
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		return fmt.Sprintf("invalid %d", invalid.Reason)
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "of an unknown authority"
	}
	return "unfit"
}

// shown is whom the refused certificate is for, for the log.
func shown(err error) (args []any) {
	verification, ok := errors.AsType[*tls.CertificateVerificationError](err)
	if !ok || len(verification.UnverifiedCertificates) == 0 {
		return nil
	}
	cert := verification.UnverifiedCertificates[0]
	name := cert.Subject.CommonName
	if len(cert.URIs) > 0 {
		name = cert.URIs[0].String()
	}
	return []any{"certificate", printable(name), "issuer", printable(cert.Issuer.CommonName)}
}

// secure does the handshake of TLS with a node.
func (d *Dialer) secure(raw net.Conn, address string) (*tls.Conn, error) {
	cfg := d.TLS(ProtocolRaft)
	if cfg == nil {
		return nil, errors.New("this node has no certificate yet")
	}
	cfg = withProtocols(cfg, ProtocolRaft)
	if cfg.ServerName == "" {
		cfg.ServerName = address
		if host, _, err := net.SplitHostPort(address); err == nil {
			cfg.ServerName = host
		}
	}
	conn := tls.Client(raw, cfg)
	if err := conn.Handshake(); err != nil {
		if d.Failed != nil {
			d.Failed(err)
		}
		return nil, tlsFailure(err)
	}
	if got := conn.ConnectionState().NegotiatedProtocol; got != ProtocolRaft {
		return nil, fmt.Errorf("what listens there speaks TLS, but not %s", ProtocolRaft)
	}
	return conn, nil
}

// tlsFailure is what a failure of TLS means to the side that dialled: a refusal where
// it is about a certificate.
func tlsFailure(err error) error {
	switch blame(err) {
	case faultTheirs:
		return Refuse(ReasonCertificate, "this node does not accept the other's certificate: %s", printable(err.Error()))
	case faultOurs:
		return Refuse(ReasonCertificate, "the other node does not accept this node's certificate: %s", printable(err.Error()))
	}
	if header, ok := errors.AsType[tls.RecordHeaderError](err); ok && header.Conn != nil {
		return fmt.Errorf("what listens there does not speak TLS: %w", err)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("the connection ended during the TLS handshake, perhaps because what listens there speaks plaintext: %w", err)
	}
	return fmt.Errorf("TLS handshake: %w", err)
}
