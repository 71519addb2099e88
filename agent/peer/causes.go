package peer

import (
	"maps"
	"sync"
	"time"
)

const (
	// causesLimit is how many causes are remembered at once.
	causesLimit = 1024
	// causesAgain is when the same is worth saying again.
	causesAgain = 10 * time.Minute
	// causesSweep is how often it is worth looking for what is old.
	causesSweep = time.Second
)

// causes remembers what has been logged, so that somebody who keeps knocking
// does not fill the log.
type causes struct {
	mu    sync.Mutex
	last  map[[2]string]time.Time // guarded by mu
	swept time.Time               // guarded by mu
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
		if now.Sub(c.swept) >= causesSweep {
			c.swept = now
			maps.DeleteFunc(c.last, func(_ [2]string, last time.Time) bool { return now.Sub(last) >= causesAgain })
		}
		if len(c.last) >= causesLimit {
			return false
		}
	}
	c.last[key] = now
	return true
}
