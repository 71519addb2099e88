package identity

import (
	"crypto/x509"
	"math/rand/v2"
	"time"
)

// timing is how often and how long. Tests are in more of a hurry.
type timing struct {
	// call bounds one request to Vault, fetch everything that a renewal or a
	// refresh of trust asks for.
	call, fetch time.Duration
	// retryFirst is the least wait after a failure; it doubles up to retryMax.
	retryFirst, retryMax time.Duration
	// openMax is the longest wait while a node has no certificate at all.
	openMax time.Duration
	// trust is how often the trusted CAs are asked for, trustLeast how soon
	// again at most when a handshake asks for it.
	trust, trustLeast time.Duration
	// poll is how often files are looked at.
	poll time.Duration
	// look is how often the clock is looked at: a timer counts running time, and
	// would not notice that the machine slept, or that its clock was set.
	look time.Duration
	// nag is how often it is said that a certificate is about to expire.
	nag time.Duration
}

var usualTiming = timing{
	call: 10 * time.Second, fetch: 30 * time.Second,
	retryFirst: time.Second, retryMax: 5 * time.Minute, openMax: 10 * time.Second,
	trust: 5 * time.Minute, trustLeast: 10 * time.Second,
	poll: 2 * time.Second, look: 30 * time.Second, nag: time.Hour,
}

// renewAt is when to renew a certificate that was good since a time: after two
// thirds of its life from then, and up to a tenth later, so that nodes which
// started together do not ask together. r is random, in [0, 1).
//
// For one that was just issued that time is now: CAs date certificates back, for
// clocks that are behind, and that part of a short life is no part of it.
func renewAt(since time.Time, c *x509.Certificate, r float64) time.Time {
	return since.Add(time.Duration(float64(c.NotAfter.Sub(since)) * (0.66 + r*0.10)))
}

// retryAfter is how long to wait after failure n, the first being 0, with so
// much of the certificate's life left: 1 to 5 s at first, then twice as long
// each time, but in what is left there are always some tries more. r is random,
// in [0, 1).
func (t timing) retryAfter(n int, left time.Duration, r float64) time.Duration {
	first := t.retryFirst + time.Duration(r*4*float64(t.retryFirst))
	wait := min(first<<min(n, 20), t.retryMax)
	// Once it has expired others refuse us, and each second counts.
	limit := max(left/8, min(t.retryMax, 2*t.retryFirst))
	return min(wait, limit)
}

// fetchLimit is how long a renewal may take with so much life left: one that
// hangs must leave time for another.
func (t timing) fetchLimit(left time.Duration) time.Duration {
	return max(min(t.fetch, left/3), t.fetch/10)
}

// jitter takes up to a tenth away.
func jitter(d time.Duration) time.Duration {
	return d - time.Duration(rand.Float64()*float64(d)/10)
}
