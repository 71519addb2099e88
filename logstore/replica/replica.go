package replica

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs"
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

	// shown is the last entry that the state machine was given, and progress
	// wakes those who wait for one; see WaitApplied.
	shown    atomic.Uint64
	progress watermark

	// belief is the cluster that this server was told it is in; founding is
	// told when that changes.
	belief   atomic.Pointer[string]
	founding chan struct{}

	transport  *transport // nil in a group that reaches nobody
	dog        *watchdog
	pilot      *pilot
	changes    broadcast
	confirming confirmations
	space      space

	failOnce sync.Once
	failure  atomic.Pointer[error]
	// lastTransfer is the last attempt to hand over that failed, see stuck.
	lastTransfer atomic.Pointer[transfer]
	opened       chan struct{} // Open has returned
	severed      chan struct{} // after a failure: everything is cut off
	failed       chan struct{}

	closeOnce sync.Once
	closeErr  error
	// abandoned, made by a Close that returns ErrHangs, is closed when what that
	// left behind has come to its end.
	abandoned chan struct{}
	closing   chan struct{}
	watching  sync.WaitGroup

	// Guards the beginning of a question to Raft, which close waits for,
	// against the end of all.
	askMu  sync.Mutex
	closed bool
	// changing is held while a change of the group is handed to Raft, so that a
	// removal and its tombstone are seen by whoever would take the server in
	// again, or come after it.
	changing vfs.Mutex
	asking   sync.WaitGroup
}

// closeGrace is how long Close waits for Raft after its context has ended: the
// files cannot be closed under it.
const closeGrace = 2 * time.Second

// Open starts a replica from what its directory holds. It does not wait for a
// leader. Damage is refused with ErrDamaged, and then nothing has changed.
func Open(cfg Config) (r *Replica, err error) {
	var opened []func() error
	if cfg.Network != nil {
		opened = append(opened, cfg.Network.Close)
	}
	if err := cfg.applyDefaultsAndValidate(); err != nil {
		if cfg.Network != nil {
			err = errors.Join(err, cfg.Network.Close())
		}
		return nil, err
	}
	r = &Replica{
		cfg:       cfg,
		watermark: &watermark{},
		applied:   &atomic.Uint64{},
		start:     &atomic.Uint64{},
		founding:  make(chan struct{}, 1),
		space:     space{wake: make(chan struct{}, 1)},
		opened:    make(chan struct{}),
		severed:   make(chan struct{}),
		failed:    make(chan struct{}),
		closing:   make(chan struct{}),
	}
	r.dog = newWatchdog(cfg.StallLimit, r.stalled)
	half := r // also when nil is returned
	defer func() {
		close(half.opened)
		if err != nil {
			if isDamage(err) && !errors.Is(err, ErrDamaged) {
				err = fmt.Errorf("%w: %w", ErrDamaged, err)
			}
			if half.Err() != nil {
				<-half.severed
			}
			for i := len(opened) - 1; i >= 0; i-- {
				err = errors.Join(err, opened[i]())
			}
		}
	}()
	files, err := openFiles(&r.cfg, r.broken)
	if err != nil {
		return nil, err
	}
	opened = append(opened, files.close)
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
	r.believe(cfg.ClusterID)
	r.machine.clusterID, r.machine.broken = r.believed, r.broken
	r.machine.onShown, r.machine.onApplied = r.progress.advance, r.shown.Store
	r.snapshots = r.newSnapshots()
	r.machine.install = r.snapshots.install
	r.store = &logStore{gens: r.gens, applied: r.applied, seam: &r.machine.seam, broken: r.broken, down: r.Err, rolled: r.retention.poke, full: r.space.hit}
	r.retention.init(cfg.Retention)
	if err := bootstrap(&r.cfg, files, r.store); err != nil {
		return nil, err
	}
	transport := cfg.transport
	if cfg.Network != nil {
		r.transport = newTransport(&r.cfg)
		r.transport.committed = &r.progress
		opened = append(opened[1:], func() error {
			err := half.transport.Close()
			half.transport.wait()
			return err
		})
		transport = r.transport
	} else if transport == nil {
		_, transport = raft.NewInmemTransport(raft.ServerAddress(cfg.Address))
	}
	if r.raft, err = launch(func() (*raft.Raft, error) {
		return raft.NewRaft(cfg.raftConfig(), r.machine, watchedLog{r.store, r.dog}, watchedStable{r.stable, r.dog}, r.snapshots, transport)
	}); err != nil {
		if failure := r.Err(); failure != nil {
			err = failure
		}
		return nil, fmt.Errorf("start raft: %w", err)
	}
	r.store.raft.Store(r.raft)
	r.seq = newSequencer(r.raft, r.gens, &r.cfg, r.refusal)
	r.seq.changed = r.changes.poke
	r.pilot = newPilot(r)
	r.seq.start()
	r.own(func() { r.mind(files.gen) })
	r.own(r.mindClusterID)
	r.own(r.mindRetention)
	r.own(r.scrub)
	r.own(func() { r.dog.run(r.closing) })
	r.own(r.watchLeader)
	r.own(r.watchSpace)
	r.own(r.pilot.run)
	return r, nil
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
	if r.space.full.Load() && (r.raft.State() == raft.Leader || r.alone()) {
		return nil, ErrDiskFull
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

// refusal says why nothing can be appended by a server that does not lead.
func (r *Replica) refusal() error {
	if r.space.full.Load() && r.alone() {
		return ErrDiskFull // which is why it does not
	}
	return r.notLeader()
}

// WaitReadable returns once offset is below the high watermark, or with ctx's
// error or ErrClosed.
func (r *Replica) WaitReadable(ctx context.Context, offset uint64) error {
	return r.watermark.wait(ctx, offset)
}

// Status is this server's part in the group.
type Status struct {
	State   string // Leader, Follower, Candidate or Shutdown
	Ready   bool   // it leads and takes proposals
	Term    uint64
	Applied uint64
	// Committed is the highest index that the leader has called committed, as far
	// as this server was told since it was opened; 0 where it was told nothing.
	Committed uint64
	Last      uint64 // index of the last entry, LastTerm its term
	LastTerm  uint64
	// Who leads, as far as is known, and where it says that it is.
	LeaderID, LeaderAddress string
	// LastContact is the time of the last message from the leader; zero where
	// there is none.
	LastContact time.Time
	// DiskFull: records are refused for want of space.
	DiskFull bool
	// DiskFree is how many bytes of the disk were free when the replica looked
	// last, which is a second ago at most unless the disk hangs.
	DiskFree uint64
	Log      logstore.Stats
}

// Status returns one look at the server.
func (r *Replica) Status() Status {
	address, leader := r.raft.LeaderWithID()
	return Status{
		State:         r.raft.State().String(),
		Ready:         r.seq.ready.Load() > 0,
		Term:          r.raft.CurrentTerm(),
		Applied:       r.applied.Load(),
		Committed:     r.committed(),
		Last:          r.raft.LastIndex(),
		LastTerm:      r.lastTerm(),
		LeaderID:      string(leader),
		LeaderAddress: string(address),
		LastContact:   r.raft.LastContact(),
		DiskFull:      r.space.full.Load(),
		DiskFree:      r.space.free.Load(),
		Log:           r.gens.Stats(),
	}
}

func (r *Replica) committed() uint64 {
	index := r.raft.CommitIndex()
	if r.transport != nil {
		index = max(index, r.transport.told.Load())
	}
	return index
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
			return r.Err()
		case <-r.closing:
			return ErrClosed
		case <-ctx.Done():
			return fmt.Errorf("waiting for leadership: %w", ctx.Err())
		}
	}
}

// Close answers what is in flight, as far as that is known before ctx ends,
// and stops the replica: waits end with ErrClosed, the log records where it
// ends. A leader first hands leadership to another voter that answers, if ctx
// leaves the time. Further calls return the first one's result.
//
// When ctx ends, what was not handed to Raft yet is answered with ErrClosed;
// the rest gets a moment more, and then ErrUnknownOutcome. A disk that hangs
// can keep Raft from stopping: then Close returns ErrHangs, and its files stay
// open until the disk comes back.
func (r *Replica) Close(ctx context.Context) error {
	r.closeOnce.Do(func() { r.closeErr = r.close(ctx) })
	return r.closeErr
}

func (r *Replica) close(ctx context.Context) error {
	r.resign(ctx)
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
			// Nor is there one of a group whose newest members are not agreed on.
			if snapErr != nil && !errors.Is(snapErr, raft.ErrNothingNewToSnapshot) && !strings.HasPrefix(snapErr.Error(), "cannot take snapshot now") {
				err = fmt.Errorf("snapshot: %w", snapErr)
			}
		case <-ctx.Done():
			err = fmt.Errorf("snapshot: %w", ctx.Err())
		}
	}
	down := r.raft.Shutdown()
	if r.Err() != nil {
		<-r.severed
	}
	var closeErr error
	if r.transport != nil {
		// Raft's goroutines may wait for answers of other servers.
		closeErr = r.transport.Close()
	}
	// Time of its own: a question that Raft has not answered is no sign that it
	// hangs.
	stopping, cancel := outlive(ctx, closeGrace)
	defer cancel()
	ended := after(func() { _ = down.Error() })
	stopped := await(stopping, ended)
	r.seq.abandon()
	<-drained
	r.watermark.close()
	r.progress.close()
	r.watching.Wait()
	finish := func() error {
		if r.transport != nil {
			r.transport.wait()
		}
		return errors.Join(r.snapshots.drop(), r.gens.close(), r.stable.Close())
	}
	if !stopped {
		// The one goroutine that nobody waits for: the disk may come back before
		// the process ends.
		r.abandoned = make(chan struct{})
		go func() {
			defer close(r.abandoned)
			<-ended
			if err := finish(); err != nil {
				r.cfg.Logger.Warn("closing the log, after its disk has come back", "error", err)
			}
		}()
		return errors.Join(err, closeErr, ErrHangs)
	}
	return errors.Join(err, closeErr, finish())
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
		defer close(done)
		f()
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
