package replica

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
)

// Replica is one log's copy on this node: a member of the log's Raft group.
// All methods are safe for concurrent use.
type Replica struct {
	cfg       Config
	gens      *generations
	stable    *stableStore
	snapshots *snapshotStore
	store     *logStore
	machine   *fsm
	raft      *raft.Raft
	seq       *sequencer
	watermark *watermark
	applied   *atomic.Uint64
	start     *atomic.Uint64 // first offset that may be read
	retention retention

	failOnce sync.Once
	failed   chan struct{}
	failure  error // set before failed is closed

	closeOnce sync.Once
	closeErr  error
	closing   chan struct{}
	watching  sync.WaitGroup

	// Guards the beginning of a question to Raft, which close waits for,
	// against the end of all.
	askMu  sync.Mutex
	closed bool
	asking sync.WaitGroup
}

// closeGrace is how long Close waits for Raft after its context has ended: the
// files cannot be closed under it.
const closeGrace = 2 * time.Second

// Open starts a replica from what its directory holds. It does not wait for a
// leader. Damage is refused with a typed error, and then nothing has changed.
func Open(cfg Config) (r *Replica, err error) {
	if err := cfg.applyDefaultsAndValidate(); err != nil {
		return nil, err
	}
	r = &Replica{
		cfg:       cfg,
		watermark: &watermark{},
		applied:   &atomic.Uint64{},
		start:     &atomic.Uint64{},
		failed:    make(chan struct{}),
		closing:   make(chan struct{}),
	}
	files, err := openFiles(&r.cfg, r.broken)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, files.close())
		}
	}()
	found, err := recoverState(&r.cfg, files.gen)
	if err != nil {
		return nil, err
	}
	if err := files.stable.check(found.term); err != nil {
		return nil, err
	}
	if err := removeLeftovers(cfg.FS, cfg.Dir, files.gen.number); err != nil {
		return nil, err
	}
	if err := files.stable.repair(); err != nil {
		return nil, err
	}
	r.stable, r.gens = files.stable, newGenerations(files.gen)
	r.machine = newFSM(found.index, found.state, r.watermark, r.applied, r.start)
	r.machine.clusterID, r.machine.broken = cfg.ClusterID, r.broken
	r.snapshots = r.newSnapshots()
	r.machine.install = r.snapshots.install
	r.store = &logStore{gens: r.gens, applied: r.applied, broken: r.broken, down: r.Err, rolled: r.retention.poke}
	r.retention.init(cfg.Retention)
	if err := bootstrap(&r.cfg, files, r.store); err != nil {
		return nil, err
	}
	if r.raft, err = launch(&r.cfg, r.machine, r.store, &stableGuard{r.stable, r.Err}, r.snapshots); err != nil {
		return nil, fmt.Errorf("start raft: %w", err)
	}
	r.store.raft.Store(r.raft)
	r.seq = newSequencer(r.raft, r.gens, &r.cfg, r.notLeader)
	r.seq.start()
	r.own(func() { r.mind(files.gen) })
	r.own(r.mindClusterID)
	r.own(r.mindRetention)
	r.own(r.scrub)
	return r, nil
}

// broken records the first failure after which this replica must not take part
// any more: nothing is stored, voted or acknowledged from then on. Damage is
// ErrDamaged, whoever found it.
func (r *Replica) broken(err error) {
	if isDamage(err) && !errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	r.failOnce.Do(func() {
		r.failure = err
		close(r.failed)
		r.cfg.Logger.Error("this replica must stop", "error", err)
		r.cfg.OnFatal(err)
	})
}

// Failed is closed when this replica cannot go on. Err tells why, and with that
// what to do: see ErrDamaged, ErrRestart, ForeignClusterError and VersionError;
// everything else is a failure of the disk, after which the process must end.
func (r *Replica) Failed() <-chan struct{} { return r.failed }

// Err returns what closed Failed, or nil.
func (r *Replica) Err() error {
	select {
	case <-r.failed:
		return r.failure
	default:
		return nil
	}
}

// Propose hands a batch to the log and returns at once with a handle on its
// outcome. Batches of one goroutine are appended in the order of its calls.
// With wait it blocks for room, until ctx ends; without, it fails with
// ErrOverloaded. ctx bounds only this call: once it has returned a handle, the
// batch stays in line whatever becomes of ctx, since a stream that has ended
// still wants what it sent to be appended. An error means that nothing was, or
// will be, appended.
func (r *Replica) Propose(ctx context.Context, p Proposal, wait bool) (*Pending, error) {
	if err := r.Err(); err != nil {
		return nil, err
	}
	return r.seq.propose(ctx, p, wait)
}

// notLeader says who leads, as far as is known.
func (r *Replica) notLeader() error {
	addr, id := r.raft.LeaderWithID()
	if id == "" || string(id) == r.cfg.ID {
		return ErrNoLeader
	}
	return &NotLeaderError{LeaderID: string(id), LeaderAddress: string(addr)}
}

// WaitReadable returns once offset is below the high watermark, or with ctx's
// error or ErrClosed.
func (r *Replica) WaitReadable(ctx context.Context, offset uint64) error {
	return r.watermark.wait(ctx, offset)
}

// Linearize returns once every record that was acknowledged, by any server,
// before the call is below this server's high watermark. Only the leader can
// do it: what it acknowledged itself, it applied first; what earlier leaders
// acknowledged, it applied before it took proposals; and that it still leads,
// so that nobody else acknowledged anything, it asks a quorum now.
func (r *Replica) Linearize(ctx context.Context) error {
	verified := make(chan error, 1)
	r.askMu.Lock()
	if r.closed {
		r.askMu.Unlock()
		return ErrClosed
	}
	term := r.seq.ready.Load()
	if term == 0 {
		r.askMu.Unlock()
		return r.notLeader()
	}
	r.asking.Go(func() { verified <- r.raft.VerifyLeader().Error() })
	r.askMu.Unlock()
	select {
	case err := <-verified:
		// In the same term: a new one has to find its watermark first.
		if err != nil || r.raft.CurrentTerm() != term {
			return r.notLeader()
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Server is one member of the Raft group.
type Server struct {
	ID, Address string
	Voter       bool
	Leader      bool
}

// Servers returns the group's members as this server knows them.
func (r *Replica) Servers() ([]Server, error) {
	future := r.raft.GetConfiguration()
	if err := future.Error(); err != nil {
		return nil, err
	}
	_, leader := r.raft.LeaderWithID()
	var servers []Server
	for _, s := range future.Configuration().Servers {
		servers = append(servers, Server{
			ID: string(s.ID), Address: string(s.Address), Voter: s.Suffrage == raft.Voter, Leader: s.ID == leader,
		})
	}
	return servers, nil
}

// Status is this server's part in the group.
type Status struct {
	State    string // Leader, Follower, Candidate or Shutdown
	Ready    bool   // it leads and takes proposals
	Term     uint64
	LeaderID string
	Applied  uint64
	Last     uint64
	// LastContact is the time of the last message from the leader; zero where
	// there is none.
	LastContact time.Time
	Log         logstore.Stats
}

// Status returns one look at the server.
func (r *Replica) Status() Status {
	_, leader := r.raft.LeaderWithID()
	return Status{
		State:       r.raft.State().String(),
		Ready:       r.seq.ready.Load() > 0,
		Term:        r.raft.CurrentTerm(),
		LeaderID:    string(leader),
		Applied:     r.applied.Load(),
		Last:        r.raft.LastIndex(),
		LastContact: r.raft.LastContact(),
		Log:         r.gens.Stats(),
	}
}

// WaitReady returns once this server takes proposals as the leader, or with
// ctx's error or ErrClosed.
func (r *Replica) WaitReady(ctx context.Context) error {
	for {
		wait := r.seq.whenReady()
		if wait == nil {
			return nil
		}
		select {
		case <-wait:
		case <-r.failed:
			return r.failure
		case <-r.closing:
			return ErrClosed
		case <-ctx.Done():
			return fmt.Errorf("waiting for leadership: %w", ctx.Err())
		}
	}
}

// Close answers what is in flight, as far as that is known before ctx ends,
// and stops the replica: waits end with ErrClosed, the log records where it
// ends. Further calls return the first one's result.
//
// When ctx ends, what was not handed to Raft yet is answered with ErrClosed;
// the rest gets a moment more, and then ErrUnknownOutcome. A disk that hangs
// can keep Raft from stopping: then Close returns ErrHangs, and its files stay
// open.
func (r *Replica) Close(ctx context.Context) error {
	r.closeOnce.Do(func() { r.closeErr = r.close(ctx) })
	return r.closeErr
}

func (r *Replica) close(ctx context.Context) error {
	close(r.closing)
	r.askMu.Lock()
	r.closed = true
	r.askMu.Unlock()
	if r.Err() != nil {
		// Raft may not answer any more.
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		cancel()
	}
	graceful, cancel := outlive(ctx, closeGrace)
	defer cancel()

	var err error
	drained := r.seq.stop()
	select {
	case <-drained:
	case <-ctx.Done():
		err = fmt.Errorf("appends still in flight: %w", ctx.Err())
		r.seq.shut(ErrClosed)
	}
	// Raft leaves those that it still holds when it shuts down unanswered.
	settled := await(graceful, drained) && await(graceful, after(r.asking.Wait))
	if settled && err == nil && r.Err() == nil {
		// So that the next start has nothing to apply again.
		taken := make(chan error, 1)
		go func() { taken <- r.raft.Snapshot().Error() }()
		select {
		case snapErr := <-taken:
			if snapErr != nil && !errors.Is(snapErr, raft.ErrNothingNewToSnapshot) {
				err = fmt.Errorf("snapshot: %w", snapErr)
			}
		case <-ctx.Done():
			err = fmt.Errorf("snapshot: %w", ctx.Err())
		}
	}
	down := r.raft.Shutdown()
	stopped := await(graceful, after(func() { _ = down.Error() }))
	r.seq.abandon()
	<-drained
	r.watermark.close()
	r.watching.Wait()
	if !stopped {
		return errors.Join(err, ErrHangs)
	}
	return errors.Join(err, r.snapshots.drop(), r.gens.close(), r.stable.Close())
}

// outlive returns a context that ends some time after ctx does.
func outlive(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(d):
			cancel()
		case <-longer.Done():
		}
	})
	return longer, func() { stop(); cancel() }
}

// after returns what is closed when f has returned.
func after(f func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		f()
		close(done)
	}()
	return done
}

// await waits for an event until ctx ends, and tells whether it came.
func await(ctx context.Context, event <-chan struct{}) bool {
	select {
	case <-event:
		return true
	default:
	}
	select {
	case <-event:
		return true
	case <-ctx.Done():
		return false
	}
}
