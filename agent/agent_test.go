package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
	"github.com/diurnalog/diurna/rpc/client"
)

// testAgent is a node in this process.
type testAgent struct {
	*Agent
	cfg  *config.Config
	opts Options
	log  *output
}

func testConfig(t testing.TB, dir string) *config.Config {
	t.Helper()
	cfg := config.Dev()
	cfg.DataDir = dir
	cfg.Listener.RPC, cfg.Listener.Advertise = "127.0.0.1:0", "127.0.0.1:0"
	cfg.Listener.HTTP = "127.0.0.1:0"
	cfg.Log.SegmentSize = 1 << 20
	cfg.ShutdownTimeout = patience
	return cfg
}

func testLogger() (hclog.Logger, *output) {
	log := newOutput()
	return hclog.New(&hclog.LoggerOptions{Output: log, JSONFormat: true}), log
}

func startAgent(t testing.TB, cfg *config.Config, opts Options) *testAgent {
	t.Helper()
	a := &testAgent{cfg: cfg, opts: opts}
	a.opts.Logger, a.log = testLogger()
	var err error
	if a.Agent, err = Start(context.Background(), cfg, a.opts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Stop(within(t)) }) // tests look at its error themselves
	return a
}

// startReady is startAgent until it takes records.
func startReady(t testing.TB, cfg *config.Config, opts Options) *testAgent {
	t.Helper()
	a := startAgent(t, cfg, opts)
	if err := a.WaitReady(within(t)); err != nil {
		t.Fatal(err)
	}
	return a
}

// within bounds what is not meant to take its time.
func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func (a *testAgent) mustStop(t testing.TB) {
	t.Helper()
	if err := a.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
}

// wantReason fails unless err is an error of the client with a reason.
func wantReason(t testing.TB, err error, reason string) *client.Error {
	t.Helper()
	var e *client.Error
	if !errors.As(err, &e) || e.Reason != reason {
		t.Fatalf("got %v, want %s", err, reason)
	}
	return e
}

func TestLife(t *testing.T) {
	a := startAgent(t, testConfig(t, t.TempDir()), Options{Version: "1.2.3"})
	// Connected before the node is stopped, so that there is nothing to dial.
	c := dial(t, a.Address())
	health := func(want string) {
		t.Helper()
		serving, status, err := c.Health(t.Context())
		if err != nil || status != want || serving != (want == "SERVING") {
			t.Fatalf("health is %v %q, %v; want %s", serving, status, err, want)
		}
	}
	health("NOT_SERVING")
	if err := a.WaitReady(within(t)); err != nil {
		t.Fatal(err)
	}
	health("SERVING")
	if err := a.WaitReady(within(t)); err != nil {
		t.Fatalf("waiting a second time: %v", err)
	}

	if ack := produce(t, c, "a", "b"); ack.BaseOffset != 0 || ack.NextOffset != 2 {
		t.Errorf("%+v", ack)
	}
	if got := consume(t, c, 0); len(got) != 2 || got[0] != "a" || got[1] != "b" {
		t.Errorf("%q", got)
	}
	list, err := c.Servers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	leader, ok := list.Leader()
	if !ok || len(list.Servers) != 1 || list.AnsweredBy != a.NodeID() || leader.ID != a.NodeID() || leader.Name != a.cfg.Node.Name ||
		leader.Address != a.Address() || leader.Version != "1.2.3" || !leader.Voter || leader.FirstOffset != 0 || leader.HighWatermark != 2 || leader.Term == 0 {
		t.Errorf("%+v", list)
	}

	ctx, cancel := context.WithCancel(t.Context())
	a.mustStop(t)
	cancel()
	if err := a.Stop(ctx); err != nil {
		t.Errorf("the second Stop does not return what the first did: %v", err)
	}
	if _, err := c.Produce(t.Context(), []*client.Record{{}}); wantReason(t, err, client.ReasonUnreachable).Definite == false {
		t.Errorf("%v", err)
	}
	if err := a.WaitReady(within(t)); !errors.Is(err, ErrStopping) {
		t.Errorf("WaitReady after Stop: %v", err)
	}
}

// TestStopAtOnce: Stop may come before the node is ready, and from many at the
// same time.
func TestStopWhileStarting(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	cfg.Raft.HeartbeatTimeout, cfg.Raft.ElectionTimeout = time.Minute, time.Minute // an election that is never
	a := startAgent(t, cfg, Options{})
	ready := make(chan error, 2)
	go func() { ready <- a.WaitReady(context.Background()) }()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := a.WaitReady(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("WaitReady without time: %v", err)
	}
	var stopping sync.WaitGroup
	for range 4 {
		stopping.Go(func() {
			if err := a.Stop(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	stopping.Wait()
	if err := await(t, ready); !errors.Is(err, ErrStopping) {
		t.Errorf("WaitReady: %v", err)
	}
}

func await[T any](t testing.TB, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(patience):
		t.Fatal("waited in vain")
	}
	return v
}

func TestStopWithOpenStreams(t *testing.T) {
	a := startReady(t, testConfig(t, t.TempDir()), Options{})
	c := dial(t, a.Address())
	produce(t, c, numbered("first", 10)...)

	p, err := c.NewProducer(t.Context(), client.ProducerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Append(t.Context(), &client.Record{Value: []byte("streamed")}); err != nil {
		t.Fatal(err)
	}
	if err := p.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	idle := make(chan struct{}, 1)
	follower, err := c.Consume(t.Context(), client.ConsumeOptions{Follow: true, OnIdle: func() {
		select {
		case idle <- struct{}{}:
		default:
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer follower.Close()
	followed := make(chan error, 1)
	go func() {
		for follower.Next() {
		}
		followed <- follower.Err()
	}()
	await(t, idle)
	// One that never reads.
	asleep, err := c.Consume(t.Context(), client.ConsumeOptions{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	defer asleep.Close()
	if !asleep.Next() {
		t.Fatal(asleep.Err())
	}

	ctx := within(t)
	if err := a.Stop(ctx); err != nil || ctx.Err() != nil {
		t.Fatalf("Stop: %v", err)
	}
	e := wantReason(t, await(t, followed), client.ReasonShuttingDown)
	if next, ok := e.Uint("next_offset"); !ok || next != 11 {
		t.Errorf("the reader is not told to go on at 11: %v", e.Metadata)
	}
	<-p.Failed()
	_ = wantReason(t, p.Err(), client.ReasonShuttingDown)
	if o, err := p.Close(t.Context()); o.Acknowledged != 1 || o.Unknown+o.NotAppended != 0 || err != nil {
		t.Errorf("%+v, %v", o, err)
	}
}

// TestStopHangingDisk: the time to stop is the time to stop, whatever hangs.
func TestStopHangingDisk(t *testing.T) {
	fsys := newFaultyFS()
	a := startReady(t, testConfig(t, t.TempDir()), Options{fs: fsys})
	c := dial(t, a.Address())
	produce(t, c, "first") // so that nothing else is on its way to the log
	hanging, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	fsys.set(func(op, name string) error {
		if op == "sync" && strings.HasSuffix(name, ".log") {
			once.Do(func() { close(hanging) })
			<-release
		}
		return nil
	})
	result := make(chan error, 1)
	go func() {
		_, err := c.Produce(context.Background(), []*client.Record{{Value: []byte("x")}})
		result <- err
	}()
	<-hanging

	ctx, cancel := context.WithTimeout(context.Background(), 400*time.Millisecond)
	defer cancel()
	err := a.Stop(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "closing the log") {
		t.Errorf("Stop: %v", err)
	}
	var e *client.Error
	if err := await(t, result); !errors.As(err, &e) || e.Definite {
		t.Errorf("the call in flight: %v, want an unknown outcome", err)
	}
	// The disk comes back: what was left behind ends by itself.
	close(release)
	await(t, fsys.unlocked)
}

func TestDiskFails(t *testing.T) {
	fsys := newFaultyFS()
	fatal := make(chan error, 10)
	dir := t.TempDir()
	a := startReady(t, testConfig(t, dir), Options{fs: fsys, OnFatal: func(err error) { fatal <- err }})
	c := dial(t, a.Address())
	produce(t, c, "kept")
	fsys.set(func(op, name string) error {
		if op == "sync" {
			return &os.PathError{Op: "fdatasync", Path: name, Err: syscall.EIO}
		}
		return nil
	})
	_, err := c.Produce(t.Context(), []*client.Record{{Value: []byte("lost")}})
	if e := wantReason(t, err, client.ReasonUnknownOutcome); e.Definite {
		t.Errorf("%v is said to be definite", err)
	}
	err = await(t, fatal)
	if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), dir) {
		t.Errorf("the failure is %v, want EIO and the file", err)
	}
	_, err = c.Produce(t.Context(), []*client.Record{{Value: []byte("refused")}})
	var e *client.Error
	if !errors.As(err, &e) || !e.Definite {
		t.Errorf("after the failure: %v", err)
	}
	if got := consume1(t, c); got != "kept" {
		t.Errorf("reads %q", got)
	}
	ctx := within(t)
	_ = a.Stop(ctx) // that it cannot be clean is no news
	if ctx.Err() != nil {
		t.Error("a failed disk holds Stop up")
	}
	if len(fatal) > 0 {
		t.Errorf("OnFatal was called again, with %v", <-fatal)
	}
	// The disk is well again; what was acknowledged is there.
	a = startReady(t, testConfig(t, dir), Options{})
	if got := consume(t, dial(t, a.Address()), 0); len(got) == 0 || got[0] != "kept" {
		t.Errorf("there is %q", got)
	}
}

// consume1 reads the first record, without asking whether anybody leads.
func consume1(t testing.TB, c *client.Client) string {
	t.Helper()
	r, err := c.Consume(t.Context(), client.ConsumeOptions{MaxRecords: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if !r.Next() {
		t.Fatalf("nothing: %v", r.Err())
	}
	return string(r.Record().Value)
}

func TestServiceEnds(t *testing.T) {
	a := startReady(t, testConfig(t, t.TempDir()), Options{})
	if err := a.listen.Close(); err != nil {
		t.Fatal(err)
	}
	if err := await(t, a.Failed()); !strings.Contains(err.Error(), a.Address()) {
		t.Errorf("%v does not say where", err)
	}
	a.mustStop(t)
}

func TestRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	var id string
	for i := range 3 {
		cfg := testConfig(t, dir)
		cfg.Node.Name = fmt.Sprintf("name%d", i)
		a := startReady(t, cfg, Options{})
		if id == "" {
			id = a.NodeID()
		}
		if a.NodeID() != id {
			t.Errorf("the id was %s, now it is %s", id, a.NodeID())
		}
		c := dial(t, a.Address())
		if ack := produce(t, c, "x"); ack.BaseOffset != uint64(i) {
			t.Errorf("offset %d in life %d", ack.BaseOffset, i)
		}
		if got := consume(t, c, 0); len(got) != i+1 {
			t.Errorf("%d records in life %d", len(got), i)
		}
		list, err := c.Servers(t.Context())
		if err != nil || list.Servers[0].Name != cfg.Node.Name || list.Servers[0].Address != a.Address() {
			t.Errorf("%+v, %v", list, err)
		}
		a.mustStop(t)
		if l := find(logLines(t, a.log.text()), "cut off a write that a crash interrupted; nothing in it was acknowledged"); l != nil {
			t.Errorf("life %d begins with %v", i, l)
		}
	}
}

func TestTemporaryData(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	a := startReady(t, testConfig(t, ""), Options{})
	produce(t, dial(t, a.Address()), "x")
	if entries, err := os.ReadDir(tmp); err != nil || len(entries) != 1 {
		t.Fatalf("%v, %v", entries, err)
	}
	a.mustStop(t)
	cfg := testConfig(t, "")
	cfg.Listener.RPC = "127.0.0.1:bogus"
	if _, err := Start(context.Background(), cfg, Options{}); err == nil {
		t.Fatal("started at a port that is none")
	}
	if entries, err := os.ReadDir(tmp); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// TestStartFails: what cannot start says why and what to do, and leaves
// nothing: no goroutine, no file, no port, no lock.
func TestStartFails(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, tc := range []struct {
		name     string
		sabotage func(t *testing.T, cfg *config.Config)
		want     []string
	}{
		{"port taken", func(_ *testing.T, cfg *config.Config) {
			cfg.Listener.RPC = taken.Addr().String()
		}, []string{taken.Addr().String(), "address already in use", "-rpc-addr"}},
		{"port of another machine", func(_ *testing.T, cfg *config.Config) {
			cfg.Listener.RPC = "192.0.2.1:0"
		}, []string{"192.0.2.1", "-rpc-addr"}},
		{"locked by this process", func(t *testing.T, cfg *config.Config) {
			a := startReady(t, testConfig(t, cfg.DataDir), Options{})
			t.Cleanup(func() { a.mustStop(t) })
			// What a leader starts has started, or it would be taken for a leak.
			for ctx := within(t); ctx.Err() == nil; runtime.Gosched() {
				if servers, err := a.replica.Servers(); err != nil || servers[0].Health != nil {
					break
				}
			}
		}, []string{"in use by another process", "-data-dir"}},
		{"not a directory", func(t *testing.T, cfg *config.Config) {
			if err := os.WriteFile(cfg.DataDir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"not a directory"}},
		{"below a file", func(t *testing.T, cfg *config.Config) {
			if err := os.WriteFile(cfg.DataDir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			cfg.DataDir = filepath.Join(cfg.DataDir, "data")
		}, []string{"not a directory"}},
		{"a log that is something else", func(t *testing.T, cfg *config.Config) {
			d, err := openDataDir(vfs.OS, cfg.DataDir)
			if err != nil {
				t.Fatal(err)
			}
			// As it is once a node has run.
			if err := errors.Join(d.join(someID), d.Close(), os.MkdirAll(d.log("default"), 0o750),
				os.WriteFile(filepath.Join(d.log("default"), "README"), nil, 0o600)); err != nil {
				t.Fatal(err)
			}
		}, []string{"README"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := testConfig(t, filepath.Join(t.TempDir(), "data"))
			cfg.Listener.RPC = freeAddress(t)
			tc.sabotage(t, cfg)
			running := goleak.IgnoreCurrent()
			before := listing(t, filepath.Dir(cfg.DataDir))
			logger, _ := testLogger()
			a, err := Start(context.Background(), cfg, Options{Logger: logger})
			if err == nil || a != nil {
				t.Fatalf("started; %v", err)
			}
			for _, want := range append(tc.want, map[bool]string{true: cfg.DataDir}[!strings.Contains(tc.name, "port")]) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
			if err := goleak.Find(running); err != nil {
				t.Error(err)
			}
			sameListing(t, before, listing(t, filepath.Dir(cfg.DataDir)))
			if tc.name == "port taken" || tc.name == "port of another machine" {
				return
			}
			l, err := net.Listen("tcp", cfg.Listener.RPC)
			if err != nil {
				t.Fatalf("the port is still taken: %v", err)
			}
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// freeAddress is one that nobody listens at, and that nobody else will: who
// asks the kernel for a port does not get one of this part of the loopback net.
func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.77.31.9:0")
	if err != nil { // not every system has more of it than 127.0.0.1
		l, err = net.Listen("tcp", "127.0.0.1:0")
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return l.Addr().String()
}

func TestReload(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	a := startReady(t, cfg, Options{})
	wanted := func(change func(*config.Config)) *config.Config {
		c := *cfg
		change(&c)
		return &c
	}
	if changes := a.Reload(wanted(func(*config.Config) {})); len(changes) != 0 {
		t.Errorf("nothing has changed, but %+v", changes)
	}
	both := wanted(func(c *config.Config) { c.LogLevel, c.Node.Name = "warn", "other" })
	changes := a.Reload(both)
	if len(changes) != 2 || changes[0] != (config.Change{Key: "log_level", Old: "info", New: "warn", Live: true}) ||
		changes[1].Key != "node.name" || changes[1].New != "other" || changes[1].Live {
		t.Fatalf("%+v", changes)
	}
	raft := a.opts.Logger.Named("raft")
	a.opts.Logger.Info("after the change")
	raft.Info("after the change")
	raft.Warn("worse")
	text := a.log.text()
	if strings.Contains(text, "after the change") || !strings.Contains(text, "worse") {
		t.Errorf("the level did not change:\n%s", text)
	}
	// Once more: the level is what it is, the name is still not.
	if changes = a.Reload(both); len(changes) != 1 || changes[0].Key != "node.name" {
		t.Errorf("%+v", changes)
	}
	if n := strings.Count(a.log.text(), "takes effect with the next start only"); n != 2 {
		t.Errorf("said %d times that the name takes a restart, want 2:\n%s", n, a.log.text())
	}
	// And back.
	if changes = a.Reload(cfg); len(changes) != 1 || changes[0].Key != "log_level" || changes[0].New != "info" {
		t.Errorf("%+v", changes)
	}
	list, err := dial(t, a.Address()).Servers(t.Context())
	if err != nil || list.Servers[0].Name != cfg.Node.Name {
		t.Errorf("%+v, %v", list, err)
	}
}

// TestGarbage: whatever is sent to the port, it is one connection's problem.
func TestGarbage(t *testing.T) {
	rng := vfstest.Rand(t)
	a := startReady(t, testConfig(t, t.TempDir()), Options{})
	c := dial(t, a.Address())
	next := uint64(0)
	works := func() {
		t.Helper()
		if ack := produce(t, c, "x"); ack.BaseOffset != next {
			t.Errorf("offset %d, want %d", ack.BaseOffset, next)
		}
		next++
	}
	connect := func() net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp", a.Address())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	// ended reads to the connection's end.
	ended := func(conn net.Conn) {
		t.Helper()
		_, err := io.Copy(io.Discard, conn)
		if err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("not closed: %v", err)
		}
	}
	works()

	random := make([]byte, 100_000)
	for i := range random {
		random[i] = byte(rng.Uint32())
	}
	preface := "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	hello := append([]byte{0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}, random[:100]...)
	for name, bytes := range map[string][]byte{
		"random":               random,
		"HTTP/1":               []byte("GET / HTTP/1.1\r\nHost: diurna\r\n\r\n"),
		"half a TLS hello":     hello,
		"preface, then random": append([]byte(preface), random...),
		"an endless frame":     append([]byte(preface), 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1),
	} {
		conn := connect()
		if _, err := conn.Write(bytes); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %v", name, err)
		}
		ended(conn)
		works()
	}
	var silent []net.Conn
	for range 500 {
		silent = append(silent, connect())
	}
	works()
	if got := consume(t, c, 0); uint64(len(got)) != next {
		t.Errorf("%d records, want %d", len(got), next)
	}
	// A new client gets in, and the silent do not hold up the end.
	produce(t, dial(t, a.Address()), "y")
	ctx := within(t)
	if err := a.Stop(ctx); err != nil || ctx.Err() != nil {
		t.Fatal(err)
	}
	for _, conn := range silent {
		ended(conn)
	}
}

// TestStopCutsOff: a call that does not end by itself is cut off, and the log
// is closed all the same.
func TestStopCutsOff(t *testing.T) {
	dir := t.TempDir()
	a := startReady(t, testConfig(t, dir), Options{})
	c := dial(t, a.Address())
	big := strings.Repeat("x", 64<<10)
	for range 100 {
		produce(t, c, big, big)
	}
	// It reads one message and then nothing: the server is stuck in a send.
	r, err := c.Consume(t.Context(), client.ConsumeOptions{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if !r.Next() {
		t.Fatal(r.Err())
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	err = a.Stop(ctx)
	if ctx.Err() != nil {
		t.Errorf("it took all of the time: %v", err)
	}
	for r.Next() {
	}
	var e *client.Error
	if !errors.As(r.Err(), &e) || e.Code != codes.Unavailable {
		t.Errorf("the reader: %v", r.Err())
	}
	a = startReady(t, testConfig(t, dir), Options{})
	if got := consume(t, dial(t, a.Address()), 0); len(got) != 200 {
		t.Errorf("%d records, want 200", len(got))
	}
}
