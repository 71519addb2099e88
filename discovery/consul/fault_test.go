package consul

import (
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/diurnalog/diurna/discovery"
)

func fakeHandle(t *testing.T, f *fake, change func(*Config)) (*Discovery, *logs) {
	t.Helper()
	var l logs
	cfg := Config{Address: f.URL, Cluster: "test", Timing: quick, Logger: l.logger(t, "node")}
	if change != nil {
		change(&cfg)
	}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d, &l
}

func fixed(id string) discovery.Registration {
	return discovery.Registration{
		Node:   discovery.Node{ID: id, Address: "192.0.2.1:8400", Cluster: "test", State: discovery.Member},
		Status: discovery.Passing,
	}
}

// TestIndex plays a Consul whose index goes every way, and looks at what is
// asked next.
func TestIndex(t *testing.T) {
	f := newFake(t)
	type turn struct {
		want   uint64 // index that is asked for
		status int
		index  uint64 // of the answer
	}
	script := []turn{
		{0, 200, 50}, {50, 200, 50}, {50, 200, 60},
		{60, 200, 20}, {0, 200, 20}, // it went back: start over
		{20, 200, 0}, {0, 200, 0}, // no index at all, twice: never wait for 0
		{1, 200, 70},
		{70, 500, 0}, {0, 500, 0}, {0, 200, 71}, // after an error, the first answer is wanted at once
		{71, 200, 72},
	}
	var mu sync.Mutex
	var asked []uint64
	done := make(chan struct{})
	f.health = func(w http.ResponseWriter, r *http.Request, index uint64) {
		mu.Lock()
		asked = append(asked, index)
		n := len(asked)
		mu.Unlock()
		switch {
		case n > len(script):
			if n == len(script)+1 {
				close(done)
			}
			f.hang(r)
		case script[n-1].status != 200:
			http.Error(w, "No cluster leader", script[n-1].status)
		default:
			answer(w, script[n-1].index, f.entries())
		}
	}
	d, _ := fakeHandle(t, f, nil)
	run(t, d)
	<-done
	mu.Lock()
	defer mu.Unlock()
	for i, turn := range script {
		if asked[i] != turn.want {
			t.Fatalf("query %d: want index %d, all were %d", i+1, turn.want, asked)
		}
	}
}

// TestWentBack trusts nothing until all had the time to register again.
func TestWentBack(t *testing.T) {
	f := newFake(t)
	d, _ := fakeHandle(t, f, func(c *Config) { c.Timing.Settle, c.Timing.Wait = 500*time.Millisecond, 200*time.Millisecond })
	run(t, d)
	d.Announce(fixed("one"))
	await(t, d, "registered", trusted(1))
	f.mu.Lock()
	f.setIndex(5)
	f.mu.Unlock()
	s := await(t, d, "no trust", func(s discovery.Snapshot) bool { return !s.Trusted })
	if !strings.Contains(s.Why, "forgot") || len(s.Nodes) != 1 {
		t.Errorf("went back: %+v", s)
	}
	began := time.Now()
	await(t, d, "trust again", trusted(1))
	if took := time.Since(began); took < 300*time.Millisecond {
		t.Errorf("trusted after %s", took)
	}
}

// TestHalfOpen has an agent that takes a query and says nothing more.
func TestHalfOpen(t *testing.T) {
	f := newFake(t)
	f.health = func(w http.ResponseWriter, r *http.Request, index uint64) {
		if len(f.entries()) > 0 && index > 0 {
			f.hang(r)
			return
		}
		f.block(w, r, index)
	}
	d, _ := fakeHandle(t, f, func(c *Config) { c.Timing.Wait, c.Timing.WaitGrace = 100*time.Millisecond, 100*time.Millisecond })
	run(t, d)
	d.Announce(fixed("one"))
	await(t, d, "an answer", trusted(1))
	s := await(t, d, "given up", func(s discovery.Snapshot) bool { return strings.HasPrefix(s.Why, "no answer") })
	if s.Trusted || len(s.Nodes) != 1 || !strings.Contains(s.Why, f.URL) {
		t.Errorf("%+v", s)
	}
}

// TestOld does not trust a snapshot that is old, even where nothing noticed
// yet: the process was stopped.
func TestOld(t *testing.T) {
	f := newFake(t)
	d, _ := fakeHandle(t, f, nil)
	run(t, d)
	d.Announce(fixed("one"))
	await(t, d, "an answer", trusted(1))
	d.mu.Lock()
	d.snap.At = time.Now().Add(-time.Minute).Round(0) // no monotonic time
	d.mu.Unlock()
	if s := d.Latest(); s.Trusted || !strings.Contains(s.Why, "old") || len(s.Nodes) != 1 {
		t.Errorf("%+v", s)
	}
}

// TestRetries has an agent that refuses: the log stays short, queries stay few,
// and the data is put in place at once when it does not any more.
func TestRetries(t *testing.T) {
	f := newFake(t)
	f.refuse.Store(500)
	d, l := fakeHandle(t, f, func(c *Config) { c.Timing.RetryStep, c.Timing.RetryMax = 2*time.Millisecond, 10*time.Millisecond })
	run(t, d)
	d.Announce(fixed("one"))
	eventually(t, "it was tried 11 times", func() bool { return l.count("failures=11") == 1 })
	if n := l.count("registering with Consul fails: "); n != 2 {
		t.Errorf("%d lines after 11 failures", n)
	}
	if !strings.Contains(l.String(), f.URL) || !strings.Contains(l.String(), "refused by the test") {
		t.Error("the log does not say who and why")
	}
	f.refuse.Store(0)
	await(t, d, "registered", trusted(1))
	eventually(t, "the log says that it works", func() bool { return l.count("works again") == 1 })
}

// TestAnnounceMany announces without pause: each counts, but few are written.
func TestAnnounceMany(t *testing.T) {
	f := newFake(t)
	d, _ := fakeHandle(t, f, func(c *Config) { c.Timing.RetryStep = 20 * time.Millisecond })
	run(t, d)
	reg := fixed("one")
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for term := range uint64(100_000) {
		reg.Term = term
		d.Announce(reg)
		if term%200 == 0 { // many at once, and again and again: half a second
			<-tick.C
		}
	}
	eventually(t, "the last one counts", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.held["diurna-one"] != nil && f.held["diurna-one"].Meta["raft_term"] == "99999"
	})
	if n := f.registers.Load(); n < 2 || n > 80 {
		t.Errorf("%d registrations", n)
	}
}

// TestNoChangeNoWrite registers once while nothing changes, whatever the status
// does.
func TestNoChangeNoWrite(t *testing.T) {
	f := newFake(t)
	d, _ := fakeHandle(t, f, func(c *Config) { c.Timing.Reconcile, c.Timing.TTLUpdate = 5*time.Millisecond, 5*time.Millisecond })
	run(t, d)
	reg := fixed("one")
	d.Announce(reg)
	await(t, d, "registered", trusted(1))
	for _, status := range []discovery.Status{discovery.Warning, discovery.Critical, discovery.Passing} {
		reg.Status = status
		d.Announce(reg)
		time.Sleep(20 * time.Millisecond) // several rounds
	}
	if n := f.registers.Load(); n != 1 {
		t.Errorf("%d registrations", n)
	}
}

// TestEndIsBounded has an agent that hangs, and one that is gone, at the end.
func TestEndIsBounded(t *testing.T) {
	for name, breakIt := range map[string]func(f *fake){
		"hangs": func(f *fake) { f.hangs.Store(true) },
		"gone": func(f *fake) {
			_ = f.Listener.Close()
			f.CloseClientConnections()
		},
		"refuses": func(f *fake) { f.refuse.Store(500) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			d, _ := fakeHandle(t, f, func(c *Config) {
				c.Timing.Deregister, c.Timing.Reconcile, c.Timing.TTLUpdate = 300*time.Millisecond, time.Hour, 10*time.Second
			})
			stop := run(t, d)
			d.Announce(fixed("one"))
			await(t, d, "registered", trusted(1))
			breakIt(f)
			began := time.Now()
			err := stop()
			if err == nil || !strings.Contains(err.Error(), "diurna-one") || !strings.Contains(err.Error(), f.URL) {
				t.Errorf("the end: %v", err)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
	t.Run("nothing registered", func(t *testing.T) {
		f := newFake(t)
		d, _ := fakeHandle(t, f, nil)
		stop := run(t, d)
		await(t, d, "an answer", func(s discovery.Snapshot) bool { return !s.At.IsZero() })
		if err := stop(); err != nil || f.drops.Load() != 0 {
			t.Errorf("%v, %d deregistrations", err, f.drops.Load())
		}
	})
}

// TestSkippedOnce warns once per cause, however often it is seen, and does not
// trust an answer in which a node of ours may be hidden.
func TestSkippedOnce(t *testing.T) {
	f := newFake(t)
	var polls sync.WaitGroup
	polls.Add(20)
	n := 0
	f.health = func(w http.ResponseWriter, r *http.Request, index uint64) {
		entries := f.entries()
		for _, s := range []*api.AgentService{
			{ID: "stranger", Service: "diurna"},
			{ID: "diurna-x", Service: "diurna", Port: 1, Address: "192.0.2.9", Meta: map[string]string{"cluster_name": "test", "node_id": "y"}},
		} {
			entries = append(entries, &api.ServiceEntry{Node: &api.Node{Node: "n"}, Service: s})
		}
		if n < 20 {
			n++
			polls.Done()
		}
		answer(w, index+1, entries)
	}
	d, l := fakeHandle(t, f, func(c *Config) { c.Timing.WatchEvery = time.Millisecond })
	run(t, d)
	d.Announce(fixed("one"))
	polls.Wait()
	s := await(t, d, "no trust", func(s discovery.Snapshot) bool { return strings.Contains(s.Why, "diurna-x") })
	if s.Trusted || strings.Contains(s.Why, "stranger") {
		t.Errorf("%+v", s)
	}
	if got := []int{l.count("service=stranger"), l.count("service=diurna-x"), l.count("is not used")}; !slices.Equal(got, []int{1, 1, 2}) {
		t.Errorf("lines: %d", got)
	}
}

// TestErrors says who was asked, for what, and what to do.
func TestErrors(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	f := newFake(t)
	plain := strings.TrimPrefix(f.URL, "http://")
	for name, tc := range map[string]struct {
		cfg  Config
		want []string
	}{
		"nobody":    {Config{Address: nobody}, []string{nobody, "refused", "is the local Consul agent running"}},
		"no TLS":    {Config{Address: plain, Scheme: "https"}, []string{plain, "does not speak TLS"}},
		"not found": {Config{Address: plain}, []string{plain, "write the key diurna/test/bootstrap", "404"}},
		"no socket": {Config{Address: "unix:///nowhere/consul.sock"}, []string{"/nowhere/consul.sock", "is the local Consul agent running"}},
	} {
		t.Run(name, func(t *testing.T) {
			tc.cfg.Cluster = "test"
			d, err := New(tc.cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer d.c.close()
			_, err = d.Bootstrap().Create(t.Context(), nil)
			for _, want := range tc.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("want %q in: %v", want, err)
				}
			}
		})
	}
}

// TestRefusedToken takes the new token from the file when the old one is
// refused, within the same request.
func TestRefusedToken(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("old")
	f := newFake(t)
	var asked atomic.Int64
	f.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if r.Header.Get("X-Consul-Token") != "new" {
			http.Error(w, "ACL not found", http.StatusForbidden)
			return
		}
		_, _ = w.Write([]byte("true"))
	})
	d, _ := fakeHandle(t, f, func(c *Config) { c.TokenFile = file })
	defer d.c.close()
	_, err := d.Bootstrap().Create(t.Context(), nil)
	if err == nil || !strings.Contains(err.Error(), file) || strings.Contains(err.Error(), "old") || asked.Load() != 1 {
		t.Errorf("the same token was tried %d times: %v", asked.Load(), err)
	}
	write("new")
	if won, err := d.Bootstrap().Create(t.Context(), nil); err != nil || !won || asked.Load() != 3 {
		t.Errorf("with the new token: %t, %v, %d requests", won, err, asked.Load())
	}
}
