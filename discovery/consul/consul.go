package consul

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/discovery"
)

// Discovery is one node's view of Consul, and its registration there.
type Discovery struct {
	cfg    Config
	c      *client
	logger hclog.Logger
	record *record
	ran    atomic.Bool

	// announce and lacking wake the registrar: something was announced, and an
	// answer lacks this node.
	announce, lacking chan struct{}

	mu        sync.Mutex
	announced *discovery.Registration // nil: nothing yet
	snap      discovery.Snapshot
	changed   chan struct{}
	// settled is when everybody has had the time to register again.
	settled time.Time
}

var _ discovery.Discovery = (*Discovery)(nil)

// New checks the configuration and reads its files. It does not call Consul.
func New(cfg Config) (*Discovery, error) {
	if err := cfg.applyDefaultsAndValidate(); err != nil {
		return nil, err
	}
	d := &Discovery{
		cfg:      cfg,
		logger:   cfg.Logger,
		announce: make(chan struct{}, 1),
		lacking:  make(chan struct{}, 1),
		changed:  make(chan struct{}),
		snap:     discovery.Snapshot{Why: fmt.Sprintf("consul at %s has not answered yet", cfg.Address)},
	}
	var err error
	if d.c, err = newClient(&d.cfg); err != nil {
		return nil, err
	}
	d.record = &record{d.c, d.cfg.kvDir() + "bootstrap"}
	return d, nil
}

// Run implements discovery.Discovery. Its error says what could not be
// deregistered: Consul then forgets it by itself, after Timing.DeregisterAfter.
func (d *Discovery) Run(ctx context.Context) error {
	if d.ran.Swap(true) {
		return errors.New("consul: Run is called once")
	}
	var watching sync.WaitGroup
	watching.Go(func() { d.watch(ctx) })
	r := newRegistrar(d)
	r.run(ctx)
	watching.Wait()
	err := r.deregister(context.WithoutCancel(ctx))
	d.distrust("discovery has ended", nil)
	d.c.close()
	return err
}

// Announce implements discovery.Discovery. The cluster that is registered is
// always the configured one.
func (d *Discovery) Announce(r discovery.Registration) {
	if r.Status == "" {
		r.Status = discovery.Critical
	}
	d.mu.Lock()
	if d.announced == nil || d.announced.ID != r.ID {
		d.publish(d.snap.Nodes, d.snap.At, "this node is not registered yet as "+r.ID)
	}
	d.announced = &r
	d.mu.Unlock()
	signal(d.announce)
}

// Latest implements discovery.Discovery.
func (d *Discovery) Latest() discovery.Snapshot {
	d.mu.Lock()
	s := d.snap
	d.mu.Unlock()
	s.Nodes = slices.Clone(s.Nodes)
	if s.Trusted {
		// A query that hangs is given up in time; this is for a process that was
		// stopped for long and goes on. The wall clock counts that time, the
		// monotonic one may not.
		now := time.Now()
		age := max(now.Sub(s.At), now.Round(0).Sub(s.At.Round(0)))
		if age > d.cfg.Timing.answerBy()+2*d.cfg.Timing.WatchEvery {
			s.Trusted, s.Why = false, fmt.Sprintf("the last answer of consul at %s is %s old", d.cfg.Address, age.Round(time.Second))
		}
	}
	return s
}

// Changed implements discovery.Discovery.
func (d *Discovery) Changed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed
}

// Bootstrap implements discovery.Discovery: the key
// <KVPrefix><cluster>/bootstrap.
func (d *Discovery) Bootstrap() discovery.Record { return d.record }

// publish replaces the snapshot, which is trusted if there is no reason why
// not, and tells whoever waits. d.mu is held. The nodes are not changed any
// more.
func (d *Discovery) publish(nodes []discovery.Node, at time.Time, why string) {
	s := discovery.Snapshot{Nodes: nodes, At: at, Trusted: why == "", Why: why}
	same := d.snap.Same(s)
	d.snap = s
	if !same {
		close(d.changed)
		d.changed = make(chan struct{})
	}
}

// distrust keeps the nodes that are known and says why they are not to be
// trusted any more.
func (d *Discovery) distrust(why string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		since := "since it was started"
		if !d.snap.At.IsZero() {
			since = "since " + d.snap.At.Format(time.TimeOnly)
		}
		why = fmt.Sprintf("%s %s: %v", why, since, err)
	}
	d.publish(d.snap.Nodes, d.snap.At, why)
}

// forgotten notes that Consul lost what it knew: its answers are not trusted
// until everybody has had the time to register again.
func (d *Discovery) forgotten() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.settled = time.Now().Add(d.cfg.Timing.Settle)
	if d.snap.Trusted {
		d.publish(d.snap.Nodes, d.snap.At, d.settling())
	}
}

// settling says why an answer is not trusted yet, empty if it may be. d.mu is
// held.
func (d *Discovery) settling() string {
	if !time.Now().Before(d.settled) {
		return ""
	}
	return fmt.Sprintf("consul at %s forgot its services; until %s not everybody may be back", d.cfg.Address, d.settled.Format(time.TimeOnly))
}

// self returns what was announced last.
func (d *Discovery) self() (discovery.Registration, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.announced == nil {
		return discovery.Registration{}, false
	}
	return *d.announced, true
}

// signal wakes whoever listens, now or next.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// jitter varies a duration by up to a tenth.
func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.9 + 0.2*rand.Float64()))
}

// sleep waits, and tells whether it may go on.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// failures counts failures in a row and logs the first and every tenth.
type failures struct {
	logger hclog.Logger
	what   string
	n      int
}

func (f *failures) add(err error, args ...any) {
	if f.n%10 == 0 {
		f.logger.Warn(f.what, append([]any{"error", err, "failures", f.n + 1}, args...)...)
	}
	f.n++
}

// clear ends a row of failures; it tells once that things work again.
func (f *failures) clear() {
	if f.n > 0 {
		f.logger.Info(f.what+": works again", "failures", f.n)
	}
	f.n = 0
}
