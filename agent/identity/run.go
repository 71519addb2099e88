package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Run keeps certificate, trust, token and files up to date. It returns when ctx
// has ended and everything that it started has too. Call it once.
func (i *Identity) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	if i.src.scheduled() {
		wg.Go(func() { i.renewals(ctx) })
	}
	wg.Go(func() { i.refreshes(ctx) })
	wg.Go(func() { i.polls(ctx) })
	wg.Go(func() { i.src.run(ctx) })
}

// renewals renews when it is time.
func (i *Identity) renewals(ctx context.Context) {
	for {
		i.mu.Lock()
		left := i.nextTry.Sub(i.opts.now())
		i.mu.Unlock()
		if left <= 0 {
			// What failed is recorded, logged, and due again.
			if i.renew(ctx) != nil && ctx.Err() != nil {
				return
			}
			continue
		}
		t := time.NewTimer(min(left, i.opts.timing.look))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-i.renewKick:
			t.Stop()
		case <-t.C:
		}
	}
}

// refreshes asks for whom to trust every few minutes, and when a handshake
// fails because somebody's CA is unknown, which may be new.
func (i *Identity) refreshes(ctx context.Context) {
	var seen causes
	t := i.opts.timing
	next := time.NewTimer(jitter(t.trust))
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-i.trustKick:
		case <-next.C:
		}
		wait := t.trust
		err := i.refresh(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			seen.clear()
		default:
			wait = max(t.trust/10, t.trustLeast)
			if seen.isNew(err) {
				i.logger.Warn("cannot learn whom to trust; it stays as it is", "error", err)
			}
		}
		// Whoever has a wrong certificate may try often, and does not decide
		// how often Vault is asked.
		if !sleep(ctx, t.trustLeast) {
			return
		}
		next.Reset(jitter(wait))
	}
}

// polls looks at files, and at the certificate's end.
func (i *Identity) polls(ctx context.Context) {
	var nagged time.Time
	for sleep(ctx, i.opts.timing.poll) {
		if i.src.changed() {
			i.logger.Debug("files have changed")
			if i.src.scheduled() {
				i.renewSoon()
			} else if i.renew(ctx) != nil && ctx.Err() != nil {
				return
			}
		}
		now, leaf := i.opts.now(), i.cur.Load().pair.leaf
		if left := leaf.NotAfter.Sub(now); left < life(leaf)/6 && now.Sub(nagged) >= i.opts.timing.nag {
			nagged = now
			i.logger.Error("the certificate is about to expire: others will refuse this node", "left", max(left, 0), "expires", leaf.NotAfter)
		}
	}
}

// Reload reads files again, asks for whom to trust, and gets a new certificate
// now: SIGHUP. On an error the old stay in use.
func (i *Identity) Reload(ctx context.Context) error {
	err := i.renew(ctx)
	kick(i.renewKick) // there is another time to wait for, also after a failure
	if err != nil {
		return fmt.Errorf("reload certificates: %w", err)
	}
	i.trustSoon()
	return nil
}

// HandshakeFailed is to be called with the error of every handshake, of either
// side, that failed. One that was signed by an unknown CA has whom to trust
// asked for again soon, but not often.
func (i *Identity) HandshakeFailed(err error) {
	var unknown x509.UnknownAuthorityError
	if errors.As(err, &unknown) {
		i.trustSoon()
	}
}
