package agent

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/cli"
)

// folderWith makes files in a new folder, which it returns.
func folderWith(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func runVerb(c func(stdout, stderr *bytes.Buffer) cli.Command, args ...string) (code int, stdout, stderr string) {
	var out, err bytes.Buffer
	code = c(&out, &err).Run(args)
	return code, out.String(), err.String()
}

func aclCheck(out, err *bytes.Buffer) cli.Command { return newACLCheckCommand(out, err) }
func aclLint(out, err *bytes.Buffer) cli.Command  { return newACLLintCommand(out, err) }

func TestACLCheck(t *testing.T) {
	dir := folderWith(t, map[string]string{
		"policy.csv": "p, role:ops, *, admin\np, alice, orders.*, produce, deny\ng, alice, role:ops\n",
		"bad.csv":    "p, alice, orders.*, prodce\nx\n",
		"model.conf": "[request_definition]\nr = sub, obj, act\n[policy_definition]\np = sub, obj, act\n[policy_effect]\ne = some(where (p.eft == allow))\n[matchers]\nm = r.sub == p.sub && r.act == p.act\n",
		"own.csv":    "p, alice, x, sing\n",
		"on.hcl":     "data_dir = \"/tmp/x\"\ntls {\n  source = \"dev\"\n}\nacl {\n  enabled = true\n  policy_file = \"DIR/policy.csv\"\n}\n",
		"off.hcl":    "data_dir = \"/tmp/x\"\ntls {\n  source = \"none\"\n}\nacl {\n  policy_file = \"DIR/policy.csv\"\n}\n",
		"none.hcl":   "data_dir = \"/tmp/x\"\ntls {\n  source = \"none\"\n}\n",
	})
	file := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"on.hcl", "off.hcl"} {
		change(t, file(name), func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("DIR"), []byte(dir)) })
	}
	for name, tt := range map[string]struct {
		args           string
		code           int
		stdout, stderr string
	}{
		"allowed":             {"alice default monitor -policy-file policy.csv", exitOK, "allowed by policy.csv:1 (p, role:ops, *, admin) because of policy.csv:3 (g, alice, role:ops)", ""},
		"options first":       {"-policy-file policy.csv alice default admin", exitOK, "allowed by", ""},
		"options between":     {"alice -policy-file policy.csv default admin", exitOK, "allowed by", ""},
		"denied by a rule":    {"alice orders.eu produce -policy-file policy.csv", exitServer, "denied by policy.csv:2 (", ""},
		"denied by none":      {"bob orders.eu produce -policy-file policy.csv", exitServer, "denied: no rule is for the subject", ""},
		"by a configuration":  {"alice default admin -config-file on.hcl", exitOK, "allowed by policy.csv:1", ""},
		"that is switched on": {"bob default admin -config-file on.hcl", exitServer, "denied", ""},
		"switched off":        {"alice default admin -config-file off.hcl", exitOK, "allowed by", "acl.enabled is false"},
		"model":               {"alice x sing -policy-file own.csv -model-file model.conf", exitOK, "allowed by own.csv:1", ""},
		"model, denied":       {"alice x dance -policy-file own.csv -model-file model.conf", exitServer, "denied", ""},

		"action":           {"alice default amdin -policy-file policy.csv", exitUsage, "", "there is no action \"amdin\": actions are produce, consume, monitor, admin. Did you mean admin?"},
		"likewise":         {"alice default amdin -config-file on.hcl", exitUsage, "", "Did you mean admin?"},
		"two words":        {"alice default -policy-file policy.csv", exitUsage, "", "name a subject, a log and an action, in this order: these are 2 words."},
		"four words":       {"a b c d -policy-file policy.csv", exitUsage, "", "these are 4 words"},
		"option":           {"a b c -polcy-file policy.csv", exitUsage, "", "unknown option -polcy-file. Did you mean -policy-file?"},
		"no policy":        {"alice default admin", exitUsage, "", "name the policy with -policy-file, or a configuration"},
		"two policies":     {"alice default admin -policy-file policy.csv -config-file on.hcl", exitUsage, "", "give one"},
		"no policy in it":  {"alice default admin -config-file none.hcl", exitUsage, "", "the configuration has no acl.policy_file"},
		"no such file":     {"alice default admin -policy-file missing.csv", exitUsage, "", "missing.csv: no such file or directory"},
		"no configuration": {"alice default admin -config-file missing.hcl", exitUsage, "", "missing.hcl"},
		"bad policy":       {"alice default admin -policy-file bad.csv", exitUsage, "", "Error: bad.csv:1: There is no action \"prodce\". Did you mean produce?"},
		"all of it":        {"alice default admin -policy-file bad.csv", exitUsage, "", "Error: bad.csv:2: There is no kind of line"},
		"bad model":        {"alice default admin -policy-file policy.csv -model-file bad.csv", exitUsage, "", "bad.csv: It is not a Casbin model"},
	} {
		args := strings.Fields(tt.args)
		for i, a := range args {
			if filepath.Ext(a) != "" && i > 0 && args[i-1][0] == '-' {
				args[i] = file(a)
			}
		}
		code, out, errs := runVerb(aclCheck, args...)
		out, errs = strings.ReplaceAll(out, dir+"/", ""), strings.ReplaceAll(errs, dir+"/", "")
		if code != tt.code || !strings.Contains(out, tt.stdout) || !strings.Contains(errs, tt.stderr) || (out == "") != (tt.stdout == "") || (errs == "") != (tt.stderr == "") {
			t.Errorf("%s: exit %d\n%s%s", name, code, out, errs)
		}
	}
}

func TestACLCheckJSON(t *testing.T) {
	dir := folderWith(t, map[string]string{"policy.csv": "p, role:ops, *, admin\ng, alice, role:ops\n"})
	policy := filepath.Join(dir, "policy.csv")
	code, out, errs := runVerb(aclCheck, "-json", "-policy-file", policy, "alice", "default", "admin")
	var got struct {
		Subject, Object, Action, Text string
		Allowed                       bool
		Rule                          struct {
			File string
			Line int
			Text string
		}
		Roles []struct{ Line int }
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if code != exitOK || errs != "" || !got.Allowed || got.Subject != "alice" || got.Rule.File != policy || got.Rule.Line != 1 || len(got.Roles) != 1 || got.Roles[0].Line != 2 {
		t.Errorf("exit %d, %+v, %s", code, got, errs)
	}
}

func TestACLLint(t *testing.T) {
	dir := folderWith(t, map[string]string{"good.csv": "p, role:ops, *, admin\ng, alice, role:ops\n", "bad.csv": "p, a\np, b\n"})
	code, out, errs := runVerb(aclLint, "-policy-file", filepath.Join(dir, "good.csv"))
	if code != exitOK || errs != "" || out != "The policy is valid: 1 rules, and 1 lines about who has a role.\n" {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	code, out, errs = runVerb(aclLint, "-policy-file", filepath.Join(dir, "bad.csv"))
	if code != exitUsage || out != "" || strings.Count(errs, "Error: ") != 2 {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
}

func TestACLHelp(t *testing.T) {
	for name, c := range map[string]cli.Command{"diurna acl check SUBJECT LOG ACTION [options]": newACLCheckCommand(nil, nil), "diurna acl lint [options]": newACLLintCommand(nil, nil)} {
		for _, want := range []string{"Usage: " + name, "-policy-file=<file>", "-config-dir=<folder>", "Exits 0", "Examples:"} {
			if !strings.Contains(c.Help(), want) {
				t.Errorf("the help lacks %q:\n%s", want, c.Help())
			}
		}
		for line := range strings.Lines(c.Help()) {
			if len(line) > 83 {
				t.Errorf("%d columns: %s", len(line), line)
			}
		}
	}
}
