package agent

import (
	"fmt"
	"sync"
	"time"
)

// readiness decides when a node that serves may be counted on: when a rolling
// update, say, may take the next node down. For that it is not enough that the
// node is a voter which hears from its leader. One that has just restarted lacks
// what was appended meanwhile; were the next node stopped now, what is committed
// could be on too few of those that are left to go on.
//
// So a follower has to have applied all that the leader had committed when the
// node looked last, about a watchInterval ago. Under load there is always
// something that it has not applied yet; what was there a second ago, it has.
// And it has to have been like that for a while, without a change of leader.
// A node that is the only voter has nobody to catch up with and to wait for.
type readiness struct {
	// stable is for how long the node has to have been well.
	stable time.Duration

	mu sync.Mutex
	// looked is when the leader's commit index was target.
	looked time.Time
	target uint64
	// since is since when all has been well, in this term; zero while it is not.
	since time.Time
	term  uint64
	// late is what there was to say against the node at the last look.
	late string
}

// condition is how a node is at one moment.
type condition struct {
	// serving is whether it can be sent to, why how it is, or why not.
	serving bool
	why     string
	// alone: it is the only voter. leads: it has shown its leadership, and all
	// from before it is applied.
	alone, leads bool
	// term is the one that the leader leads in.
	term uint64
	// applied is how far the node is, committed what the leader has said that it
	// has committed: 0 for nothing.
	applied, committed uint64
}

// look is called at least every watchInterval, and tells whether the node is
// ready, and why not.
func (r *readiness) look(c condition, now time.Time) (ready bool, why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !c.serving {
		r.looked, r.target, r.since, r.late = time.Time{}, 0, time.Time{}, ""
		return false, c.why
	}
	// Looks come late, and then the next one early.
	if !c.alone && !c.leads && now.Sub(r.looked) >= watchInterval*3/4 {
		switch {
		case r.target == 0:
			// The first look only finds out how far the leader is.
			r.late = "has not compared its log with the leader's yet"
		case c.applied < r.target:
			r.late = fmt.Sprintf("catches up with the leader: it has applied entry %d of %d", c.applied, c.committed)
		default:
			r.late = ""
		}
		r.looked, r.target = now, c.committed
	}
	return r.verdict(c, now)
}

// now tells the same between two looks.
func (r *readiness) now(c condition, now time.Time) (ready bool, why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !c.serving {
		return false, c.why
	}
	return r.verdict(c, now)
}

// verdict is called with mu held.
func (r *readiness) verdict(c condition, now time.Time) (ready bool, why string) {
	switch {
	case c.alone:
		return true, c.why
	case c.leads:
		r.late = ""
	case r.looked.IsZero():
		return false, "has not compared its log with the leader's yet"
	}
	if r.late != "" {
		r.since = time.Time{}
		return false, r.late
	}
	if r.since.IsZero() || r.term != c.term {
		r.since, r.term = now, c.term
	}
	if now.Sub(r.since) < r.stable {
		return false, fmt.Sprintf("%s, but has not done so for %v yet", c.why, r.stable)
	}
	return true, c.why
}
