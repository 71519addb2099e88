package replica

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
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
	log       *logstore.Log
	stable    *stableStore
	raft      *raft.Raft
	seq       *sequencer
	watermark *watermark
	applied   *atomic.Uint64

	// shown is the last entry that the state machine was given, and progress
	// wakes those who wait for one; see WaitApplied.
	shown    atomic.Uint64
	progress watermark

	transport  *transport // nil in a group that reaches nobody
	dog        *watchdog
	pilot      *pilot
	changes    broadcast
	confirming confirmations
	space      space

	failOnce sync.Once
	failure  atomic.Pointer[error]
	opened   chan struct{} // Open has returned
	severed  chan struct{} // after a failure: everything is cut off
	failed   chan struct{}

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
			if half.Err() != nil {
				<-half.severed
			}
			for i := len(opened) - 1; i >= 0; i-- {
				err = errors.Join(err, opened[i]())
			}
		}
	}()

	if r.log, err = logstore.Open(filepath.Join(cfg.Dir, "log"), logstore.Options{FS: cfg.FS, SegmentSize: cfg.SegmentSize}); err != nil {
		return nil, err
	}
	opened = append(opened, r.log.Close)
	if rec := r.log.Recovery(); rec.Torn != "" {
		cfg.Logger.Warn("cut off a write that a crash interrupted; nothing in it was acknowledged", "file", rec.Torn, "position", rec.Position, "bytes", rec.Bytes)
	}
	snapshots, err := openSnapshots(cfg.FS, filepath.Join(cfg.Dir, "snapshots"))
	if err != nil {
		return nil, err
	}
	machine, term, err := r.recoverState(snapshots)
	if err != nil {
		return nil, err
	}
	if r.stable, err = openStable(filepath.Join(cfg.Dir, "raft.db"), term, r.fatal); err != nil {
		return nil, err
	}
	opened = append(opened, r.stable.Close)
	store := &logStore{log: r.log, applied: r.applied, fatal: r.fatal}
	if cfg.Bootstrap {
		if err := r.bootstrap(store, snapshots); err != nil {
			return nil, err
		}
	}
	var transport raft.Transport
	if cfg.Network != nil {
		r.transport = newTransport(&r.cfg)
		opened = append(opened[1:], func() error {
			err := half.transport.Close()
			half.transport.wait()
			return err
		})
		transport = r.transport
	} else {
		_, transport = raft.NewInmemTransport(raft.ServerAddress(cfg.Address))
	}
	started, err := startRaft(func() (*raft.Raft, error) {
		return raft.NewRaft(cfg.raftConfig(), machine, watchedLog{store, r.dog}, watchedStable{r.stable, r.dog}, snapshots, transport)
	})
	if err != nil {
		return nil, fmt.Errorf("start raft: %w", err)
	}
	r.raft = started
	r.seq = newSequencer(r.raft, r.log, &r.cfg, r.notLeader)
	r.seq.changed = r.changes.poke
	r.pilot = newPilot(r)
	r.seq.start()
	r.watching.Go(r.watchLog)
	r.watching.Go(func() { r.dog.run(r.closing) })
	r.watching.Go(r.watchLeader)
	r.watching.Go(r.watchSpace)
	r.watching.Go(r.pilot.run)
	return r, nil
}

// recoverState makes the state machine of the newest snapshot, and reads what
// Raft will read of the log, so that damage there is an error of Open's and not
// a panic of Raft's. It also returns the greatest term that this server has
// seen.
func (r *Replica) recoverState(snapshots *snapshotStore) (machine *fsm, term uint64, err error) {
	snap, damage, err := snapshots.newest()
	if err != nil {
		return nil, 0, err
	}
	if damage != nil {
		r.cfg.Logger.Warn("a snapshot is damaged; going on from an older one", "error", damage)
	}
	var state fsmState
	st := r.log.Stats()
	logDir := filepath.Join(r.cfg.Dir, "log")
	if snap == nil {
		if st.FirstIndex > 1 {
			return nil, 0, &CorruptError{snapshots.dir, fmt.Sprintf("the log starts at index %d, but there is no snapshot of what came before", st.FirstIndex)}
		}
		snap = &snapshotFile{}
	} else {
		file := snapshots.path(snapshotID(snap.Index, snap.Term))
		if err := unmarshalStrictly(snap.State, &state); err != nil {
			return nil, 0, &CorruptError{file, err.Error()}
		}
		switch {
		case st.LastIndex < snap.Index || st.NextOffset < state.NextOffset:
			return nil, 0, &CorruptError{logDir, fmt.Sprintf("the log ends at index %d, offset %d, but up to index %d, offset %d was committed when the snapshot was taken", st.LastIndex, st.NextOffset, snap.Index, state.NextOffset)}
		case st.FirstIndex > snap.Index+1:
			return nil, 0, &CorruptError{logDir, fmt.Sprintf("the log starts at index %d, the snapshot is of index %d", st.FirstIndex, snap.Index)}
		}
		if err := r.checkSeam(file, snap, &state); err != nil {
			return nil, 0, err
		}
	}
	r.applied.Store(snap.Index)
	r.watermark.advance(state.NextOffset)
	// Raft reads the last entry even if a snapshot covers it.
	var buf []byte
	for index := max(min(snap.Index+1, st.LastIndex), st.FirstIndex); index <= st.LastIndex; index++ {
		var err error
		if _, buf, err = r.log.Entry(index, buf); err != nil {
			return nil, 0, err
		}
	}
	return &fsm{state: state, watermark: r.watermark, applied: r.applied, onApplied: r.onApplied}, max(snap.Term, r.log.LastTerm()), nil
}

// checkSeam compares a snapshot with the entry that it was taken behind, where
// that is kept: a snapshot of another log would move the high watermark to
// where nothing was committed.
func (r *Replica) checkSeam(file string, snap *snapshotFile, state *fsmState) error {
	e, _, err := r.log.Entry(snap.Index, nil)
	switch {
	case errors.Is(err, logstore.ErrNotFound):
		return nil
	case err != nil:
		return err
	}
	if next := e.BaseOffset + uint64(e.Count); e.Term != snap.Term || next != state.NextOffset {
		return &CorruptError{file, fmt.Sprintf("it is of index %d, term %d, next offset %d; the log has term %d, next offset %d there", snap.Index, snap.Term, state.NextOffset, e.Term, next)}
	}
	return nil
}

// bootstrap makes the first configuration if there is nothing at all. Raft
// writes a term before it, and a crash between the two would leave a server
// that believes to have state but has no peers, not even itself; a term
// without a log is such a leftover.
func (r *Replica) bootstrap(store *logStore, snapshots *snapshotStore) error {
	if last, err := store.LastIndex(); err != nil || last > 0 {
		return err
	}
	if ids, err := snapshots.ids(); err != nil || len(ids) > 0 {
		return err
	}
	if err := r.stable.SetUint64(keyCurrentTerm, 0); err != nil {
		return err
	}
	configuration := raft.Configuration{Servers: []raft.Server{{
		ID: raft.ServerID(r.cfg.ID), Address: raft.ServerAddress(r.cfg.Address), Suffrage: raft.Voter,
	}}}
	if err := raft.BootstrapCluster(r.cfg.raftConfig(), store, r.stable, snapshots, nil, configuration); err != nil {
		return fmt.Errorf("bootstrap: %w", err)
	}
	return nil
}

// watchLog notices a failure of the log's own background writes.
func (r *Replica) watchLog() {
	select {
	case <-r.log.Failed():
		r.fatal(r.log.Err())
	case <-r.closing:
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
	if r.space.full.Load() {
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

// Bounds returns the first offset that is kept, the high watermark, and the
// offset after the last stored record, committed or not.
func (r *Replica) Bounds() (first, watermark, end uint64) {
	// In this order: the end is never below the watermark that was read before.
	watermark = r.watermark.load()
	st := r.log.Stats()
	return min(st.FirstOffset, watermark), watermark, st.NextOffset
}

// WaitReadable returns once offset is below the high watermark, or with ctx's
// error or ErrClosed.
func (r *Replica) WaitReadable(ctx context.Context, offset uint64) error {
	return r.watermark.wait(ctx, offset)
}

// Read reads committed entries with records into buf, as
// logstore.Log.ReadBatches does, from the one that holds offset from.
func (r *Replica) Read(from uint64, buf []byte, dst []logstore.Batch) ([]logstore.Batch, error) {
	limit := r.watermark.load()
	dst, err := r.log.ReadBatches(from, limit, buf, dst)
	switch {
	case errors.Is(err, logstore.ErrNotFound):
		return dst, &OffsetOutOfRangeError{Offset: from, First: r.log.FirstOffset(), Next: limit}
	case errors.Is(err, logstore.ErrClosed):
		return dst, ErrClosed
	}
	return dst, err
}

// OffsetAtTime returns the first committed offset whose append time is t or
// later; the high watermark when there is none.
func (r *Replica) OffsetAtTime(t time.Time) (uint64, error) {
	watermark := r.watermark.load()
	nanos := t.UnixNano()
	switch {
	case t.Before(time.Unix(0, 0)):
		nanos = 0
	case t.After(time.Unix(0, 1<<63-1)):
		return watermark, nil
	}
	offset, err := r.log.OffsetAtTime(nanos)
	if errors.Is(err, logstore.ErrClosed) {
		err = ErrClosed
	}
	return min(offset, watermark), err
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
		Log:         r.log.Stats(),
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
// open.
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
	if r.Err() != nil {
		<-r.severed
	}
	var closeErr error
	if r.transport != nil {
		// Raft's goroutines may wait for answers of other servers.
		closeErr = r.transport.Close()
	}
	stopped := await(graceful, after(func() { _ = down.Error() }))
	r.seq.abandon()
	<-drained
	r.watermark.close()
	r.progress.close()
	r.watching.Wait()
	if !stopped {
		return errors.Join(err, closeErr, ErrHangs)
	}
	if r.transport != nil {
		r.transport.wait()
	}
	return errors.Join(err, closeErr, r.log.Close(), r.stable.Close())
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
