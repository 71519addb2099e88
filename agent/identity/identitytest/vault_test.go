package identitytest

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// orphanEnv makes this binary start a Vault, say its process id, and wait to be
// killed.
const orphanEnv = "DIURNA_TEST_ORPHAN"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestRestart has a real Vault lose everything, and be set up again at the same
// address.
func TestRestart(t *testing.T) {
	v := StartVault(t)
	url := v.URL
	v.Setup(t, "diurna")
	root := func() string { return v.Run(t, "read", "-field=certificate", "pki_diurna_root/cert/ca") }
	first := root()
	v.Setup(t, "diurna", "SERVER_TTL=60s")
	if root() != first {
		t.Error("the second setup has made another root")
	}
	if got := v.Run(t, "read", "-field=max_ttl", "pki_diurna/roles/diurna-server"); got != "60" && got != "1m" {
		t.Errorf("the second setup has left the role as it was: max_ttl=%s", got)
	}
	v.Seal(t)
	v.Unseal(t)
	v.Stop(t)
	v.Start(t)
	v.Setup(t, "diurna")
	if root() == first || v.URL != url {
		t.Errorf("not another Vault at %s, but at %s", url, v.URL)
	}
}

// TestMissing must not find what is not there.
func TestMissing(t *testing.T) {
	find := func() (string, error) {
		return findAbove("vault", "DIURNA_VAULT", filepath.Join(".tools", "bin", "vault"))
	}
	t.Setenv("DIURNA_VAULT", "")
	t.Setenv("PATH", t.TempDir())
	t.Chdir(t.TempDir())
	if name, err := find(); err == nil {
		t.Errorf("found %q", name)
	}
	t.Setenv("DIURNA_VAULT", "/some/vault")
	if name, err := find(); err != nil || name != "/some/vault" {
		t.Errorf("found %q, %v", name, err)
	}
	t.Setenv("DIURNA_VAULT", "")
	dir := t.TempDir()
	below, want := filepath.Join(dir, "a", "b"), filepath.Join(dir, ".tools", "bin", "vault")
	for _, d := range []string{below, filepath.Dir(want)} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(want, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Chdir(below)
	if name, err := find(); err != nil || name != want {
		t.Errorf("found %q, %v", name, err)
	}
}

// TestOrphan is half of TestNoOrphan, in a process of its own.
func TestOrphan(t *testing.T) {
	if os.Getenv(orphanEnv) == "" {
		return // TestNoOrphan runs it
	}
	v := StartVault(t)
	fmt.Printf("vault's pid: %d\n", v.cmd.Process.Pid)
	select {}
}

// TestNoOrphan kills a test process in the middle; its Vault must go with it.
func TestNoOrphan(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^TestOrphan$", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), orphanEnv+"=1", "TMPDIR="+t.TempDir()) // it leaves its folder behind
	cmd.SysProcAttr = childAttr()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := 0
	lines := bufio.NewScanner(out)
	for pid == 0 && lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), "vault's pid: "); ok {
			if pid, err = strconv.Atoi(text); err != nil {
				t.Error(err)
			}
		}
	}
	killGroup(cmd)
	_ = cmd.Wait() // killed
	if pid == 0 {
		t.Fatal("it did not start")
	}
	deadline := time.Now().Add(time.Minute)
	for running(pid) {
		if time.Now().After(deadline) {
			t.Fatalf("vault (%d) outlived the test that started it", pid)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
