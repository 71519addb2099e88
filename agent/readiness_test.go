package agent

import (
	"strings"
	"testing"
	"time"
)

func TestReadiness(t *testing.T) {
	// step is a look, or a question between two looks, some time after the
	// beginning, and what is answered.
	type step struct {
		at   time.Duration
		c    condition
		ask  bool
		want string // part of why not; empty is ready
	}
	const s = time.Second
	follows := func(term, applied, committed uint64) condition {
		return condition{serving: true, why: "follows", term: term, applied: applied, committed: committed}
	}
	leads := condition{serving: true, why: "leads", leads: true, term: 2, applied: 9, committed: 9}
	waits := condition{why: "knows no leader", term: 2}
	for name, steps := range map[string][]step{
		"alone": {
			{0, condition{why: "takes over leadership"}, false, "takes over leadership"},
			{0, condition{serving: true, why: "leads", leads: true, alone: true}, true, ""},
		},
		"leads": {
			{0, leads, false, "not done so for 2s yet"},
			{1900 * time.Millisecond, leads, true, "not done so for 2s yet"},
			{2 * s, leads, true, ""},
		},
		"follows": {
			{0, waits, false, "knows no leader"},
			{0, follows(2, 10, 10), true, "not compared"},
			{1 * s, follows(2, 10, 10), false, "not compared"},
			{2 * s, follows(2, 11, 12), false, "not done so for 2s yet"}, // under load: not all, but what there was
			{3 * s, follows(2, 12, 14), false, "not done so for 2s yet"},
			{4 * s, follows(2, 14, 15), true, ""},
		},
		"was told nothing": {
			{0, follows(2, 10, 0), false, "not compared"},
			{5 * s, follows(2, 10, 0), false, "not compared"},
		},
		"looks in a hurry": {
			{0, follows(2, 10, 20), false, "not compared"},
			{s / 10, follows(2, 10, 20), false, "not compared"},
			{s / 5, follows(2, 20, 20), false, "not compared"},
			{1 * s, follows(2, 20, 20), false, "not done so for 2s yet"},
			{3 * s, follows(2, 20, 20), false, ""},
		},
		"catches up": {
			{0, follows(2, 10, 1000), false, "not compared"},
			{1 * s, follows(2, 500, 1100), false, "applied entry 500 of 1100"},
			{9 * s, follows(2, 900, 2000), false, "applied entry 900 of 2000"},
			{9*s + s/2, follows(2, 2000, 2000), true, "applied entry 900 of 2000"}, // until the next look
			{10 * s, follows(2, 2000, 2100), false, "not done so for 2s yet"},
			{12 * s, follows(2, 2100, 2100), false, ""},
		},
		"falls behind": {
			{0, follows(2, 9, 9), false, "not compared"},
			{1 * s, follows(2, 9, 9), false, "not done so for 2s yet"},
			{3 * s, follows(2, 9, 50), false, ""},
			{4 * s, follows(2, 9, 50), false, "catches up"},
			{5 * s, follows(2, 50, 50), false, "not done so for 2s yet"},
			{7 * s, follows(2, 50, 50), false, ""},
		},
		"loses its leader": {
			{0, follows(2, 9, 9), false, "not compared"},
			{1 * s, follows(2, 9, 9), false, "not done so for 2s yet"},
			{3 * s, follows(2, 9, 9), false, ""},
			{3 * s, waits, true, "knows no leader"}, // at once
			{4 * s, waits, false, "knows no leader"},
			{5 * s, follows(2, 9, 9), false, "not compared"},
		},
		"gets another leader": {
			{0, leads, false, "not done so for 2s yet"},
			{2 * s, leads, false, ""},
			{2 * s, follows(3, 9, 9), true, "not compared"},
			{3 * s, follows(3, 9, 9), false, "not compared"},
			{4 * s, follows(3, 9, 9), false, "not done so for 2s yet"},
			{6 * s, follows(3, 9, 9), false, ""},
			{6 * s, follows(4, 9, 9), false, "not done so for 2s yet"}, // so soon that nobody saw it gone
			{8 * s, follows(4, 9, 9), false, ""},
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := readiness{stable: 2 * s}
			begin := time.Now()
			for i, step := range steps {
				do := r.look
				if step.ask {
					do = r.now
				}
				ready, why := do(step.c, begin.Add(step.at))
				if ready != (step.want == "") || !strings.Contains(why, step.want) || why == "" {
					t.Fatalf("step %d: %v, %q; want %q", i, ready, why, step.want)
				}
			}
		})
	}
}
