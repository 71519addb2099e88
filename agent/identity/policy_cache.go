package identity

import (
	"strings"
	"sync"
)

// decisionKey is a question that a policy answers.
type decisionKey struct{ subject, object, action string }

func (k decisionKey) clone() decisionKey {
	// Not only to keep a request's buffer from being kept: a caller may reuse
	// what its strings lie in.
	return decisionKey{strings.Clone(k.subject), strings.Clone(k.object), strings.Clone(k.action)}
}

// cachedDecisions is how many decisions a generation of the cache holds. Who
// asks is bounded by the certificates there are, what for by the logs; but a
// client may ask for logs that do not exist.
const cachedDecisions = 4096

// maxCachedBytes is the longest question that is worth remembering.
const maxCachedBytes = 1024

// decisionCache remembers the last decisions in two generations: when the young
// one is full it becomes the old one, and what is asked for again is taken over.
// So it holds at most twice cachedDecisions, and what is in use stays.
type decisionCache struct {
	mu         sync.RWMutex
	young, old map[decisionKey]bool // guarded by mu
}

func (c *decisionCache) get(k decisionKey) (allowed, ok bool) {
	c.mu.RLock()
	allowed, ok = c.young[k]
	old := false
	if !ok {
		allowed, old = c.old[k]
	}
	c.mu.RUnlock()
	if old {
		c.put(k, allowed)
	}
	return allowed, ok || old
}

func (c *decisionCache) put(k decisionKey, allowed bool) {
	if len(k.subject)+len(k.object)+len(k.action) > maxCachedBytes {
		return
	}
	k = k.clone()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.young) >= cachedDecisions {
		c.old, c.young = c.young, nil
	}
	if c.young == nil {
		c.young = make(map[decisionKey]bool)
	}
	c.young[k] = allowed
}

// len is how many decisions are remembered; one in both generations counts
// twice.
func (c *decisionCache) len() int {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return len(c.young) + len(c.old)
}
