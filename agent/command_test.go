package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/rpc/client"
)

// command is the agent's verb in this process, with its seams in the test's
// hands.
type command struct {
	*agentCommand
	stdout, stderr *output
	signals        chan os.Signal
	clock          atomic.Int64
	exits          chan int // what would have ended the process
	code           chan int
}

func newCommand() *command {
	c := &command{stdout: newOutput(), stderr: newOutput(), signals: make(chan os.Signal, 4), exits: make(chan int, 4), code: make(chan int, 1)}
	c.agentCommand = &agentCommand{
		stdout: c.stdout, stderr: c.stderr, program: "diurna", version: "1.2.3",
		signals: func() (<-chan os.Signal, func()) { return c.signals, func() {} },
		exit:    func(code int) { c.exits <- code },
		now:     func() time.Time { return time.Unix(0, c.clock.Load()) },
	}
	c.clock.Store(1)
	return c
}

func (c *command) start(args ...string) {
	go func() {
		c.code <- c.Run(append([]string{"-dev", "-rpc-addr", "127.0.0.1:0", "-log-json"}, args...))
	}()
}

func (c *command) mustAddr(t testing.TB) string {
	t.Helper()
	text := c.stderr.mustAwait(t, `"@message":"ready"`)
	return find(logLines(t, text), "node started").str("address")
}

// TestBanner does what somebody does who has just found this: what is printed
// works as it is.
func TestBanner(t *testing.T) {
	t.Run("plaintext", func(t *testing.T) { testBanner(t, 0) })
	t.Run("TLS", func(t *testing.T) { testBanner(t, 1, "-tls") })
	t.Run("TLS with a folder", func(t *testing.T) {
		t.Chdir(t.TempDir()) // where the other terminal is not
		testBanner(t, 1, "-tls", "-tls-dir", "it's a folder")
	})
}

func testBanner(t *testing.T, exports int, args ...string) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	node := startDiurna(t, append([]string{"agent", "-dev", "-rpc-addr", "127.0.0.1:0", "-http-addr", "127.0.0.1:0"}, args...)...)
	banner := node.stdout.mustAwait(t, "consume")
	lines := regexp.MustCompile(`(?m)^    (.*)$`).FindAllStringSubmatch(banner, -1)
	if !strings.Contains(banner, "Ready.") || len(lines) != exports+2 {
		t.Fatalf("the banner is %q", banner)
	}
	setup := ""
	for ; exports > 0; exports-- {
		setup, lines = setup+lines[0][1]+"\n", lines[1:]
	}
	run := func(line string) (string, string) {
		t.Helper()
		cmd := exec.Command("sh", "-c", setup+line)
		cmd.Dir = "/"
		var out, err bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &err
		if e := cmd.Run(); e != nil {
			t.Fatalf("%s: %v\n%s", line, e, err.String())
		}
		return out.String(), err.String()
	}
	if _, said := run(lines[0][1]); !strings.Contains(said, "100,000 records") || !strings.Contains(said, "offsets 0–99999") {
		t.Errorf("produce says %q", said)
	}
	var want strings.Builder
	for i := range 100_000 {
		fmt.Fprintln(&want, i+1)
	}
	if got, _ := run(lines[1][1]); got != want.String() {
		t.Errorf("consume prints %d bytes, %.20q…; want %d", len(got), got, want.Len())
	}
	if entries, err := os.ReadDir(tmp); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
	node.signal(t, os.Interrupt)
	if code := node.wait(t); code != exitOK {
		t.Errorf("exit %d: %s", code, node.stderr.text())
	}
	if entries, err := os.ReadDir(tmp); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestBannerNamesTheAddress(t *testing.T) {
	for address, want := range map[string]string{
		"127.0.0.1:8400": "bin/diurna consume\n",
		"127.0.0.1:9400": "bin/diurna consume -addr 127.0.0.1:9400\n",
		"10.0.0.7:8400":  "| bin/diurna produce -addr 10.0.0.7:8400\n",
	} {
		c := newCommand()
		c.program = "bin/diurna"
		c.banner(config.Dev(), &Agent{address: address})
		if got := c.stdout.text(); !strings.Contains(got, want) {
			t.Errorf("%s: %q", address, got)
		}
	}
}

// TestBannerOfOthersCertificates: whose client's files to use is not for the node
// to know.
func TestBannerOfOthersCertificates(t *testing.T) {
	c, cfg := newCommand(), config.Dev()
	cfg.TLS.Source = config.TLSFiles
	c.banner(cfg, &Agent{address: "127.0.0.1:8400"})
	if got := c.stdout.text(); !strings.Contains(got, "DIURNA_CLIENT_KEY naming the files of a client:\n\n    seq") {
		t.Errorf("%q", got)
	}
}

func TestSignalsStop(t *testing.T) {
	for _, signal := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		t.Run(signal.String(), func(t *testing.T) {
			dir := t.TempDir()
			n := startNode(t, dir)
			produce(t, dial(t, n.addr), numbered("x", 100)...)
			follow := startDiurna(t, "consume", "-addr", n.addr, "-follow", "-retry", "0")
			follow.stdout.mustAwait(t, "x-99\n")
			n.signal(t, signal)
			if code := n.wait(t); code != exitOK {
				t.Fatalf("exit %d:\n%s", code, n.stderr.text())
			}
			if code, said := follow.wait(t), follow.stderr.text(); code != 2 || !strings.Contains(said, "SHUTTING_DOWN") || !strings.Contains(said, "-from 100") {
				t.Errorf("a reader ends with %d and %q", code, said)
			}
			lines := n.log(t)
			if last := lines[len(lines)-1]; last.message() != "stopped" {
				t.Errorf("the last word is %v", last)
			}
			l, err := logstore.Open(filepath.Join(dir, logsDir, "default", "gen-1", "log"), logstore.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if r := l.Recovery(); !r.Clean || r.Torn != "" || r.Bytes != 0 {
				t.Errorf("not closed cleanly: %+v", r)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			n = startNode(t, dir)
			if got := consume(t, dial(t, n.addr), 0); len(got) != 100 {
				t.Errorf("%d records", len(got))
			}
			for _, l := range n.log(t) {
				if level := l.str("@level"); level != "info" && !strings.Contains(l.message(), "heartbeat timeout reached") {
					t.Errorf("a clean start says %v", l)
				}
			}
			n.terminate(t)
		})
	}
}

func TestSecondSignal(t *testing.T) {
	fsys := newFaultyFS()
	c := newCommand()
	c.fs = fsys
	c.start("-data-dir", t.TempDir())
	addr := c.mustAddr(t)
	hanging, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	fsys.set(func(op, name string) error {
		if op == "sync" {
			once.Do(func() { close(hanging) })
			<-release
		}
		return nil
	})
	cl := dial(t, addr)
	produced := make(chan error, 1)
	go func() {
		_, err := cl.Produce(t.Context(), []*client.Record{{}})
		produced <- err
	}()
	<-hanging
	c.signals <- os.Interrupt
	c.stderr.mustAwait(t, `"@message":"stopping"`)
	c.signals <- syscall.SIGHUP // is not a second one
	c.signals <- os.Interrupt   // nor is an echo
	c.signals <- syscall.SIGHUP
	for len(c.signals) > 0 {
		select {
		case code := <-c.exits:
			t.Errorf("an echo ends it, with %d", code)
			c.exits <- code
			<-c.signals
		default:
			runtime.Gosched()
		}
	}
	c.clock.Add(int64(echo))
	c.signals <- os.Interrupt
	if code := await(t, c.exits); code != exitUsage {
		t.Errorf("exit %d", code)
	}
	if code := await(t, c.code); code != exitUsage {
		t.Errorf("exit %d", code)
	}
	close(release)
	await(t, fsys.unlocked)
	_ = await(t, produced) // cut off
}

// TestEcho: a signal that comes twice at once, as timeout(1) sends it, is one.
func TestEcho(t *testing.T) {
	for range 10 {
		n := startNode(t, t.TempDir())
		n.signal(t, syscall.SIGTERM)
		if err := n.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Fatal(err)
		}
		if code := n.wait(t); code != exitOK {
			t.Fatalf("exit %d:\n%s", code, n.stderr.text())
		}
	}
}

// TestSignalsWhileStarting: a start that takes long can be ended.
func TestSignalsWhileStarting(t *testing.T) {
	begin := func(t *testing.T, dir string) (c *command, fsys *faultyFS, release chan error) {
		fsys = newFaultyFS()
		hanging := make(chan struct{})
		release = make(chan error)
		fsys.set(func(op, name string) error {
			if op == "create" && strings.HasSuffix(name, ".tmp") && strings.Contains(name, "default") {
				fsys.set(nil)
				close(hanging)
				return <-release
			}
			return nil
		})
		c = newCommand()
		c.fs = fsys
		c.start("-data-dir", dir)
		await(t, hanging)
		return c, fsys, release
	}
	t.Run("first", func(t *testing.T) {
		c, _, release := begin(t, t.TempDir())
		c.signals <- syscall.SIGTERM
		c.stderr.mustAwait(t, "stopping once it has started")
		release <- nil
		if code := await(t, c.code); code != exitOK {
			t.Errorf("exit %d: %s", code, c.stderr.text())
		}
	})
	t.Run("second", func(t *testing.T) {
		c, fsys, release := begin(t, t.TempDir())
		c.signals <- os.Interrupt
		c.stderr.mustAwait(t, "stopping once it has started")
		c.clock.Add(int64(echo))
		c.signals <- os.Interrupt
		if code := await(t, c.exits); code != exitUsage {
			t.Errorf("exit %d", code)
		}
		release <- syscall.EIO
		await(t, fsys.unlocked)
	})
	t.Run("reload", func(t *testing.T) {
		c, _, release := begin(t, t.TempDir())
		c.signals <- syscall.SIGHUP
		release <- nil
		c.stderr.mustAwait(t, "configuration reloaded; nothing has changed")
		c.signals <- os.Interrupt
		if code := await(t, c.code); code != exitOK {
			t.Errorf("exit %d: %s", code, c.stderr.text())
		}
	})
}

func TestReloadSignal(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "node.hcl")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`log_level = "info"`)
	n := startNode(t, filepath.Join(dir, "data"), "-config-file", conf)
	c := dial(t, n.addr)

	hup := func(want string) logLine {
		t.Helper()
		before := len(n.log(t))
		n.signal(t, syscall.SIGHUP)
		text, ok := n.stderr.await(t, func(text string) bool { return find(logLines(t, text)[before:], want) != nil })
		if !ok {
			t.Fatalf("the node ended:\n%s", text)
		}
		return find(logLines(t, text)[before:], want)
	}
	hup("configuration reloaded; nothing has changed")
	write(`log_level = "debug"`)
	if l := hup("configuration changed"); l.str("key") != "log_level" || l.str("from") != "info" || l.str("to") != "debug" {
		t.Errorf("%v", l)
	}
	write("log_level = \"debug\"\nlog {\n  segment_size = \"2MiB\"\n}\n")
	for range 2 {
		if l := hup("configuration changed, but takes effect with the next start only"); l.str("key") != "log.segment_size" || l.str("@level") != "warn" {
			t.Errorf("%v", l)
		}
	}
	write("log_level = \"debug\"\nlogs {\n}\nlog_levell = 1")
	if l := hup("configuration not reloaded"); !strings.Contains(l.str("error"), conf+":2") || !strings.Contains(l.str("error"), conf+":4") {
		t.Errorf("%v", l)
	}
	// It is still there, as it was.
	produce(t, c, "x")
	write(`log_level = "debug"`)
	hup("configuration reloaded; nothing has changed")
	n.terminate(t)
}

// TestNotStarted: what is wrong is told before anything is touched.
func TestNotStarted(t *testing.T) {
	for name, tc := range map[string]struct {
		args   []string
		conf   string
		stderr []string
	}{
		"unknown flag":    {args: []string{"-data-dri", "data"}, stderr: []string{"-data-dri", "-data-dir?", "diurna agent -help"}},
		"flag's value":    {args: []string{"-data-dir"}, stderr: []string{"-data-dir"}},
		"argument":        {args: []string{"-data-dir", "data", "stray"}, stderr: []string{"stray"}},
		"no data_dir":     {args: []string{"-rpc-addr", "127.0.0.1:0"}, stderr: []string{"Missing data_dir", "-dev"}},
		"wrong address":   {args: []string{"-data-dir", "data", "-rpc-addr", "nowhere"}, stderr: []string{"listener.rpc", "-rpc-addr"}},
		"no such file":    {args: []string{"-data-dir", "data", "-config-file", "none.hcl"}, stderr: []string{"none.hcl", "no such file"}},
		"broken HCL":      {conf: "data_dir = \"data\"\nlistener {\n", stderr: []string{"node.hcl line 2", "listener {"}},
		"unknown key":     {conf: "data_dir = \"data\"\nlog_levell = \"info\"\n", stderr: []string{"node.hcl line 2", `"log_level"?`}},
		"value too large": {conf: "data_dir = \"data\"\nlog {\n  segment_size = \"1TiB\"\n}\n", stderr: []string{"node.hcl line 3", "segment_size"}},
		"two mistakes":    {conf: "log_json = \"maybe\"\nlog_level = \"loud\"\n", stderr: []string{"node.hcl line 1", "node.hcl line 2"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			t.Chdir(dir)
			args := append([]string{"agent"}, tc.args...)
			if tc.conf != "" {
				writeFiles(t, dir, map[string]string{"node.hcl": tc.conf})
				args = append(args, "-config-file", "node.hcl", "-rpc-addr", "127.0.0.1:0")
			}
			before := listing(t, dir)
			code, stdout, stderr := runDiurna(t, "", args...)
			if code != exitUsage || stdout != "" {
				t.Errorf("exit %d, prints %q", code, stdout)
			}
			for _, want := range tc.stderr {
				if !strings.Contains(stderr, want) {
					t.Errorf("does not say %q:\n%s", want, stderr)
				}
			}
			if strings.Contains(stderr, "node started") {
				t.Errorf("it started:\n%s", stderr)
			}
			sameListing(t, before, listing(t, dir))

			if tc.conf == "" {
				return
			}
			code, stdout, validate := runDiurna(t, "", "validate", "node.hcl")
			if code != exitUsage || stdout != "" || validate != stderr {
				t.Errorf("validate exits %d, prints %q, says\n%s\nand agent\n%s", code, stdout, validate, stderr)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	writeFiles(t, dir, map[string]string{"a.hcl": "data_dir = \"data\"\ntls {\n  source = \"none\"\n}\n", "b.json": `{"log_level": "warn"}`, "d": "/", "d/c.hcl": `log_level = 1`, "d/notes.txt": "no"})
	for _, tc := range []struct {
		args   []string
		code   int
		stderr string
	}{
		{[]string{"a.hcl"}, 0, ""},
		{[]string{"a.hcl", "b.json"}, 0, ""},
		{[]string{"b.json"}, 1, "Missing data_dir"},
		{[]string{"a.hcl", "d"}, 1, "c.hcl line 1"},
		{[]string{"none"}, 1, "none"},
		{nil, 1, "name at least one"},
		{[]string{"-x"}, 1, "-x"},
	} {
		code, stdout, stderr := runDiurna(t, "", append([]string{"validate"}, tc.args...)...)
		if code != tc.code || (code == 0) != (stdout == "The configuration is valid.\n") || !strings.Contains(stderr, tc.stderr) || (code == 0) != (stderr == "") {
			t.Errorf("validate %v: exit %d, %q, %q", tc.args, code, stdout, stderr)
		}
	}
	if entries, err := os.ReadDir("."); err != nil || len(entries) != 3 {
		t.Errorf("validate made something: %v, %v", entries, err)
	}
}

// TestLogJSON: with it, nothing but JSON, whatever happens.
func TestLogJSON(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "data")
	conf := filepath.Join(root, "node.hcl")
	writeFiles(t, root, map[string]string{"node.hcl": ""})
	n := startNode(t, dir, "-log-level", "trace", "-config-file", conf)
	produce(t, dial(t, n.addr), "x")
	writeFiles(t, root, map[string]string{"node.hcl": "log {"})
	n.signal(t, syscall.SIGHUP)
	n.stderr.mustAwait(t, "configuration not reloaded")
	second := startDiurna(t, "agent", "-dev", "-data-dir", dir, "-rpc-addr", "127.0.0.1:0", "-log-json")
	if code := second.wait(t); code != exitUsage {
		t.Errorf("exit %d", code)
	}
	if l := find(logLines(t, second.stderr.text()), "cannot start"); l == nil || l.str("@level") != "error" || !strings.Contains(l.str("error"), dir) {
		t.Errorf("%s", second.stderr.text())
	}
	n.terminate(t)
	if len(n.log(t)) < 5 {
		t.Errorf("%s", n.stderr.text())
	}
	for _, p := range []*process{n.process, second} {
		if out := p.stdout.text(); out != "" {
			t.Errorf("on standard output: %q", out)
		}
	}
}

// TestDiskFailsUnderCommand: the process ends with a code of its own.
func TestDiskFailsUnderCommand(t *testing.T) {
	for _, tc := range []struct {
		errno  error
		advice string
	}{{syscall.EIO, "Look at the disk"}, {syscall.ENOSPC, "Make room"}} {
		fsys := newFaultyFS()
		c := newCommand()
		c.fs = fsys
		dir := t.TempDir()
		c.start("-data-dir", dir)
		cl := dial(t, c.mustAddr(t))
		fsys.set(func(op, name string) error {
			if op == "write" {
				return &fs.PathError{Op: op, Path: name, Err: tc.errno}
			}
			return nil
		})
		if _, err := cl.Produce(t.Context(), []*client.Record{{}}); err == nil {
			t.Error("acknowledged")
		}
		if code := await(t, c.exits); code != exitStorage {
			t.Errorf("exit %d", code)
		}
		text := c.stderr.text()
		if !strings.Contains(text, tc.advice) || !strings.Contains(text, filepath.Join(dir, logsDir)) || !strings.Contains(text, tc.errno.Error()) {
			t.Errorf("%s", text)
		}
		// Here, the process did not end.
		fsys.set(nil)
		c.signals <- os.Interrupt
		await(t, c.code)
	}
}

// TestServiceEndsUnderCommand: a port that is lost is the end, with its code.
func TestServiceEndsUnderCommand(t *testing.T) {
	a := startReady(t, testConfig(t, t.TempDir()), Options{})
	c := newCommand()
	if err := a.listen.Close(); err != nil {
		t.Fatal(err)
	}
	if code, err := c.supervise(a.Agent, a.cfg, config.Sources{}, a.opts.Logger, c.signals); code != exitServer || err != nil {
		t.Errorf("exit %d, %v", code, err)
	}
	if text := c.stderr.text(); !strings.Contains(text, "cannot serve any more") || !strings.Contains(text, a.Address()) {
		t.Errorf("%s", text)
	}
}

// TestDiskFull fills a real disk under a node: it refuses records, serves
// readers, and goes on by itself when there is room.
func TestDiskFull(t *testing.T) {
	for name, minFree := range map[string]string{"before it is full": "3MiB", "when it is full": "0B"} {
		t.Run(name, func(t *testing.T) { testDiskFull(t, minFree) })
	}
}

func testDiskFull(t *testing.T, minFree string) {
	disk := t.TempDir()
	mountTmpfs(t, disk, "14M")
	dir := filepath.Join(disk, "data")
	conf := filepath.Join(t.TempDir(), "node.hcl")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "log { segment_size = \"1MiB\" }\ndisk { min_free = %q }\n", minFree), 0o600); err != nil {
		t.Fatal(err)
	}
	ballast := filepath.Join(disk, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	n := startNode(t, dir, "-config-file", conf)
	c := dial(t, n.addr)
	fill := func() (next uint64) {
		t.Helper()
		for i := 0; ; i++ {
			ack, err := c.Produce(t.Context(), []*client.Record{{Value: make([]byte, 100<<10)}})
			if err == nil {
				next = ack.NextOffset
				continue
			}
			if e := wantReason(t, err, "DISK_FULL"); !e.Definite {
				t.Errorf("not definite: %v", err)
			}
			return next
		}
	}
	check := func(next uint64) {
		t.Helper()
		// Not linearizable: that takes a leader, which has to write.
		r, err := c.Consume(t.Context(), client.ConsumeOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		var got uint64
		for r.Next() {
			got++
		}
		if r.Err() != nil || got != next {
			t.Fatalf("there are %d records, %d were acknowledged; %v", got, next, r.Err())
		}
	}
	next := fill()
	if next == 0 {
		t.Fatal("nothing was acknowledged")
	}
	check(next)
	// A full disk is no reason not to end, or not to start.
	n.terminate(t)
	n = startNode(t, dir, "-config-file", conf)
	c = dial(t, n.addr)
	check(next)
	if minFree != "0B" {
		_, err := c.Produce(t.Context(), []*client.Record{{Value: []byte("x")}})
		_ = wantReason(t, err, "DISK_FULL")
	}

	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	for ctx := within(t); ; {
		ack, err := c.Produce(ctx, []*client.Record{{Value: []byte("and on")}})
		if err == nil {
			if ack.BaseOffset < next {
				t.Errorf("goes on at %d, want %d", ack.BaseOffset, next)
			}
			next = ack.NextOffset
			break
		}
		// The disk is looked at from time to time.
		_ = wantReason(t, err, "DISK_FULL")
	}
	check(next)
	if more := fill(); more <= next {
		t.Errorf("full again at %d, was %d", more, next)
	}
	n.terminate(t)
}
