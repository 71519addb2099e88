package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/identity/identitytest"
	"github.com/diurnalog/diurna/agent/peer"
	"github.com/diurnalog/diurna/discovery/consul/consultest"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
	"github.com/diurnalog/diurna/rpc/client"
)

// trustedCluster is a cluster whose nodes have their certificates from a real
// Vault, and whose Consul takes tokens, over TLS.
type trustedCluster struct {
	*processCluster
	vault  *identitytest.Vault
	env    []string // of scripts/vault-pki.sh
	roleID string
	// What nodes log in with: a workload's JWT, or an AppRole.
	jwtFile, secretIDFile string
	roots                 []byte // that clients trust
}

// prepareTrusted makes all that such nodes need, and starts none yet. life is
// that of their certificates.
func prepareTrusted(t *testing.T, life time.Duration) *trustedCluster {
	t.Helper()
	c := &trustedCluster{
		processCluster: &processCluster{consul: consultest.Start(t, consultest.Options{ACL: true, TLS: true}), dir: t.TempDir()},
		vault:          identitytest.StartVault(t),
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	keys := c.write(t, "jwt-key.pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}))
	c.jwtFile = c.write(t, "jwt", []byte(signJWT(t, key, map[string]any{
		"sub": "diurna", "aud": "vault.io", "iat": time.Now().Unix(), "exp": time.Now().Add(24 * time.Hour).Unix(),
	})))
	c.env = []string{"SERVER_TTL=" + life.String(), "JWT_PUBKEYS_FILE=" + keys}
	c.vault.Setup(t, "test", c.env...)
	role := c.vault.AppRole(t)
	c.roleID = role.RoleID
	c.secretIDFile = c.write(t, "secret-id", []byte(role.SecretID+"\n"))

	token := c.consul.MakeToken(t, `service "diurna" { policy = "write" } node_prefix "" { policy = "read" } key_prefix "diurna/" { policy = "write" }`)
	c.configure(t, 3, fmt.Sprintf(`
		consul {
			address = %q
			ca_file = %q
			token   = %q
		}
		tls { source = "vault" }
		vault {
			address        = %q
			auth           = "approle"
			role_id        = %q
			secret_id_file = %q
			ca_mounts      = ["pki_diurna_root"]
			ttl            = %q
		}
	`, c.consul.HTTPS, c.consul.CAFile, token, c.vault.URL, c.roleID, c.secretIDFile, life))
	c.files = c.clientFiles(t, "app")
	if c.roots, err = os.ReadFile(c.files.CAFile); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *trustedCluster) write(t testing.TB, name string, content []byte) string {
	t.Helper()
	file := filepath.Join(c.dir, name)
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// clientFiles has Vault issue a client's certificate.
func (c *trustedCluster) clientFiles(t testing.TB, name string) *client.TLSFiles {
	t.Helper()
	return c.issue(t, "test", name)
}

// issue is clientFiles for any cluster.
func (c *trustedCluster) issue(t testing.TB, cluster, name string) *client.TLSFiles {
	t.Helper()
	var issued struct {
		Data struct {
			Certificate string   `json:"certificate"`
			CAChain     []string `json:"ca_chain"`
			PrivateKey  string   `json:"private_key"`
		} `json:"data"`
	}
	out := c.vault.Run(t, "write", "-format=json", "pki_diurna/issue/diurna-client", "common_name="+name,
		"exclude_cn_from_sans=true", fmt.Sprintf("uri_sans=spiffe://%s.diurna/client/%s", cluster, name))
	if err := json.Unmarshal([]byte(out), &issued); err != nil {
		t.Fatal(err)
	}
	chain := issued.Data.Certificate + "\n" + strings.Join(issued.Data.CAChain, "\n")
	root := c.vault.Run(t, "read", "-field=certificate", "pki_diurna_root/cert/ca")
	return &client.TLSFiles{
		CAFile:   c.write(t, name+"-ca.pem", []byte(root+"\n")),
		CertFile: c.write(t, name+".pem", []byte(chain+"\n")),
		KeyFile:  c.write(t, name+"-key.pem", []byte(issued.Data.PrivateKey+"\n")),
	}
}

// start starts three nodes: two log in as AppRole, one by JWT.
func (c *trustedCluster) start(t *testing.T) {
	t.Helper()
	jwt := c.write(t, "jwt.hcl", fmt.Appendf(nil, "vault {\n  auth = \"jwt\"\n  auth_role = \"diurna-server\"\n  jwt_file = %q\n}\n", c.jwtFile))
	c.add(t)
	c.add(t)
	c.add(t, "-config-file", jwt)
	for _, m := range c.nodes {
		m.awaitReady(t)
	}
	c.servers(t, "three nodes vote", healthy(3))
}

// signJWT signs claims by ES256.
func signJWT(t testing.TB, key *ecdsa.PrivateKey, claims map[string]any) string {
	t.Helper()
	body, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	text := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"ES256","typ":"JWT"}`)) + "." + base64.RawURLEncoding.EncodeToString(body)
	sum := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + base64.RawURLEncoding.EncodeToString(append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...))
}

// http asks a node's HTTP endpoint, as the client.
func (c *trustedCluster) http(t testing.TB, m *member, path string) []byte {
	t.Helper()
	cfg := c.clientTLS(t)
	hc := &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}, Timeout: patience}
	resp, err := hc.Get("https://" + m.httpAddr(t) + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s: %s, %v", path, resp.Status, body, err)
	}
	return body
}

func (c *processCluster) clientTLS(t testing.TB) *tls.Config {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(c.files.CertFile, c.files.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := os.ReadFile(c.files.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(roots)
	return &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}}
}

func (m *member) httpAddr(t testing.TB) string {
	t.Helper()
	return find(m.log(t), "node started").str("http")
}

// certificate is what a node says of its own.
func (c *trustedCluster) certificate(t testing.TB, m *member) certificateJSON {
	t.Helper()
	var s statusJSON
	if err := json.Unmarshal(c.http(t, m, "/v1/status"), &s); err != nil || s.Certificate == nil {
		t.Fatalf("%+v, %v", s, err)
	}
	return *s.Certificate
}

// served is the serial number of the certificate that a node shows somewhere.
func served(t testing.TB, addr, protocol string) string {
	t.Helper()
	var serial string
	conn, err := tls.Dial("tcp", addr, &tls.Config{
		NextProtos: []string{protocol}, InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			serial = fmt.Sprintf("%x", s.PeerCertificates[0].SerialNumber)
			return nil
		},
	})
	if err == nil {
		err = conn.Close()
	}
	if serial == "" {
		t.Fatalf("%s at %s: %v", protocol, addr, err)
	}
	return serial
}

// serials are what a node shows for gRPC, Raft and HTTP.
func (c *trustedCluster) serials(t testing.TB, m *member) [3]string {
	t.Helper()
	return [3]string{served(t, m.listen, peer.ProtocolClients), served(t, m.listen, peer.ProtocolRaft), served(t, m.httpAddr(t), "http/1.1")}
}

// awaitCertificate waits until a node's certificate is as wanted.
func (c *trustedCluster) awaitCertificate(t testing.TB, m *member, what string, ok func(certificateJSON) bool) {
	t.Helper()
	for end := time.Now().Add(patience + 3*time.Minute); ; time.Sleep(200 * time.Millisecond) { // another process's state
		got := c.certificate(t, m)
		if ok(got) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s %s; its certificate is %+v", m.name, what, got)
		}
	}
}

// TestTrustForms: three nodes log in to Vault in two ways, get certificates, and
// form a cluster over mutual TLS, with a Consul that speaks TLS and takes tokens.
// A client with a certificate is served, one without is not, whoever it is.
func TestTrustForms(t *testing.T) {
	t.Parallel()
	c := prepareTrusted(t, time.Hour)
	c.start(t)
	c.awaitDNS(t, "diurna", ports(c.nodes...)) // so Consul's health checks pass
	c.awaitDNS(t, "leader.diurna", ports(c.leader(t)))
	values := numbered("v", 100)
	produce(t, patient(t, c.nodes[0].listen), values...)
	for _, m := range c.nodes {
		if got := consume(t, patient(t, m.listen), 0); len(got) != len(values) {
			t.Errorf("%s has %d records", m.name, len(got))
		}
		if got := c.certificate(t, m); got.Source != "vault" || got.VaultUp == nil || !*got.VaultUp || got.ExpiresIn < 3000 {
			t.Errorf("%s: %+v", m.name, got)
		}
	}
	addr := c.nodes[1].listen
	for name, tc := range map[string]struct {
		opts   []client.Option
		reason string
	}{
		"no certificate": {[]client.Option{client.WithTLS(client.TLSFiles{CAFile: c.files.CAFile})}, client.ReasonNoCertificate},
		"no TLS":         {nil, client.ReasonTLSFailed},
	} {
		cl, err := client.Dial(addr, append(tc.opts, client.WithRetry(0))...)
		if err != nil {
			t.Fatal(err)
		}
		_, err = cl.Produce(within(t), []*client.Record{{Value: []byte("x")}})
		if e := wantReason(t, err, tc.reason); !e.Definite {
			t.Errorf("%s: %v is not definite", name, err)
		}
		if err := cl.Close(); err != nil {
			t.Error(err)
		}
	}
	// The command line, told by its environment.
	for end := time.Now().Add(patience); ; {
		p := startProcess(t, "env", "DIURNA_ADDR="+addr, "DIURNA_CACERT="+c.files.CAFile, "DIURNA_CLIENT_CERT="+c.files.CertFile,
			"DIURNA_CLIENT_KEY="+c.files.KeyFile, diurna(t), "status")
		code := p.wait(t)
		if code == exitOK && strings.Contains(p.stdout.text(), "Certificate") {
			break
		}
		// On a busy machine, somebody may be found unhealthy for a moment.
		if !strings.Contains(p.stderr.text(), "unhealthy") || time.Now().After(end) {
			t.Errorf("status: exit %d: %s%s", code, p.stdout.text(), p.stderr.text())
			break
		}
	}
	if code, _, stderr := runDiurna(t, "", "status", "-addr", addr); code != exitServer || !strings.Contains(stderr, "TLS") {
		t.Errorf("status without TLS: exit %d: %s", code, stderr)
	}
	// No secret is in any log.
	secret, err := os.ReadFile(c.secretIDFile)
	if err != nil {
		t.Fatal(err)
	}
	jwt, err := os.ReadFile(c.jwtFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range c.nodes {
		for _, s := range []string{strings.TrimSpace(string(secret)), string(jwt), "PRIVATE KEY", "hvs."} {
			if strings.Contains(m.stderr.text(), s) {
				t.Errorf("%s logged a secret", m.name)
			}
		}
	}
}

// TestTrustRotates: certificates are replaced, again and again, under a producer
// and a reader that notice nothing.
func TestTrustRotates(t *testing.T) {
	t.Parallel()
	life := time.Duration(vfstest.Env(t, "DIURNA_CERT_LIFE", 20)) * time.Second
	c := prepareTrusted(t, life)
	c.start(t)
	l := startLoad(t, 2, c.addresses())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var seen uint64
	followed := make(chan error, 1)
	// A client that repeats nothing: one broken stream, and it is over.
	go func() { followed <- follow(ctx, c.nodes[2].listen, &seen, client.WithRetry(0)) }()

	before := make(map[string]map[string]bool) // by node and place
	for round := range 4 {
		for _, m := range c.nodes {
			c.awaitCertificate(t, m, "has another certificate", func(got certificateJSON) bool {
				return got.Renewals >= uint64(round+1)
			})
			for i, serial := range c.serials(t, m) {
				place := fmt.Sprint(m.name, i)
				if before[place] == nil {
					before[place] = make(map[string]bool)
				}
				before[place][serial] = true
			}
		}
		select {
		case err := <-followed:
			t.Fatalf("the reader ended: %v", err)
		default:
		}
	}
	for place, serials := range before {
		if len(serials) < 4 {
			t.Errorf("%s showed %d certificates in three rotations", place, len(serials))
		}
	}
	l.stop(t, c.processCluster)
	for _, s := range l.producers {
		if len(s.unknown)+s.refused > 0 {
			t.Errorf("%s noticed: %d in doubt, %d refused", s.name, len(s.unknown), s.refused)
		}
	}
	cancel()
	if err := <-followed; err != nil || seen == 0 {
		t.Errorf("the reader has seen %d records, and ended: %v", seen, err)
	}
	for _, m := range c.nodes {
		if got := c.certificate(t, m); got.RenewFailures > 0 {
			t.Errorf("%s: %+v", m.name, got)
		}
	}
}

// TestTrustOutage: Vault is gone while certificates are to be renewed, and while
// a node is restarted; it comes back with other CAs; the CAs are replaced while
// it runs. Records are acknowledged throughout.
func TestTrustOutage(t *testing.T) {
	t.Parallel()
	const life = 90 * time.Second
	c := prepareTrusted(t, life)
	c.start(t)
	l := startLoad(t, 1, c.addresses())

	// Gone. What is due is tried, and seen to fail.
	c.vault.Stop(t)
	for _, m := range c.nodes {
		m.signal(t, syscall.SIGHUP)
	}
	for _, m := range c.nodes {
		c.awaitCertificate(t, m, "misses Vault", func(got certificateJSON) bool { return got.RenewFailures > 0 && !*got.VaultUp })
	}
	metrics := string(c.http(t, c.nodes[0], "/v1/metrics"))
	for _, want := range []string{"diurna_certificate_expiry_timestamp_seconds ", "diurna_vault_up 0", "diurna_certificate_renew_failures_total "} {
		if !strings.Contains(metrics, "\n"+want) {
			t.Errorf("the metrics lack %q", want)
		}
	}
	m := c.nodes[1]
	m.terminate(t)
	c.launch(t, m)
	m.awaitReady(t)
	c.servers(t, "three nodes vote", healthy(3))

	// Back, with nothing of what it had: other CAs.
	old := c.serialsOf(t)
	c.vault.Start(t)
	c.setUpAgain(t)
	c.awaitNewIssuers(t, old)

	// And now the CAs are replaced in a Vault that runs.
	old = c.serialsOf(t)
	c.vault.Run(t, "write", "pki_diurna_root/root/rotate/internal", "common_name=Diurna root CA 2", "issuer_name=second", "key_type=ec", "key_bits=256", "ttl=8760h")
	c.vault.Run(t, "write", "pki_diurna_root/root/replace", "default=second")
	csr := c.write(t, "second.csr", []byte(c.vault.Run(t, "write", "-field=csr", "pki_diurna/intermediate/generate/internal", "common_name=Diurna CA 2", "key_type=ec", "key_bits=256")))
	signed := c.write(t, "second.pem", []byte(c.vault.Run(t, "write", "-field=certificate", "pki_diurna_root/root/sign-intermediate", "csr=@"+csr,
		"common_name=Diurna CA 2", "format=pem", "ttl=8000h", "max_path_length=0")))
	var imported struct {
		Data struct {
			ImportedIssuers []string `json:"imported_issuers"`
		} `json:"data"`
	}
	out := c.vault.Run(t, "write", "-format=json", "pki_diurna/intermediate/set-signed", "certificate=@"+signed)
	if err := json.Unmarshal([]byte(out), &imported); err != nil || len(imported.Data.ImportedIssuers) == 0 {
		t.Fatalf("%v in %s", err, out)
	}
	c.vault.Run(t, "write", "pki_diurna/config/issuers", "default="+imported.Data.ImportedIssuers[0])
	c.awaitNewIssuers(t, old)

	l.stop(t, c.processCluster)
	for _, s := range l.producers {
		if len(s.unknown) > 0 {
			t.Errorf("%s: %d records in doubt", s.name, len(s.unknown))
		}
		t.Logf("%s: %d records, %d attempts refused, the longest pause was %v", s.name, len(s.acked), s.refused, s.longest.Round(time.Millisecond))
	}
}

func (c *trustedCluster) serialsOf(t testing.TB) map[string]string {
	t.Helper()
	serials := make(map[string]string)
	for _, m := range c.nodes {
		serials[m.name] = c.certificate(t, m).Serial
	}
	return serials
}

// setUpAgain makes an empty Vault what it was, but for its CAs.
func (c *trustedCluster) setUpAgain(t *testing.T) {
	t.Helper()
	c.vault.Setup(t, "test", c.env...)
	c.vault.Run(t, "write", "auth/approle/role/diurna-server/role-id", "role_id="+c.roleID)
	secret := c.vault.Run(t, "write", "-f", "-field=secret_id", "auth/approle/role/diurna-server/secret-id")
	c.write(t, "secret-id", []byte(secret+"\n"))
}

// awaitNewIssuers has the nodes get certificates of other CAs, and then clients.
// Until all have moved on, everybody trusts both.
func (c *trustedCluster) awaitNewIssuers(t *testing.T, old map[string]string) {
	t.Helper()
	c.roots = append(c.roots, c.vault.Run(t, "read", "-field=certificate", "pki_diurna_root/cert/ca")+"\n"...)
	c.write(t, "app-ca.pem", c.roots)
	for _, m := range c.nodes {
		m.signal(t, syscall.SIGHUP)
	}
	for _, m := range c.nodes {
		c.awaitCertificate(t, m, "has another certificate", func(got certificateJSON) bool { return got.Serial != old[m.name] })
	}
	c.clientFiles(t, "app")
	c.write(t, "app-ca.pem", c.roots)
	for _, m := range c.nodes {
		produce(t, patient(t, m.listen), "new CA")
	}
	c.servers(t, "three nodes vote", healthy(3))
}
