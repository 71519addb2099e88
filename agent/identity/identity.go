package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/agent/config"
)

// Config of Open.
type Config struct {
	// TLS says where certificates come from. TLSNone is an error.
	TLS config.TLS
	// Vault is for config.TLSVault.
	Vault config.Vault
	// Cluster is the cluster's name: who is a server of it is told by it.
	Cluster string
	// Service is the name in Consul; empty means "diurna".
	Service string
	// NodeID is the node's UUID, which its certificate names.
	NodeID string
	// Host is where others reach the node, an IP address or a name. Empty means
	// that this machine's loopback addresses are enough.
	Host string
	// Dir is a folder of the node's own, made if it is not there: the cache of
	// what Vault issued, or the throw-away CA of config.TLSDev.
	Dir string
	// Logger may be nil. No secret is ever logged.
	Logger hclog.Logger
}

// options are what tests turn.
type options struct {
	timing timing
	now    func() time.Time
	random func() float64
}

func usual() options {
	return options{timing: usualTiming, now: time.Now, random: rand.Float64}
}

// Identity is who this node is and whom it trusts, kept up to date while Run
// runs. It may be used from several goroutines.
type Identity struct {
	cfg        Config
	opts       options
	logger     hclog.Logger
	serverName string
	minVersion uint16
	src        source
	cur        atomic.Pointer[state]
	// maxLife is the longest life of a certificate seen, in nanoseconds: for so
	// long an issuer that vanished may still be needed.
	maxLife atomic.Int64

	// fetching is held while the source is asked, so that two renewals do not
	// overtake one another. A channel, so that a wait for it can end.
	fetching chan struct{}
	// renewKick and trustKick wake the loops of Run.
	renewKick, trustKick chan struct{}

	mu      sync.Mutex
	changed chan struct{} // closed at the next swap
	status  Status
	// nextTry is when to renew, by the wall's clock; zero is never by itself.
	nextTry time.Time
	fails   int // in a row
	causes  causes
}

// state is what handshakes use. It does not change: there is a new one instead.
type state struct {
	pair  *pair
	trust *trust
}

// source is where certificates and trust come from.
type source interface {
	// fetch returns a certificate with its key, and whom to trust, which may be
	// nil where nothing new is known.
	fetch(ctx context.Context) (*pair, *issuers, error)
	// issuers returns whom to trust, nil where that comes with fetch only.
	issuers(ctx context.Context) (*issuers, error)
	// changed tells whether files that it reads have changed since it was last
	// asked, and settled, so that fetch is worth a try.
	changed() bool
	// scheduled tells whether certificates are renewed before they expire, and
	// a failure is tried again. Otherwise only changed leads to a fetch.
	scheduled() bool
	// run does what is to be done besides, until ctx ends.
	run(ctx context.Context)
}

// Open returns once there is a valid certificate: a new one, or one from the
// cache in cfg.Dir, for which Vault need not be there. It waits for a Vault
// that does not answer, is sealed or does not let it in, until ctx ends, and
// logs what it waits for. What waiting cannot mend is an error at once.
//
// Nothing is kept up to date before Run.
func Open(ctx context.Context, cfg Config) (*Identity, error) { return open(ctx, cfg, usual()) }

func open(ctx context.Context, cfg Config, opts options) (*Identity, error) {
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	i := &Identity{
		cfg: cfg, opts: opts, logger: cfg.Logger, serverName: ServerName(cfg.Cluster),
		fetching: make(chan struct{}, 1), renewKick: make(chan struct{}, 1), trustKick: make(chan struct{}, 1),
		changed: make(chan struct{}), status: Status{Source: cfg.TLS.Source},
	}
	if cfg.Cluster == "" {
		return nil, errors.New("identity: the cluster has no name")
	}
	var err error
	if i.minVersion, err = minVersion(cfg.TLS.MinVersion); err != nil {
		return nil, err
	}
	want := serverNames(cfg.Cluster, cfg.Service, cfg.NodeID, cfg.Host, cfg.TLS.Names)
	switch cfg.TLS.Source {
	case config.TLSFiles:
		i.src = newFileSource(cfg.TLS, i.logger)
	case config.TLSDev:
		dir := cfg.TLS.DevDir
		if dir == "" {
			dir = cfg.Dir
		}
		i.src = &devSource{dir: dir, cluster: cfg.Cluster, names: want, now: opts.now, logger: i.logger}
	case config.TLSVault:
		v, err := newVaultSource(cfg.Vault, want, opts, i.logger)
		if err != nil {
			return nil, err
		}
		i.src = v
		if i.fromCache(&want) {
			return i, nil
		}
	default:
		return nil, fmt.Errorf("identity: tls.source = %q has no certificates", cfg.TLS.Source)
	}
	if err := i.first(ctx); err != nil {
		return nil, err
	}
	return i, nil
}

// fromCache takes what an earlier run left, if it is still good.
func (i *Identity) fromCache(want *names) bool {
	now := i.opts.now()
	c, err := loadCache(i.cfg.Dir, now)
	if err == nil && c == nil {
		return false
	}
	if err == nil {
		err = c.pair.check(now, i.serverName, c.trust)
	}
	if err == nil {
		if id, ok := nodeIDOf(c.pair.leaf, i.cfg.Cluster); ok && i.cfg.NodeID != "" && id != i.cfg.NodeID {
			err = fmt.Errorf("%w: it names node %s, and this is %s", ErrWrongRole, id, i.cfg.NodeID)
		}
	}
	if err != nil {
		i.logger.Warn("the cached certificate is not used; a new one is fetched", "folder", i.cfg.Dir, "error", err)
		return false
	}
	i.use(c.pair, c.trust, c.pair.leaf.NotBefore)
	i.status.FromCache = true
	if lacks := want.missing(c.pair.leaf); lacks != "" {
		i.logger.Info("the cached certificate lacks a name; it is renewed at once", "name", lacks)
		i.renewSoon()
	}
	i.trustSoon() // what it knew may be old
	i.logger.Info("using the cached certificate", "subject", i.status.Subject, "serial", i.status.Serial, "expires", i.status.NotAfter)
	return true
}

// first waits for the first certificate.
func (i *Identity) first(ctx context.Context) error {
	for n := 0; ; n++ {
		err := i.renew(ctx)
		if err == nil {
			return nil
		}
		if !i.src.scheduled() || isPermanent(err) {
			return fmt.Errorf("get a certificate: %w", err)
		}
		wait := i.opts.timing.retryAfter(n, 0, i.opts.random())
		wait = min(wait<<min(n, 8), i.opts.timing.openMax)
		if !sleep(ctx, wait) {
			return fmt.Errorf("get a certificate: %w (%w)", err, context.Cause(ctx))
		}
	}
}

// renew fetches and uses a new certificate. Failing changes nothing but the
// status.
func (i *Identity) renew(ctx context.Context) error {
	if err := i.lock(ctx); err != nil {
		return err
	}
	defer i.unlock()
	limit := i.opts.timing.fetch
	if cur := i.cur.Load(); cur != nil {
		limit = i.opts.timing.fetchLimit(cur.pair.leaf.NotAfter.Sub(i.opts.now()))
	}
	fctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	p, from, err := i.src.fetch(fctx)
	if err == nil {
		err = i.adopt(p, from)
	}
	if ctx.Err() != nil && err != nil {
		return err // we were told to stop: nothing is wrong
	}
	i.outcome(err)
	return err
}

// adopt checks a certificate and swaps to it. The caller holds the lock.
func (i *Identity) adopt(p *pair, from *issuers) error {
	now := i.opts.now()
	var old *trust
	if cur := i.cur.Load(); cur != nil {
		old = cur.trust
	}
	t, problem := merge(old, from, now, i.keep(p.leaf))
	if t == nil {
		return problem
	}
	if problem != nil {
		i.logger.Warn("not everything that is to be trusted can be", "error", problem)
	}
	if err := p.check(now, i.serverName, t); err != nil {
		return err
	}
	i.use(p, t, now)
	i.save(p, t)
	return nil
}

// use swaps to a certificate, good since a time, and a trust that fit together.
func (i *Identity) use(p *pair, t *trust, since time.Time) {
	i.keep(p.leaf)
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.src.scheduled() {
		i.nextTry = renewAt(since, p.leaf, i.opts.random())
		// However short a life is given, Vault is not asked without end.
		if least := i.opts.now().Add(i.opts.timing.retryFirst); i.nextTry.Before(least) {
			i.nextTry = least
		}
	}
	i.status.certificate(p.leaf, i.nextTry)
	i.status.trust(t)
	i.swap(&state{p, t})
}

// swap makes a state current. The caller holds mu.
func (i *Identity) swap(s *state) {
	i.cur.Store(s)
	close(i.changed)
	i.changed = make(chan struct{})
}

// outcome records how a renewal went, and logs a cause once.
func (i *Identity) outcome(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	cur := i.cur.Load()
	if err == nil {
		i.fails = 0
		i.causes.clear()
		i.status.LastError = ""
		i.status.FromCache = false
		i.status.Renewals++
		i.status.LastRenewal = i.opts.now().Round(0)
		args := []any{"subject", i.status.Subject, "serial", i.status.Serial, "expires", i.status.NotAfter}
		if !i.nextTry.IsZero() {
			args = append(args, "renew_at", i.nextTry)
		}
		i.logger.Info("new certificate", args...)
		return
	}
	i.status.RenewFailures++
	i.status.LastError = err.Error()
	left := time.Duration(0)
	if cur != nil {
		left = cur.pair.leaf.NotAfter.Sub(i.opts.now())
		if i.src.scheduled() {
			i.nextTry = i.opts.now().Round(0).Add(i.opts.timing.retryAfter(i.fails, left, i.opts.random()))
		}
	}
	i.fails++
	if !i.causes.isNew(err) {
		return
	}
	switch {
	case cur == nil && isPermanent(err), cur == nil && !i.src.scheduled():
		// Open returns it.
	case cur == nil:
		i.logger.Warn("waiting for a first certificate", "error", err)
	default:
		i.logger.Warn("no new certificate; the old one stays in use", "expires", cur.pair.leaf.NotAfter, "error", err)
	}
}

// keep is for how long an issuer that vanished may still be needed.
func (i *Identity) keep(seen *x509.Certificate) time.Duration {
	for {
		most, l := i.maxLife.Load(), int64(life(seen))
		if l <= most {
			return time.Duration(most)
		}
		if i.maxLife.CompareAndSwap(most, l) {
			return time.Duration(l)
		}
	}
}

// refresh asks for whom to trust. Failing keeps the old.
func (i *Identity) refresh(ctx context.Context) error {
	if err := i.lock(ctx); err != nil {
		return err
	}
	defer i.unlock()
	fctx, cancel := context.WithTimeout(ctx, i.opts.timing.fetch)
	defer cancel()
	from, err := i.src.issuers(fctx)
	if from == nil {
		return err
	}
	cur := i.cur.Load()
	t, problem := merge(cur.trust, from, i.opts.now(), i.keep(cur.pair.leaf))
	if t == nil {
		return problem
	}
	if t.same(cur.trust) {
		i.cur.Store(&state{cur.pair, t})
	} else {
		i.mu.Lock()
		i.status.trust(t)
		i.swap(&state{cur.pair, t})
		i.mu.Unlock()
		i.save(cur.pair, t)
		i.logger.Info("whom to trust has changed", "issuers", t.subjects(), "revoked", len(t.revoked))
	}
	i.judge(cur.pair, t)
	return errors.Join(err, problem)
}

// judge asks for a new certificate where the CAs no longer stand by ours: Vault
// came back with another root, or ours is revoked.
func (i *Identity) judge(p *pair, t *trust) {
	chains, err := p.verify(i.opts.now(), t.listed)
	var why string
	switch {
	case err != nil:
		why = "its issuer is no longer listed"
	case t.revokedOf(chains) != nil:
		why = "it is revoked"
	default:
		return
	}
	i.mu.Lock()
	failing := i.fails > 0
	i.mu.Unlock()
	if !failing { // else it is being tried, at its pace
		i.logger.Warn("this node needs another certificate", "why", why, "serial", serialOf(p.leaf))
		i.renewSoon()
	}
}

// renewSoon has Run renew at once.
func (i *Identity) renewSoon() {
	i.mu.Lock()
	i.nextTry = i.opts.now().Round(0)
	i.mu.Unlock()
	kick(i.renewKick)
}

func (i *Identity) trustSoon() { kick(i.trustKick) }

// kick wakes somebody who waits on a channel with room for one.
func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (i *Identity) lock(ctx context.Context) error {
	select {
	case i.fetching <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (i *Identity) unlock() { <-i.fetching }

// sleep waits, and tells whether ctx still holds.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
