package identitytest

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
)

// Faults are what a Fake does wrong.
type Faults struct {
	// Sealed refuses everything: 503.
	Sealed bool
	// Hang lets every request wait until its caller gives up.
	Hang bool
	// Forbidden refuses to sign, whatever the token: 403.
	Forbidden bool
	// NoLogin refuses logins: 400.
	NoLogin bool
	// NoCRL answers requests for revocation lists with 500.
	NoCRL bool
	// Mismatch signs for another key than that of the request.
	Mismatch bool
	// NoNames leaves the names out of what it signs.
	NoNames bool
	// ClientOnly signs certificates that no server can use.
	ClientOnly bool
	// OtherCA signs with a CA that is not listed.
	OtherCA bool
	// NoChain leaves the intermediate and the root out of its answers.
	NoChain bool
	// Unlisted leaves the root out of the list of issuers.
	Unlisted bool
	// Rooted adds the root to the chain.
	Rooted bool
	// NotBefore and NotAfter are when certificates are valid, from now on,
	// where they are not zero.
	NotBefore, NotAfter time.Duration
	// Garbage answers with something that is not JSON.
	Garbage bool
}

// Fake is a Vault of which tests decide how it fails. It knows the PKI engines
// pki_diurna and pki_diurna_root, with the role diurna-server, and the logins
// approle, jwt and kubernetes, whose secret is FakeSecret.
type Fake struct {
	URL string

	server *httptest.Server
	mu     sync.Mutex
	faults Faults
	// ttl is the life of what is signed.
	ttl time.Duration
	// lease is that of the tokens it gives.
	lease   time.Duration
	tokens  map[string]time.Time // when they expire
	allowed []string
	ca      *fakeCA
	stop    chan struct{}
	counts  map[string]int
	logins  int
}

// FakeSecret is what a Fake's logins ask for: a secret id or a JWT.
const FakeSecret = "s3cret-of-the-fake-vault"

// StartFake starts one. It ends with the test.
func StartFake(t testing.TB) *Fake {
	t.Helper()
	f := &Fake{
		ttl: time.Hour, lease: time.Hour, stop: make(chan struct{}), counts: make(map[string]int),
		tokens: map[string]time.Time{RootToken: {}},
	}
	f.Renew(t)
	f.server = httptest.NewServer(f)
	f.URL = f.server.URL
	t.Cleanup(func() {
		close(f.stop) // for requests that hang
		f.server.Close()
	})
	return f
}

// Set replaces the faults.
func (f *Fake) Set(faults Faults) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = faults
}

// Lives sets how long certificates and tokens live that it gives from now on.
func (f *Fake) Lives(ttl, lease time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ttl, f.lease = ttl, lease
}

// Renew makes other CAs and forgets tokens, as a Vault that lost everything.
func (f *Fake) Renew(t testing.TB) {
	t.Helper()
	ca, err := newFakeCA()
	if err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ca = ca
	f.tokens = map[string]time.Time{RootToken: {}}
}

// ForgetTokens makes all tokens invalid that logins gave.
func (f *Fake) ForgetTokens() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tokens = map[string]time.Time{RootToken: {}}
}

// Allow has the role refuse names other than these. None allows all.
func (f *Fake) Allow(names ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.allowed = names
}

// Count is how often a path was asked for, such as "pki_diurna/sign/diurna-server".
func (f *Fake) Count(at string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts[at]
}

// Config is a configuration that logs in as an AppRole.
func (f *Fake) Config() config.Vault {
	c := config.Default().Vault
	c.Address, c.Auth, c.RoleID, c.SecretID = f.URL, config.VaultAppRole, "role", FakeSecret
	c.CAMounts = []string{"pki_diurna_root"}
	return c
}

// Revoke takes a certificate back, given as PEM.
func (f *Fake) Revoke(t testing.TB, cert []byte) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.ca.revoke(cert); err != nil {
		t.Fatal(err)
	}
}

// ServeHTTP is for tests that look at the requests.
func (f *Fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	at := strings.TrimPrefix(r.URL.Path, "/v1/")
	f.mu.Lock()
	f.counts[at]++
	hang := f.faults.Hang
	f.mu.Unlock()
	if hang {
		select {
		case <-r.Context().Done():
		case <-f.stop:
		}
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	status, answer := f.answer(r, at)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if f.faults.Garbage {
		_, _ = fmt.Fprint(w, "<html>a proxy</html>") // its caller may have gone
		return
	}
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		panic(http.ErrAbortHandler)
	}
}

type object = map[string]any

func refuse(status int, format string, args ...any) (int, object) {
	return status, object{"errors": []string{fmt.Sprintf(format, args...)}}
}

func (f *Fake) answer(r *http.Request, at string) (int, object) {
	if f.faults.Sealed {
		return refuse(http.StatusServiceUnavailable, "Vault is sealed")
	}
	if r.Header.Get("X-Vault-Request") != "true" {
		return refuse(http.StatusPreconditionFailed, "missing required Vault header")
	}
	token := r.Header.Get("X-Vault-Token")
	mount, rest, _ := strings.Cut(at, "/")
	switch {
	case mount == "auth" && strings.HasSuffix(rest, "/login"):
		return f.login(r, path.Dir(rest))
	case at == "auth/token/renew-self":
		if !f.known(token) {
			return refuse(http.StatusForbidden, "permission denied")
		}
		return http.StatusOK, f.auth(token)
	case rest == "issuers":
		return f.issuers(mount)
	case strings.HasPrefix(rest, "issuer/"):
		return f.issuer(mount, strings.TrimPrefix(rest, "issuer/"))
	case at == "pki_diurna/sign/diurna-server":
		if !f.known(token) || f.faults.Forbidden {
			return refuse(http.StatusForbidden, "1 error occurred:\n\t* permission denied\n\n")
		}
		return f.sign(r)
	}
	return refuse(http.StatusNotFound, "no handler for route %q", at)
}

func (f *Fake) known(token string) bool {
	expires, ok := f.tokens[token]
	return ok && (expires.IsZero() || time.Now().Before(expires))
}

func (f *Fake) login(r *http.Request, mount string) (int, object) {
	var in struct{ RoleID, Role, SecretID, JWT string }
	var raw map[string]string
	if err := json.NewDecoder(r.Body).Decode(&raw); err != nil {
		return refuse(http.StatusBadRequest, "%v", err)
	}
	in.SecretID, in.JWT, in.RoleID, in.Role = raw["secret_id"], raw["jwt"], raw["role_id"], raw["role"]
	if f.faults.NoLogin || in.RoleID+in.Role == "" || in.SecretID+in.JWT != FakeSecret || (path.Base(mount) == "approle") != (in.JWT == "") {
		// As careless as an answer could be.
		return refuse(http.StatusBadRequest, "invalid role or secret: %s%s", in.SecretID, in.JWT)
	}
	f.logins++
	token := fmt.Sprintf("hvs.fake-token-%d-of-this-test", f.logins)
	f.tokens[token] = time.Now().Add(f.lease)
	return http.StatusOK, f.auth(token)
}

// Tokens are those that logins gave: what no log line may hold.
func (f *Fake) Tokens() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []string
	for n := range f.logins {
		all = append(all, fmt.Sprintf("hvs.fake-token-%d-of-this-test", n+1))
	}
	return all
}

func (f *Fake) auth(token string) object {
	f.tokens[token] = time.Now().Add(f.lease)
	return object{"auth": object{"client_token": token, "renewable": true, "lease_duration": int(max(f.lease/time.Second, 1))}}
}

func (f *Fake) issuers(mount string) (int, object) {
	keys := f.ca.list(mount)
	if f.faults.Unlisted {
		keys = slices.DeleteFunc(keys, func(k string) bool { return k == "root" })
	}
	if len(keys) == 0 {
		return http.StatusNotFound, object{"errors": []string{}}
	}
	return http.StatusOK, object{"data": object{"keys": keys}}
}

func (f *Fake) issuer(mount, rest string) (int, object) {
	ref, what, _ := strings.Cut(rest, "/")
	if !slices.Contains(f.ca.list(mount), ref) {
		return refuse(http.StatusBadRequest, "unable to find issuer: %s", ref)
	}
	one := f.ca.of(ref)
	switch what {
	case "json":
		return http.StatusOK, object{"data": object{"certificate": encode("CERTIFICATE", one.cert.Raw)}}
	case "crl":
		if f.faults.NoCRL {
			return refuse(http.StatusInternalServerError, "unable to find CRL")
		}
		crl, err := one.crl()
		if err != nil {
			return refuse(http.StatusInternalServerError, "%v", err)
		}
		return http.StatusOK, object{"data": object{"crl": encode("X509 CRL", crl)}}
	}
	return refuse(http.StatusNotFound, "no handler")
}

func encode(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}
