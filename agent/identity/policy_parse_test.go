package identity

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestParsePolicy(t *testing.T) {
	long := strings.Repeat("x", maxPatternBytes+1)
	for name, tt := range map[string]struct {
		text string
		want string // a problem as "line: text", or part of it; empty: it is good
	}{
		"good":           {"p, a, b, consume", ""},
		"tight":          {"p,a,b,consume,deny", ""},
		"Windows":        {"\xef\xbb\xbf# hello\r\np, a, b, consume\r\n\r\n", ""},
		"spaces inside":  {"p, Jane Doe, b, consume", ""},
		"same twice":     {"p, a, b, consume\np, a, b, consume, allow", ""},
		"indented":       {"  # x\n\t p , a , b , *", ""},
		"empty":          {"", "0: The file has no rule"},
		"only comments":  {"# p, a, b, consume\n", "0: The file has no rule"},
		"only roles":     {"g, a, role:x", "1: No rule is for role:x"},
		"kind":           {"\np, a, b, consume\nP, a, b, consume", `3: There is no kind of line "P". A line begins with p (a rule), g (who has a role) or # (a comment).`},
		"no kind":        {"a, b, consume", `1: There is no kind of line "a"`},
		"p2":             {"p2, a, b, consume", `1: There is no kind of line "p2"`},
		"too few":        {"p, a, b", "1: A rule is p, subject, log, action and perhaps allow or deny. This one has 3 fields, not 4 or 5."},
		"too many":       {"p, a, b, consume, allow, x", "This one has 6 fields"},
		"empty subject":  {"p, , b, consume", "1: A field is empty. For everything, write *."},
		"empty effect":   {"p, a, b, consume,", "1: A field is empty."},
		"action":         {"p, a, b, cosume", `1: There is no action "cosume". Did you mean consume? A rule has one action: produce, consume, monitor, admin, or * for all.`},
		"upper case":     {"p, a, b, PRODUCE", `Did you mean produce?`},
		"two actions":    {"p, a, b, produce|consume", `1: There is no action "produce|consume".`},
		"action pattern": {"p, a, b, con*", `1: There is no action "con*".`},
		"peer":           {"p, a, b, peer", `1: There is no action "peer".`},
		"effect":         {"p, a, b, consume, denny", `1: There is no effect "denny". Did you mean deny?`},
		"late comment":   {"p, a, b, consume # why", `1: There is no action "consume # why"`},
		"quotes":         {`p, "a", b, consume`, `has a ", which has no meaning here`},
		"question mark":  {"p, a?, b, consume", `1: The subject "a?" has a ?, which has no meaning here: the only wildcards are * (anything without a /) and ** (anything).`},
		"class":          {"p, a, log[12], consume", `1: The log "log[12]" has a [`},
		"expression":     {"p, ^a.*$, b, consume", `has a ^`},
		"three":          {"p, a***, b, consume", "1: The subject \"a***\" has three * in a row"},
		"path as log":    {"p, a, logs/b, consume", `1: The log "logs/b" is not the name of a log`},
		"control":        {"p, a\x01, b, consume", "has characters that cannot be printed"},
		"not UTF-8":      {"p, a\xff, b, consume", "0: The file is not text in UTF-8."},
		"long pattern":   {"p, " + long + ", b, consume", "has more than 512 characters"},
		"long comment":   {"# " + strings.Repeat("x", maxLineBytes) + "\np, a, b, consume", ""},
		"long rule":      {"p, a, b, consume" + strings.Repeat(" ", 8) + strings.Repeat(",", maxLineBytes), "1: The line has more than 4096 characters."},
		"trust domain":   {"p, spiffe://Orders.diurna/client/x, b, consume", "1: The subject \"spiffe://Orders.diurna/client/x\" stands for nobody: trust domains have no upper-case letters. Did you mean spiffe://orders.diurna/client/x?"},
		"too large":      {strings.Repeat("#", maxPolicyBytes+1), "0: The file has more than 1 MiB."},
		"too many rules": {strings.Repeat("p, a, b, consume\n", maxRules+2), "10001: This is line 10001 that is no comment, and there may be 10000."},

		"role":          {"p, role:x, b, consume\ng, a, role:x", ""},
		"no prefix":     {"p, x, b, consume\ng, a, x", `2: "x" is no role: the name of a role begins with "role:". Did you mean role:x?`},
		"link fields":   {"p, role:x, b, consume\ng, a, role:x, y", "2: Who has a role is said by g, subject, role. This line has 4 fields, not 3."},
		"empty link":    {"p, role:x, b, consume\ng, , role:x", "2: A field is empty. For everybody, write *."},
		"role pattern":  {"p, role:*, b, consume", `1: "role:*" is no role`},
		"nameless":      {"p, role:, b, consume", `1: "role:" is no role`},
		"misspelt":      {"p, role:operator, b, consume, deny\ng, a, role:opertor", "1: Nobody has role:operator: a line g, SUBJECT, role:operator is missing. Did you mean role:opertor?"},
		"and the other": {"p, role:operator, b, consume\ng, a, role:operator\ng, b, role:opertor", "3: No rule is for role:opertor, so having it means nothing. Did you mean role:operator?"},
		"nobody has it": {"p, role:x, b, consume\ng, role:y, role:x", "2: Nobody has role:y"},
		"itself":        {"p, role:x, b, consume\ng, role:x, role:x\ng, a, role:x", "2: A role is a member of itself: role:x → role:x."},
		"cycle":         {"p, role:x, b, consume\ng, a, role:x\ng, role:x, role:y\ng, role:y, role:z\ng, role:z, role:x", "5: A role is a member of itself: role:x → role:y → role:z → role:x."},
		"diamond":       {"p, role:x, b, consume\ng, a, role:l\ng, a, role:r\ng, role:l, role:x\ng, role:r, role:x", ""},
	} {
		set, err := parsePolicy("f.csv", []byte(tt.text), builtinShape)
		var bad *PolicyError
		switch {
		case err == nil && tt.want == "":
		case err == nil:
			t.Errorf("%s: taken as %+v, want %q", name, set, tt.want)
		case !errors.As(err, &bad):
			t.Errorf("%s: %T", name, err)
		default:
			var got []string
			for _, p := range bad.Problems {
				got = append(got, fmt.Sprintf("%d: %s", p.Line, p.Text))
			}
			most := 1
			if name == "misspelt" {
				most = 2 // seen from both sides
			}
			if len(got) > most || tt.want == "" || !strings.Contains(got[0], tt.want) {
				t.Errorf("%s:\n%q, want\n%q", name, got, tt.want)
			}
		}
	}
}

// TestPolicyErrors: all problems are told, in the order of the lines.
func TestPolicyErrors(t *testing.T) {
	_, err := OpenPolicy(PolicyConfig{PolicyFile: policyFile(t, "policy.csv", strings.Repeat("p, a, b, cosume\nx\n", 200))})
	var bad *PolicyError
	if !errors.As(err, &bad) || len(bad.Problems) != maxProblems {
		t.Fatalf("%v", err)
	}
	text := err.Error()
	if strings.Count(text, "policy.csv:") != 5 || !strings.HasSuffix(text, "; and 95 more") || strings.Contains(text, "\n") {
		t.Errorf("%s", text)
	}
	if lines := bad.Lines(); !strings.Contains(lines[1], "policy.csv:2: There is no kind of line") {
		t.Errorf("%q", lines[1])
	}

	missing := filepath.Join(t.TempDir(), "missing.csv")
	if _, err := OpenPolicy(PolicyConfig{PolicyFile: missing}); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), missing) {
		t.Errorf("%v", err)
	}
	if _, err := OpenPolicy(PolicyConfig{PolicyFile: t.TempDir()}); err == nil || !strings.Contains(err.Error(), "is not a file") {
		t.Errorf("%v", err)
	}
	if _, err := OpenPolicy(PolicyConfig{}); err == nil {
		t.Error("a policy without a file")
	}
}

// FuzzPolicy: whatever is taken for a policy decides, and decides as a few
// lines that know nothing of Casbin do.
func FuzzPolicy(f *testing.F) {
	f.Add(examplePolicy, "alice", "orders.eu", uint8(3))
	f.Add("p, a*, b**, consume\ng, a, role:x\np, role:x, *, *, deny", "a", "b/c", uint8(1))
	f.Add("p, \"a\", b, consume", "a", "b", uint8(0))
	f.Add("p,a,b,c,d,e\ng,\n,,,\np", "", "", uint8(9))
	f.Fuzz(func(t *testing.T, text, subject, object string, which uint8) {
		set, err := parsePolicy("f.csv", []byte(text), builtinShape)
		if err != nil {
			var bad *PolicyError
			if !errors.As(err, &bad) || len(bad.Problems) == 0 || !utf8.ValidString(err.Error()) {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		files := policyText{model: []byte(BuiltinModel), policy: []byte(text)}
		st, err := files.load(PolicyConfig{PolicyFile: "f.csv"})
		if err != nil {
			t.Fatalf("%q is a policy, but: %v", text, err)
		}
		action := actions[int(which)%len(actions)]
		k := decisionKey{subject, object, action}
		if st.unaskable(k) != "" {
			return
		}
		got, err := st.enforcer.Enforce(subject, object, action)
		if err != nil {
			t.Fatal(err)
		}
		if want := reference(set, subject, object, action); got != want {
			t.Fatalf("%q: %+v is %v, want %v", text, k, got, want)
		}
		if d := st.explain(k); d.Allowed != got || d.Text == "" {
			t.Fatalf("%+v", d)
		}
	})
}

// reference decides by the words of the documentation.
func reference(set *ruleSet, subject, object, action string) bool {
	names := map[string]bool{}
	for changed := true; changed; {
		changed = false
		for _, l := range set.links {
			if (names[l.fields[0]] || globMatch(l.fields[0], subject)) && !names[l.fields[1]] {
				names[l.fields[1]] = true
				changed = true
			}
		}
	}
	allowed := false
	for _, r := range set.rules {
		if !names[r.fields[0]] && !globMatch(r.fields[0], subject) || !globMatch(r.fields[1], object) {
			continue
		}
		denies := r.fields[3] == deny
		if r.fields[2] != action && r.fields[2] != "*" && (denies || r.fields[2] != ActionAdmin || action != ActionMonitor) {
			continue
		}
		if denies {
			return false
		}
		allowed = true
	}
	return allowed
}
