package identity

import (
	"slices"
	"strings"
	"sync/atomic"
)

// rolePrefix begins every role's name, so that no certificate can be mistaken
// for a role: a subject that begins so is refused.
const rolePrefix = "role:"

// roleGraph is who has which role. Immutable.
type roleGraph struct {
	links []row // fields: member, role
	// last is whose roles were looked for last. One decision asks for the same
	// subject with every rule.
	last atomic.Pointer[reached]
}

// reached is the roles that a subject has, each with the link that gave it.
type reached struct {
	subject string
	via     map[string]int
}

// holds tells whether a rule for name, a pattern or a role, is for subject.
func (g *roleGraph) holds(subject, name string) bool {
	if len(g.links) > 0 {
		if _, ok := g.roles(subject).via[name]; ok {
			return true
		}
	}
	return globMatch(name, subject)
}

func (g *roleGraph) roles(subject string) *reached {
	if r := g.last.Load(); r != nil && r.subject == subject {
		return r
	}
	r := &reached{subject: subject, via: make(map[string]int)}
	var todo []string
	add := func(i int) {
		role := g.links[i].fields[1]
		if _, ok := r.via[role]; !ok {
			r.via[role] = i
			todo = append(todo, role)
		}
	}
	for i, l := range g.links {
		if globMatch(l.fields[0], subject) {
			add(i)
		}
	}
	for len(todo) > 0 {
		role := todo[0]
		todo = todo[1:]
		for i, l := range g.links {
			if l.fields[0] == role {
				add(i)
			}
		}
	}
	g.last.Store(r)
	return r
}

// path is the links by which subject has a role, in order; none if it has not.
func (g *roleGraph) path(subject, role string) []row {
	r := g.roles(subject)
	var links []row
	for {
		i, ok := r.via[role]
		if !ok {
			break
		}
		links = append(links, g.links[i])
		// Each was reached from one that was reached before it, so this ends.
		role = g.links[i].fields[0]
	}
	slices.Reverse(links)
	return links
}

// cycle finds a link that makes a role a member of itself, and tells by which
// way; nil if there is none.
func cycle(links []row) (at *row, way string) {
	from := make(map[string][]int)
	for i, l := range links {
		from[l.fields[0]] = append(from[l.fields[0]], i)
	}
	const (
		open = 1
		done = 2
	)
	state := make(map[string]int)
	// A stack of our own: a chain of roles may be as long as the file.
	type step struct {
		name string
		next int
	}
	for _, first := range links {
		if state[first.fields[0]] != 0 {
			continue
		}
		stack := []step{{name: first.fields[0]}}
		state[first.fields[0]] = open
		for len(stack) > 0 {
			top := &stack[len(stack)-1]
			if top.next == len(from[top.name]) {
				state[top.name] = done
				stack = stack[:len(stack)-1]
				continue
			}
			link := &links[from[top.name][top.next]]
			top.next++
			role := link.fields[1]
			switch state[role] {
			case 0:
				state[role] = open
				stack = append(stack, step{name: role})
			case open:
				var names []string
				for _, s := range stack {
					if len(names) > 0 || s.name == role {
						names = append(names, s.name)
					}
				}
				return link, strings.Join(append(names, role), " → ")
			}
		}
	}
	return nil, ""
}
