package identity

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// policyFile writes a policy, or a new version of one.
func policyFile(t testing.TB, name, text string) string {
	t.Helper()
	if !filepath.IsAbs(name) {
		name = filepath.Join(t.TempDir(), name)
	}
	// As an editor or a template would: whole, or not at all.
	if err := os.WriteFile(name+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
	return name
}

func openPolicy(t testing.TB, text string) *Policy {
	t.Helper()
	p, err := OpenPolicy(PolicyConfig{PolicyFile: policyFile(t, "policy.csv", text)})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const examplePolicy = `
# who writes orders
p, spiffe://orders.diurna/client/billing-*, orders.*, produce
p, spiffe://orders.diurna/client/billing-*, orders.secret, produce, deny
p, spiffe://orders.diurna/client/**, orders.*, consume, allow

p, role:operator, *, admin
p, role:operator, orders.*, consume, deny
p, role:watcher, *, monitor
p, *, public, consume
p, root, *, *
p, intern, *, admin, deny
p, locked, *, *
p, locked, *, *, deny
p, blind, *, *
p, blind, *, monitor, deny

g, alice, role:operator
g, role:lead, role:operator
g, spiffe://orders.diurna/client/ops/*, role:lead
g, spiffe://orders.diurna/client/prometheus, role:watcher
g, intern, role:watcher
`

func TestAllow(t *testing.T) {
	p := openPolicy(t, examplePolicy)
	const billing, other = "spiffe://orders.diurna/client/billing-7", "spiffe://orders.diurna/client/shop"
	for _, tt := range []struct {
		subject, object string
		want            string // the actions that are allowed
	}{
		{billing, "orders.eu", "produce consume"},
		{billing, "orders.", "produce consume"},
		{billing, "orders", ""},
		{billing, "orders.secret", "consume"},
		{billing, "default", ""},
		{"spiffe://orders.diurna/client/billing-", "orders.eu", "produce consume"},
		{"spiffe://orders.diurna/client/billing-7/x", "orders.eu", "consume"},
		{"spiffe://orders.diurna/server/billing-7", "orders.eu", ""},
		{"spiffe://evil.diurna/client/billing-7", "orders.eu", ""},
		{"xspiffe://orders.diurna/client/billing-7", "orders.eu", ""},
		{other, "orders.eu", "consume"},
		{other, "public", "consume"},

		{"alice", "default", "monitor admin"},
		{"alice", "orders.eu", "monitor admin"},
		{"Alice", "default", ""},
		{"spiffe://orders.diurna/client/ops/bob", "default", "monitor admin"},
		// The deny of one role wins over the allow that others have.
		{"spiffe://orders.diurna/client/ops/bob", "orders.eu", "monitor admin"},
		{"spiffe://orders.diurna/client/prometheus", "default", "monitor"},
		{"root", "anything", "produce consume monitor admin"},
		// A deny of admin leaves what admin includes.
		{"intern", "default", "monitor"},
		{"locked", "default", ""},
		{"blind", "default", "produce consume admin"},

		{"nobody", "default", ""},
		{"nobody", "public", "consume"},
		{"", "public", ""},
		{"role:operator", "default", ""},
		{"role:operator", "public", ""},
		{"*", "default", ""},
		{strings.Repeat("x", maxNameBytes+1), "public", ""},
	} {
		var got []string
		for _, action := range actions {
			for range 2 { // decided, then remembered
				allowed := p.Allow(tt.subject, tt.object, action)
				d := p.Explain(tt.subject, tt.object, action)
				if d.Allowed != allowed || !strings.HasPrefix(d.Text, map[bool]string{true: "allowed", false: "denied"}[allowed]) {
					t.Errorf("%s %s %s: allowed is %v, explained as %+v", tt.subject, tt.object, action, allowed, d)
				}
				if allowed && (len(got) == 0 || got[len(got)-1] != action) {
					got = append(got, action)
				}
			}
		}
		if got := strings.Join(got, " "); got != tt.want {
			t.Errorf("%.80s may %q with %s, want %q", tt.subject, got, tt.object, tt.want)
		}
		for _, action := range []string{"", "peer", "*", "Admin", "root"} {
			if p.Allow(tt.subject, tt.object, action) {
				t.Errorf("%s may %q", tt.subject, action)
			}
		}
	}
}

func TestExplain(t *testing.T) {
	p := openPolicy(t, examplePolicy)
	file := p.cfg.PolicyFile
	for _, tt := range []struct {
		subject, object, action string
		want                    string // FILE stands for the file
	}{
		{"root", "x", "produce", "allowed by FILE:11 (p, root, *, *)"},
		{"spiffe://orders.diurna/client/ops/bob", "x", "admin",
			"allowed by FILE:7 (p, role:operator, *, admin) because of FILE:20 (g, spiffe://orders.diurna/client/ops/*, role:lead) and FILE:19 (g, role:lead, role:operator)"},
		{"alice", "orders.eu", "consume", "denied by FILE:8 (p, role:operator, orders.*, consume, deny) because of FILE:18 (g, alice, role:operator)"},
		{"alice", "x", "produce", "denied: no rule allows it; rules for the subject: FILE:7 (p, role:operator, *, admin), FILE:8 (p, role:operator, orders.*, consume, deny), FILE:10 (p, *, public, consume)"},
		{"", "x", "produce", "denied: nobody is named"},
		{"root", "x", "peer", "denied: there is no such action; there are produce, consume, monitor, admin"},
		{"role:operator", "x", "admin", "denied: the subject looks like a role, and a certificate is none"},
	} {
		if got := strings.ReplaceAll(p.Explain(tt.subject, tt.object, tt.action).Text, file, "FILE"); got != tt.want {
			t.Errorf("%s %s %s:\n%s, want\n%s", tt.subject, tt.object, tt.action, got, tt.want)
		}
	}
	if d := openPolicy(t, "p, a, b, consume").Explain("c", "b", "consume"); d.Text != "denied: no rule is for the subject" {
		t.Error(d.Text)
	}
	if s := p.Stats(); s.Decisions[0] != (DecisionCount{Action: "produce"}) {
		t.Errorf("explaining counts: %+v", s)
	}
}

func TestStats(t *testing.T) {
	p := openPolicy(t, examplePolicy)
	for range 3 {
		p.Allow("root", "x", "produce")
		p.Allow("nobody", "x", "consume")
	}
	p.Allow("root", "x", "peer")
	s := p.Stats()
	want := []DecisionCount{{"produce", 3, 0}, {"consume", 0, 3}, {"monitor", 0, 0}, {"admin", 0, 0}, {"other", 0, 1}}
	for i, w := range want {
		if s.Decisions[i] != w {
			t.Errorf("%+v, want %+v", s.Decisions[i], w)
		}
	}
	if s.Rules != 13 || s.Roles != 5 || s.Loaded.IsZero() {
		t.Errorf("%+v", s)
	}
}

// TestModel: a model of one's own, with Casbin's functions and ours.
func TestModel(t *testing.T) {
	const model = `
[request_definition]
r = sub, obj, act
[policy_definition]
p = sub, obj, act
[role_definition]
g = _, _
[policy_effect]
e = some(where (p.eft == allow))
[matchers]
m = g(r.sub, p.sub) && keyMatch(r.obj, p.obj) && r.act == p.act
`
	open := func(model, policy string) (*Policy, error) {
		return OpenPolicy(PolicyConfig{ModelFile: policyFile(t, "model.conf", model), PolicyFile: policyFile(t, "policy.csv", policy)})
	}
	p, err := open(model, "p, editors, /logs/*, sing\ng, al*, writers\ng, writers, editors")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		subject, object, action string
		want                    bool
	}{
		{"alice", "/logs/a/b", "sing", true}, {"bob", "/logs/a", "sing", false}, {"alice", "/x", "sing", false}, {"alice", "/logs/a", "dance", false},
	} {
		if got := p.Allow(tt.subject, tt.object, tt.action); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
	if d := p.Explain("alice", "/logs/a", "sing"); d.Rule == nil || d.Rule.Line != 1 {
		t.Errorf("%+v", d)
	}

	replace := func(old, new string) string { return strings.Replace(model, old, new, 1) }
	for name, tt := range map[string]struct{ model, policy, want string }{
		"fields":           {model, "p, a, b, c, allow", "By the model a rule has 4 fields, the p included. This one has 5."},
		"no model":         {"hello", "p, a, b, c", "It is not a Casbin model"},
		"empty":            {"", "p, a, b, c", "missing required sections"},
		"no roles":         {replace("[role_definition]\ng = _, _", ""), "p, a, b, c\ng, a, b", "The model has no role_definition"},
		"domains":          {replace("g = _, _", "g = _, _, _"), "p, a, b, c", `The role_definition has to be "g = _, _"`},
		"request":          {replace("r = sub, obj, act", "r = sub, act"), "p, a, b, c", `The request_definition has to be "r = sub, obj, act"`},
		"two definitions":  {replace("p = sub, obj, act", "p = sub, obj, act\np2 = x, y"), "p, a, b, c", "It defines p2."},
		"unknown function": {replace("keyMatch(", "kayMatch("), "p, a, b, c", "It does not work with "},
		"unknown name":     {replace("r.act ==", "r.action =="), "p, a, b, c", "It does not work with "},
		"arguments":        {replace("keyMatch(r.obj, p.obj)", "glob(r.obj)"), "p, a, b, c", "glob takes 2 arguments, not 1"},
		"effect":           {replace("some(where (p.eft == allow))", "most(where (p.eft == allow))"), "p, a, b, c", "unsupported effect"},
		"cycle":            {model, "p, a, b, c\ng, a, b\ng, b, a", "policy.csv:3: A role is a member of itself: a → b → a."},
		"too large":        {strings.Repeat("#", maxModelBytes+1), "p, a, b, c", "more than 64 KiB"},
	} {
		_, err := open(tt.model, tt.policy)
		var bad *PolicyError
		if !errors.As(err, &bad) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCasbinFails: what Casbin cannot decide is denied, and not remembered.
func TestCasbinFails(t *testing.T) {
	const model = `
[request_definition]
r = sub, obj, act
[policy_definition]
p = sub, obj, act
[policy_effect]
e = some(where (p.eft == allow))
[matchers]
m = r.sub != "bad" || glob(r.obj)
`
	var out bytes.Buffer
	p, err := OpenPolicy(PolicyConfig{
		ModelFile: policyFile(t, "model.conf", model), PolicyFile: policyFile(t, "policy.csv", "p, a, b, c"),
		Logger: hclog.New(&hclog.LoggerOptions{Output: &out}),
	})
	if err != nil {
		t.Fatal(err)
	}
	if !p.Allow("good", "b", "c") || p.Allow("bad", "b", "c") {
		t.Error("decided wrongly")
	}
	if !strings.Contains(out.String(), "Casbin cannot decide: ") {
		t.Errorf("logged %q", out.String())
	}
	if n := p.state.Load().cache.len(); n != 1 {
		t.Errorf("%d decisions are remembered", n)
	}
}

func TestCacheIsBounded(t *testing.T) {
	p := openPolicy(t, "p, a, *, consume")
	cache := &p.state.Load().cache
	for i := range 5 * cachedDecisions {
		if !p.Allow("a", "hot", "consume") || !p.Allow("a", fmt.Sprint(i), "consume") {
			t.Fatal("denied")
		}
		if n := cache.len(); n > 2*cachedDecisions {
			t.Fatalf("%d decisions are remembered", n)
		}
		if _, ok := cache.get(decisionKey{"a", "hot", "consume"}); !ok {
			t.Fatal("forgot what is in use")
		}
	}
	p.Allow("a", strings.Repeat("x", maxCachedBytes), "consume")
	if _, ok := cache.get(decisionKey{"a", strings.Repeat("x", maxCachedBytes), "consume"}); ok {
		t.Error("a long question is remembered")
	}
}

// TestCacheKeepsNoBuffer: the strings of a question may be changed afterwards.
func TestCacheKeepsNoBuffer(t *testing.T) {
	var c decisionCache
	k := decisionKey{"subject", "object", "action"}
	c.put(k, true)
	for kept := range c.young {
		if kept != k {
			t.Fatal(kept)
		}
		if sameString(kept.subject, k.subject) || sameString(kept.object, k.object) || sameString(kept.action, k.action) {
			t.Error("the cache keeps the caller's string")
		}
	}
}

func TestDenialsAreBounded(t *testing.T) {
	var out lines
	now := time.Unix(1e9, 0)
	d := denialLog{logger: hclog.New(&hclog.LoggerOptions{Output: &out}), now: func() time.Time { return now }}
	why := func() string { return "denied: because" }
	note := func(subject, action string, n int) {
		for range n {
			d.note(decisionKey{subject, "log", action}, why)
		}
	}
	expect := func(what string, want ...string) {
		t.Helper()
		got := out.take()
		if len(got) != len(want) {
			t.Fatalf("%s: logged %q, want %q", what, got, want)
		}
		for i, w := range want {
			for word := range strings.FieldsSeq(w) {
				if !strings.Contains(got[i], word) {
					t.Errorf("%s: %q lacks %q", what, got[i], word)
				}
			}
		}
	}

	note("mallory", "produce", 10)
	expect("first", `denied: subject=mallory object=log action=produce because`)
	note("mallory", "consume", 1)
	expect("another action", `action=consume`)
	now = now.Add(denialQuiet)
	note("mallory", "produce", 5)
	expect("after a while", `subject=mallory suppressed=9`)
	d.flush()
	expect("too early")
	now = now.Add(denialQuiet)
	d.flush()
	expect("told at the end", `often subject=mallory action=produce times=4`)
	now = now.Add(denialQuiet)
	d.flush()
	expect("told once")
	if len(d.seen) != 0 {
		t.Errorf("%d are remembered", len(d.seen))
	}

	note("evil\nname", "produce", 1)
	if got := out.take(); len(got) != 1 || !strings.Contains(got[0], "evil�name") {
		t.Errorf("logged %q", got)
	}
	for i := range 10 * maxDenials {
		note(fmt.Sprint(i), "produce", 1)
		note(fmt.Sprint(i), "consume", 1)
	}
	if got := len(out.take()); got > maxDenials+2*len(actions) || len(d.seen) > maxDenials+len(actions)+1 {
		t.Errorf("%d lines, %d are remembered", got, len(d.seen))
	}
	now = now.Add(denialQuiet)
	note("someone", "produce", 1)
	if got := out.take(); len(got) == 0 || !strings.Contains(strings.Join(got, ""), "others") {
		t.Errorf("the others are not told of: %q", got)
	}
}

// TestDeniedOften: the policy itself limits its warnings.
func TestDeniedOften(t *testing.T) {
	var out lines
	p, err := OpenPolicy(PolicyConfig{PolicyFile: policyFile(t, "policy.csv", "p, a, b, consume"), Logger: hclog.New(&hclog.LoggerOptions{Output: &out})})
	if err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		p.Allow("mallory", "b", "consume")
	}
	if got := out.take(); len(got) != 1 || !strings.Contains(got[0], "no rule is for the subject") {
		t.Errorf("logged %q", got)
	}
	if s := p.Stats(); s.Decisions[1].Denied != 1000 {
		t.Errorf("%+v", s)
	}
}

// lines is a log that tests read. Safe for concurrent use.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

// take returns what was logged since the last call.
func (l *lines) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var got []string
	for line := range strings.Lines(l.text.String()) {
		got = append(got, line)
	}
	l.text.Reset()
	return got
}

func BenchmarkAllow(b *testing.B) {
	p := openPolicy(b, examplePolicy)
	b.ReportAllocs()
	for b.Loop() {
		if !p.Allow("spiffe://orders.diurna/client/billing-7", "orders.eu", "produce") {
			b.Fatal("denied")
		}
	}
}

func BenchmarkAllowParallel(b *testing.B) {
	p := openPolicy(b, examplePolicy)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if !p.Allow("spiffe://orders.diurna/client/billing-7", "orders.eu", "produce") {
				b.Error("denied")
			}
		}
	})
}

// BenchmarkDecide is a decision that is not remembered, with a policy as large
// as can be.
func BenchmarkDecide(b *testing.B) {
	var text strings.Builder
	for i := range maxRules {
		fmt.Fprintf(&text, "p, spiffe://orders.diurna/client/c%d, *, consume\n", i)
	}
	p := openPolicy(b, text.String())
	k := decisionKey{"spiffe://orders.diurna/client/nobody", "default", "consume"}
	for b.Loop() {
		if p.decide(&policyState{set: p.state.Load().set, shape: builtinShape, enforcer: p.state.Load().enforcer}, k) {
			b.Fatal("allowed")
		}
	}
}
