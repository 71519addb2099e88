package replica

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/semaphore"

	"github.com/diurnalog/diurna/logstore"
)

// Proposal is one batch of records to append, whole or not at all.
type Proposal struct {
	// Records is the entry's payload, opaque here. The replica may keep it
	// until the outcome is known, and does not change it.
	Records []byte
	// Count is the number of records, at least 1.
	Count uint32
	// Expected, if set, is the offset the first record must get.
	Expected *uint64
}

// Ack says where an appended batch went.
type Ack struct {
	BaseOffset, NextOffset uint64
	AppendTime             time.Time
}

// Pending is a proposal that is under way.
type Pending struct {
	p    Proposal
	size int64
	done chan struct{}
	ack  Ack
	err  error
}

// Done is closed when the outcome is known.
func (p *Pending) Done() <-chan struct{} { return p.done }

// Result returns the outcome, once Done is closed. Errors other than
// ErrUnknownOutcome mean that nothing was appended.
func (p *Pending) Result() (Ack, error) { return p.ack, p.err }

// proposalOverhead is what a waiting proposal costs beside its records.
const proposalOverhead = 512

// sequencer turns proposals into Raft entries. While this node leads, its one
// goroutine is the only source of entries with records, and that is what makes
// offsets dense: it assigns base offset and append time, checks conditions,
// and hands the entry to Raft, so that what was checked is what is appended.
//
// Proposals that wait at the same time become one entry, up to entryBytes, and
// a few entries are in flight at once, so that the next group is sequenced and
// written while the previous one is synced and replicated. What an entry costs,
// in syncs, messages and wake-ups on every server, hardly depends on its size;
// so the next one does not start before it is as large as all that are in
// flight together. Few callers get an entry each, many get large ones, and
// nobody waits longer than for what is in flight.
type sequencer struct {
	raft raftNode
	log  logEnd
	now  func() time.Time
	// leaderHint makes the error for a node that does not lead.
	leaderHint func() error

	entryBytes int
	room       *semaphore.Weighted // bytes of all proposals not yet answered

	mu       sync.Mutex
	queue    []*Pending
	queued   int64     // size of queue
	since    time.Time // when the queue was empty last; only for committed
	inFlight int64     // size of what has left queue and has no answer
	open     bool      // proposals are taken: this node leads
	closing  bool
	wake     chan struct{} // one token: due, resync or closing changed

	slots  chan struct{} // one for each entry in flight
	groups chan *group   // in the order of their offsets
	resync atomic.Bool   // an entry failed: offsets must be read anew
	// ready is the term in which this node leads, all of earlier terms is
	// applied and offsets are known; 0 if there is none.
	ready atomic.Uint64
	// began is an index that was this node's last one when that term was settled:
	// who has it follows this leader.
	began atomic.Uint64
	// changed is called when ready changes.
	changed func()
	// committed, if set, is told how long an entry took.
	committed func(time.Duration)
	// becameReady is closed when ready is set, and guarded by mu.
	becameReady chan struct{}

	quitOnce, deadOnce sync.Once

	quit chan struct{}
	dead chan struct{} // closed by abandon
	wg   sync.WaitGroup
}

// logEnd is what the sequencer needs of the log.
type logEnd interface {
	LastIndex() uint64
	NextOffset() uint64
	LastAppendTime() int64
}

// raftNode is what the sequencer needs of a *raft.Raft.
type raftNode interface {
	State() raft.RaftState
	CurrentTerm() uint64
	LeaderCh() <-chan bool
	ApplyLog(raft.Log, time.Duration) raft.ApplyFuture
	Barrier(time.Duration) raft.Future
	VerifyLeader() raft.Future
}

// errAbandoned: Raft ended, or hangs, and left a request without an answer.
var errAbandoned = errors.New("raft gave no answer before it stopped")

// group is the proposals that share an entry.
type group struct {
	term    uint64
	size    int64            // of all its proposals
	since   time.Time        // since when it was waited for; see sequencer.since
	future  raft.ApplyFuture // nil if all of them failed their conditions
	members []*Pending
	refused []*Pending // by their condition; err is set
}

func newSequencer(r raftNode, log logEnd, cfg *Config, leaderHint func() error) *sequencer {
	return &sequencer{
		raft:       r,
		log:        log,
		now:        cfg.Now,
		leaderHint: leaderHint,
		entryBytes: cfg.EntryBytes,
		room:       semaphore.NewWeighted(cfg.InFlightBytes),
		wake:       make(chan struct{}, 1),
		slots:      make(chan struct{}, cfg.EntriesInFlight),
		groups:     make(chan *group, cfg.EntriesInFlight+1),
		quit:       make(chan struct{}),
		dead:       make(chan struct{}),
		changed:    func() {},
		committed:  cfg.Observer.Committed,

		becameReady: make(chan struct{}),
	}
}

func (s *sequencer) start() {
	s.wg.Go(s.run)
	s.wg.Go(s.complete)
}

// propose queues a proposal. See Replica.Propose.
func (s *sequencer) propose(ctx context.Context, p Proposal, wait bool) (*Pending, error) {
	if p.Count == 0 {
		return nil, errors.New("a batch needs at least one record")
	}
	if len(p.Records) > s.entryBytes {
		return nil, &TooLargeError{len(p.Records), s.entryBytes}
	}
	size := int64(len(p.Records)) + proposalOverhead
	if wait {
		if err := s.room.Acquire(ctx, size); err != nil {
			return nil, err
		}
	} else if !s.room.TryAcquire(size) {
		return nil, ErrOverloaded
	}
	pending := &Pending{p: p, size: size, done: make(chan struct{})}
	if err := s.enqueue(pending); err != nil {
		s.room.Release(size)
		return nil, err
	}
	return pending, nil
}

func (s *sequencer) enqueue(p *Pending) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closing:
		return ErrClosed
	case !s.open:
		return s.leaderHint()
	}
	if len(s.queue) == 0 && s.committed != nil {
		s.since = s.now()
	}
	s.queue = append(s.queue, p)
	s.queued += p.size
	if s.due() {
		s.poke()
	}
	return nil
}

// due tells whether what waits is worth an entry now. To be called with mu held.
func (s *sequencer) due() bool {
	return s.queued > 0 && (s.queued >= s.inFlight || s.queued >= int64(s.entryBytes) || s.closing)
}

// landed notes that a group has been answered.
func (s *sequencer) landed(g *group) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inFlight -= g.size
	if s.due() {
		s.poke()
	}
}

func (s *sequencer) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// finish answers a proposal.
func (s *sequencer) finish(p *Pending, err error) {
	p.err = err
	if err != nil {
		p.ack = Ack{}
	}
	p.p.Records = nil
	s.room.Release(p.size)
	close(p.done)
}

// run is the sequencing goroutine: one round per term of leadership, or per
// failure within one.
func (s *sequencer) run() {
	defer close(s.groups)
	leader := s.raft.LeaderCh()
	for {
		if s.raft.State() != raft.Leader {
			s.shut(s.leaderHint())
			select {
			case <-leader:
				continue
			case <-s.quit:
				return
			}
		}
		s.mu.Lock()
		s.open = !s.closing
		s.mu.Unlock()
		term := s.raft.CurrentTerm()
		if !s.settle() {
			select {
			case <-s.quit:
				s.shut(ErrClosed)
				return
			case <-leader:
			case <-time.After(50 * time.Millisecond): // the term may go on
			}
			continue
		}
		// What the channel holds now tells of this term's beginning, or of an
		// end that shows in what is looked at next: Raft changes its state
		// before it says so, and its term before it leads again. What comes
		// later is news to serve.
		select {
		case <-leader:
		default:
		}
		if s.raft.State() != raft.Leader || s.raft.CurrentTerm() != term {
			continue
		}
		s.began.Store(s.log.LastIndex())
		s.setReady(term)
		done := s.serve(leader, term)
		s.setReady(0)
		if done {
			s.shut(ErrClosed)
			return
		}
	}
}

func (s *sequencer) setReady(term uint64) {
	defer s.changed()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready.Store(term)
	if term > 0 {
		close(s.becameReady)
	} else {
		s.becameReady = make(chan struct{})
	}
}

// whenReady returns nil, or what is closed when that changes.
func (s *sequencer) whenReady() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ready.Load() > 0 {
		return nil
	}
	return s.becameReady
}

// settle waits until nothing of ours is in flight, and until this term's first
// entry and all before it are applied. From then on nobody but this goroutine
// can append records, until the term ends. Entries that are still on their way
// then are refused by Raft, or by the store unless they continue what it holds.
func (s *sequencer) settle() bool {
	for range cap(s.slots) {
		select {
		case s.slots <- struct{}{}:
		case <-s.quit:
			return false
		}
	}
	for range cap(s.slots) {
		<-s.slots
	}
	s.resync.Store(false)
	return s.await(func() error { return s.raft.Barrier(0).Error() }) == nil
}

// await returns what an answer of Raft's is. Requests that are queued when Raft
// shuts down are never answered; the goroutine that waits for one stays with
// it.
func (s *sequencer) await(answer func() error) error {
	answered := make(chan error, 1)
	go func() { answered <- answer() }()
	select {
	case err := <-answered:
		return err
	case <-s.dead:
	}
	select {
	case err := <-answered:
		return err
	default:
		return errAbandoned
	}
}

// serve sequences proposals until this node leads no more, an entry fails
// (false), or the replica closes and the queue is empty (true).
func (s *sequencer) serve(leader <-chan bool, term uint64) (closed bool) {
	next, last := s.log.NextOffset(), s.log.LastAppendTime()
	for {
		// A slot first: what arrives while all are taken shares the next entry.
		select {
		case s.slots <- struct{}{}:
		case <-leader:
			return false
		}
		var (
			batch []*Pending
			size  int64
			since time.Time
		)
		for {
			if s.resync.Load() || s.lost(leader) {
				<-s.slots
				return false
			}
			var closing bool
			if batch, size, since, closing = s.take(); len(batch) > 0 {
				break
			}
			if closing {
				<-s.slots
				return true
			}
			select {
			case <-s.wake:
			case <-leader:
				<-s.slots
				return false
			}
		}
		last = max(last, s.now().UnixNano())
		g := s.sequence(batch, &next, last)
		g.term, g.size, g.since = term, size, since
		if g.future == nil {
			// Still in line: the refusal rests on offsets of entries that are
			// not committed yet.
			<-s.slots
		}
		s.groups <- g
	}
}

// lost tells whether the term that serve works for has ended, also when another
// one of this node's has begun since: then there is word of it in the channel.
func (s *sequencer) lost(leader <-chan bool) bool {
	if s.raft.State() != raft.Leader {
		return true
	}
	select {
	case <-leader:
		return true
	default:
		return false
	}
}

// take returns waiting proposals for one entry, if that is due, their size, and
// since when the first of them waits, at most.
func (s *sequencer) take() (batch []*Pending, size int64, since time.Time, closing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.due() {
		return nil, 0, time.Time{}, s.closing
	}
	n, bytes := 0, 0
	for n < len(s.queue) {
		bytes += len(s.queue[n].p.Records)
		if n > 0 && bytes > s.entryBytes {
			break
		}
		size += s.queue[n].size
		n++
	}
	batch = s.queue[:n:n]
	if s.queue = s.queue[n:]; len(s.queue) == 0 {
		s.queue = nil
	}
	s.queued -= size
	s.inFlight += size
	return batch, size, s.since, s.closing
}

// sequence makes one entry of a batch and hands it to Raft.
func (s *sequencer) sequence(batch []*Pending, next *uint64, now int64) *group {
	g := &group{}
	base := *next
	size := 0
	for _, p := range batch {
		switch {
		case p.p.Expected != nil && *p.p.Expected != *next:
			p.err = &OffsetMismatchError{Expected: *p.p.Expected, Next: *next}
			g.refused = append(g.refused, p)
		default:
			p.ack = Ack{BaseOffset: *next, NextOffset: *next + uint64(p.p.Count), AppendTime: time.Unix(0, now)}
			*next = p.ack.NextOffset
			size += len(p.p.Records)
			g.members = append(g.members, p)
		}
	}
	if len(g.members) == 0 {
		return g
	}
	data := g.members[0].p.Records
	if len(g.members) > 1 {
		data = make([]byte, 0, size)
		for _, p := range g.members {
			data = append(data, p.p.Records...)
		}
	}
	// Without a timeout: Raft takes it, or says that it does not lead. Entries
	// of one goroutine keep their order.
	g.future = s.raft.ApplyLog(raft.Log{Data: data, Extensions: encodeExtensions(base, uint32(*next-base), now)}, 0)
	return g
}

// complete answers proposals, in order.
func (s *sequencer) complete() {
	failed := false // the entry before; reset with the next that commits
	for g := range s.groups {
		var err error
		if g.future != nil {
			if err = s.await(g.future.Error); err == nil {
				if applyErr, ok := g.future.Response().(error); ok {
					err = applyErr
				}
			}
			failed = err != nil
			if !failed && s.committed != nil {
				s.committed(s.now().Sub(g.since))
			}
			if failed {
				s.resync.Store(true)
				s.poke()
			}
			<-s.slots
		}
		for _, p := range g.members {
			s.finish(p, s.outcome(err))
		}
		// An offset that rests on an entry which was not committed is no answer;
		// nor is one of a leader that others have replaced. An entry that was
		// committed with the refusals shows that it was not; without one Raft
		// has to ask. That they were not appended is certain in any case.
		doubt := failed || g.future == nil && !s.stillLeads(g.term)
		for _, p := range g.refused {
			if doubt {
				p.err = s.leaderHint()
			}
			s.finish(p, p.err)
		}
		s.landed(g)
	}
}

// stillLeads tells whether nobody else can have led since term began.
func (s *sequencer) stillLeads(term uint64) bool {
	err := s.await(func() error { return s.raft.VerifyLeader().Error() })
	return err == nil && s.raft.CurrentTerm() == term
}

// outcome turns Raft's error into ours.
func (s *sequencer) outcome(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		// Refused before it was written. Not so raft.ErrRaftShutdown, which is
		// also the answer to entries that were committed but not applied.
		return s.leaderHint()
	case errors.Is(err, logstore.ErrFull):
		// Nothing was written, but this server leads no more.
		return fmt.Errorf("%w: %w", ErrDiskFull, err)
	case errors.Is(err, logstore.ErrRejected), errors.Is(err, logstore.ErrTooLarge):
		// Refused by the store, which wrote nothing: an entry before failed, or
		// its term was over.
		return fmt.Errorf("%w (%w)", ErrNoLeader, err)
	default:
		return fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	}
}

// shut stops taking proposals and answers those that wait: none of them was
// handed to Raft.
func (s *sequencer) shut(err error) {
	s.mu.Lock()
	s.open = false
	queue := s.queue
	s.queue, s.queued = nil, 0
	s.mu.Unlock()
	for _, p := range queue {
		s.finish(p, err)
	}
}

// stop takes no more proposals and returns what is closed when those taken are
// answered and the goroutines have ended.
func (s *sequencer) stop() <-chan struct{} {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.quitOnce.Do(func() { close(s.quit) })
	s.poke()
	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		close(done)
	}()
	return done
}

// abandon ends the wait for answers of Raft's. To be called when it has stopped
// or hangs.
func (s *sequencer) abandon() { s.deadOnce.Do(func() { close(s.dead) }) }

// fail takes no more proposals and answers those in flight at once, since Raft
// may never do it. What of them was appended is not known.
func (s *sequencer) fail() {
	s.stop()
	s.shut(ErrNoLeader)
	s.abandon()
}
