package agent

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// story builds histories by hand. Everything happens after everything before,
// but for what is left open.
type story struct {
	*history
}

func newStory() *story { return &story{history: newHistory()} }

func (s *story) acked(client, batch, count int, base uint64) *simAppend {
	a := s.beginAppend(simAppend{client: client, batch: batch, count: count, node: simPlace{"n1", 1}})
	s.endAppend(a, func(a *simAppend) { a.outcome, a.base = simAcked, base })
	return a
}

func (s *story) refused(client, batch int) {
	a := s.beginAppend(simAppend{client: client, batch: batch, count: 1, node: simPlace{"n1", 1}})
	s.endAppend(a, func(a *simAppend) { a.outcome, a.why = simRefused, "NO_LEADER" })
}

func (s *story) mismatch(client, batch int, expected, next uint64) {
	a := s.beginAppend(simAppend{client: client, batch: batch, count: 1, expected: &expected, node: simPlace{"n1", 1}})
	s.endAppend(a, func(a *simAppend) { a.outcome, a.next = simRefused, &next })
}

func (s *story) unknown(client, batch, count int) {
	a := s.beginAppend(simAppend{client: client, batch: batch, count: count, node: simPlace{"n1", 1}})
	s.endAppend(a, func(a *simAppend) { a.outcome, a.why = simUnknown, "TIMEOUT" })
}

// keys turns records, each "client/batch/i/count", into what is read from an
// offset.
func keys(from uint64, ids ...string) (records []simRecord) {
	for i, id := range ids {
		at := from + uint64(i)
		records = append(records, simRecord{at, id, simSum(simValue(id)), int64(at)})
	}
	return records
}

func (s *story) read(node string, from uint64, linear bool, ids ...string) *simRead {
	r := s.beginRead(simRead{client: 9, node: simPlace{node, 1}, from: from, linear: linear})
	s.endRead(r, func(r *simRead) {
		r.records, r.complete, r.end = keys(from, ids...), true, from+uint64(len(ids))
	})
	return r
}

func (s *story) get(offset uint64, ids ...string) {
	s.read("n1", offset, true, ids...).limit = 1
}

func (s *story) audit(node string, ids ...string) *simRead {
	r := s.read(node, 0, false, ids...)
	r.final = true
	return r
}

// TestChecker: what is wrong is found, by the right check, and what is right is
// not.
func TestChecker(t *testing.T) {
	tests := map[string]struct {
		// want is the letter of the check; "" for what is right, "p" for what
		// only the search for an order finds.
		want  string
		story func(s *story)
	}{
		"all is well": {"", func(s *story) {
			s.acked(1, 1, 2, 0)
			s.unknown(2, 1, 1)
			s.refused(1, 2)
			s.mismatch(2, 2, 0, 2)
			s.read("n1", 0, true, "1/1/0/2", "1/1/1/2")
			s.acked(1, 3, 1, 3)
			s.get(3, "1/3/0/1")
			s.get(4)
			s.audit("n1", "1/1/0/2", "1/1/1/2", "2/1/0/1", "1/3/0/1")
			s.audit("n2", "1/1/0/2", "1/1/1/2", "2/1/0/1", "1/3/0/1")
		}},
		"nothing happened": {"", func(*story) {}},
		"unknown, and not there": {"", func(s *story) {
			s.unknown(1, 1, 3)
			s.acked(1, 2, 1, 0)
			s.audit("n1", "1/2/0/1")
		}},
		"tried again with a condition": {"", func(s *story) {
			s.unknown(1, 1, 1)
			s.mismatch(1, 1, 0, 1)
			s.audit("n1", "1/1/0/1")
		}},
		"acknowledged and lost": {"a", func(s *story) {
			s.acked(1, 1, 1, 0)
			s.acked(1, 2, 1, 1)
			s.audit("n1", "1/1/0/1", "1/2/0/1")
			s.audit("n2", "1/1/0/1")
		}},
		"acknowledged and replaced": {"a", func(s *story) {
			s.acked(1, 1, 1, 0)
			s.unknown(2, 1, 1)
			s.audit("n1", "2/1/0/1")
		}},
		"two contents at one offset": {"b", func(s *story) {
			s.unknown(1, 1, 1)
			s.unknown(2, 1, 1)
			s.read("n1", 0, false, "1/1/0/1")
			s.read("n2", 0, false, "2/1/0/1")
		}},
		"two acknowledgements of one offset": {"b", func(s *story) {
			s.acked(1, 1, 1, 0)
			s.acked(2, 1, 1, 0)
		}},
		"read and lost": {"b", func(s *story) {
			s.unknown(1, 1, 1)
			s.read("n1", 0, false, "1/1/0/1")
			s.audit("n1")
		}},
		"append times that differ": {"b", func(s *story) {
			s.acked(1, 1, 1, 0)
			s.read("n1", 0, false, "1/1/0/1")
			s.read("n2", 0, false, "1/1/0/1").records[0].time++
		}},
		"out of order": {"c", func(s *story) {
			s.acked(1, 1, 1, 1)
			s.acked(1, 2, 1, 0)
		}},
		"acknowledged elsewhere than expected": {"c", func(s *story) {
			expected := uint64(1)
			s.acked(1, 1, 1, 0).expected = &expected
		}},
		"a stream out of order": {"c", func(s *story) {
			for i := range 2 {
				a := s.beginAppend(simAppend{client: 1, batch: i, count: 1, stream: 1, position: i})
				s.endAppend(a, func(a *simAppend) { a.outcome = simUnknown })
			}
			s.audit("n1", "1/1/0/1", "1/0/0/1")
		}},
		"a hole": {"d", func(s *story) {
			s.acked(1, 1, 2, 0)
			r := s.read("n1", 0, false, "1/1/0/2", "1/1/1/2")
			r.records[1].offset++
		}},
		"half a batch": {"d", func(s *story) {
			s.unknown(1, 1, 2)
			s.audit("n1", "1/1/0/2")
		}},
		"the end further than the records": {"d", func(s *story) {
			s.acked(1, 1, 1, 0)
			s.acked(1, 2, 1, 1)
			s.read("n1", 0, false, "1/1/0/1").end = 2
		}},
		"append times that go backwards": {"d", func(s *story) {
			s.acked(1, 1, 2, 0)
			s.read("n1", 0, false, "1/1/0/2", "1/1/1/2").records[0].time = 7
		}},
		"from nowhere": {"e", func(s *story) { s.read("n1", 0, false, "1/1/0/1") }},
		"garbage":      {"e", func(s *story) { s.read("n1", 0, false, "\x00") }},
		"another content": {"e", func(s *story) {
			s.acked(1, 1, 1, 0)
			s.read("n1", 0, false, "1/1/0/1").records[0].sum++
		}},
		"refused, and there": {"e", func(s *story) {
			s.refused(1, 1)
			s.read("n1", 0, false, "1/1/0/1")
		}},
		"twice": {"e", func(s *story) {
			s.unknown(1, 1, 1)
			s.read("n1", 0, false, "1/1/0/1", "1/1/0/1")
		}},
		"before it was tried": {"e", func(s *story) {
			s.read("n1", 0, false, "1/1/0/1")
			s.unknown(1, 1, 1)
		}},
		"back in time": {"f", func(s *story) {
			s.acked(1, 1, 1, 0)
			s.read("n1", 0, false, "1/1/0/1")
			s.read("n1", 0, false)
		}},
		"a follower behind, or started again": {"", func(s *story) {
			s.acked(1, 1, 1, 0)
			s.read("n1", 0, false, "1/1/0/1")
			s.read("n2", 0, false)
			r := s.read("n1", 0, false)
			r.node.life++
		}},
		"linearizable, and behind an acknowledgement": {"f", func(s *story) {
			s.acked(1, 1, 1, 0)
			s.read("n2", 0, true)
		}},
		"linearizable, and behind another's read": {"f", func(s *story) {
			s.unknown(1, 1, 1)
			s.read("n1", 0, false, "1/1/0/1")
			s.read("n2", 0, true)
		}},
		"one node behind at the end": {"h", func(s *story) {
			s.unknown(1, 1, 1)
			s.audit("n1", "1/1/0/1")
			s.audit("n2")
		}},
		"a refused condition that was met": {"p", func(s *story) {
			s.acked(1, 1, 1, 0)
			s.mismatch(1, 2, 1, 1)
			s.audit("n1", "1/1/0/1")
		}},
		"a refused condition with an old end": {"p", func(s *story) {
			s.acked(1, 1, 1, 0)
			s.acked(1, 2, 1, 1)
			s.mismatch(1, 3, 2, 1)
			s.audit("n1", "1/1/0/1", "1/2/0/1")
		}},
		"a record that is not found any more": {"p", func(s *story) {
			s.acked(1, 1, 1, 0)
			s.get(0)
			s.audit("n1", "1/1/0/1")
		}},
		"unknown, seen, and not seen": {"p", func(s *story) {
			s.unknown(1, 1, 1)
			s.get(0, "1/1/0/1")
			s.get(0)
			s.audit("n1", "1/1/0/1")
		}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := newStory()
			tt.story(s)
			found := violations(s.history)
			result, _ := linearizable(s.history)
			switch tt.want {
			case "":
				if len(found) > 0 || result != porcupine.Ok {
					t.Errorf("%q, %v", found, result)
				}
			case "p":
				if len(found) > 0 || result != porcupine.Illegal {
					t.Errorf("%q, %v", found, result)
				}
			default:
				if !slices.ContainsFunc(found, func(f string) bool { return strings.HasPrefix(f, "("+tt.want+")") }) {
					t.Errorf("%q, want one of (%s)", found, tt.want)
				}
			}
			var b strings.Builder
			if err := s.write(&b); err != nil || strings.Count(b.String(), "\n") < len(s.appends)+len(s.reads) {
				t.Errorf("%v\n%s", err, &b)
			}
		})
	}
}

// TestLinearizableIsDecided: the largest histories that are made here are
// searched in no time, many of unknown outcome included, right or wrong.
func TestLinearizableIsDecided(t *testing.T) {
	for _, stale := range []bool{false, true} {
		s := newStory()
		var log []string
		for round := range 40 {
			// Five at once, of which two never return; those that do are in the
			// log, and every other one that does not.
			var open []*simAppend
			for client := range 5 {
				open = append(open, s.beginAppend(simAppend{client: client, batch: round, count: 1}))
			}
			for client, a := range open {
				if client < 3 || round%2 == 0 {
					log = append(log, simKey(client, round, 0, 1))
				}
				if client < 3 {
					s.endAppend(a, func(a *simAppend) { a.outcome, a.base = simAcked, uint64(len(log))-1 })
				}
			}
			s.read("n1", 0, true, log...)
		}
		if stale {
			s.get(uint64(len(log) - 1))
		}
		s.audit("n1", log...)
		begin := time.Now()
		result, _ := linearizable(s.history)
		if want := map[bool]porcupine.CheckResult{false: porcupine.Ok, true: porcupine.Illegal}[stale]; result != want {
			t.Errorf("%v, want %v", result, want)
		}
		if took := time.Since(begin); took > simCheckTime/4 {
			t.Errorf("it took %v", took)
		}
	}
}
