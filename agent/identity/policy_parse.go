package identity

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Actions of the built-in model.
const (
	ActionProduce = "produce"
	ActionConsume = "consume"
	// ActionMonitor is looking at the node over HTTP: metrics, status, servers.
	ActionMonitor = "monitor"
	// ActionAdmin is changing the cluster. Whoever may do that may look, too.
	ActionAdmin = "admin"
)

// anyAction stands for all of them in a rule.
const anyAction = "*"

var actions = []string{ActionProduce, ActionConsume, ActionMonitor, ActionAdmin}

const (
	allow = "allow"
	deny  = "deny"
)

// How much a policy may hold. An operator with more has generated it and should
// use roles and patterns; a decision that is not cached looks at every rule.
const (
	maxPolicyBytes = 1 << 20
	maxModelBytes  = 64 << 10
	maxLineBytes   = 4 << 10
	maxRules       = 10_000
)

// PolicyProblem is one thing that is wrong with a policy.
type PolicyProblem struct {
	// Line is counted from 1; 0 where it is the file as a whole.
	Line int
	// Text says what is wrong, in full sentences.
	Text string
}

// PolicyError is all that is wrong with a policy's or a model's file.
type PolicyError struct {
	File     string
	Problems []PolicyProblem
}

// Lines are the problems, each with its place: "policy.csv:3: ...".
func (e *PolicyError) Lines() []string {
	lines := make([]string, 0, len(e.Problems))
	for _, p := range e.Problems {
		place := e.File
		if p.Line > 0 {
			place = fmt.Sprintf("%s:%d", e.File, p.Line)
		}
		lines = append(lines, place+": "+p.Text)
	}
	return lines
}

func (e *PolicyError) Error() string {
	const most = 5
	lines := e.Lines()
	if len(lines) > most {
		lines = append(lines[:most:most], fmt.Sprintf("and %d more", len(e.Problems)-most))
	}
	return strings.Join(lines, "; ")
}

// row is one line of a policy: its fields without the first, which says what
// kind of line it is.
type row struct {
	line   int
	text   string
	fields []string
}

// ruleSet is what a policy file says.
type ruleSet struct {
	file  string
	rules []row // each with an effect as its last field, where the model has one
	links []row
}

// shape is what lines have to look like.
type shape struct {
	// builtin holds the lines to what they mean in the built-in model.
	builtin bool
	// fields is how many a rule has, with the effect; effect tells whether the
	// last one is that.
	fields int
	effect bool
	roles  bool
}

var builtinShape = shape{builtin: true, fields: 4, effect: true, roles: true}

// policyParser collects what is wrong.
type policyParser struct {
	shape
	set      *ruleSet
	problems []PolicyProblem
}

// parsePolicy reads a policy. It is stricter than Casbin, which skips or
// misunderstands what it does not know: a deny that is misspelt denies nothing.
func parsePolicy(file string, text []byte, s shape) (*ruleSet, error) {
	p := &policyParser{shape: s, set: &ruleSet{file: file}}
	text = bytes.TrimPrefix(text, []byte("\xef\xbb\xbf")) // as some editors begin a file
	switch {
	case len(text) > maxPolicyBytes:
		p.fail(0, "The file has more than 1 MiB. Use roles and patterns.")
	case !utf8.Valid(text):
		p.fail(0, "The file is not text in UTF-8.")
	default:
		n := 0
		for line := range strings.Lines(string(text)) {
			n++
			p.line(n, strings.TrimSpace(line))
		}
		p.whole()
	}
	if len(p.problems) > 0 {
		slices.SortStableFunc(p.problems, func(a, b PolicyProblem) int { return a.Line - b.Line })
		return nil, &PolicyError{File: file, Problems: p.problems}
	}
	return p.set, nil
}

// maxProblems is how many are worth collecting.
const maxProblems = 100

func (p *policyParser) fail(line int, format string, args ...any) {
	if len(p.problems) < maxProblems {
		p.problems = append(p.problems, PolicyProblem{Line: line, Text: fmt.Sprintf(format, args...)})
	}
}

func (p *policyParser) line(n int, text string) {
	if text == "" || text[0] == '#' {
		return
	}
	if len(text) > maxLineBytes {
		p.fail(n, "The line has more than %d characters.", maxLineBytes)
		return
	}
	if len(p.set.rules)+len(p.set.links) >= maxRules {
		if len(p.set.rules)+len(p.set.links) == maxRules && len(p.problems) == 0 {
			p.fail(n, "This is line %d that is no comment, and there may be %d. Use roles and patterns.", maxRules+1, maxRules)
		}
		return
	}
	fields := strings.Split(text, ",")
	for i := range fields {
		fields[i] = strings.TrimSpace(fields[i])
	}
	r := row{line: n, text: text, fields: fields[1:]}
	switch fields[0] {
	case "p":
		p.rule(r)
	case "g":
		p.link(r)
	default:
		p.fail(n, "There is no kind of line %q. A line begins with p (a rule), g (who has a role) or # (a comment).", fields[0])
	}
}

func (p *policyParser) rule(r row) {
	least := p.fields
	if p.effect {
		least--
	}
	if len(r.fields) < least || len(r.fields) > p.fields {
		if p.builtin {
			p.fail(r.line, "A rule is p, subject, log, action and perhaps allow or deny. This one has %d fields, not 4 or 5.", len(r.fields)+1)
		} else {
			p.fail(r.line, "By the model a rule has %d fields, the p included. This one has %d.", p.fields+1, len(r.fields)+1)
		}
		return
	}
	for _, f := range r.fields {
		if f == "" {
			p.fail(r.line, "A field is empty. For everything, write *.")
			return
		}
	}
	if p.effect {
		if len(r.fields) < p.fields {
			r.fields = append(slices.Clip(r.fields), allow)
		}
		if e := r.fields[p.fields-1]; e != allow && e != deny {
			p.fail(r.line, "There is no effect %q.%s A rule ends with allow or deny, or with its action, which means allow.", e, didYouMean(e, []string{allow, deny}))
			return
		}
	}
	if p.builtin {
		if !p.subject(r.line, r.fields[0]) || !p.object(r.line, r.fields[1]) {
			return
		}
		if a := r.fields[2]; a != anyAction && !slices.Contains(actions, a) {
			p.fail(r.line, "There is no action %q.%s A rule has one action: %s, or * for all.", a, didYouMean(a, actions), strings.Join(actions, ", "))
			return
		}
	}
	p.set.rules = append(p.set.rules, r)
}

func (p *policyParser) link(r row) {
	switch {
	case !p.roles:
		p.fail(r.line, "The model has no role_definition, so there cannot be roles.")
		return
	case len(r.fields) != 2:
		p.fail(r.line, "Who has a role is said by g, subject, role. This line has %d fields, not 3.", len(r.fields)+1)
		return
	case r.fields[0] == "" || r.fields[1] == "":
		p.fail(r.line, "A field is empty. For everybody, write *.")
		return
	}
	if p.builtin {
		if role := r.fields[1]; !strings.HasPrefix(role, rolePrefix) {
			p.fail(r.line, "%q is no role: the name of a role begins with %q. Did you mean %s%s?", role, rolePrefix, rolePrefix, role)
			return
		}
		if !p.subject(r.line, r.fields[0]) || !p.subject(r.line, r.fields[1]) {
			return
		}
	} else if bad := checkGlob(r.fields[0]); bad != "" {
		p.fail(r.line, "%q %s.", r.fields[0], bad)
		return
	}
	p.set.links = append(p.set.links, r)
}

// subject checks who a rule or a link is for: a pattern or a role.
func (p *policyParser) subject(line int, s string) bool {
	if bad := checkGlob(s); bad != "" {
		p.fail(line, "The subject %q %s.", s, bad)
		return false
	}
	if name, ok := strings.CutPrefix(s, rolePrefix); ok && (name == "" || strings.Contains(name, "*")) {
		p.fail(line, "%q is no role: a role has a name, and it is named in full.", s)
		return false
	}
	if rest, ok := strings.CutPrefix(s, "spiffe://"); ok {
		if domain, _, _ := strings.Cut(rest, "/"); domain != strings.ToLower(domain) {
			p.fail(line, "The subject %q stands for nobody: trust domains have no upper-case letters. Did you mean spiffe://%s?", s, strings.ToLower(domain)+strings.TrimPrefix(rest, domain))
			return false
		}
	}
	return true
}

// object checks the pattern of a log's name.
func (p *policyParser) object(line int, s string) bool {
	bad := checkGlob(s)
	if bad == "" && strings.ContainsAny(s, "/: \t") {
		bad = "is not the name of a log, or a pattern of one"
	}
	if bad != "" {
		p.fail(line, "The log %q %s.", s, bad)
		return false
	}
	return true
}

// whole checks what only the lines together can say.
func (p *policyParser) whole() {
	if at, way := cycle(p.set.links); at != nil {
		p.fail(at.line, "A role is a member of itself: %s.", way)
	}
	if p.builtin && len(p.problems) == 0 {
		p.looseRoles()
	}
	if len(p.set.rules) == 0 && len(p.problems) == 0 {
		// A file that is being written, or was cut short, looks like that.
		p.fail(0, "The file has no rule, so that nobody may do anything. Write at least one.")
	}
}

// looseRoles refuses roles that nobody has or that nothing comes of, which is
// what a misspelt one looks like.
func (p *policyParser) looseRoles() {
	ruled, had := make(map[string]bool), make(map[string]bool)
	for _, r := range p.set.rules {
		if strings.HasPrefix(r.fields[0], rolePrefix) {
			ruled[r.fields[0]] = true
		}
	}
	for _, l := range p.set.links {
		had[l.fields[1]] = true
		if strings.HasPrefix(l.fields[0], rolePrefix) {
			ruled[l.fields[0]] = true
		}
	}
	report := func(rows []row, field int, good map[string]bool, other map[string]bool, what string) {
		for _, r := range rows {
			name := r.fields[field]
			if strings.HasPrefix(name, rolePrefix) && !good[name] {
				var near []string
				for n := range other {
					if n != name {
						near = append(near, n)
					}
				}
				slices.Sort(near)
				p.fail(r.line, what+"%s", name, didYouMean(name, near))
				good[name] = true // once is enough
			}
		}
	}
	hadToo, ruledToo := clone(had), clone(ruled)
	report(p.set.rules, 0, had, hadToo, "Nobody has %s: a line g, SUBJECT, %[1]s is missing.")
	report(p.set.links, 0, had, hadToo, "Nobody has %s: a line g, SUBJECT, %[1]s is missing.")
	report(p.set.links, 1, ruled, ruledToo, "No rule is for %s, so having it means nothing.")
}

func clone(m map[string]bool) map[string]bool {
	c := make(map[string]bool, len(m))
	for k := range m {
		c[k] = true
	}
	return c
}

// didYouMean is a sentence with the candidate that is nearest to word, or
// nothing where none is near.
func didYouMean(word string, candidates []string) string {
	const longest, most = 64, 1000
	if len(word) > longest {
		return ""
	}
	best, distance := "", 1+max(1, len(word)/3)
	for _, c := range candidates[:min(most, len(candidates))] {
		// A difference in length alone says enough, and words may be long.
		if n := len(c) - len(word); n >= distance || -n >= distance {
			continue
		}
		if d := editDistance(strings.ToLower(word), c); d < distance {
			best, distance = c, d
		}
	}
	if best == "" {
		return ""
	}
	return " Did you mean " + best + "?"
}

// editDistance counts the characters to insert, delete and replace to make b
// of a.
func editDistance(a, b string) int {
	previous := make([]int, len(b)+1)
	for j := range previous {
		previous[j] = j
	}
	for i := range len(a) {
		current := make([]int, len(b)+1)
		current[0] = i + 1
		for j := range len(b) {
			change := previous[j]
			if a[i] != b[j] {
				change++
			}
			current[j+1] = min(previous[j+1]+1, current[j]+1, change)
		}
		previous = current
	}
	return previous[len(b)]
}
