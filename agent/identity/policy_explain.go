package identity

import (
	"fmt"
	"slices"
	"strings"
)

// Decision is an answer of a policy with its reason.
type Decision struct {
	Subject string `json:"subject"`
	Object  string `json:"object"`
	Action  string `json:"action"`
	Allowed bool   `json:"allowed"`
	// Rule is the one that decided; nil where none did, which denies.
	Rule *PolicyLine `json:"rule,omitempty"`
	// Roles are the lines by which the subject has the role that Rule is for.
	Roles []PolicyLine `json:"roles,omitempty"`
	// Others are rules that are for the subject, but not for this; where none
	// decided. At most a few.
	Others []PolicyLine `json:"other_rules,omitempty"`
	// Text is all of it as a sentence.
	Text string `json:"text"`
}

// PolicyLine is a line of a policy file.
type PolicyLine struct {
	File string `json:"file"`
	Line int    `json:"line"`
	Text string `json:"text"`
}

func (l PolicyLine) String() string { return fmt.Sprintf("%s:%d (%s)", l.File, l.Line, l.Text) }

// Explain decides as Allow does, and says why. It neither counts nor remembers
// anything.
func (p *Policy) Explain(subject, object, action string) Decision {
	return p.state.Load().explain(decisionKey{subject, object, action})
}

// mostOthers is how many rules that did not decide are told.
const mostOthers = 5

func (st *policyState) explain(k decisionKey) Decision {
	d := Decision{Subject: k.subject, Object: k.object, Action: k.action}
	if d.Text = st.unaskable(k); d.Text != "" {
		return d
	}
	allowed, fields, err := st.enforcer.EnforceEx(k.subject, k.object, k.action)
	if err != nil {
		d.Text = "denied: Casbin cannot decide: " + firstLine(err.Error())
		return d
	}
	d.Allowed = allowed
	if len(fields) == 0 {
		if allowed {
			d.Text = "allowed by the model"
			return d
		}
		d.Text = "denied: no rule allows it"
		if st.shape.builtin {
			d.Others = st.others(k.subject)
			for i, l := range d.Others {
				d.Text += []string{"; rules for the subject: ", ", "}[min(i, 1)] + l.String()
			}
			if len(d.Others) == 0 {
				d.Text = "denied: no rule is for the subject"
			}
		}
		return d
	}
	// Equal rules are one to Casbin, and the first one to us.
	i := slices.IndexFunc(st.set.rules, func(r row) bool { return slices.Equal(r.fields, fields) })
	if i < 0 {
		d.Text = fmt.Sprintf("decided by a rule that has no line: %s", strings.Join(fields, ", "))
		return d
	}
	rule := st.set.line(st.set.rules[i])
	d.Rule = &rule
	d.Text = map[bool]string{true: "allowed by ", false: "denied by "}[allowed] + rule.String()
	if st.shape.builtin {
		for _, l := range st.roles.path(k.subject, fields[0]) {
			d.Roles = append(d.Roles, st.set.line(l))
		}
		for i, l := range d.Roles {
			d.Text += []string{" because of ", " and "}[min(i, 1)] + l.String()
		}
	}
	return d
}

// others are rules that are for a subject.
func (st *policyState) others(subject string) (lines []PolicyLine) {
	for _, r := range st.set.rules {
		if len(lines) == mostOthers {
			break
		}
		if st.roles.holds(subject, r.fields[0]) {
			lines = append(lines, st.set.line(r))
		}
	}
	return lines
}

func (s *ruleSet) line(r row) PolicyLine {
	return PolicyLine{File: s.file, Line: r.line, Text: r.text}
}
