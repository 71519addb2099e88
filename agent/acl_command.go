package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/hashicorp/cli"

	"github.com/diurnalog/diurna/agent/config"
	ident "github.com/diurnalog/diurna/agent/identity"
	"github.com/diurnalog/diurna/rpc/cli/flags"
)

// policyOptions say which policy a verb is about.
type policyOptions struct {
	policyFile, modelFile string
	sources               config.Sources
}

func (o *policyOptions) register(f *flags.Set) {
	f.Text(&o.policyFile, "policy-file", "file", "", "The policy.")
	f.Text(&o.modelFile, "model-file", "file", "", "The Casbin model by which it is applied, if it is not the built-in one.")
	add := func(to *[]string) func(string) error {
		return func(s string) error {
			*to = append(*to, s)
			return nil
		}
	}
	f.Each(add(&o.sources.Files), "config-file", "file", "Take both from the acl block of this configuration. May be repeated.")
	f.Each(add(&o.sources.Dirs), "config-dir", "folder", "Likewise, from all files of a folder.")
}

// open opens the policy, and prints what is wrong.
func (o *policyOptions) open(verb string, stderr io.Writer) (*ident.Policy, int) {
	configured := len(o.sources.Files)+len(o.sources.Dirs) > 0
	switch {
	case configured && (o.policyFile != "" || o.modelFile != ""):
		return nil, usageError(stderr, verb, errors.New("the policy is named both by a configuration and by -policy-file or -model-file: give one"))
	case !configured && o.policyFile == "":
		return nil, usageError(stderr, verb, errors.New("name the policy with -policy-file, or a configuration with -config-file or -config-dir"))
	}
	if configured {
		cfg, ok := loadConfig(o.sources, stderr)
		if !ok {
			return nil, exitUsage
		}
		o.policyFile, o.modelFile = cfg.ACL.PolicyFile, cfg.ACL.ModelFile
		if o.policyFile == "" {
			say(stderr, "Error: the configuration has no acl.policy_file.\n")
			return nil, exitUsage
		}
		if !cfg.ACL.Enabled {
			say(stderr, "Warning: acl.enabled is false in this configuration: a node that is started with it asks no policy.\n")
		}
	}
	p, err := ident.OpenPolicy(ident.PolicyConfig{PolicyFile: o.policyFile, ModelFile: o.modelFile})
	if err == nil {
		return p, exitOK
	}
	var bad *ident.PolicyError
	if !errors.As(err, &bad) {
		say(stderr, "Error: %s\n", sentence(err))
		return nil, exitUsage
	}
	for _, line := range bad.Lines() {
		say(stderr, "Error: %s\n", line)
	}
	return nil, exitUsage
}

// aclCheckCommand tells what a policy decides, and why.
type aclCheckCommand struct {
	stdout, stderr io.Writer

	policy policyOptions
	json   bool
}

func newACLCheckCommand(stdout, stderr io.Writer) cli.Command {
	return &aclCheckCommand{stdout: stdout, stderr: stderr}
}

func (c *aclCheckCommand) options() *flags.Set {
	f := flags.New()
	c.policy.register(f)
	f.Bool(&c.json, "json", "Print a JSON object.")
	return f
}

// Synopsis implements cli.Command.
func (c *aclCheckCommand) Synopsis() string { return "Tell whether a policy allows something, and why" }

// Help implements cli.Command.
func (c *aclCheckCommand) Help() string {
	return (&aclCheckCommand{}).options().Help("diurna acl check SUBJECT LOG ACTION [options]", `
Tells whether a policy allows somebody to do something, and by which lines. It
needs no node: it reads the file, and decides as a node does that has read it.

SUBJECT is whom a certificate names: its first URI, or else its common name. LOG
is a log's name; what is about the node and not about a log is asked for the log
"default". ACTION is produce, consume, monitor or admin.

Exits 0 when it is allowed, 2 when it is denied, and 1 when the command was
called wrongly or the policy has errors.
`, `
Examples:

  May billing write orders, by a policy that is not in force yet?

      $ diurna acl check spiffe://orders.diurna/client/billing orders.eu \
          produce -policy-file policy.csv

  What does the policy of this machine's node say of the metrics?

      $ diurna acl check -config-dir /etc/diurna.d \
          spiffe://orders.diurna/client/prometheus default monitor
`)
}

// Run implements cli.Command.
func (c *aclCheckCommand) Run(args []string) int {
	const verb = "acl check"
	f := c.options()
	words, err := interleaved(f, args)
	if err == nil && len(words) != 3 {
		err = fmt.Errorf("name a subject, a log and an action, in this order: these are %d words", len(words))
	}
	if err != nil {
		return usageError(c.stderr, verb, err)
	}
	p, code := c.policy.open(verb, c.stderr)
	if p == nil {
		return code
	}
	// By a model of one's own, actions are what the policy makes of them.
	if action := words[2]; c.policy.modelFile == "" && !slices.Contains(aclActions, action) {
		return usageError(c.stderr, verb, fmt.Errorf("there is no action %q: actions are %s.%s", action, strings.Join(aclActions, ", "), flags.DidYouMean(action, aclActions, "")))
	}
	d := p.Explain(words[0], words[1], words[2])
	if c.json {
		text, err := json.MarshalIndent(d, "", "  ")
		if err != nil {
			say(c.stderr, "Error: %s\n", sentence(err))
			return exitUsage
		}
		d.Text = string(text)
	}
	if _, err := fmt.Fprintln(c.stdout, d.Text); err != nil {
		say(c.stderr, "Error: write to standard output: %v\n", err)
		return exitUsage
	}
	if !d.Allowed {
		return exitServer
	}
	return exitOK
}

var aclActions = []string{ident.ActionProduce, ident.ActionConsume, ident.ActionMonitor, ident.ActionAdmin}

// interleaved takes options before, between and behind other words, and returns
// those.
func interleaved(f *flags.Set, args []string) (words []string, err error) {
	for {
		rest, err := f.ParseArgs(args)
		if err != nil || len(rest) == 0 {
			return words, err
		}
		words, args = append(words, rest[0]), rest[1:]
	}
}

// aclLintCommand checks a policy.
type aclLintCommand struct {
	stdout, stderr io.Writer

	policy policyOptions
}

func newACLLintCommand(stdout, stderr io.Writer) cli.Command {
	return &aclLintCommand{stdout: stdout, stderr: stderr}
}

func (c *aclLintCommand) options() *flags.Set {
	f := flags.New()
	c.policy.register(f)
	return f
}

// Synopsis implements cli.Command.
func (c *aclLintCommand) Synopsis() string { return "Check a policy's file" }

// Help implements cli.Command.
func (c *aclLintCommand) Help() string {
	return (&aclLintCommand{}).options().Help("diurna acl lint [options]", `
Reads a policy as a node would, and tells everything that is wrong with it.

Exits 0 when a node would take it, 1 when not.
`, `
Examples:

      $ diurna acl lint -policy-file policy.csv
      $ diurna acl lint -config-dir /etc/diurna.d
`)
}

// Run implements cli.Command.
func (c *aclLintCommand) Run(args []string) int {
	const verb = "acl lint"
	if err := c.options().Parse(args); err != nil {
		return usageError(c.stderr, verb, err)
	}
	p, code := c.policy.open(verb, c.stderr)
	if p == nil {
		return code
	}
	s := p.Stats()
	say(c.stdout, "The policy is valid: %d rules, and %d lines about who has a role.\n", s.Rules, s.Roles)
	return exitOK
}
