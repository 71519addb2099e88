package consul

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/time/rate"

	"github.com/diurnalog/diurna/discovery"
)

// registrar keeps the agent holding what was announced. It is one goroutine.
type registrar struct {
	d     *Discovery
	limit *rate.Limiter // of what announcements can cause

	// held are the service ids that the agent may hold because of us.
	held map[string]bool
	// tried is the announcement that reconcile last saw, placed the last one it
	// put in place. Status and Output do not count.
	tried, placed discovery.Node
	// force registers without asking what the agent has.
	force bool
	// pushed is the status that the TTL check last took.
	pushed discovery.Status

	nextReconcile, nextPush time.Time
	lastReconcile           time.Time
	reconcileFails          failures
	pushFails               failures
	tokenFails              failures
}

func newRegistrar(d *Discovery) *registrar {
	return &registrar{
		d:              d,
		limit:          rate.NewLimiter(rate.Every(d.cfg.Timing.RetryStep), 5),
		held:           make(map[string]bool),
		reconcileFails: failures{logger: d.logger, what: "registering with Consul fails"},
		tokenFails:     failures{logger: d.logger, what: "the token in use may be an old one"},
		pushFails:      failures{logger: d.logger, what: "updating the health check in Consul fails"},
	}
}

// run works until ctx ends.
func (r *registrar) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-r.d.announce:
		case <-r.d.lacking:
			// An answer may be older than a registration that was just made.
			if r.reconcileFails.n == 0 && time.Since(r.lastReconcile) >= r.d.cfg.Timing.RetryStep {
				r.nextReconcile = time.Time{}
			}
		}
		if want, ok := r.d.self(); ok {
			r.work(ctx, want)
			timer.Reset(time.Until(earlier(r.nextReconcile, r.nextPush)))
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// work does what is due.
func (r *registrar) work(ctx context.Context, want discovery.Registration) {
	t := r.d.cfg.Timing
	if want.Node != r.tried || !time.Now().Before(r.nextReconcile) {
		if r.limit.Wait(ctx) != nil {
			return
		}
		first := r.placed.ID != want.ID
		registered, err := r.reconcile(ctx, want.Node)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			r.reconcileFails.add(err, "node", want.ID)
			r.nextReconcile = time.Now().Add(jitter(min(time.Duration(r.reconcileFails.n)*t.RetryStep, t.RetryMax)))
		default:
			r.reconcileFails.clear()
			if first {
				r.d.logger.Info("registered with Consul", "address", r.d.cfg.Address, "service", r.d.cfg.serviceID(want.ID))
			}
			if registered {
				r.nextPush = time.Time{}
			}
			r.nextReconcile = time.Now().Add(jitter(t.Reconcile))
		}
	}
	if r.placed.ID == want.ID && (want.Status != r.pushed || !time.Now().Before(r.nextPush)) {
		r.push(ctx, want)
	}
	if r.placed.ID != want.ID {
		r.nextPush = r.nextReconcile // there is nothing to update yet
	}
}

// reconcile makes the agent hold a node, and tells whether it had to.
func (r *registrar) reconcile(ctx context.Context, want discovery.Node) (registered bool, err error) {
	r.tried, r.lastReconcile = want, time.Now()
	d := r.d
	if _, err := d.c.rereadToken(); err != nil {
		r.tokenFails.add(err)
	} else {
		r.tokenFails.clear()
	}
	reg, err := d.cfg.registration(want)
	if err != nil {
		return false, fmt.Errorf("what is announced cannot be registered: %w", err)
	}
	for id := range r.held {
		if id != reg.ID {
			if err := r.drop(ctx, id); err != nil {
				return false, err
			}
		}
	}
	if !r.force && r.placed.ID == want.ID {
		have, err := r.look(ctx, reg.ID)
		switch {
		case err != nil:
			return false, err
		case have == nil:
			r.lost("the agent does not know it any more")
		case holds(have, reg):
			r.placed = want
			return false, nil
		}
	}
	r.held[reg.ID] = true // even if there is no answer
	err = r.request(ctx, "register "+reg.ID, func(ctx context.Context, token string) error {
		// A check that the agent has already keeps its status.
		return d.c.api.Agent().ServiceRegisterOpts(reg, api.ServiceRegisterOpts{ReplaceExistingChecks: true, Token: token}.WithContext(ctx))
	})
	if err != nil {
		return false, err
	}
	r.force, r.placed = false, want
	return true, nil
}

// lost notes that the agent forgot us.
func (r *registrar) lost(how string) {
	r.d.logger.Warn("Consul forgot this node; it is registered again", "address", r.d.cfg.Address, "node", r.placed.ID, "how", how)
	r.d.forgotten()
}

// look asks the agent, not the catalog, what it has: nil for nothing.
func (r *registrar) look(ctx context.Context, id string) (have *api.AgentService, err error) {
	err = r.request(ctx, "look up "+id, func(ctx context.Context, token string) error {
		have, _, err = r.d.c.api.Agent().Service(id, r.d.c.query(ctx, token))
		return err
	})
	if unknown(err) {
		return nil, nil
	}
	return have, err
}

// push updates the TTL check.
func (r *registrar) push(ctx context.Context, want discovery.Registration) {
	t := r.d.cfg.Timing
	if want.Status != r.pushed && r.limit.Wait(ctx) != nil {
		return
	}
	check := raftCheckID(r.d.cfg.serviceID(want.ID))
	err := r.request(ctx, "update the check "+check, func(ctx context.Context, token string) error {
		return r.d.c.api.Agent().UpdateTTLOpts(check, clip(want.Output, 1000), string(want.Status), r.d.c.query(ctx, token))
	})
	r.nextPush = time.Now().Add(jitter(t.TTLUpdate))
	r.pushed = want.Status
	switch {
	case err == nil:
		r.pushFails.clear()
	case ctx.Err() != nil:
	case unknown(err):
		r.lost(err.Error())
		// At once, but not again and again.
		r.force, r.nextReconcile = true, r.lastReconcile.Add(t.RetryStep)
	default:
		r.pushFails.add(err)
	}
}

// request makes a request that is answered at once.
func (r *registrar) request(ctx context.Context, op string, f func(ctx context.Context, token string) error) error {
	ctx, cancel := context.WithTimeout(ctx, r.d.cfg.Timing.Request)
	defer cancel()
	return r.d.c.do(op, func(token string) error { return f(ctx, token) })
}

// drop takes an instance out. One that is not there is fine.
func (r *registrar) drop(ctx context.Context, id string) error {
	err := r.request(ctx, "deregister "+id, func(ctx context.Context, token string) error {
		return r.d.c.api.Agent().ServiceDeregisterOpts(id, r.d.c.query(ctx, token))
	})
	if err != nil && !unknown(err) {
		return err
	}
	delete(r.held, id)
	return nil
}

// deregister takes everything out that is ours, and tries twice.
func (r *registrar) deregister(ctx context.Context) error {
	t := r.d.cfg.Timing
	ctx, cancel := context.WithTimeout(ctx, t.Deregister)
	defer cancel()
	for again := false; ; again = true {
		var failed error
		for id := range r.held {
			// One that does not answer leaves the other tries some time.
			one, cancel := context.WithTimeout(ctx, t.Deregister/2)
			if err := r.drop(one, id); err != nil {
				failed = err
			}
			cancel()
		}
		if failed == nil {
			return nil
		}
		if again || !sleep(ctx, t.Deregister/10) {
			return fmt.Errorf("%w; Consul forgets it after %s, or: consul services deregister -id=…", failed, t.DeregisterAfter)
		}
	}
}
