package replica

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// fakeNode is a Raft of which the test says what becomes of each entry.
type fakeNode struct {
	mu      sync.Mutex
	state   raft.RaftState
	term    uint64
	verify  error
	barrier func() error // called with mu held
	settled []uint64     // the terms in which a barrier was passed
	early   bool         // an entry came before its term's barrier
	leader  chan bool
	applied chan *fakeFuture // every entry that is handed over
}

func newFakeNode() *fakeNode {
	return &fakeNode{state: raft.Leader, term: 3, leader: make(chan bool, 1), applied: make(chan *fakeFuture, 100)}
}

// become changes state and term as Raft does: first those, then the word.
func (n *fakeNode) become(state raft.RaftState, term uint64) {
	n.mu.Lock()
	n.state, n.term = state, term
	n.mu.Unlock()
	select {
	case <-n.leader:
	default:
	}
	n.leader <- state == raft.Leader
}

func (n *fakeNode) State() raft.RaftState {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state
}

func (n *fakeNode) CurrentTerm() uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.term
}

func (n *fakeNode) LeaderCh() <-chan bool { return n.leader }

func (n *fakeNode) ApplyLog(l raft.Log, _ time.Duration) raft.ApplyFuture {
	f := newFuture()
	f.log = l
	n.mu.Lock()
	n.early = n.early || !slices.Contains(n.settled, n.term)
	n.mu.Unlock()
	n.applied <- f
	return f
}

func (n *fakeNode) Barrier(time.Duration) raft.Future {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.barrier != nil {
		if err := n.barrier(); err != nil {
			return answered(err)
		}
	}
	n.settled = append(n.settled, n.term)
	return answered(nil)
}

func (n *fakeNode) VerifyLeader() raft.Future {
	n.mu.Lock()
	defer n.mu.Unlock()
	return answered(n.verify)
}

// fakeFuture is answered by the test, or never.
type fakeFuture struct {
	raft.IndexFuture
	log      raft.Log
	done     chan struct{}
	err      error
	response any
}

func newFuture() *fakeFuture { return &fakeFuture{done: make(chan struct{})} }

func answered(err error) *fakeFuture {
	f := newFuture()
	f.answer(err)
	return f
}

func (f *fakeFuture) answer(err error) { f.err = err; close(f.done) }
func (f *fakeFuture) Error() error     { <-f.done; return f.err }
func (f *fakeFuture) Response() any    { return f.response }

func (f *fakeFuture) base() uint64 {
	base, _, _, _ := decodeExtensions(f.log.Extensions)
	return base
}

var errHint = errors.New("hint")

func newTestSequencer(t *testing.T, n raftNode, entries int) *sequencer {
	cfg := testConfig(t, "x")
	cfg.EntriesInFlight = entries
	if err := cfg.applyDefaultsAndValidate(); err != nil {
		t.Fatal(err)
	}
	log, err := logstore.Open("log", logstore.Options{FS: vfstest.New(), SegmentSize: logstore.MinSegmentSize})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	return newSequencer(n, log, &cfg, func() error { return errHint })
}

// serving starts a sequencer and waits until it takes proposals.
func serving(t *testing.T, n raftNode, entries int) *sequencer {
	t.Helper()
	s := newTestSequencer(t, n, entries)
	s.start()
	t.Cleanup(func() {
		done := s.stop()
		s.abandon()
		<-done
	})
	awaitReady(s)
	return s
}

func awaitReady(s *sequencer) {
	if wait := s.whenReady(); wait != nil {
		<-wait
	}
}

func at(offset uint64) *uint64 { return &offset }

func mustQueue(t *testing.T, s *sequencer, p Proposal) *Pending {
	t.Helper()
	pending, err := s.propose(t.Context(), p, true)
	if err != nil {
		t.Fatal(err)
	}
	return pending
}

// TestOutcome: what is not certainly absent from the log is unknown.
func TestOutcome(t *testing.T) {
	s := newTestSequencer(t, newFakeNode(), 1)
	for _, tc := range []struct {
		err  error
		want error
	}{
		{nil, nil},
		{raft.ErrNotLeader, errHint},
		{raft.ErrLeadershipTransferInProgress, errHint},
		{fmt.Errorf("x: %w", logstore.ErrRejected), ErrNoLeader},
		{fmt.Errorf("x: %w", logstore.ErrTooLarge), ErrNoLeader},
		{fmt.Errorf("x: %w", logstore.ErrFull), ErrDiskFull},
		{raft.ErrLeadershipLost, ErrUnknownOutcome},
		{raft.ErrRaftShutdown, ErrUnknownOutcome}, // also of committed entries
		{raft.ErrAbortedByRestore, ErrUnknownOutcome},
		{logstore.ErrFailed, ErrUnknownOutcome},
		{logstore.ErrClosed, ErrUnknownOutcome},
		{errAbandoned, ErrUnknownOutcome},
		{errors.New("anything"), ErrUnknownOutcome},
	} {
		got := s.outcome(tc.err)
		if !errors.Is(got, tc.want) || tc.want != ErrUnknownOutcome && errors.Is(got, ErrUnknownOutcome) {
			t.Errorf("%v becomes %v, want %v", tc.err, got, tc.want)
		}
	}
}

// TestAnswersInOrder: nothing is answered before Raft did, nor before what was
// proposed earlier.
func TestAnswersInOrder(t *testing.T) {
	n := newFakeNode()
	s := serving(t, n, 2)
	first := mustQueue(t, s, Proposal{Count: 2})
	f1 := <-n.applied
	second := mustQueue(t, s, Proposal{Count: 3})
	f2 := <-n.applied
	refused := mustQueue(t, s, Proposal{Count: 1, Expected: at(1)})
	if f1.base() != 0 || f2.base() != 2 {
		t.Fatalf("bases %d, %d", f1.base(), f2.base())
	}
	f2.answer(nil)
	for _, p := range []*Pending{first, second, refused} {
		select {
		case <-p.Done():
			t.Fatalf("answered before the first entry: %v", p.err)
		default:
		}
	}
	f1.answer(nil)
	if ack, err := result(first); err != nil || ack.BaseOffset != 0 || ack.NextOffset != 2 {
		t.Errorf("%+v, %v", ack, err)
	}
	if ack, err := result(second); err != nil || ack.BaseOffset != 2 || ack.NextOffset != 5 {
		t.Errorf("%+v, %v", ack, err)
	}
	var mismatch *OffsetMismatchError
	if _, err := result(refused); !errors.As(err, &mismatch) || *mismatch != (OffsetMismatchError{Expected: 1, Next: 5}) {
		t.Errorf("refused: %v", err)
	}
}

// TestFailedEntry: after an entry that failed, offsets are read anew from the
// log, and refusals that rested on it are not given as such.
func TestFailedEntry(t *testing.T) {
	for _, cause := range []error{raft.ErrLeadershipLost, raft.ErrNotLeader, logstore.ErrRejected, raft.ErrRaftShutdown} {
		n := newFakeNode()
		s := serving(t, n, 2)
		lost := mustQueue(t, s, Proposal{Count: 5})
		f := <-n.applied
		refused := mustQueue(t, s, Proposal{Count: 1, Expected: at(0)})
		for len(s.groups) == 0 { // until it is sequenced, behind the other
			runtime.Gosched()
		}
		f.answer(cause)
		if ack, err := result(lost); err == nil || ack != (Ack{}) {
			t.Errorf("%v: %+v, %v", cause, ack, err)
		}
		var mismatch *OffsetMismatchError
		switch _, err := result(refused); {
		case err == nil, errors.As(err, &mismatch):
			t.Errorf("%v: refused: %v", cause, err)
		}
		awaitReady(s)
		again := mustQueue(t, s, Proposal{Count: 1, Expected: at(0)})
		f = <-n.applied
		if f.base() != 0 {
			t.Errorf("%v: base offset %d after it, the log is empty", cause, f.base())
		}
		f.answer(nil)
		if _, err := result(again); err != nil {
			t.Errorf("%v: %v", cause, err)
		}
	}
}

// TestApplyFailure: an entry that the state machine could not apply is not
// acknowledged.
func TestApplyFailure(t *testing.T) {
	n := newFakeNode()
	s := serving(t, n, 2)
	p := mustQueue(t, s, Proposal{Count: 1})
	f := <-n.applied
	f.response = errors.New("cannot apply")
	f.answer(nil)
	if _, err := result(p); !errors.Is(err, ErrUnknownOutcome) {
		t.Error(err)
	}
}

// TestStaleMismatch: a leader that others have replaced knows old offsets.
func TestStaleMismatch(t *testing.T) {
	for name, change := range map[string]func(n *fakeNode){
		"replaced": func(n *fakeNode) { n.verify = raft.ErrNotLeader },
		"again":    func(n *fakeNode) { n.term += 2 }, // leads, but another did in between
	} {
		n := newFakeNode()
		s := serving(t, n, 2)
		n.mu.Lock()
		change(n)
		n.mu.Unlock()
		p := mustQueue(t, s, Proposal{Count: 1, Expected: at(7)})
		if _, err := result(p); err != errHint {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestTermChange: in a new term of its own the sequencer begins with what the
// log holds, after a barrier.
func TestTermChange(t *testing.T) {
	n := newFakeNode()
	s := serving(t, n, 2)
	if got := s.ready.Load(); got != 3 {
		t.Fatalf("ready in term %d", got)
	}
	// Another leader's entry, in between.
	n.become(raft.Follower, 4)
	if err := s.log.(*logstore.Log).Append([]logstore.Entry{{Index: 1, Term: 4, Count: 9, AppendTime: 1 << 62, Payload: []byte("x")}}); err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	refusals := 0
	n.barrier = func() error { // Raft may not have its first entry committed
		if refusals++; refusals <= 2 {
			return raft.ErrNotLeader
		}
		return nil
	}
	n.mu.Unlock()
	n.become(raft.Leader, 5)
	queued, err := s.propose(t.Context(), Proposal{Count: 1}, true)
	for err != nil { // while it has not noticed
		queued, err = s.propose(t.Context(), Proposal{Count: 1}, true)
	}
	f := <-n.applied
	if n.early || refusals != 3 {
		t.Errorf("handed over before the barrier; %d barriers", refusals)
	}
	_, _, when, _ := decodeExtensions(f.log.Extensions)
	if f.base() != 9 || when != 1<<62 {
		t.Errorf("base offset %d, time %d; want 9 and the time of the entry before", f.base(), when)
	}
	f.answer(nil)
	if ack, err := result(queued); err != nil || ack.BaseOffset != 9 {
		t.Errorf("%+v, %v", ack, err)
	}
}

// TestTermChangeWhileSettling: a barrier that was passed in another term says
// nothing of this one.
func TestTermChangeWhileSettling(t *testing.T) {
	n := newFakeNode()
	n.leader <- true // word of term 3 that nobody has heard yet
	n.barrier = func() error {
		n.barrier = nil
		n.term = 5
		<-n.leader
		n.leader <- true
		return nil
	}
	s := serving(t, n, 2)
	if got := s.ready.Load(); got != 5 {
		t.Errorf("ready in term %d", got)
	}
	p := mustQueue(t, s, Proposal{Count: 1})
	(<-n.applied).answer(nil)
	if _, err := result(p); err != nil {
		t.Error(err)
	}
	// Word of a term that has been settled does not end it.
	if !slices.Equal(n.settled, []uint64{5, 5}) || s.ready.Load() != 5 {
		t.Errorf("settled in terms %v, ready in %d", n.settled, s.ready.Load())
	}
}

// TestAbandon: Raft never answers what is queued when it shuts down.
func TestAbandon(t *testing.T) {
	n := newFakeNode()
	s := newTestSequencer(t, n, 1)
	s.start()
	awaitReady(s)
	inFlight := mustQueue(t, s, Proposal{Count: 1})
	f := <-n.applied
	defer f.answer(nil) // or its goroutine stays
	queued := mustQueue(t, s, Proposal{Count: 1})
	done := s.stop()
	select {
	case <-done:
		t.Fatal("stopped with an entry in flight")
	default:
	}
	s.shut(ErrClosed)
	if _, err := result(queued); err != ErrClosed {
		t.Errorf("queued: %v", err)
	}
	n.become(raft.Shutdown, 3)
	s.abandon()
	if _, err := result(inFlight); !errors.Is(err, ErrUnknownOutcome) {
		t.Errorf("in flight: %v", err)
	}
	<-done
	if _, err := s.propose(t.Context(), Proposal{Count: 1}, true); err != ErrClosed {
		t.Errorf("afterwards: %v", err)
	}
	if !s.room.TryAcquire(64 << 20) {
		t.Error("some room was not given back")
	}
}

// TestCoalescing: what waits together shares an entry, as far as it fits, and
// each keeps its own outcome.
func TestCoalescing(t *testing.T) {
	n := newFakeNode()
	s := serving(t, n, 1)
	blocker := mustQueue(t, s, Proposal{Count: 1})
	f := <-n.applied
	half := make([]byte, s.entryBytes/2)
	waiting := []*Pending{
		mustQueue(t, s, Proposal{Records: half, Count: 2}),
		mustQueue(t, s, Proposal{Count: 1, Expected: at(99)}),
		mustQueue(t, s, Proposal{Records: half, Count: 3, Expected: at(3)}),
		mustQueue(t, s, Proposal{Records: []byte("x"), Count: 1}), // does not fit
	}
	f.answer(nil)
	if _, err := result(blocker); err != nil {
		t.Fatal(err)
	}
	f = <-n.applied
	if _, count, _, _ := decodeExtensions(f.log.Extensions); count != 5 || len(f.log.Data) != s.entryBytes {
		t.Errorf("entry of %d records, %d bytes", count, len(f.log.Data))
	}
	f.answer(nil)
	f = <-n.applied
	if f.base() != 6 || string(f.log.Data) != "x" {
		t.Errorf("last entry at %d: %q", f.base(), f.log.Data)
	}
	f.answer(nil)
	for i, want := range []uint64{1, 0, 3, 6} {
		ack, err := result(waiting[i])
		var mismatch *OffsetMismatchError
		if i == 1 {
			if !errors.As(err, &mismatch) || mismatch.Next != 3 {
				t.Errorf("refused: %v", err)
			}
			continue
		}
		if err != nil || ack.BaseOffset != want {
			t.Errorf("proposal %d: %+v, %v", i, ack, err)
		}
	}
}
