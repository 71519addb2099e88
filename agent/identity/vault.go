package identity

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"

	"github.com/diurnalog/diurna/agent/config"
)

// vaultSource has Vault's PKI engine sign certificates.
type vaultSource struct {
	cfg    config.Vault
	names  names
	opts   options
	logger hclog.Logger

	// up tells whether Vault answered the last request, unsealed.
	up atomic.Bool
	// failing tells that the last fetch failed.
	failing atomic.Bool
	// files are those with credentials.
	files watch
	// fresh is told of a token that was obtained.
	fresh chan struct{}

	// loggingIn is held while a token is obtained, so that two callers do not
	// obtain two. A channel, so that a wait for it can end.
	loggingIn chan struct{}

	mu     sync.Mutex
	client *api.Client
	httpc  *http.Client
	ca     string // content of ca_file that client trusts
	token  *token // nil before the first login, and once it is lost
}

func newVaultSource(cfg config.Vault, want names, opts options, logger hclog.Logger) (*vaultSource, error) {
	if cfg.AuthMount == "" {
		cfg.AuthMount = cfg.Auth
	}
	if cfg.Auth == config.VaultKubernetes && cfg.JWTFile == "" {
		cfg.JWTFile = kubernetesJWT
	}
	v := &vaultSource{
		cfg: cfg, names: want, opts: opts, logger: logger,
		files:     watch{files: []string{cfg.TokenFile, cfg.SecretIDFile, cfg.JWTFile, cfg.CAFile}},
		fresh:     make(chan struct{}, 1),
		loggingIn: make(chan struct{}, 1),
	}
	if cfg.PKIMount == "" || cfg.PKIRole == "" {
		return nil, errors.New("vault.pki_mount and vault.pki_role have to be given")
	}
	v.files.mark()
	_, err := v.base()
	return v, err
}

// base returns the client, made anew where ca_file has changed. Only copies of
// it are used for requests.
func (v *vaultSource) base() (*api.Client, error) {
	ca := ""
	if v.cfg.CAFile != "" {
		text, err := readFile(v.cfg.CAFile)
		if err != nil {
			return nil, permanent(fmt.Errorf("vault.ca_file: %w", err))
		}
		if ca = string(text); ca == "" {
			return nil, permanent(fmt.Errorf("vault.ca_file: %s is empty", v.cfg.CAFile))
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.client != nil && v.ca == ca {
		return v.client, nil
	}
	hc, err := v.httpClient(ca)
	if err != nil {
		return nil, err
	}
	// A whole configuration: what it left out would come from the environment.
	c, err := api.NewClient(&api.Config{
		Address: v.cfg.Address, HttpClient: hc, Timeout: v.opts.timing.call,
		// One that waits for a sealed Vault would not hear of a stop; it is
		// tried again by those who know how urgent it is.
		MaxRetries: 0, MinRetryWait: time.Second, MaxRetryWait: time.Second,
		// A standby sends to the active node.
		DisableRedirects: false,
	})
	if err != nil {
		return nil, permanent(fmt.Errorf("a client for Vault at %s, with the environment's VAULT_ variables, which do not count but have to be valid: %w", v.cfg.Address, err))
	}
	// Nor do these: VAULT_TOKEN, VAULT_HEADERS, VAULT_NAMESPACE, VAULT_WRAP_TTL.
	c.ClearToken()
	c.SetHeaders(http.Header{api.RequestHeaderName: {"true"}})
	if v.cfg.Namespace != "" {
		c.SetNamespace(v.cfg.Namespace)
	}
	c.SetWrappingLookupFunc(func(string, string) string { return "" })
	if v.httpc != nil {
		v.httpc.CloseIdleConnections()
	}
	v.client, v.httpc, v.ca = c, hc, ca
	return c, nil
}

func (v *vaultSource) httpClient(ca string) (*http.Client, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		b, err := parsePEM([]byte(ca))
		if err == nil && len(b.certs) == 0 {
			err = errors.New("it holds no certificate")
		}
		if err != nil {
			return nil, permanent(fmt.Errorf("vault.ca_file: %s: %w", v.cfg.CAFile, err))
		}
		t.RootCAs = x509.NewCertPool()
		for _, c := range b.certs {
			t.RootCAs.AddCert(c)
		}
	}
	return &http.Client{
		Transport: &bounded{&http.Transport{
			Proxy:               http.ProxyFromEnvironment,
			DialContext:         (&net.Dialer{Timeout: v.opts.timing.call, KeepAlive: 30 * time.Second}).DialContext,
			TLSClientConfig:     t,
			TLSHandshakeTimeout: v.opts.timing.call,
			ForceAttemptHTTP2:   true,
			// Renewals are hours apart.
			IdleConnTimeout: 30 * time.Second, MaxIdleConnsPerHost: 2,
		}},
		// The client follows one redirect itself.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// call makes one request, with a token or, if it is empty, without.
func (v *vaultSource) call(ctx context.Context, op, token string, do func(context.Context, *api.Logical) (*api.Secret, error)) (*api.Secret, error) {
	base, err := v.base()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, v.opts.timing.call)
	defer cancel()
	c := base.WithRequestCallbacks(func(r *api.Request) { r.ClientToken = token })
	secret, err := do(ctx, c.Logical())
	if err != nil {
		err = v.explain(ctx, op, token, err)
	}
	v.up.Store(answered(err))
	return secret, err
}

func (v *vaultSource) fetch(ctx context.Context) (*pair, *issuers, error) {
	// What differs from now on is worth a try if this fails.
	v.files.mark()
	// Both in each case: a certificate of a new CA comes with it.
	from, err := v.issuers(ctx)
	var p *pair
	if from != nil {
		if err != nil {
			v.logger.Warn("not every CA could be asked for", "error", err)
		}
		p, err = v.sign(ctx)
	}
	v.failing.Store(err != nil)
	if err != nil {
		return nil, nil, err
	}
	return p, from, nil
}

// sign makes a key, which never leaves this process but for the cache, and has
// its certificate signed.
func (v *vaultSource) sign(ctx context.Context) (*pair, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: v.names.common},
		DNSNames: v.names.dns, IPAddresses: v.names.ips, URIs: v.names.uris,
	}, key)
	if err != nil {
		return nil, err
	}
	data := map[string]any{
		"csr":    string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})),
		"format": "pem",
		// For roles that do not take the names from the request.
		"common_name": v.names.common,
	}
	if v.cfg.TTL > 0 {
		data["ttl"] = fmt.Sprintf("%ds", max(int64(v.cfg.TTL/time.Second), 1))
	}
	target := path.Join(v.cfg.PKIMount, "sign", v.cfg.PKIRole)
	secret, err := v.authorised(ctx, "sign a certificate by "+target, func(ctx context.Context, l *api.Logical) (*api.Secret, error) {
		return l.WriteWithContext(ctx, target, data)
	})
	if err != nil {
		return nil, unmendable(err)
	}
	chain, err := signedChain(secret)
	if err != nil {
		return nil, fmt.Errorf("vault's answer from %s: %w", target, err)
	}
	p, err := newPair(key, chain)
	if err != nil {
		return nil, fmt.Errorf("vault's answer from %s: %w", target, err)
	}
	if lacks := v.names.missing(p.leaf); lacks != "" {
		if lacks == v.names.common {
			return nil, fmt.Errorf("vault's answer from %s: %w: it lacks the DNS name %s: does the role use the names of the request (use_csr_sans)?", target, ErrWrongRole, lacks)
		}
		v.logger.Warn("the certificate lacks a name that was asked for", "name", lacks, "role", v.cfg.PKIRole)
	}
	return p, nil
}

// signedChain reads the certificates of a signing, the leaf first.
func signedChain(secret *api.Secret) ([]*x509.Certificate, error) {
	if secret == nil || secret.Data == nil {
		return nil, errors.New("it is empty")
	}
	leaf, ok := secret.Data["certificate"].(string)
	if !ok {
		return nil, errors.New("it holds no certificate")
	}
	texts := []string{leaf}
	list, _ := secret.Data["ca_chain"].([]any) // absent where the issuer has no chain
	for _, one := range list {
		if text, ok := one.(string); ok {
			texts = append(texts, text)
		}
	}
	if text, ok := secret.Data["issuing_ca"].(string); ok {
		texts = append(texts, text)
	}
	b, err := parsePEM([]byte(strings.Join(texts, "\n")))
	if err != nil {
		return nil, err
	}
	if len(b.certs) == 0 {
		return nil, errors.New("it holds no certificate")
	}
	return b.certs, nil
}

// scheduled is true: Vault does not tell when to renew.
func (v *vaultSource) scheduled() bool { return true }

// changed tells that credentials have changed, if that may help.
func (v *vaultSource) changed() bool { return v.failing.Load() && v.files.changed() }
