package agent

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/grpc/credentials"

	"github.com/diurnalog/diurna/agent/config"
	ident "github.com/diurnalog/diurna/agent/identity"
	"github.com/diurnalog/diurna/agent/peer"
	"github.com/diurnalog/diurna/rpc"
)

// tlsDir is where in the data directory certificates are kept.
const tlsDir = "tls"

// security is who this node is to others, whom it believes to be who, and what
// they may do. Without TLS it is empty: everybody may do everything.
type security struct {
	identity *ident.Identity // nil: plaintext
	policy   *ident.Policy   // nil: a certificate is permission enough
	audit    *ident.Auditor
}

// openSecurity returns once the node has a certificate. Where that is to come
// from a Vault that does not answer, that is until ctx ends.
func openSecurity(ctx context.Context, cfg *config.Config, opts Options, data *dataDir, address string) (*security, error) {
	s := &security{audit: ident.NewAuditor(opts.Logger)}
	switch cfg.TLS.Source {
	case "":
		return nil, errors.New("agent: tls.source has to be set, be it to none")
	case config.TLSNone:
		if !cfg.Dev {
			opts.Logger.Warn("connections are plaintext, as tls.source says: whoever reaches the port may do everything", "address", address)
		}
		return s, nil
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if cfg.ACL.Enabled {
		s.policy, err = ident.OpenPolicy(ident.PolicyConfig{
			ModelFile: cfg.ACL.ModelFile, PolicyFile: cfg.ACL.PolicyFile, Logger: opts.Logger.Named("acl"),
		})
		if err != nil {
			return nil, err
		}
	}
	s.identity, err = ident.Open(ctx, ident.Config{
		TLS: cfg.TLS, Vault: cfg.Vault, Cluster: cfg.Cluster.Name, Service: cfg.Consul.Service,
		NodeID: data.nodeID(), Host: host, Dir: filepath.Join(data.path, tlsDir), Logger: opts.Logger.Named("tls"),
	})
	return s, err
}

// run keeps certificates and permissions up to date until ctx ends. changed, if
// set, is called when the certificate or whom to trust is another.
func (s *security) run(ctx context.Context, changed func()) {
	var wg sync.WaitGroup
	defer wg.Wait()
	if s.identity != nil {
		wg.Go(func() { s.identity.Run(ctx) })
	}
	if s.identity != nil && changed != nil {
		wg.Go(func() {
			for next := s.identity.Changed(); ; {
				select {
				case <-next:
					next = s.identity.Changed()
					changed()
				case <-ctx.Done():
					return
				}
			}
		})
	}
	if s.policy != nil {
		wg.Go(func() { s.policy.Run(ctx) })
	}
}

// reloadTimeout is how long Vault may take to renew a certificate that somebody
// asks for.
const reloadTimeout = 30 * time.Second

// reload reads files again, and renews. What fails stays as it was.
func (s *security) reload(ctx context.Context, logger hclog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, reloadTimeout)
	defer cancel()
	if s.policy != nil {
		if err := s.policy.Reload(); err != nil {
			logger.Error("the permissions stay as they were", "error", err)
		}
	}
	if s.identity != nil {
		if err := s.identity.Reload(ctx); err != nil {
			logger.Error("the certificate stays as it was", "error", err)
		}
	}
}

// port is for connections that come in; nil is plaintext.
func (s *security) port() *tls.Config {
	if s.identity == nil {
		return nil
	}
	return s.identity.Server(peer.ProtocolClients, peer.ProtocolRaft)
}

// dial is for connections to other nodes: what it returns is for one of them.
// It is nil for plaintext.
func (s *security) dial() func(protocol string) *tls.Config {
	if s.identity == nil {
		return nil
	}
	return func(protocol string) *tls.Config { return s.identity.Peer(protocol) }
}

// credentials are for gRPC to other nodes; nil is plaintext.
func (s *security) credentials() credentials.TransportCredentials {
	if s.identity == nil {
		return nil
	}
	return rpc.DialTLS(func() *tls.Config { return s.identity.Peer(peer.ProtocolClients) })
}

// failed is told of handshakes that failed: whom to trust may have changed.
func (s *security) failed(err error) {
	if s.identity != nil {
		s.identity.HandshakeFailed(err)
	}
}

// caller tells who is at the other end of a connection.
func (s *security) caller(state tls.ConnectionState) rpc.Caller {
	return rpc.Caller(s.identity.Caller(state))
}

// sameNode refuses a peer whose certificate names another node than its
// greeting does. One that names no node, as a file's may, speaks for any.
func (s *security) sameNode(conn net.Conn, id string) error {
	return peer.SameNode(conn, id, func(state tls.ConnectionState) string { return s.identity.Caller(state).NodeID })
}

// authorize is rpc.Config.Authorize.
func (s *security) authorize(ctx context.Context, action rpc.Action, log string) error {
	caller, _ := rpc.CallerFrom(ctx)
	return s.allow(caller.Subject, string(action), log)
}

// probe is rpc.Config.Probe.
func (s *security) probe(ctx context.Context, action rpc.Action, log string) bool {
	caller, _ := rpc.CallerFrom(ctx)
	return s.policy.Would(caller.Subject, log, string(action))
}

func (s *security) allow(subject, action, log string) error {
	if s.policy.Allow(subject, log, action) {
		return nil
	}
	return &rpc.DeniedError{Subject: subject, Object: log, Action: action}
}

// overHTTP decides who may do what by HTTP. As with gRPC, nodes need no
// permission.
func (s *security) overHTTP(state *tls.ConnectionState, action string) error {
	caller := s.identity.Caller(*state)
	if caller.Server {
		return nil
	}
	return s.allow(caller.Subject, action, rpc.DefaultLog)
}

// audited is rpc.Config.Audit.
func (s *security) audited(_ context.Context, e rpc.AuditEvent) {
	s.audit.Record(ident.AuditEvent{
		Subject: cmp.Or(e.Subject, "anonymous"), OnBehalfOf: e.OnBehalfOf, Verb: e.Verb, Target: e.Target,
		Outcome: cmp.Or(e.Reason, "ok"), Error: e.Err, Took: e.Took,
	})
}

// certificate is what there is to tell of the node's certificate.
func (s *security) certificate() (certificateStatus, bool) {
	if s.identity == nil {
		return certificateStatus{}, false
	}
	st := s.identity.Status()
	c := certificateStatus{
		Source: st.Source, Subject: st.Subject, Serial: st.Serial, NotBefore: st.NotBefore, NotAfter: st.NotAfter,
		Renewals: uint64(st.Renewals), RenewFailures: uint64(st.RenewFailures),
	}
	if st.Source == config.TLSVault {
		c.VaultUp = &st.VaultUp
	}
	return c, true
}

// expiresSoon says so where the certificate should have been renewed long ago:
// less than a sixth of its life is left. Empty where all is well.
func (s *security) expiresSoon() string {
	c, ok := s.certificate()
	left := time.Until(c.NotAfter)
	switch {
	case !ok || left >= c.NotAfter.Sub(c.NotBefore)/6:
		return ""
	case left <= 0:
		return "its certificate has expired"
	}
	return fmt.Sprintf("its certificate expires in %v", left.Round(time.Second))
}

// stats is what there is to tell of permissions.
func (s *security) stats() func() ident.PolicyStats {
	if s.policy == nil {
		return nil
	}
	return s.policy.Stats
}
