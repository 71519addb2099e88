package consultest

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// orphanEnv makes this binary start a Consul, say its process id, and wait to
// be killed.
const orphanEnv = "DIURNA_TEST_ORPHAN"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// call makes one request and returns the answer's status and body.
func call(t *testing.T, s *Server, method, path, body string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+s.HTTP+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Consul-Token", s.Token)
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var b strings.Builder
	if _, err := fmt.Fprint(&b, resp.StatusCode, " "); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(resp.Body).WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestRestart(t *testing.T) {
	s := Start(t, Options{ACL: true})
	address := s.HTTP
	if got := call(t, s, "PUT", "/v1/kv/x", "kept"); got != "200 true" && got != "200 true\n" {
		t.Fatalf("write: %s", got)
	}
	for name, restart := range map[string]func(){
		"killed":  func() { s.Kill(t); s.Restart(t) },
		"stopped": func() { s.Stop(t); s.Restart(t) },
		"both":    func() { s.Restart(t) },
	} {
		restart()
		if got := call(t, s, "GET", "/v1/kv/x?raw", ""); got != "200 kept" {
			t.Errorf("%s: %s", name, got)
		}
	}
	s.RestartEmpty(t)
	if got := call(t, s, "GET", "/v1/kv/x?raw", ""); !strings.HasPrefix(got, "404") || s.HTTP != address {
		t.Errorf("empty, at %s: %s", s.HTTP, got)
	}
	token := s.Token
	s.Token = ""
	if got := call(t, s, "GET", "/v1/kv/x?raw", ""); !strings.HasPrefix(got, "403") {
		t.Errorf("without a token: %s", got)
	}
	s.Token = token
}

// TestMissing must say how to get one.
func TestMissing(t *testing.T) {
	t.Setenv("DIURNA_CONSUL", "")
	t.Setenv("PATH", t.TempDir())
	t.Chdir(t.TempDir())
	if name, err := find(); err == nil || !strings.Contains(err.Error(), "make consul") {
		t.Errorf("found %q, %v", name, err)
	}
	t.Setenv("DIURNA_CONSUL", "/some/consul")
	if name, err := find(); err != nil || name != "/some/consul" {
		t.Errorf("found %q, %v", name, err)
	}
	dir := t.TempDir()
	t.Setenv("DIURNA_CONSUL", "")
	below := filepath.Join(dir, "a", "b")
	if err := os.MkdirAll(below, 0o755); err != nil {
		t.Fatal(err)
	}
	want := filepath.Join(dir, ".tools", "bin", "consul")
	if err := os.MkdirAll(filepath.Dir(want), 0o755); err != nil {
		t.Fatal(err)
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
	s := Start(t, Options{})
	fmt.Printf("consul's pid: %d\n", s.cmd.Process.Pid)
	select {}
}

// TestNoOrphan kills a test process in the middle; its Consul must go with it.
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
		if text, ok := strings.CutPrefix(lines.Text(), "consul's pid: "); ok {
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
			t.Fatalf("consul (%d) outlived the test that started it", pid)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
