package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/agent/identity/identitytest"
)

// TestLogins logs in by every method.
func TestLogins(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	for name, change := range map[string]func(*config.Vault){
		"token":               func(v *config.Vault) { v.Auth, v.Token = config.VaultToken, identitytest.RootToken },
		"token file":          func(v *config.Vault) { v.Auth, v.TokenFile = config.VaultTokenFile, file },
		"approle":             func(*config.Vault) {},
		"approle, file":       func(v *config.Vault) { v.SecretID, v.SecretIDFile = "", file },
		"approle, other path": func(v *config.Vault) { v.AuthMount = "elsewhere/approle" },
		"kubernetes": func(v *config.Vault) {
			v.Auth, v.AuthRole, v.JWTFile = config.VaultKubernetes, "diurna", file
		},
		"jwt": func(v *config.Vault) { v.Auth, v.AuthRole, v.JWTFile = config.VaultJWT, "diurna", file },
	} {
		t.Run(name, func(t *testing.T) {
			f := identitytest.StartFake(t)
			v := f.Config()
			change(&v)
			secret := identitytest.FakeSecret
			if v.TokenFile != "" {
				secret = identitytest.RootToken
			}
			write(t, file, secret+"\n")
			if v.Auth == config.VaultKubernetes || v.Auth == config.VaultJWT {
				v.RoleID, v.SecretID = "", ""
			}
			cfg, _ := vaultConfig(t, v)
			i := mustOpen(t, cfg, hurried())
			mount := v.AuthMount
			if mount == "" {
				mount = v.Auth
			}
			if want := v.Auth != config.VaultToken && v.Auth != config.VaultTokenFile; (f.Count("auth/"+mount+"/login") == 1) != want {
				t.Errorf("%d logins at %s", f.Count("auth/"+mount+"/login"), mount)
			}
			if err := i.Reload(t.Context()); err != nil {
				t.Error(err)
			}
			if n := f.Count("auth/" + mount + "/login"); n > 1 {
				t.Errorf("logged in %d times: one token is enough", n)
			}
		})
	}
	if v, err := newVaultSource(config.Vault{Address: "http://127.0.0.1:1", Auth: config.VaultKubernetes, PKIMount: "p", PKIRole: "r"}, names{}, hurried(), nil); err != nil || v.cfg.JWTFile != kubernetesJWT {
		t.Errorf("where Kubernetes puts it: %v", err)
	}
}

// TestSecretFiles has files with secrets absent, wrong, and put right while
// somebody waits.
func TestSecretFiles(t *testing.T) {
	for name, tc := range map[string]struct{ text, says string }{
		"absent":     {"", "vault.jwt_file: open"},
		"empty":      {"\n", "is empty"},
		"wrong":      {"another-secret-of-somebody", "invalid role or secret: [secret]"},
		"two lines":  {"a\nb", "holds more than one line"},
		"large":      {strings.Repeat("x", maxPEM+1), "is larger than"},
		"not a file": {"/", "is a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			f := identitytest.StartFake(t)
			v := f.Config()
			v.Auth, v.AuthRole, v.JWTFile = config.VaultJWT, "diurna", filepath.Join(t.TempDir(), "jwt")
			switch tc.text {
			case "":
			case "/":
				if err := os.Mkdir(v.JWTFile, 0o700); err != nil {
					t.Fatal(err)
				}
			default:
				write(t, v.JWTFile, tc.text)
			}
			cfg, l := vaultConfig(t, v)
			done := make(chan error, 1)
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				_, err := open(ctx, cfg, hurried())
				done <- err
			}()
			eventually(t, "it says why", func() bool { return l.count(tc.says) > 0 })
			if strings.Contains(l.String(), "another-secret") {
				t.Error("the secret is in the log")
			}
			if tc.text == "/" {
				remove(t, v.JWTFile)
			}
			write(t, v.JWTFile, identitytest.FakeSecret)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestTokenLost logs in again when the token is no longer good, and goes on
// with another one from its file.
func TestTokenLost(t *testing.T) {
	t.Run("obtained", func(t *testing.T) {
		f := identitytest.StartFake(t)
		cfg, l := vaultConfig(t, f.Config())
		i := mustOpen(t, cfg, hurried())
		for n := range 3 {
			f.ForgetTokens()
			if err := i.Reload(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := f.Count("auth/approle/login"); got != n+2 {
				t.Errorf("%d logins, not %d", got, n+2)
			}
		}
		noSecrets(t, l.String(), f.Tokens)
	})
	t.Run("of a file", func(t *testing.T) {
		f := identitytest.StartFake(t)
		v := f.Config()
		v.Auth, v.TokenFile = config.VaultTokenFile, filepath.Join(t.TempDir(), "token")
		write(t, v.TokenFile, identitytest.RootToken)
		cfg, _ := vaultConfig(t, v)
		i := mustOpen(t, cfg, hurried())
		start(t, i)
		write(t, v.TokenFile, "hvs.expired-token-of-this-test")
		err := i.Reload(t.Context())
		if err == nil || !strings.Contains(err.Error(), `(vault.auth = "token_file")`) {
			t.Errorf("with a token that is not good: %v", err)
		}
		before := i.Status()
		write(t, v.TokenFile, identitytest.RootToken)
		await(t, i, "the new token is used", func(s Status) bool { return s.LastError == "" && s.Serial != before.Serial })
	})
}

// TestNewCredentialsAtOnce does not sit out the back-off once there is a new
// secret.
func TestNewCredentialsAtOnce(t *testing.T) {
	f := identitytest.StartFake(t)
	v := f.Config()
	v.Auth, v.TokenFile = config.VaultTokenFile, filepath.Join(t.TempDir(), "token")
	write(t, v.TokenFile, identitytest.RootToken)
	cfg, _ := vaultConfig(t, v)
	opts := hurried()
	opts.timing.retryFirst, opts.timing.retryMax = time.Hour, time.Hour
	i := mustOpen(t, cfg, opts)
	start(t, i)
	write(t, v.TokenFile, "hvs.expired-token-of-this-test")
	if err := i.Reload(t.Context()); err == nil {
		t.Fatal("a bad token is good")
	}
	before := i.Status()
	if left := time.Until(before.RenewAt); left < 5*time.Minute {
		t.Fatalf("tried again in %s: this shows nothing", left)
	}
	write(t, v.TokenFile, identitytest.RootToken)
	await(t, i, "it is tried at once", func(s Status) bool { return s.Renewals > before.Renewals })
}

// TestTokenIsKeptAlive renews a token for as long as that works, and then logs
// in again, without anybody needing it.
func TestTokenIsKeptAlive(t *testing.T) {
	f := identitytest.StartFake(t)
	f.Lives(24*time.Hour, time.Hour) // no certificate is due
	cfg, _ := vaultConfig(t, f.Config())
	opts, c := hurried(), &clock{}
	opts.now = c.now
	i := mustOpen(t, cfg, opts)
	v := i.src.(*vaultSource)
	first := v.held()
	if first == nil || first.keepAt.Before(c.now().Add(30*time.Minute)) || first.keepAt.After(c.now().Add(45*time.Minute)) {
		t.Fatalf("the token is renewed at %+v", first)
	}
	start(t, i)
	c.advance(45 * time.Minute)
	kick(v.fresh)
	eventually(t, "the token is renewed", func() bool { return f.Count("auth/token/renew-self") == 1 && v.held() != first })
	if next := v.held(); next.id != first.id || !next.expires.After(first.expires) {
		t.Errorf("%+v became %+v", first.expires, next.expires)
	}
	f.ForgetTokens()
	c.advance(45 * time.Minute)
	kick(v.fresh)
	eventually(t, "it has logged in again", func() bool { return v.held().id != first.id })
	if n := f.Count("auth/approle/login"); n != 2 {
		t.Errorf("%d logins, not 2", n)
	}

	// A lease that has become short is the token's end: log in before it.
	f.Lives(24*time.Hour, time.Minute)
	c.advance(45 * time.Minute)
	kick(v.fresh)
	eventually(t, "it has logged in for the third time", func() bool { return f.Count("auth/approle/login") == 3 })
}

// TestUnknownAuthority asks for whom to trust when a handshake fails for that
// reason, and not at every handshake.
func TestUnknownAuthority(t *testing.T) {
	f := identitytest.StartFake(t)
	cfg, _ := vaultConfig(t, f.Config())
	opts := hurried()
	opts.timing.trust, opts.timing.trustLeast = time.Hour, time.Hour
	i := mustOpen(t, cfg, opts)
	start(t, i)
	asked := f.Count("pki_diurna/issuers")
	i.HandshakeFailed(ErrRevoked)
	i.HandshakeFailed(nil)
	f.Renew(t)

	other := cfg
	other.Dir = t.TempDir()
	j := mustOpen(t, other, hurried())
	asked += 1
	srv := serve(t, j.Server(ALPNRaft))
	for range 3 {
		_, err := srv.dial(t, i.Peer(ALPNRaft))
		if err == nil {
			break
		}
		i.HandshakeFailed(err)
	}
	await(t, i, "it has learnt of the other CA", func(s Status) bool { return len(s.Issuers) == 4 })
	await(t, i, "it has a certificate of it", func(s Status) bool { return s.Renewals == 2 })
	if _, err := srv.dial(t, i.Peer(ALPNRaft)); err != nil {
		t.Error(err)
	}
	for range 100 {
		i.HandshakeFailed(x509.UnknownAuthorityError{})
	}
	if n := f.Count("pki_diurna/issuers") - asked; n > 2 { // one refresh, one renewal
		t.Errorf("Vault was asked %d times", n)
	}
}

// TestRealJWT logs in to a real Vault as Nomad's workloads do, with what
// scripts/vault-pki.sh sets up, with certificates that live for a minute.
func TestRealJWT(t *testing.T) {
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	pub, file := filepath.Join(dir, "key.pub"), filepath.Join(dir, "jwt")
	write(t, pub, block("PUBLIC KEY", public))
	vault := identitytest.StartVault(t)
	env := []string{"JWT_MOUNT=jwt-nomad", "JWT_PUBKEYS_FILE=" + pub, "JWT_USER_CLAIM=/nomad_job_id", `JWT_BOUND_CLAIMS={"nomad_job_id":"diurna"}`, "SERVER_TTL=60s", "NAMES=n1.example.com"}
	vault.Setup(t, "Test", env...)
	vault.Setup(t, "Test", env...) // nothing is made twice
	if n := strings.Count(vault.Run(t, "list", "pki_diurna/issuers"), "-"); n > 20 {
		t.Error("the second time made other CAs")
	}

	v := vault.Config(t)
	v.Auth, v.Token, v.AuthMount, v.AuthRole, v.JWTFile = config.VaultJWT, "", "jwt-nomad", "diurna-server", file
	write(t, file, signJWT(t, key, "somebody-else"))
	cfg, l := vaultConfig(t, v)
	cfg.Host = "n1.example.com"
	result := make(chan *Identity, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		i, err := open(ctx, cfg, hurried())
		if err != nil {
			t.Error(err)
		}
		result <- i
	}()
	eventually(t, "another job is refused", func() bool { return l.count("log in by jwt at auth/jwt-nomad/login") > 0 })
	write(t, file, signJWT(t, key, "diurna"))
	i := <-result
	if i == nil {
		return
	}
	s := i.Status()
	if got := s.NotAfter.Sub(s.NotBefore); got > 2*time.Minute {
		t.Errorf("it lives for %s", got)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	noSecrets(t, l.String(), func() []string { return []string{string(text)} })

	// A name that the role does not allow is not waited for.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cfg.Host, cfg.Dir = "n2.example.com", t.TempDir()
	if _, err := open(ctx, cfg, hurried()); err == nil || !strings.Contains(err.Error(), "n2.example.com not allowed by this role") {
		t.Errorf("a name that is not allowed: %v", err)
	}
	// Nor does a role of clients make a server.
	cfg.Vault, cfg.Host = vault.Config(t), ""
	cfg.Vault.PKIRole = "diurna-client"
	if _, err := open(ctx, cfg, hurried()); err == nil || !strings.Contains(err.Error(), "not allowed by this role") {
		t.Errorf("a server by the role of clients: %v", err)
	}
}

// signJWT makes a workload's token (ES256).
func signJWT(t *testing.T, key *ecdsa.PrivateKey, job string) string {
	t.Helper()
	part := func(v map[string]any) string {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(text)
	}
	now := time.Now()
	text := part(map[string]any{"alg": "ES256", "typ": "JWT"}) + "." + part(map[string]any{
		"aud": "vault.io", "sub": "global:default:" + job, "nomad_job_id": job, "iat": now.Unix(), "nbf": now.Unix() - 60, "exp": now.Add(time.Hour).Unix(),
	})
	sum := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	sig := make([]byte, 64)
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return fmt.Sprintf("%s.%s", text, base64.RawURLEncoding.EncodeToString(sig))
}
