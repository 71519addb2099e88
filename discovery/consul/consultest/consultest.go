// Package consultest runs a real Consul for tests: one server on ports of its
// own, with its data in a temporary folder.
//
//	server := consultest.Start(t, consultest.Options{})
//	cfg := consul.Config{Address: server.HTTP, Cluster: "test"}
//
// It needs a consul: the one that DIURNA_CONSUL names, one on the PATH, or the
// one that "make consul" builds. Without any the test fails; it is never
// skipped.
package consultest

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
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
)

// startLimit is how long a server may take until it leads. A second or two on a
// machine that has nothing else to do.
const startLimit = 90 * time.Second

// Options of a server.
type Options struct {
	// ACL turns access control on, denying what no token allows.
	ACL bool
	// TLS serves HTTPS besides HTTP.
	TLS bool
	// Extra is more configuration, by Consul's names.
	Extra map[string]any
}

// Server is a Consul server. Its methods are for the test's goroutine.
type Server struct {
	// HTTP and DNS (TCP and UDP) are addresses, host:port, which stay the same
	// when it is restarted.
	HTTP, DNS string
	// Token may do everything. Empty without ACL.
	Token string
	// HTTPS is a URL, and CAFile what vouches for who answers there. Empty
	// without TLS.
	HTTPS, CAFile string

	binary string
	dir    string
	ports  map[string]int
	opts   Options
	output output
	cmd    *exec.Cmd
	exited chan struct{} // closed when the process has ended
}

// Start starts a server and waits until it leads. It is killed when the test
// ends, or this process, however that ends.
func Start(t testing.TB, opts Options) *Server {
	t.Helper()
	binary, err := find()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{binary: binary, dir: t.TempDir(), opts: opts}
	if opts.ACL {
		s.Token = uuid.NewString()
	}
	if opts.TLS {
		if err := s.makeCertificate(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		s.end()
		if t.Failed() {
			t.Logf("consul's output:\n%s", s.output.String())
		}
	})
	// The kernel chose ports that were free, and somebody else may have taken
	// one since.
	for try := 1; ; try++ {
		if err := s.choosePorts(); err != nil {
			t.Fatal(err)
		}
		err := s.start(t.Context())
		if err == nil {
			return s
		}
		if try == 5 || !s.portTaken() {
			t.Fatalf("start %s: %v\n%s", binary, err, s.output.String())
		}
		s.end()
		s.output.reset()
	}
}

// Kill ends the process at once, as kill -9 does. Its data stays.
func (s *Server) Kill(t testing.TB) {
	t.Helper()
	s.end()
}

// Stop ends the process as an operator does. Its data stays.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	if s.cmd == nil {
		return
	}
	if err := s.cmd.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
	select {
	case <-s.exited:
	case <-time.After(30 * time.Second):
		t.Error("consul does not stop")
	}
	s.end()
}

// Restart kills the process if it runs, and starts it again at the same
// addresses, with the data it had.
func (s *Server) Restart(t testing.TB) {
	t.Helper()
	s.restart(t)
}

// RestartEmpty is Restart with all data lost: catalog, keys, tokens other than
// Token, and what the agent knew.
func (s *Server) RestartEmpty(t testing.TB) {
	t.Helper()
	s.end()
	if err := os.RemoveAll(filepath.Join(s.dir, "data")); err != nil {
		t.Fatal(err)
	}
	s.restart(t)
}

func (s *Server) restart(t testing.TB) {
	t.Helper()
	for try := 1; ; try++ {
		s.end()
		s.output.reset()
		err := s.start(t.Context())
		if err == nil {
			return
		}
		// Somebody may use one of the ports for a short connection.
		if try == 5 || !s.portTaken() {
			t.Fatalf("restart %s: %v\n%s", s.binary, err, s.output.String())
		}
	}
}

// find looks for a consul.
func find() (string, error) {
	const hint = `run "make consul", or set DIURNA_CONSUL to the path of a consul`
	if name := os.Getenv("DIURNA_CONSUL"); name != "" {
		return name, nil
	}
	if name, err := exec.LookPath("consul"); err == nil {
		return name, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		name := filepath.Join(dir, ".tools", "bin", "consul")
		if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
			return name, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("there is no consul on the PATH and none in .tools/bin: " + hint)
		}
		dir = up
	}
}

// choosePorts asks the kernel for ports that are free for what needs them.
func (s *Server) choosePorts() error {
	s.ports = map[string]int{"grpc": -1, "grpc_tls": -1, "https": -1, "serf_wan": -1}
	var held []io.Closer // all at once, so that no port is given out twice
	defer func() {
		for _, c := range held {
			_ = c.Close() // nothing was sent
		}
	}()
	names := []string{"http", "dns", "serf_lan", "server"}
	if s.opts.TLS {
		names = append(names, "https")
	}
	for _, name := range names {
		for try := 1; ; try++ {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			held = append(held, l)
			port := l.Addr().(*net.TCPAddr).Port
			p, err := net.ListenPacket("udp", l.Addr().String())
			if err == nil {
				held = append(held, p)
				s.ports[name] = port
				break
			}
			if try == 20 {
				return err
			}
		}
	}
	s.HTTP = fmt.Sprintf("127.0.0.1:%d", s.ports["http"])
	s.DNS = fmt.Sprintf("127.0.0.1:%d", s.ports["dns"])
	if s.opts.TLS {
		s.HTTPS = fmt.Sprintf("https://127.0.0.1:%d", s.ports["https"])
	}
	return nil
}

func (s *Server) portTaken() bool {
	return strings.Contains(s.output.String(), "address already in use")
}

// config is the server's configuration file.
func (s *Server) config() ([]byte, error) {
	c := map[string]any{
		"server":                  true,
		"bootstrap_expect":        1,
		"node_name":               "test",
		"datacenter":              "dc1",
		"data_dir":                filepath.Join(s.dir, "data"),
		"bind_addr":               "127.0.0.1",
		"client_addr":             "127.0.0.1",
		"ports":                   s.ports,
		"log_level":               "info",
		"disable_update_check":    true,
		"leave_on_terminate":      false,
		"skip_leave_on_interrupt": true,
		"performance":             map[string]any{"raft_multiplier": 1},
		"connect":                 map[string]any{"enabled": false},
	}
	if s.opts.ACL {
		c["acl"] = map[string]any{
			"enabled": true, "default_policy": "deny", "enable_token_persistence": false,
			"tokens": map[string]any{"initial_management": s.Token, "agent": s.Token, "dns": s.Token},
		}
	}
	if s.opts.TLS {
		c["tls"] = map[string]any{"https": map[string]any{"ca_file": s.CAFile, "cert_file": s.file("consul.pem"), "key_file": s.file("consul-key.pem")}}
	}
	for k, v := range s.opts.Extra {
		c[k] = v
	}
	return json.MarshalIndent(c, "", "  ")
}

// start runs the process until it leads.
func (s *Server) start(ctx context.Context) error {
	text, err := s.config()
	if err != nil {
		return err
	}
	file := filepath.Join(s.dir, "consul.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return err
	}
	cmd := exec.Command(s.binary, "agent", "-config-file="+file)
	cmd.Stdout, cmd.Stderr = &s.output, &s.output
	cmd.SysProcAttr = childAttr()
	// Not the caller's: CONSUL_HTTP_ADDR and the like are about another one.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "TMPDIR=" + s.dir}
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
	s.cmd, s.exited = cmd, exited
	return s.waitLeader(ctx)
}

// waitLeader polls until the server leads and has put itself into its catalog.
func (s *Server) waitLeader(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := errors.New("no answer yet")
	for {
		select {
		case <-s.exited:
			return errors.New("it ended")
		case <-ctx.Done():
			return fmt.Errorf("it does not lead after %s: %w", startLimit, last)
		case <-tick.C:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.HTTP+"/v1/health/node/test?consistent", nil)
		if err != nil {
			return err
		}
		req.Header.Set("X-Consul-Token", s.Token)
		resp, err := hc.Do(req)
		if err != nil {
			last = err
			continue
		}
		body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		_ = resp.Body.Close() // read
		switch {
		case err != nil:
			last = err
		case resp.StatusCode != http.StatusOK:
			last = fmt.Errorf("status %d: %s", resp.StatusCode, body)
		case !bytes.Contains(body, []byte(`"serfHealth"`)):
			last = fmt.Errorf("its catalog lacks itself: %s", body)
		default:
			return nil
		}
	}
}

// end kills the process and whatever it started, and waits for it.
func (s *Server) end() {
	if s.cmd == nil {
		return
	}
	killGroup(s.cmd)
	<-s.exited
	s.cmd = nil
}

// output keeps the end of what a process prints.
type output struct {
	mu  sync.Mutex
	buf []byte
}

const outputLimit = 64 << 10

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
