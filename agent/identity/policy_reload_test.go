package identity

import (
	"context"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"
)

const (
	forAlice = "p, alice, *, consume"
	forBob   = "p, bob, *, consume"
	broken   = "p, alice, *, cosume"
)

func loggedPolicy(t *testing.T, text string) (*Policy, *lines) {
	t.Helper()
	out := new(lines)
	p, err := OpenPolicy(PolicyConfig{
		PolicyFile: policyFile(t, "policy.csv", text), Interval: time.Millisecond,
		Logger: hclog.New(&hclog.LoggerOptions{Output: out}),
	})
	if err != nil {
		t.Fatal(err)
	}
	return p, out
}

func (p *Policy) who() string {
	var who []string
	for _, subject := range []string{"alice", "bob"} {
		if p.Allow(subject, "default", "consume") {
			who = append(who, subject)
		}
	}
	return strings.Join(who, " ")
}

func TestReload(t *testing.T) {
	p, out := loggedPolicy(t, forAlice)
	file := p.cfg.PolicyFile
	expect := func(who string, reloads, failures uint64, refused bool) {
		t.Helper()
		s := p.Stats()
		if got := p.who(); got != who || s.Reloads != reloads || s.ReloadFailures != failures || s.Refused != refused {
			t.Errorf("%s is allowed, want %s; %+v", got, who, s)
		}
	}
	errorsLogged := func() (n int) {
		for _, line := range out.take() {
			if strings.Contains(line, "[ERROR]") {
				n++
			}
		}
		return n
	}
	expect("alice", 0, 0, false)

	policyFile(t, file, forBob)
	expect("alice", 0, 0, false)
	if err := p.Reload(); err != nil {
		t.Fatal(err)
	}
	expect("bob", 1, 0, false)

	policyFile(t, file, broken)
	for i := range 3 {
		if err := p.Reload(); err == nil || !strings.Contains(err.Error(), file+":1: There is no action") {
			t.Errorf("%v", err)
		}
		expect("bob", 1, uint64(i)+1, true)
	}
	if n := errorsLogged(); n != 1 {
		t.Errorf("said so %d times", n)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.Reload(); err == nil {
			t.Error("reloaded what is gone")
		}
	}
	if n := errorsLogged(); n != 1 {
		t.Errorf("said so %d times", n)
	}
	expect("bob", 1, 5, true)

	policyFile(t, file, forAlice)
	if err := p.Reload(); err != nil {
		t.Fatal(err)
	}
	expect("alice", 2, 5, false)
}

// TestPoll: a change is believed when it is seen twice.
func TestPoll(t *testing.T) {
	p, out := loggedPolicy(t, forAlice)
	file := p.cfg.PolicyFile
	step := func(what, text, who string, failures uint64, refused bool) {
		t.Helper()
		if text != "" {
			policyFile(t, file, text)
		}
		p.poll()
		if got, s := p.who(), p.Stats(); got != who || s.ReloadFailures != failures || s.Refused != refused {
			t.Errorf("%s: %s is allowed, want %s; %+v", what, got, who, s)
		}
	}
	step("nothing new", "", "alice", 0, false)
	step("new", forBob, "alice", 0, false)
	step("still being written", forBob+"\np, alice, *, consume", "alice", 0, false)
	step("back to the first part", forBob, "alice", 0, false)
	step("at rest", "", "bob", 0, false)
	step("broken", broken, "bob", 0, false)
	step("broken and at rest", "", "bob", 1, true)
	step("nothing new in that", "", "bob", 1, true)
	step("mended, to what is in force", forBob, "bob", 1, true)
	step("mended and at rest", "", "bob", 1, false)
	step("broken again", broken, "bob", 1, false)
	step("and at rest", "", "bob", 2, true)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	step("gone", "", "bob", 2, true)
	step("gone for good", "", "bob", 3, true)
	step("still gone", "", "bob", 3, true)
	step("back", forAlice, "bob", 3, true)
	step("back and at rest", "", "alice", 3, false)
	n := 0
	for _, line := range out.take() {
		if strings.Contains(line, "[ERROR]") {
			n++
		}
	}
	if n != 3 {
		t.Errorf("%d errors logged, want 3", n)
	}
}

// TestRun changes the files while others ask: each answer is that of one policy
// or the other, and what does not change is never denied.
func TestRun(t *testing.T) {
	defer goleak.VerifyNone(t)
	const both = "p, carol, *, consume\n"
	p, _ := loggedPolicy(t, both+forAlice)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { p.Run(ctx) })
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if !p.Allow("carol", "default", "consume") || p.Allow("dave", "default", "consume") {
					t.Error("decided wrongly")
					return
				}
				p.who()
				p.Explain("alice", "default", "consume")
				p.Stats()
			}
		})
	}
	wg.Go(func() {
		for ctx.Err() == nil {
			_ = p.Reload() // the file may hold anything now
		}
	})
	deadline := time.Now().Add(30 * time.Second)
	for i, text := range []string{forBob, broken, forAlice, forBob, forAlice} {
		policyFile(t, p.cfg.PolicyFile, both+text)
		want := map[string]string{forAlice: "alice", forBob: "bob", broken: "bob"}[text]
		for p.who() != want || (text == broken) != p.Stats().Refused {
			if time.Now().After(deadline) {
				t.Fatalf("change %d: %s is allowed, want %s; %+v", i, p.who(), want, p.Stats())
			}
			time.Sleep(time.Millisecond)
		}
	}
	cancel()
	wg.Wait()
}
