package identity

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/agent/identity/identitytest"
)

// TestVaultFails has Vault fail in every way it can, at first and later: at
// first a node waits or says what cannot be mended, later it keeps what it has.
func TestVaultFails(t *testing.T) {
	for name, tc := range map[string]struct {
		faults identitytest.Faults
		is     error
		says   string // in the error
	}{
		"sealed":             {identitytest.Faults{Sealed: true}, nil, "it is sealed (status 503)"},
		"slow":               {identitytest.Faults{Hang: true}, context.DeadlineExceeded, "no answer in time"},
		"not allowed":        {identitytest.Faults{Forbidden: true}, nil, "its policies do not allow it"},
		"login refused":      {identitytest.Faults{NoLogin: true}, nil, "log in by approle at auth/approle/login: invalid role or secret"},
		"other key":          {identitytest.Faults{Mismatch: true}, ErrKeyMismatch, "the certificate is for another key"},
		"no names":           {identitytest.Faults{NoNames: true}, ErrWrongRole, "it lacks the DNS name server.test.diurna"},
		"client only":        {identitytest.Faults{ClientOnly: true}, ErrWrongRole, "lacks server authentication"},
		"another CA":         {identitytest.Faults{OtherCA: true}, ErrUntrusted, "CN=Stranger"},
		"expired":            {identitytest.Faults{NotBefore: -2 * time.Hour, NotAfter: -time.Hour}, ErrExpired, "has expired"},
		"not yet valid":      {identitytest.Faults{NotBefore: time.Hour, NotAfter: 2 * time.Hour}, ErrNotYetValid, "this machine's clock says"},
		"a proxy's web page": {identitytest.Faults{Garbage: true}, nil, "invalid character"},
	} {
		t.Run(name, func(t *testing.T) {
			f := identitytest.StartFake(t)
			cfg, l := vaultConfig(t, f.Config())
			opts := hurried()
			if tc.faults.Hang {
				opts.timing.call = 50 * time.Millisecond
			}

			// At first: it waits, and says so once.
			f.Set(tc.faults)
			ctx, cancel := context.WithCancel(t.Context())
			result := make(chan error, 1)
			var i *Identity
			go func() {
				var err error
				i, err = open(ctx, cfg, opts)
				result <- err
			}()
			eventually(t, "it was tried thrice", func() bool {
				return f.Count("pki_diurna/issuers") >= 3
			})
			select {
			case err := <-result:
				t.Fatalf("it did not wait: %v", err)
			default:
			}
			if n := l.count("waiting for a first certificate"); n != 1 {
				t.Errorf("%d lines about waiting, not 1", n)
			}
			if !strings.Contains(l.String(), tc.says) {
				t.Errorf("the log does not say %q", tc.says)
			}
			f.Set(identitytest.Faults{})
			if err := <-result; err != nil {
				t.Fatal(err)
			}
			cancel()

			// Later: it stays as it is, and tries again, also where it was not
			// Run that failed.
			start(t, i)
			for range 2 { // until Run waits for the next renewal
				kick(i.renewKick)
				eventually(t, "Run looks", func() bool { return len(i.renewKick) == 0 })
			}
			f.ForgetTokens()
			f.Set(tc.faults)
			before := i.Status()
			err := i.Reload(t.Context())
			if err == nil || !strings.Contains(err.Error(), tc.says) || tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("error %v, which should say %q", err, tc.says)
			}
			if err != nil {
				noSecrets(t, err.Error(), f.Tokens)
			}
			noSecrets(t, l.String(), f.Tokens)
			s := await(t, i, "it failed again", func(s Status) bool { return s.RenewFailures > before.RenewFailures+1 })
			if s.Serial != before.Serial || s.LastError == "" {
				t.Errorf("status %+v", s)
			}
			srv := serve(t, i.Server(ALPNRaft))
			if _, err := srv.dial(t, i.Peer(ALPNRaft)); err != nil {
				t.Errorf("a handshake meanwhile: %v", err)
			}
			f.Set(identitytest.Faults{})
			await(t, i, "it is well again", func(s Status) bool { return s.Serial != before.Serial && s.LastError == "" })
		})
	}
}

// TestChains accepts what a Vault that is set up otherwise answers.
func TestChains(t *testing.T) {
	for name, faults := range map[string]identitytest.Faults{
		"chain without root":    {},
		"chain with root":       {Rooted: true},
		"no chain":              {NoChain: true},
		"root not listed":       {Unlisted: true},
		"no revocation lists":   {NoCRL: true},
		"no chain, no root":     {NoChain: true, Unlisted: true},
		"of short life to come": {NotAfter: 2 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			f := identitytest.StartFake(t)
			f.Set(faults)
			cfg, _ := vaultConfig(t, f.Config())
			i := mustOpen(t, cfg, hurried())
			srv := serve(t, i.Server(ALPNRaft))
			if _, err := srv.dial(t, i.Peer(ALPNRaft)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestCannotBeMended has Open give up at once.
func TestCannotBeMended(t *testing.T) {
	https := httptest.NewTLSServer(http.NotFoundHandler())
	defer https.Close()
	dir := t.TempDir()
	broken, empty := filepath.Join(dir, "broken.pem"), filepath.Join(dir, "empty.pem")
	write(t, broken, "-----BEGIN CERTIFICATE-----\nAAAA\n")
	write(t, empty, "")
	for name, tc := range map[string]struct {
		change func(*Config, *identitytest.Fake)
		says   string
	}{
		"names not allowed": {func(_ *Config, f *identitytest.Fake) { f.Allow("server.test.diurna", "localhost") },
			"subject alternate name diurna.service.consul not allowed by this role"},
		"unknown CA": {func(c *Config, _ *identitytest.Fake) { c.Vault.Address = https.URL },
			"its certificate is not what vault.ca_file"},
		"not TLS": {func(c *Config, f *identitytest.Fake) {
			c.Vault.Address = strings.Replace(f.URL, "http://", "https://", 1)
		}, "does not speak TLS"},
		"TLS": {func(c *Config, _ *identitytest.Fake) {
			c.Vault.Address = strings.Replace(https.URL, "https://", "http://", 1)
		}, "vault.address has to begin with https://"},
		"no CA file":   {func(c *Config, _ *identitytest.Fake) { c.Vault.CAFile = filepath.Join(dir, "absent.pem") }, "vault.ca_file: open"},
		"bad CA file":  {func(c *Config, _ *identitytest.Fake) { c.Vault.CAFile = broken }, "damaged or cut off"},
		"no CA in it":  {func(c *Config, _ *identitytest.Fake) { c.Vault.CAFile = empty }, "empty.pem is empty"},
		"no method":    {func(c *Config, _ *identitytest.Fake) { c.Vault.Auth = "magic" }, `vault.auth = "magic"`},
		"no address":   {func(c *Config, _ *identitytest.Fake) { c.Vault.Address = "http://a b" }, "invalid character"},
		"no mount":     {func(c *Config, _ *identitytest.Fake) { c.Vault.PKIMount = "" }, "vault.pki_mount"},
		"no cluster":   {func(c *Config, _ *identitytest.Fake) { c.Cluster = "" }, "the cluster has no name"},
		"no source":    {func(c *Config, _ *identitytest.Fake) { c.TLS.Source = config.TLSNone }, `tls.source = "none"`},
		"TLS too old":  {func(c *Config, _ *identitytest.Fake) { c.TLS.MinVersion = "1.0" }, `tls.min_version = "1.0"`},
		"wrong secret": {nil, ""}, // for contrast: somebody may make the role yet
	} {
		t.Run(name, func(t *testing.T) {
			f := identitytest.StartFake(t)
			cfg, _ := vaultConfig(t, f.Config())
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if tc.change == nil {
				f.Set(identitytest.Faults{NoLogin: true})
				var short context.CancelFunc
				ctx, short = context.WithTimeout(t.Context(), 200*time.Millisecond)
				defer short()
				tc.says = context.DeadlineExceeded.Error()
			} else {
				tc.change(&cfg, f)
			}
			_, err := open(ctx, cfg, hurried())
			if err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Fatalf("error %v, which should say %q", err, tc.says)
			}
			noSecrets(t, err.Error(), f.Tokens)
			if tc.change != nil && ctx.Err() != nil {
				t.Error("it waited for what cannot be mended")
			}
		})
	}
}

// TestEnvironment has a hostile environment change nothing.
func TestEnvironment(t *testing.T) {
	var asked int
	trap := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked++ }))
	defer trap.Close()
	for k, v := range map[string]string{
		"VAULT_ADDR": trap.URL, "VAULT_AGENT_ADDR": trap.URL, "VAULT_TOKEN": "hvs.of-the-environment", "VAULT_NAMESPACE": "elsewhere",
		"VAULT_WRAP_TTL": "60", "VAULT_HEADERS": `{"X-Forwarded-For":"1"}`, "VAULT_PROXY_ADDR": trap.URL, "VAULT_MAX_RETRIES": "50", "VAULT_SKIP_VERIFY": "true",
	} {
		t.Setenv(k, v)
	}
	var bad []string
	f := identitytest.StartFake(t)
	look := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, h := range []string{"X-Vault-Namespace", "X-Vault-Wrap-Ttl", "X-Forwarded-For"} {
			if r.Header.Get(h) != "" {
				bad = append(bad, h)
			}
		}
		if r.Header.Get("X-Vault-Token") == "hvs.of-the-environment" {
			bad = append(bad, "X-Vault-Token")
		}
		f.ServeHTTP(w, r)
	}))
	defer look.Close()
	v := f.Config()
	v.Address = look.URL
	cfg, _ := vaultConfig(t, v)
	mustOpen(t, cfg, hurried())
	if asked > 0 || len(bad) > 0 {
		t.Errorf("the environment's Vault was asked %d times; sent were %v", asked, bad)
	}

	skip := httptest.NewTLSServer(http.NotFoundHandler())
	defer skip.Close()
	cfg.Vault.Address, cfg.Dir = skip.URL, t.TempDir()
	if _, err := open(t.Context(), cfg, hurried()); err == nil || !strings.Contains(err.Error(), "vault.ca_file") {
		t.Errorf("VAULT_SKIP_VERIFY counts: %v", err)
	}
}

// TestShortLives renews certificates that live for seconds, in time.
func TestShortLives(t *testing.T) {
	f := identitytest.StartFake(t)
	f.Lives(3*time.Second, time.Hour)
	cfg, _ := vaultConfig(t, f.Config())
	opts := hurried()
	c := &clock{}
	opts.now = c.now
	i := mustOpen(t, cfg, opts)
	start(t, i)
	for range 3 {
		s := i.Status()
		// 33 s in all, 30 of which are over: it is due.
		c.advance(s.RenewAt.Sub(c.now()))
		kick(i.renewKick)
		next := await(t, i, "it is renewed", func(n Status) bool { return n.Serial != s.Serial })
		if !next.LastRenewal.Before(s.NotAfter) {
			t.Errorf("renewed at %s, expired at %s", next.LastRenewal, s.NotAfter)
		}
		c.ahead.Store(0)
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
