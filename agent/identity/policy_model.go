package identity

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/casbin/casbin/v2"
	"github.com/casbin/casbin/v2/model"
	"github.com/casbin/govaluate"
)

// BuiltinModel is how rules are applied where no model file is named. Besides
// Casbin's own functions, a model can use glob(text, pattern),
// covers(wanted, granted, effect), and g(subject, name), which is Casbin's but
// for the patterns.
const BuiltinModel = `[request_definition]
r = sub, obj, act

[policy_definition]
p = sub, obj, act, eft

[role_definition]
g = _, _

[policy_effect]
e = some(where (p.eft == allow)) && !some(where (p.eft == deny))

[matchers]
m = covers(r.act, p.act, p.eft) && glob(r.obj, p.obj) && g(r.sub, p.sub)
`

// covers tells whether a rule for one action is for the wanted one. Admin
// includes monitor where it is allowed; where it is denied, only what is named
// is: who may not change anything may still look.
func covers(wanted, granted, effect string) bool {
	switch granted {
	case wanted, anyAction:
		return true
	case ActionAdmin:
		return wanted == ActionMonitor && effect != deny
	}
	return false
}

// loadModel reads a model and tells what policies for it look like. It takes
// the role definition out: see newEnforcer.
func loadModel(file, text string) (m model.Model, s shape, err error) {
	// Casbin takes a good model for granted.
	defer func() {
		if r := recover(); r != nil {
			err = modelError(file, fmt.Sprintf("Casbin cannot read it (%v).", r))
		}
	}()
	m, err = model.NewModelFromString(text)
	if err != nil {
		return nil, s, modelError(file, fmt.Sprintf("It is not a Casbin model: %v.", err))
	}
	for _, section := range []string{"r", "p", "e", "m", "g"} {
		if len(m[section]) > 1 {
			return nil, s, modelError(file, fmt.Sprintf("It defines %s2. There may be only one definition of a kind.", section))
		}
	}
	if r := m["r"]["r"]; len(r.Tokens) != 3 {
		return nil, s, modelError(file, `The request_definition has to be "r = sub, obj, act": a subject, a log and an action are what is asked for.`)
	}
	tokens := m["p"]["p"].Tokens
	s = shape{fields: len(tokens), effect: tokens[len(tokens)-1] == "p_eft"}
	if g, ok := m["g"]["g"]; ok {
		if len(g.Tokens) != 2 || len(g.ParamsTokens) > 0 {
			return nil, s, modelError(file, `The role_definition has to be "g = _, _": there are no domains and no conditions.`)
		}
		s.roles = true
		delete(m, "g")
	}
	return m, s, nil
}

func modelError(file, text string) error {
	return &PolicyError{File: file, Problems: []PolicyProblem{{Text: text}}}
}

// newEnforcer makes Casbin apply rules by a model.
//
// The roles are ours, because Casbin's g remembers every subject it was ever
// asked about, as long as the enforcer lives; and because only so we can say
// by which lines somebody has a role. A model without a role definition leaves
// the name g free for a function.
func newEnforcer(m model.Model, set *ruleSet, roles *roleGraph, s shape) (e *casbin.Enforcer, err error) {
	defer func() {
		if r := recover(); r != nil {
			e, err = nil, fmt.Errorf("casbin: %v", r)
		}
	}()
	for _, r := range set.rules {
		if err := m.AddPolicy("p", "p", r.fields); err != nil {
			return nil, fmt.Errorf("line %d: %w", r.line, err)
		}
	}
	if e, err = casbin.NewEnforcer(m); err != nil {
		return nil, err
	}
	functions := map[string]govaluate.ExpressionFunction{
		"glob":   predicate("glob", 2, func(a []string) bool { return globMatch(a[1], a[0]) }),
		"covers": predicate("covers", 3, func(a []string) bool { return covers(a[0], a[1], a[2]) }),
	}
	if s.roles {
		functions["g"] = predicate("g", 2, func(a []string) bool { return roles.holds(a[0], a[1]) })
	}
	for name, f := range functions {
		e.AddFunction(name, f)
	}
	if err := probe(e, m, set, functions); err != nil {
		return nil, err
	}
	return e, nil
}

// probe finds mistakes of a model that Casbin sees only when it is asked.
func probe(e *casbin.Enforcer, m model.Model, set *ruleSet, ours map[string]govaluate.ExpressionFunction) error {
	known := model.LoadFunctionMap()
	functions := known.GetFunctions()
	maps.Copy(functions, ours)
	functions["eval"] = ours["glob"] // Casbin makes it for each question
	tokens := append(slices.Clone(m["r"]["r"].Tokens), m["p"]["p"].Tokens...)
	matcher, err := govaluate.NewEvaluableExpressionWithFunctions(m["m"]["m"].Value, functions)
	if err != nil {
		return fmt.Errorf("its matcher cannot be read: %w", err)
	}
	for _, name := range matcher.Vars() {
		if !slices.Contains(tokens, name) {
			return fmt.Errorf("its matcher names %s, which is not defined", strings.Replace(name, "_", ".", 1))
		}
	}
	// Once with what nobody is, once with what a rule says, so that more of the
	// matcher is gone through.
	likely := []any{"probe", "probe", ActionConsume}
	for i, name := range []string{"p_sub", "p_obj", "p_act"} {
		if at := slices.Index(m["p"]["p"].Tokens, name); at >= 0 {
			likely[i] = set.rules[0].fields[at]
		}
	}
	for _, question := range [][]any{{"probe", "probe", ActionConsume}, likely} {
		if _, err := e.Enforce(question...); err != nil {
			return fmt.Errorf("casbin cannot apply it: %s", firstLine(err.Error()))
		}
	}
	return nil
}

// predicate is a function of strings as Casbin calls it.
func predicate(name string, n int, f func([]string) bool) govaluate.ExpressionFunction {
	return func(args ...any) (any, error) {
		if len(args) != n {
			return false, fmt.Errorf("%s takes %d arguments, not %d", name, n, len(args))
		}
		texts := make([]string, n)
		for i, a := range args {
			s, ok := a.(string)
			if !ok {
				return false, fmt.Errorf("%s takes texts, not %T", name, a)
			}
			texts[i] = s
		}
		return f(texts), nil
	}
}

// firstLine cuts off the stack that Casbin puts into errors.
func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s
}
