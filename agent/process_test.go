package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/diurnalog/diurna/rpc/client"
)

// patience is how long anything may take that has to happen. Nothing waits for
// it to pass unless a test is about to fail.
var patience = func() time.Duration {
	if os.Getenv("DIURNA_SOAK") != "" {
		return 5 * time.Minute // so much more is moved
	}
	return time.Minute
}()

// process is a child whose output is collected, and which a test cannot leave
// behind.
type process struct {
	*exec.Cmd
	stdin          io.WriteCloser
	stdout, stderr *output
	ended          chan struct{}
}

// startProcess starts a program. Its name stands first in args.
func startProcess(t testing.TB, args ...string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(args[0], args[1:]...), stdout: newOutput(), stderr: newOutput(), ended: make(chan struct{})}
	p.SysProcAttr = childAttr()
	p.Env = append(os.Environ(), "NO_COLOR=1")
	p.Stdout, p.Stderr = p.stdout, p.stderr
	var err error
	if p.stdin, err = p.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	started := make(chan error)
	go func() {
		// On Linux a child dies with the thread that made it, see childAttr. Without
		// this, that thread might serve another goroutine next, and end with it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.Start()
		started <- err
		if err != nil {
			return
		}
		_ = p.Wait() // ProcessState tells
		p.stdout.end()
		p.stderr.end()
		close(p.ended)
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The group is named after a process that has not been waited for, or
		// there is no such group any more.
		select {
		case <-p.ended:
		default:
			_ = syscall.Kill(-p.Process.Pid, syscall.SIGKILL)
			<-p.ended
		}
	})
	return p
}

// startDiurna runs a verb.
func startDiurna(t testing.TB, args ...string) *process {
	t.Helper()
	return startProcess(t, append([]string{diurna(t)}, args...)...)
}

// runDiurna runs a verb to its end, with input.
func runDiurna(t testing.TB, input string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	p := startDiurna(t, args...)
	_, err := io.WriteString(p.stdin, input)
	// A verb that wants no input may have ended before it gets any.
	if err = errors.Join(err, p.stdin.Close()); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, os.ErrClosed) {
		t.Fatal(err)
	}
	code = p.wait(t)
	return code, p.stdout.text(), p.stderr.text()
}

func (p *process) signal(t testing.TB, s os.Signal) {
	t.Helper()
	if err := p.Process.Signal(s); err != nil {
		t.Fatalf("signal %v: %v\n%s", s, err, p.stderr.text())
	}
}

// wait returns the exit code, -1 for a process that a signal ended.
func (p *process) wait(t testing.TB) int {
	t.Helper()
	select {
	case <-p.ended:
		return p.ProcessState.ExitCode()
	case <-time.After(patience):
		t.Fatalf("%v does not end:\n%s%s", p.Args, p.stdout.text(), p.stderr.text())
		return 0
	}
}

// output collects what a process writes, and can be waited on.
type output struct {
	mu    sync.Mutex
	bytes bytes.Buffer
	more  chan struct{} // closed by the next write
	over  bool
}

func newOutput() *output { return &output{more: make(chan struct{})} }

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.more)
	o.more = make(chan struct{})
	return o.bytes.Write(p)
}

func (o *output) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.over = true
	close(o.more)
	o.more = make(chan struct{})
}

func (o *output) text() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.bytes.String()
}

func (o *output) lines() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return bytes.Count(o.bytes.Bytes(), []byte("\n"))
}

// await returns what was written once it satisfies ok; false if it ended
// without.
func (o *output) await(t testing.TB, ok func(text string) bool) (string, bool) {
	t.Helper()
	timeout := time.After(patience)
	for {
		o.mu.Lock()
		text, more, over := o.bytes.String(), o.more, o.over
		o.mu.Unlock()
		if ok(text) {
			return text, true
		}
		if over {
			return text, false
		}
		select {
		case <-more:
		case <-timeout:
			t.Fatalf("waited in vain; there is:\n%s", text)
		}
	}
}

func (o *output) mustAwait(t testing.TB, part string) string {
	t.Helper()
	text, ok := o.await(t, func(text string) bool { return strings.Contains(text, part) })
	if !ok {
		t.Fatalf("ended without %q:\n%s", part, text)
	}
	return text
}

// logLine is one line of a node's log.
type logLine map[string]any

func (l logLine) message() string { s, _ := l["@message"].(string); return s }

func (l logLine) str(key string) string { s, _ := l[key].(string); return s }

// logLines reads a log in JSON; anything else in it fails.
func logLines(t testing.TB, text string) (lines []logLine) {
	t.Helper()
	if end := strings.LastIndexByte(text, '\n'); end >= 0 {
		for line := range strings.Lines(text[:end+1]) {
			var l logLine
			if err := json.Unmarshal([]byte(line), &l); err != nil {
				t.Fatalf("this is not JSON: %q", line)
			}
			lines = append(lines, l)
		}
	}
	return lines
}

func find(lines []logLine, message string) logLine {
	for _, l := range lines {
		if l.message() == message {
			return l
		}
	}
	return nil
}

// node is a `diurna agent` process.
type node struct {
	*process
	addr string
}

// startNode runs a node at a port of its own until it takes records.
func startNode(t testing.TB, dir string, more ...string) *node {
	t.Helper()
	n := launchNode(t, dir, more...)
	n.awaitReady(t)
	return n
}

func launchNode(t testing.TB, dir string, more ...string) *node {
	t.Helper()
	args := append([]string{"agent", "-dev", "-data-dir", dir, "-rpc-addr", "127.0.0.1:0", "-http-addr", "127.0.0.1:0", "-log-json"}, more...)
	return &node{process: startDiurna(t, args...)}
}

func (n *node) awaitReady(t testing.TB) {
	t.Helper()
	text, ok := n.stderr.await(t, func(text string) bool { return strings.Contains(text, `"@message":"ready"`) })
	if !ok {
		t.Fatalf("the node ended, code %d, before it was ready:\n%s", n.ProcessState.ExitCode(), text)
	}
	n.addr = find(logLines(t, text), "node started").str("address")
}

// log returns what the node has logged so far.
func (n *node) log(t testing.TB) []logLine { return logLines(t, n.stderr.text()) }

// terminate stops the node cleanly.
func (n *node) terminate(t testing.TB) {
	t.Helper()
	n.signal(t, syscall.SIGTERM)
	if code := n.wait(t); code != exitOK {
		t.Fatalf("exit %d:\n%s", code, n.stderr.text())
	}
}

// kill ends the node without giving it a chance.
func (n *node) kill(t testing.TB) {
	t.Helper()
	n.signal(t, syscall.SIGKILL)
	n.wait(t)
}

// dial makes a client that repeats nothing: what one node says counts.
func dial(t testing.TB, addr string) *client.Client {
	t.Helper()
	return dialWith(t, addr, client.WithRetry(0))
}

// patient makes a client as users have one. A cluster may be without a leader at
// any moment, and be well.
func patient(t testing.TB, addr string) *client.Client {
	t.Helper()
	return dialWith(t, addr, client.WithRetry(patience))
}

// trusts has, by address, what clients of nodes with TLS need.
var trusts sync.Map // of client.TLSFiles

// dialNode makes a client of a node, with TLS where the node has it.
func dialNode(addr string, opts ...client.Option) (*client.Client, error) {
	if files, ok := trusts.Load(addr); ok {
		opts = append(opts, client.WithTLS(files.(client.TLSFiles)))
	}
	return client.Dial(addr, opts...)
}

func dialWith(t testing.TB, addr string, opts ...client.Option) *client.Client {
	t.Helper()
	c, err := dialNode(addr, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// consume reads the values from an offset to the end, and checks that offsets
// are dense.
func consume(t testing.TB, c *client.Client, from uint64) (values []string) {
	t.Helper()
	r, err := c.Consume(t.Context(), client.ConsumeOptions{Start: client.AtOffset(from), Linearizable: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for r.Next() {
		if got, want := r.Record().Offset, from+uint64(len(values)); got != want {
			t.Fatalf("offset %d where %d belongs", got, want)
		}
		values = append(values, string(r.Record().Value))
	}
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	return values
}

func produce(t testing.TB, c *client.Client, values ...string) client.Ack {
	t.Helper()
	records := make([]*client.Record, len(values))
	for i, v := range values {
		records[i] = &client.Record{Value: []byte(v)}
	}
	ack, err := c.Produce(t.Context(), records)
	if err != nil {
		t.Fatal(err)
	}
	return ack
}

func numbered(prefix string, n int) []string {
	values := make([]string, n)
	for i := range values {
		values[i] = fmt.Sprintf("%s-%d", prefix, i)
	}
	return values
}
