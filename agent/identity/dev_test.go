package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
)

func devConfig(t *testing.T, dir string) Config {
	logger, _ := newLogs(t, nil)
	return Config{TLS: config.TLS{Source: config.TLSDev, DevDir: dir}, Cluster: "Test", NodeID: testNode, Host: "127.0.0.1", Logger: logger}
}

const devChild = "DIURNA_TEST_DEV_DIR"

// TestDevChild is a process of TestDevRace.
func TestDevChild(t *testing.T) {
	dir := os.Getenv(devChild)
	if dir == "" {
		return // not one
	}
	mustOpen(t, devConfig(t, dir), hurried())
}

// TestDevRace has processes and goroutines make a CA in the same folder: there
// is one, and all of them are of it.
func TestDevRace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dev")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestDevChild$", "-test.v")
			cmd.Env = append(os.Environ(), devChild+"="+dir)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("a process: %v\n%s", err, out)
			}
		})
	}
	all := make([]*Identity, 8)
	for k := range all {
		wg.Go(func() { all[k] = mustOpen(t, devConfig(t, dir), hurried()) })
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	srv := serve(t, all[0].Server(ALPNRaft, "h2"))
	for k, i := range all {
		if _, err := srv.dial(t, i.Peer(ALPNRaft)); err != nil {
			t.Errorf("number %d: %v", k, err)
		}
	}

	// The command line's certificate is a client's, and fits its key.
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, DevClientFile), filepath.Join(dir, DevClientKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	text, err := os.ReadFile(filepath.Join(dir, CAFile))
	if err != nil || !roots.AppendCertsFromPEM(text) {
		t.Fatalf("no CA: %v", err)
	}
	client := func(proto string) *tls.Config {
		return &tls.Config{RootCAs: roots, ServerName: ServerName("Test"), Certificates: []tls.Certificate{cert}, NextProtos: []string{proto}}
	}
	conn, err := srv.handshake(t, client("h2"))
	if err != nil {
		t.Fatal(err)
	}
	if c := all[0].Caller(conn.ConnectionState()); c.Server || c.Subject != "spiffe://test.diurna/client/dev" {
		t.Errorf("caller %+v", c)
	}
	if _, err := srv.handshake(t, client(ALPNRaft)); !errors.Is(err, ErrWrongRole) {
		t.Errorf("a client that speaks Raft: %v", err)
	}
	private(t, dir, CAFile, CAKeyFile, DevClientFile, DevClientKeyFile)
}

// private checks that nobody else can read files, and that nothing else is
// there.
func private(t *testing.T, dir string, files ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	have := make(map[string]bool)
	for _, e := range entries {
		have[e.Name()] = true
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %s", e.Name(), info.Mode())
		}
	}
	for _, f := range files {
		if !have[f] {
			t.Errorf("there is no %s", f)
		}
		delete(have, f)
	}
	for f := range have {
		t.Errorf("there is %s besides", f)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder: %v %v", info.Mode(), err)
	}
}

// TestDevRenews renews both certificates in time, and follows a CA that was
// replaced.
func TestDevRenews(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dev")
	opts, c := hurried(), &clock{}
	opts.now = c.now
	i := mustOpen(t, devConfig(t, dir), opts)
	start(t, i)
	client := func() string {
		b, err := loadPEM(filepath.Join(dir, DevClientFile))
		if err != nil {
			t.Fatal(err)
		}
		return serialOf(b.certs[0])
	}
	before, was := i.Status(), client()
	c.advance(before.RenewAt.Sub(c.now()))
	kick(i.renewKick)
	next := await(t, i, "it is renewed", func(s Status) bool { return s.Serial != before.Serial })
	if client() != was {
		t.Error("the client's certificate was renewed too soon")
	}
	c.advance(devClientLife * 3 / 4)
	kick(i.renewKick)
	await(t, i, "it is renewed again", func(s Status) bool { return s.Serial != next.Serial })
	eventually(t, "the client's certificate is renewed", func() bool { return client() != was })

	if err := os.Remove(filepath.Join(dir, CAKeyFile)); err != nil {
		t.Fatal(err)
	}
	old := i.cur.Load()
	await(t, i, "there is another CA", func(Status) bool {
		_, err := old.pair.verify(c.now(), i.cur.Load().trust.pool)
		return err != nil
	})
	write(t, filepath.Join(dir, CAKeyFile), "rubbish")
	if _, err := open(t.Context(), devConfig(t, dir), hurried()); err == nil || !strings.Contains(err.Error(), CAKeyFile) {
		t.Errorf("a broken CA: %v", err)
	}
}

// TestCreate makes what people without Vault need, and never overwrites.
func TestCreate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	if err := CreateServer(dir, ServerCert{Cluster: "Test", TTL: time.Hour}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a CA: %v", err)
	}
	server := ServerCert{Cluster: "Test", NodeID: testNode, Names: []string{"10.1.2.3", "n1.example.com"}, File: "n1", TTL: time.Hour}
	makes := map[string]func() error{
		"CA":     func() error { return CreateCA(dir, "Test", 2*time.Hour) },
		"server": func() error { return CreateServer(dir, server) },
		"client": func() error { return CreateClient(dir, "Test", "app", time.Hour) },
	}
	for _, name := range []string{"CA", "server", "client"} {
		if err := makes[name](); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	read := func() (all string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			text, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			all += e.Name() + string(text)
		}
		return all
	}
	before := read()
	for name, again := range makes {
		if err := again(); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s again: %v", name, err)
		}
	}
	for _, bad := range []string{"", "ca", "ca-key", "../x", "a/b", "a b", "x\n", strings.Repeat("x", 65)} {
		if err := CreateClient(dir, "Test", bad, time.Hour); err == nil {
			t.Errorf("a client is called %q", bad)
		}
	}
	if err := CreateClient(dir, "Test", "late", -time.Hour); err == nil {
		t.Error("a life that is over")
	}
	if read() != before {
		t.Error("something was changed or left behind")
	}
	private(t, dir, CAFile, CAKeyFile, "n1.pem", "n1-key.pem", "app.pem", "app-key.pem")

	// The node's files are what tls.source = "files" wants.
	cfg, _ := folder{dir}.config(t)
	cfg.TLS.CertFile, cfg.TLS.KeyFile = filepath.Join(dir, "n1.pem"), filepath.Join(dir, "n1-key.pem")
	i := mustOpen(t, cfg, hurried())
	n := serverNames("Test", "", testNode, "10.1.2.3", []string{"n1.example.com"})
	if lacks := n.missing(i.cur.Load().pair.leaf); lacks != "" {
		t.Errorf("the node's certificate lacks %s", lacks)
	}
}
