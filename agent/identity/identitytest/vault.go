// Package identitytest has Vaults for tests: a real one, and a fake one that
// signs as well and fails in ways that a real one cannot be made to.
//
//	vault := identitytest.StartVault(t)
//	vault.Setup(t, "diurna", "SERVER_TTL=60s")
//	cfg := identity.Config{Vault: vault.AppRole(t), ...}
//
// The real one needs a vault: the one that DIURNA_VAULT names, one on the PATH,
// or the one that "make vault" builds. Without any the test fails; it is never
// skipped.
package identitytest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
)

// startLimit is how long a server may take until it answers. A second on a
// machine that has nothing else to do.
const startLimit = 90 * time.Second

// RootToken may do everything, in the real Vault and in the fake one.
const RootToken = "root-token-of-a-test"

// Vault is a real Vault in its development mode: unsealed, with everything in
// memory. Its methods are for the test's goroutine.
type Vault struct {
	// URL stays the same when it is started again.
	URL string

	binary string
	dir    string
	port   int
	output output
	cmd    *exec.Cmd
	exited chan struct{} // closed when the process has ended
}

// StartVault starts a Vault and waits until it answers. It is killed when the
// test ends, or this process, however that ends.
func StartVault(t testing.TB) *Vault {
	t.Helper()
	binary, err := findAbove("vault", "DIURNA_VAULT", filepath.Join(".tools", "bin", "vault"))
	if err != nil {
		t.Fatalf(`%v: run "make vault", or set DIURNA_VAULT to the path of a vault`, err)
	}
	v := &Vault{binary: binary, dir: t.TempDir()}
	t.Cleanup(func() {
		v.end()
		if t.Failed() {
			t.Logf("vault's output:\n%s", v.output.String())
		}
	})
	// The kernel chose a port that was free, and somebody else may have taken
	// it since.
	for try := 1; ; try++ {
		if err := v.choosePort(); err != nil {
			t.Fatal(err)
		}
		if v.tryStart(t, try == 5) {
			return v
		}
	}
}

// Stop kills the process: everything in it is lost.
func (v *Vault) Stop(t testing.TB) {
	t.Helper()
	v.end()
}

// Start starts a stopped one again at the same address: empty, sealed by
// nothing, with RootToken.
func (v *Vault) Start(t testing.TB) {
	t.Helper()
	for try := 1; !v.tryStart(t, try == 5); try++ {
	}
}

func (v *Vault) tryStart(t testing.TB, last bool) bool {
	t.Helper()
	v.end()
	v.output.reset()
	err := v.start(t.Context())
	if err == nil {
		return true
	}
	if last || !strings.Contains(v.output.String(), "address already in use") {
		t.Fatalf("start %s: %v\n%s", v.binary, err, v.output.String())
	}
	return false
}

// Setup runs scripts/vault-pki.sh for a cluster, with more environment.
func (v *Vault) Setup(t testing.TB, cluster string, env ...string) {
	t.Helper()
	script, err := findAbove("", "", filepath.Join("scripts", "vault-pki.sh"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), script, cluster)
	cmd.Env = append(v.environment(), append(env, "VAULT="+v.binary)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// Run runs the vault binary as root and returns what it prints.
func (v *Vault) Run(t testing.TB, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), v.binary, args...)
	cmd.Env = v.environment()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("vault %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

func (v *Vault) environment() []string {
	return []string{"PATH=" + os.Getenv("PATH"), "HOME=" + v.dir, "TMPDIR=" + v.dir, "VAULT_ADDR=" + v.URL, "VAULT_TOKEN=" + RootToken}
}

// Config is a configuration that logs in with the root token.
func (v *Vault) Config(testing.TB) config.Vault {
	c := config.Default().Vault
	c.Address, c.Auth, c.Token = v.URL, config.VaultToken, RootToken
	c.CAMounts = []string{"pki_diurna_root"}
	return c
}

// AppRole is a configuration that logs in as the AppRole diurna-server, which
// Setup makes.
func (v *Vault) AppRole(t testing.TB) config.Vault {
	t.Helper()
	c := v.Config(t)
	c.Auth, c.Token = config.VaultAppRole, ""
	c.RoleID = v.Run(t, "read", "-field=role_id", "auth/approle/role/diurna-server/role-id")
	c.SecretID = v.Run(t, "write", "-f", "-field=secret_id", "auth/approle/role/diurna-server/secret-id")
	return c
}

// Seal makes Vault refuse everything until Unseal.
func (v *Vault) Seal(t testing.TB) {
	t.Helper()
	v.api(t, "sys/seal", nil)
}

var unsealKey = regexp.MustCompile(`(?m)^Unseal Key: (\S+)$`)

// Unseal undoes Seal.
func (v *Vault) Unseal(t testing.TB) {
	t.Helper()
	m := unsealKey.FindStringSubmatch(v.output.String())
	if m == nil {
		t.Fatal("vault did not print its unseal key")
	}
	v.api(t, "sys/unseal", map[string]any{"key": m[1]})
}

// Revoke takes a certificate back, given as PEM.
func (v *Vault) Revoke(t testing.TB, cert []byte) {
	t.Helper()
	v.api(t, "pki_diurna/revoke", map[string]any{"certificate": string(cert)})
	// With auto_rebuild Vault would take its time.
	v.Run(t, "read", "pki_diurna/crl/rotate")
}

// Empty loses everything, as a restart in development mode does, and sets it up
// again: there are other CAs.
func (v *Vault) Empty(t testing.TB, cluster string, env ...string) {
	t.Helper()
	v.Stop(t)
	v.Start(t)
	v.Setup(t, cluster, env...)
}

func (v *Vault) api(t testing.TB, at string, data map[string]any) {
	t.Helper()
	body, err := json.Marshal(data)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, v.URL+"/v1/"+at, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Vault-Token", RootToken)
	resp, err := oneShot.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	_ = resp.Body.Close() // read
	if err != nil || resp.StatusCode >= 300 {
		t.Fatalf("vault: %s: status %d: %s (%v)", at, resp.StatusCode, text, err)
	}
}

// oneShot keeps no connections that a test would leave behind.
var oneShot = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 30 * time.Second}

// findAbove finds a program: the one that a variable names, one on the PATH, or
// a file in this folder or one above.
func findAbove(name, variable, file string) (string, error) {
	if variable != "" {
		if named := os.Getenv(variable); named != "" {
			return named, nil
		}
	}
	if name != "" {
		if found, err := exec.LookPath(name); err == nil {
			return found, nil
		}
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		at := filepath.Join(dir, file)
		if info, err := os.Stat(at); err == nil && info.Mode().IsRegular() {
			return at, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", fmt.Errorf("there is no %s here or above", file)
		}
		dir = up
	}
}

func (v *Vault) choosePort() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	v.port = l.Addr().(*net.TCPAddr).Port
	v.URL = fmt.Sprintf("http://127.0.0.1:%d", v.port)
	return l.Close()
}

// start runs the process until it answers.
func (v *Vault) start(ctx context.Context) error {
	cmd := exec.Command(v.binary, "server", "-dev", "-dev-no-store-token", "-dev-root-token-id="+RootToken,
		fmt.Sprintf("-dev-listen-address=127.0.0.1:%d", v.port))
	cmd.Stdout, cmd.Stderr = &v.output, &v.output
	cmd.SysProcAttr = childAttr()
	// Not the caller's: VAULT_ADDR and the like are about another one.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + v.dir, "TMPDIR=" + v.dir}
	exited := make(chan struct{})
	started := make(chan error, 1)
	go func() {
		defer close(exited)
		started <- run(cmd)
		// Only that it ended counts, not how.
		_ = cmd.Wait()
	}()
	if err := <-started; err != nil {
		<-exited
		return err
	}
	v.cmd, v.exited = cmd, exited
	return v.wait(ctx)
}

// wait polls until the server answers and is unsealed.
func (v *Vault) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := errors.New("no answer yet")
	for {
		select {
		case <-v.exited:
			return errors.New("it ended")
		case <-ctx.Done():
			return fmt.Errorf("it is not up after %s: %w", startLimit, last)
		case <-tick.C:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, v.URL+"/v1/auth/token/lookup-self", nil)
		if err != nil {
			return err
		}
		// The token is made last.
		req.Header.Set("X-Vault-Token", RootToken)
		resp, err := oneShot.Do(req)
		if err != nil {
			last = err
			continue
		}
		_ = resp.Body.Close() // only the status counts
		if resp.StatusCode == http.StatusOK {
			return nil
		}
		last = fmt.Errorf("status %d", resp.StatusCode)
	}
}

// end kills the process and waits for it.
func (v *Vault) end() {
	if v.cmd == nil {
		return
	}
	killGroup(v.cmd)
	<-v.exited
	v.cmd = nil
}

// output keeps the end of what a process prints.
type output struct {
	mu  sync.Mutex
	buf []byte
}

const outputLimit = 256 << 10

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.buf = append(o.buf, p...)
	if extra := len(o.buf) - outputLimit; extra > 0 {
		o.buf = append(o.buf[:0], o.buf[extra:]...)
	}
	return len(p), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.buf)
}

func (o *output) reset() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.buf = nil
}
