package peer

import (
	"sync"
	"time"
)

const (
	// causesLimit is how many causes are remembered at once.
	causesLimit = 1024
	// causesAgain is when the same is worth saying again.
	causesAgain = 10 * time.Minute
)

// causes remembers what has been logged, so that somebody who keeps knocking
// does not fill the log.
type causes struct {
	mu   sync.Mutex
	last map[[2]string]time.Time // guarded by mu
}

func newCauses() *causes { return &causes{last: make(map[[2]string]time.Time)} }

// first tells whether something has not happened at a host for causesAgain. When
// more is going on than it can remember, it tells so of nothing new.
func (c *causes) first(what, host string, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := [2]string{what, host}
	if last, ok := c.last[key]; ok && now.Sub(last) < causesAgain {
		return false
	} else if !ok && len(c.last) >= causesLimit {
		for k, last := range c.last {
			if now.Sub(last) >= causesAgain {
				delete(c.last, k)
			}
		}
		if len(c.last) >= causesLimit {
			return false
		}
	}
	c.last[key] = now
	return true
}
