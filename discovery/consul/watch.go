package consul

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/time/rate"

	"github.com/diurnalog/diurna/discovery"
)

// watcher follows the catalog by blocking queries. The rules for their index
// are Consul's own ("Blocking Queries" in its documentation): an answer need
// not be a change, the index is at least 1, and when it goes backwards one
// starts over.
type watcher struct {
	d     *Discovery
	index uint64
	// seen is the id of ours that the last answer held.
	seen  string
	fails failures
	// warned is when each cause of a skipped instance was last logged.
	warned map[skipped]time.Time
}

// rewarn is how often an instance that is skipped is logged.
const rewarn = time.Hour

// maxEntries bounds an answer that is looked at. A cluster has a handful.
const maxEntries = 10_000

func (d *Discovery) watch(ctx context.Context) {
	w := &watcher{d: d, fails: failures{logger: d.logger, what: "watching Consul fails"}}
	t := d.cfg.Timing
	limit := rate.NewLimiter(rate.Every(t.WatchEvery), 2)
	for limit.Wait(ctx) == nil {
		filtered, err := w.next(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			w.fails.add(err)
			d.distrust("no answer", err)
			// Half of it is random: after an outage everybody asks.
			if !sleep(ctx, jitter(min(t.RetryStep<<min(w.fails.n-1, 10), t.RetryMax)*3/4)) {
				return
			}
		case filtered:
			w.fails.clear()
			// A policy that changes ends no query. Ask anew now and then.
			w.index = 0
			if changed, err := d.c.rereadToken(); err != nil || !changed {
				if !sleep(ctx, jitter(t.RetryMax)) {
					return
				}
			}
		default:
			w.fails.clear()
		}
	}
}

// next asks once and publishes the answer.
func (w *watcher) next(ctx context.Context) (filtered bool, err error) {
	d, t := w.d, w.d.cfg.Timing
	// After a failure the first answer is wanted at once: a Consul that was
	// wiped would otherwise wait for its index to reach ours.
	index, wait, limit := w.index, t.Wait, t.Request
	if w.fails.n > 0 {
		index = 0
	}
	if index > 0 {
		d.mu.Lock()
		if left := time.Until(d.settled); left > 0 {
			wait = min(wait, left+time.Second/10) // the verdict changes then
		}
		d.mu.Unlock()
		limit = t.answerBy()
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var entries []*api.ServiceEntry
	var meta *api.QueryMeta
	err = d.c.do("list the instances of "+d.cfg.Service, func(token string) error {
		o := d.c.query(ctx, token)
		o.WaitIndex, o.WaitTime = index, wait
		// Sorting by distance is not the point. It keeps a client agent from
		// answering out of its own copy, which it goes on to do, without an
		// error, when it has lost the servers.
		o.Near = "_agent"
		entries, meta, err = d.c.api.Health().Service(d.cfg.Service, "", false, o)
		return err
	})
	if err != nil {
		return false, err
	}
	if len(entries) > maxEntries {
		return false, fmt.Errorf("consul at %s lists %d instances of %s, more than %d: is something else using this name?",
			d.cfg.Address, len(entries), d.cfg.Service, maxEntries)
	}
	back := meta.LastIndex < w.index
	w.index = max(1, meta.LastIndex)
	if back {
		w.index = 0
		d.logger.Warn("Consul's index went back: it was restored or wiped", "address", d.cfg.Address)
		d.forgotten()
	}
	w.take(entries, meta)
	return meta.ResultsFilteredByACLs, nil
}

// take publishes an answer.
func (w *watcher) take(entries []*api.ServiceEntry, meta *api.QueryMeta) {
	d, now := w.d, time.Now()
	nodes, skip := d.cfg.decodeAll(entries)
	w.warn(skip, now)
	self, announced := d.self()
	_, present := discovery.Snapshot{Nodes: nodes}.Find(self.ID)
	present = present && announced
	if !present && announced {
		if w.seen == self.ID {
			d.logger.Warn("Consul's catalog has lost this node; it is registered again", "address", d.cfg.Address)
			d.forgotten()
		}
		signal(d.lacking)
	}
	w.seen = ""
	if present {
		w.seen = self.ID
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	var why string
	switch {
	case meta.ResultsFilteredByACLs:
		why = fmt.Sprintf("consul at %s left instances out that the token may not read: it needs read on the service %q and on all nodes", d.cfg.Address, d.cfg.Service)
	case meta.DefaultACLPolicy == "deny" && !d.c.hasToken():
		// Consul does not tell those without a token that it left things out.
		why = fmt.Sprintf("consul at %s shows only what is allowed without a token, and none is configured", d.cfg.Address)
	case !meta.KnownLeader:
		why = fmt.Sprintf("consul at %s has no leader", d.cfg.Address)
	case meta.QueryBackend == api.QueryBackendStreaming:
		why = fmt.Sprintf("consul at %s answers from its own copy, which may be old", d.cfg.Address)
	case d.announced == nil:
		why = "this node is not registered yet"
	case !present || d.announced.ID != self.ID:
		why = fmt.Sprintf("consul at %s does not list this node", d.cfg.Address)
	default:
		why = d.settling()
	}
	if why == "" {
		why = distrustSkipped(skip)
	}
	d.publish(nodes, now, why)
}

// distrustSkipped says why an answer with instances that could not be used is
// not trusted: one of them may be a node that seems to be absent.
func distrustSkipped(skip []skipped) string {
	var ids []string
	for _, s := range skip {
		if !s.foreign && len(ids) < 5 {
			ids = append(ids, s.service)
		}
	}
	if len(ids) == 0 {
		return ""
	}
	return "some instances of this cluster cannot be used: " + strings.Join(ids, ", ")
}

// warn logs every cause when it appears, and again now and then.
func (w *watcher) warn(skip []skipped, now time.Time) {
	warned := make(map[skipped]time.Time, len(skip))
	for _, s := range skip {
		last, known := w.warned[s]
		if !known || now.Sub(last) >= rewarn {
			last = now
			w.d.logger.Warn("an instance in Consul is not used", "service", s.service, "node", s.node, "cause", s.why, "address", w.d.cfg.Address)
		}
		warned[s] = last
	}
	w.warned = warned
}
