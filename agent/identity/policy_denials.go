package identity

import (
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

const (
	// denialQuiet is how long after a denial was logged further ones of the same
	// subject and action are only counted. A client that is refused tries again.
	denialQuiet = time.Minute
	// maxDenials is how many subjects and actions are told apart; the rest share
	// one line.
	maxDenials = 1024
)

type denialKey struct{ subject, action string }

type denialCount struct {
	since      time.Time // of the last line
	suppressed uint64
}

// denialLog warns of denials, not of each one.
type denialLog struct {
	logger hclog.Logger
	now    func() time.Time

	mu   sync.Mutex
	seen map[denialKey]denialCount // guarded by mu; at most maxDenials, and one of the others for each action
}

// others stands for whoever comes when too many are told apart already. No
// certificate has this subject: it would be "anonymous".
const others = ""

// note logs a denial, or counts it. why is asked for only if it is logged.
func (d *denialLog) note(k decisionKey, why func() string) {
	now := d.now()
	d.mu.Lock()
	key := denialKey{k.subject, k.action}
	c, known := d.seen[key]
	if !known && len(d.seen) >= maxDenials {
		d.sweep(now)
	}
	if !known && len(d.seen) >= maxDenials {
		key.subject = others
		if knownAction(key.action) == otherAction {
			key.action = ""
		}
		c, known = d.seen[key]
	}
	if known && now.Sub(c.since) < denialQuiet {
		c.suppressed++
		d.seen[key] = c
		d.mu.Unlock()
		return
	}
	if d.seen == nil {
		d.seen = make(map[denialKey]denialCount)
	}
	// The strings may lie in a buffer that is used again.
	d.seen[denialKey{strings.Clone(key.subject), strings.Clone(key.action)}] = denialCount{since: now}
	d.mu.Unlock()

	args := []any{"subject", clean(k.subject), "object", clean(k.object), "action", clean(k.action), "why", clean(why())}
	if c.suppressed > 0 {
		args = append(args, "suppressed", c.suppressed)
	}
	d.logger.Warn("denied", args...)
}

// flush tells of what was only counted, once it is quiet, and forgets it.
func (d *denialLog) flush() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sweep(d.now())
}

// sweep is flush for who has the lock.
func (d *denialLog) sweep(now time.Time) {
	for key, c := range d.seen {
		if now.Sub(c.since) < denialQuiet {
			continue
		}
		if c.suppressed == 0 {
			delete(d.seen, key)
			continue
		}
		subject := clean(key.subject)
		if key.subject == others {
			subject = "others"
		}
		d.logger.Warn("denied more often", "subject", subject, "action", clean(key.action), "times", c.suppressed, "within", now.Sub(c.since).Round(time.Second))
		d.seen[key] = denialCount{since: now}
	}
}

// maxLoggedBytes is how much of a name goes into the log.
const maxLoggedBytes = 256

// clean makes of what came from outside something that stays on its line.
func clean(s string) string {
	if len(s) > maxLoggedBytes {
		s = strings.ToValidUTF8(s[:maxLoggedBytes], "") + "…"
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\u2028' || r == '\u2029' || r == '\u0085' {
			return '�'
		}
		return r
	}, s)
}
