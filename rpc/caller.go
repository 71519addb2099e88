package rpc

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// Caller is who makes a call, by the certificate of the connection.
type Caller struct {
	// Subject is what permissions and the log name the caller by.
	Subject string
	// Server says that it is a node of this cluster: it may do everything, and
	// is the only one that may use the service Peer.
	Server bool
	// NodeID is the node's id, empty where its certificate does not name one.
	NodeID string
}

// CallerFrom is who makes the call of ctx; ok is false without TLS, and where
// there is no verified certificate.
func CallerFrom(ctx context.Context) (caller Caller, ok bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Caller{}, false
	}
	info, ok := p.AuthInfo.(*acceptedInfo)
	if !ok || !info.verified {
		return Caller{}, false
	}
	return info.caller, true
}

// acceptedInfo is what is known of an accepted connection. It is found out once
// for the connection, and not again for each call.
type acceptedInfo struct {
	credentials.TLSInfo
	caller   Caller
	verified bool
}

// acceptedTLS is the server's credentials where the listener hands out
// connections that are past their TLS handshake.
type acceptedTLS struct {
	who func(tls.ConnectionState) Caller
}

var _ credentials.TransportCredentials = acceptedTLS{}

// ServerHandshake implements credentials.TransportCredentials.
func (a acceptedTLS) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	state, ok := tlsState(conn)
	if !ok {
		return nil, nil, errors.New("the listener handed out a connection that is not secured by TLS")
	}
	info := &acceptedInfo{TLSInfo: credentials.TLSInfo{
		State:          state,
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}}
	if len(state.PeerCertificates) > 0 && len(state.VerifiedChains) > 0 {
		info.caller, info.verified = a.who(state), true
	}
	return conn, info, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (acceptedTLS) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are a server's")
}

// Info implements credentials.TransportCredentials.
func (acceptedTLS) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (a acceptedTLS) Clone() credentials.TransportCredentials { return a }

// OverrideServerName implements credentials.TransportCredentials.
func (acceptedTLS) OverrideServerName(string) error { return nil }

// tlsState finds the TLS below what listeners put around a connection.
func tlsState(conn net.Conn) (state tls.ConnectionState, ok bool) {
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

// DialTLS returns credentials for ForwarderConfig: config is asked for every
// connection, so that the certificate and whom to trust may change while those
// that are open go on. Where its ServerName is empty, it is the host that is
// dialled. A nil config fails the connection.
func DialTLS(config func() *tls.Config) credentials.TransportCredentials {
	return dialTLS{config}
}

type dialTLS struct{ config func() *tls.Config }

// ClientHandshake implements credentials.TransportCredentials.
func (d dialTLS) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cfg := d.config()
	if cfg == nil {
		return nil, nil, errors.New("this node has no certificate yet")
	}
	cfg = cfg.Clone()
	cfg.NextProtos = nil // NewTLS adds h2, and there must not be another
	if cfg.ServerName != "" {
		authority = cfg.ServerName // which NewTLS would overwrite
	}
	return credentials.NewTLS(cfg).ClientHandshake(ctx, authority, raw)
}

// ServerHandshake implements credentials.TransportCredentials.
func (dialTLS) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are a client's")
}

// Info implements credentials.TransportCredentials.
func (dialTLS) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (d dialTLS) Clone() credentials.TransportCredentials { return d }

// OverrideServerName implements credentials.TransportCredentials.
func (dialTLS) OverrideServerName(string) error { return nil }

// admit decides whether a call may be made at all, by who makes it. Health is
// for everybody: what asks for it, a load balancer say, often cannot show a
// certificate, and it tells nothing.
func (s *Service) admit(ctx context.Context, method string) error {
	if !s.known || strings.HasPrefix(method, healthPrefix) {
		return nil
	}
	caller, ok := CallerFrom(ctx)
	if !ok {
		return errNoCertificate
	}
	if strings.HasPrefix(method, peerPrefix) && !caller.Server {
		return &DeniedError{Subject: caller.Subject, Object: DefaultLog, Action: string(ActionPeer)}
	}
	return nil
}

// permit asks whether the caller may do this to the named log. A node of the
// cluster may do everything: what it asks for, it has been asked for by somebody
// whom it has permitted that.
func (s *Service) permit(ctx context.Context, action Action, log string) error {
	if s.authorize == nil {
		return nil
	}
	if caller, ok := CallerFrom(ctx); ok && caller.Server {
		return nil
	}
	return s.authorize(ctx, action, log)
}

// permitAny asks whether the caller may do one of these, and returns why not
// the first.
func (s *Service) permitAny(ctx context.Context, log string, actions ...Action) error {
	if s.probe != nil {
		for _, action := range actions {
			if s.probe(ctx, action, log) {
				return s.permit(ctx, action, log)
			}
		}
		return s.permit(ctx, actions[0], log)
	}
	var refused error
	for _, action := range actions {
		err := s.permit(ctx, action, log)
		if err == nil {
			return nil
		}
		if denied := (*DeniedError)(nil); !errors.As(err, &denied) {
			return err
		}
		if refused == nil {
			refused = err
		}
	}
	return refused
}

// subjectKey tells, in the metadata of a call that a node passes on, for whom.
// -bin, since a name may be any text.
const subjectKey = "diurna-subject-bin"

// subjectOf is for whom a call is made, for the log: whoever makes it, or whom a
// node that passes it on names. It is empty where nobody is known.
func subjectOf(ctx context.Context) string {
	caller, ok := CallerFrom(ctx)
	if !ok {
		return ""
	}
	if caller.Server && len(metadata.ValueFromIncomingContext(ctx, forwardedKey)) > 0 {
		if said := metadata.ValueFromIncomingContext(ctx, subjectKey); len(said) == 1 {
			return said[0]
		}
	}
	return caller.Subject
}
