package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"syscall"

	"google.golang.org/grpc/credentials"
)

// TLSFiles says how to secure connections: with files in PEM. Every field may be
// left out; CertFile and KeyFile belong together.
type TLSFiles struct {
	// CAFile holds the certificates of those who sign the nodes'. Empty means
	// the machine's own roots.
	CAFile string
	// CertFile and KeyFile are what the client shows of itself: its certificate,
	// with those between it and the CA, and the key to it.
	CertFile, KeyFile string
	// ServerName is the name that a node's certificate must have. Empty means
	// the host that is dialled. server.<cluster>.diurna is in every node's.
	ServerName string
}

// WithTLS secures connections with TLS, 1.2 or newer. The files are read anew
// for every connection, so that what replaces them counts from then on; open
// connections stay. Dial fails where they cannot be read, a later connection
// with reason TLS_FAILED.
func WithTLS(files TLSFiles) Option {
	return func(o *options) { o.tls = &files }
}

// config reads the files.
func (f TLSFiles) config() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"}, ServerName: f.ServerName}
	if f.CAFile != "" {
		pem, err := os.ReadFile(f.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read the CA file: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("the CA file %s holds no certificate in PEM", f.CAFile)
		}
	}
	switch {
	case f.CertFile != "" && f.KeyFile != "":
		cert, err := loadPair(f.CertFile, f.KeyFile)
		if err != nil {
			return nil, err
		}
		// Whatever the node asks for: it says better than we why it does not do.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	case f.CertFile != "":
		return nil, fmt.Errorf("the key to the client certificate %s is missing", f.CertFile)
	case f.KeyFile != "":
		return nil, fmt.Errorf("the client certificate to the key %s is missing", f.KeyFile)
	}
	return cfg, nil
}

func loadPair(certFile, keyFile string) (*tls.Certificate, error) {
	certPEM, err := os.ReadFile(certFile)
	if err != nil {
		return nil, fmt.Errorf("read the client certificate: %w", err)
	}
	keyPEM, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, fmt.Errorf("read the client key: %w", err)
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("the client certificate %s and the key %s are of no use: %w", certFile, keyFile, err)
	}
	return &cert, nil
}

// What Error.Metadata["cause"] says with TLS_FAILED.
const (
	// CauseFiles: the client's own files cannot be used.
	CauseFiles = "files"
	// CauseUntrusted: no CA that the client trusts has signed the node's
	// certificate.
	CauseUntrusted = "untrusted"
	// CauseWrongName: the node's certificate is for other names.
	CauseWrongName = "wrong_name"
	// CauseNotValid: it has expired, is not valid yet, or is not a server's.
	CauseNotValid = "not_valid"
	// CauseRefused: the node does not accept the client's certificate.
	CauseRefused = "refused"
	// CauseRequired: the node wants a client certificate and was shown none.
	CauseRequired = "required"
	// CausePlaintext: what answers speaks plaintext, the client TLS.
	CausePlaintext = "plaintext"
	// CauseTLS: the node speaks TLS, the client plaintext.
	CauseTLS = "tls"
	// CauseOther: anything else, see the message.
	CauseOther = "other"
)

// tlsError is why a connection could not be secured.
type tlsError struct {
	cause        string
	text, advice string
	err          error // may be nil
}

func (e *tlsError) Error() string {
	if e.err == nil {
		return e.text
	}
	return e.text + ": " + e.err.Error()
}

func (e *tlsError) Unwrap() error { return e.err }

// alerts by which a node refuses a certificate. crypto/tls gives alerts no
// exported type; their texts are the same.
const alertRequired = tls.AlertError(116)

var certificateAlerts = func() (texts []string) {
	for _, code := range []tls.AlertError{42, 43, 44, 45, 46, 48, 49} {
		texts = append(texts, code.Error())
	}
	return texts
}()

// explainTLS says who refused whom, and why. nil means that the connection just
// ended.
func explainTLS(err error) *tlsError {
	if already, ok := errors.AsType[*tlsError](err); ok {
		return already
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" {
		switch text := op.Err.Error(); {
		case text == alertRequired.Error():
			return &tlsError{CauseRequired, "the node wants a client certificate", "Give one, with its key.", err}
		case slices.Contains(certificateAlerts, text):
			return &tlsError{CauseRefused, "the node refused this client's certificate", "Use one that is valid and signed by a CA which the cluster trusts. The node's log says more.", err}
		}
		return &tlsError{CauseOther, "the node refused the TLS handshake", "The node's log says more.", err}
	}
	if header, ok := errors.AsType[tls.RecordHeaderError](err); ok && header.Conn != nil {
		return &tlsError{CausePlaintext, "the node speaks plaintext, this client TLS", "Connect without TLS, or to another port.", nil}
	}
	if v, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return explainCertificate(v)
	}
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() || errors.Is(err, context.Canceled) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrClosedPipe) {
		return nil
	}
	return &tlsError{CauseOther, "the TLS handshake failed", "", err}
}

func explainCertificate(v *tls.CertificateVerificationError) *tlsError {
	if _, ok := errors.AsType[x509.HostnameError](v); ok {
		return &tlsError{CauseWrongName, "the node's certificate is for another name", "Dial the node by a name that its certificate has, or say which name to expect: server.<cluster>.diurna is in every node's.", v.Err}
	}
	if _, ok := errors.AsType[x509.CertificateInvalidError](v); ok {
		return &tlsError{CauseNotValid, "the node's certificate is not valid", "If the clocks are right, the node needs a new certificate.", v.Err}
	}
	advice := "Name the file of the CA that has signed the nodes' certificates."
	if len(v.UnverifiedCertificates) > 0 {
		if issuer := v.UnverifiedCertificates[0].Issuer.String(); issuer != "" {
			advice = fmt.Sprintf("Name the file of the CA that has signed the nodes' certificates; this one's calls itself %q.", issuer)
		}
	}
	return &tlsError{CauseUntrusted, "the node's certificate is not trusted: it is not signed by a CA that this client knows", advice, v.Err}
}

// watchedCreds are credentials that note why a connection of their endpoint
// could not be secured, which gRPC would only tell as text.
type watchedCreds struct {
	credentials.TransportCredentials
	ep *endpoint
}

// ClientHandshake implements credentials.TransportCredentials.
func (w watchedCreds) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := w.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		w.ep.unsecured(err)
		return nil, nil, err
	}
	return &watchedConn{Conn: conn, ep: w.ep, plaintext: w.Info().SecurityProtocol == "insecure"}, info, nil
}

// Clone implements credentials.TransportCredentials.
func (w watchedCreds) Clone() credentials.TransportCredentials {
	return watchedCreds{w.TransportCredentials.Clone(), w.ep}
}

// unsecured notes why a connection could not be.
func (ep *endpoint) unsecured(err error) {
	var why error
	if failed := explainTLS(err); failed != nil {
		why = failed
	} else if errors.Is(err, context.Canceled) {
		return // as in watchDial
	} else {
		why = &endedError{err}
	}
	ep.dialErr.Store(&why)
}

// endedError is a connection that ended while it was being secured.
type endedError struct{ err error }

func (e *endedError) Error() string {
	return "the connection ended during the TLS handshake, perhaps because the node speaks plaintext or is stopping: " + e.err.Error()
}

func (e *endedError) Unwrap() error { return e.err }

// watchedConn looks at the first that the node says. With TLS 1.3 that is where
// the client learns what the node thinks of its certificate; and a node that
// speaks TLS answers to plaintext with an alert.
type watchedConn struct {
	net.Conn
	ep        *endpoint
	plaintext bool
	spoke     atomic.Bool
}

// alertType is the first byte of a TLS record that is an alert. In HTTP/2 it
// would begin a frame of a megabyte, before anything was settled.
const alertType = 0x15

// Read implements net.Conn.
func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.spoke.Load() {
		return n, err
	}
	switch {
	case n > 0 && c.plaintext && p[0] == alertType:
		failed := &tlsError{CauseTLS, "the node speaks TLS, this client plaintext", "Connect with TLS.", nil}
		c.ep.unsecured(failed)
		return 0, failed
	case n > 0:
		c.spoke.Store(true)
		c.ep.client.spoke.Store(true)
		c.ep.dialErr.Store(nil)
	case err != nil && !c.plaintext && explainTLS(err) != nil:
		c.ep.unsecured(err)
	case err != nil:
		c.ep.dialErr.Store(nil) // gRPC says it as well as we could
	}
	return n, err
}

// fileCreds are those of WithTLS.
type fileCreds struct{ files TLSFiles }

// ClientHandshake implements credentials.TransportCredentials.
func (f fileCreds) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cfg, err := f.files.config()
	if err != nil {
		return nil, nil, &tlsError{CauseFiles, "the files for TLS cannot be used", "", err}
	}
	if cfg.ServerName == "" {
		cfg.ServerName = authority
		if host, _, err := net.SplitHostPort(authority); err == nil {
			cfg.ServerName = host
		}
		if cfg.ServerName == "" {
			cfg.ServerName = "localhost" // which is what is dialled
		}
	}
	conn := tls.Client(raw, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close() // the handshake's error is what counts
		return nil, nil, err
	}
	state := conn.ConnectionState()
	if state.NegotiatedProtocol != "h2" {
		_ = raw.Close()
		return nil, nil, &tlsError{CauseOther, "what answers speaks TLS, but not gRPC", "Is the address that of a Diurna node?", nil}
	}
	return conn, credentials.TLSInfo{
		State:          state,
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}, nil
}

// ServerHandshake implements credentials.TransportCredentials.
func (fileCreds) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are a client's")
}

// Info implements credentials.TransportCredentials.
func (f fileCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (f fileCreds) Clone() credentials.TransportCredentials { return f }

// OverrideServerName implements credentials.TransportCredentials.
func (fileCreds) OverrideServerName(string) error { return nil }
