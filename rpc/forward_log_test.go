package rpc

import (
	"context"
	"errors"
	"slices"
	"testing"

	"google.golang.org/grpc/codes"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func (m *member) indexCalls() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.indexes
}

func (m *member) waitedFor() []uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.applied)
}

// TestReadIndexShared: at most one call is under way and one is due; a reader
// shares only a call that began after it came.
func TestReadIndexShared(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, nil)
	begun, release := make(chan int), make(chan struct{})
	c["a"].onIndex = func(n int) error {
		begun <- n
		<-release
		return nil
	}
	log := c["b"].svc.log
	ctx := testContext(t)
	results := make(chan error, 20)
	read := func() { results <- log.Linearize(ctx) }
	go read()
	<-begun // the first call has begun: nobody may share it any more
	for range 10 {
		go read()
	}
	r := &c["b"].forward.reads
	eventually(t, "a second call is due", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.next != nil
	})
	release <- struct{}{}
	if err := <-results; err != nil {
		t.Fatal(err)
	}
	if got := c["b"].waitedFor(); !slices.Equal(got, []uint64{101}) {
		t.Fatalf("the first reader waited for %v", got)
	}
	// All ten, unless one was late and needs a third.
	calls := 1
	for done := 0; done < 10; {
		select {
		case err := <-results:
			if err != nil {
				t.Error(err)
			}
			done++
		case <-begun:
			calls++
			release <- struct{}{}
		case <-ctx.Done():
			t.Fatal("waited too long")
		}
	}
	if calls > 3 {
		t.Errorf("%d calls for eleven readers", calls)
	}
	if slices.Contains(c["b"].waitedFor()[1:], 101) {
		t.Error("a reader shared a call that had begun before it came")
	}
}

// TestReadIndexOwnTime: a reader's context bounds its wait, not the call that
// it shares.
func TestReadIndexOwnTime(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, nil)
	begun, release := make(chan struct{}, 2), make(chan struct{})
	c["a"].onIndex = func(int) error {
		begun <- struct{}{}
		<-release
		return nil
	}
	log := c["b"].svc.log
	short, cancel := context.WithCancel(testContext(t))
	got := make(chan error, 1)
	go func() { got <- log.Linearize(short) }()
	<-begun
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	go func() { got <- log.Linearize(testContext(t)) }()
	close(release)
	if err := <-got; err != nil {
		t.Errorf("the next reader got %v", err)
	}
}

// TestReadIndexLeaderChange: readers do not wait for a former leader.
func TestReadIndexLeaderChange(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b", "c"}, nil)
	begun, release := make(chan struct{}), make(chan struct{})
	defer close(release)
	c["a"].onIndex = func(int) error {
		close(begun)
		<-release
		return nil
	}
	log := c["b"].svc.log
	first := make(chan error, 1)
	go func() { first <- log.Linearize(testContext(t)) }()
	<-begun
	c["b"].setLeader("c")
	c["c"].setLeader("c")
	if err := log.Linearize(testContext(t)); err != nil {
		t.Errorf("from the new leader: %v", err)
	}
	if err := <-first; !errors.Is(err, ErrNoLeader) {
		t.Errorf("from the old leader: %v", err)
	}
	if n := c["c"].indexCalls(); n != 1 {
		t.Errorf("the new leader was asked %d times", n)
	}
}

func TestReadIndexHint(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b", "c"}, nil)
	c["a"].setLeader("c")
	c["c"].setLeader("c")
	if err := c["b"].svc.log.Linearize(testContext(t)); err != nil {
		t.Error(err)
	}
}

// TestFollowerReads: a follower's word on what is there is as good as the
// leader's.
func TestFollowerReads(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, nil)
	ctx := testContext(t)
	// The records arrive only when somebody waits for them.
	b := c["b"]
	b.onApply = func(uint64) {
		b.memLog.mu.Lock()
		defer b.memLog.mu.Unlock()
		if b.end == 0 {
			b.appendLocked(encode(t, record(0, 9), record(1, 9)), 2)
		}
	}
	resp, err := b.client.Consume(ctx, &v1.ConsumeRequest{Linearizable: true})
	if err != nil || resp.GetNextOffset() != 2 {
		t.Errorf("linearizable: %v, %v", resp, err)
	}
	if n := c["a"].indexCalls(); n != 1 {
		t.Errorf("the leader was asked %d times", n)
	}
	// Within what is there nobody is asked; above it the leader is.
	if _, err := b.client.Consume(ctx, &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Offset{Offset: 1}}); err != nil {
		t.Error(err)
	}
	if n := c["a"].indexCalls(); n != 1 {
		t.Errorf("the leader was asked %d times", n)
	}
	_, err = b.client.Consume(ctx, &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Offset{Offset: 3}})
	if meta := wantStatus(t, err, codes.OutOfRange, ReasonOffsetOutOfRange); meta["next"] != "2" {
		t.Errorf("metadata %v", meta)
	}
	if n := c["a"].indexCalls(); n != 2 {
		t.Errorf("the leader was asked %d times", n)
	}
	// Behind, and caught up in time: not out of range.
	b.onApply = func(uint64) {
		b.memLog.mu.Lock()
		defer b.memLog.mu.Unlock()
		b.appendLocked(encode(t, record(2, 9), record(3, 9)), 2)
	}
	if resp, err = b.client.Consume(ctx, &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Offset{Offset: 3}}); err != nil || resp.GetNextOffset() != 4 {
		t.Errorf("an offset that was on its way: %v, %v", resp, err)
	}
}

func TestPeerStatus(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, nil)
	ctx := testContext(t)
	for _, contact := range []string{"some", "none"} {
		want, err := c["a"].Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if contact == "none" {
			want.LastContact = -1
		}
		want.Version = "1.2.3"
		want.LastContact++ // differs from every default
		if got := statusFromMessage(statusMessage(&want)); !slices.Equal(got.FormerIDs, want.FormerIDs) {
			t.Errorf("former ids %v", got.FormerIDs)
		} else if got.FormerIDs, want.FormerIDs = nil, nil; !equalStatus(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	st, err := c["b"].forward.Status(ctx, "a:1")
	if err != nil || st.NodeID != "a" || st.LeaderID != "a" || len(st.FormerIDs) != 2 {
		t.Errorf("Status: %+v, %v", st, err)
	}
	if _, err := c["b"].forward.Status(ctx, "nowhere:1"); err == nil {
		t.Error("nobody has a status")
	}
}

func equalStatus(a, b NodeStatus) bool {
	a.FormerIDs, b.FormerIDs = nil, nil
	return statusMessage(&a).String() == statusMessage(&b).String() && a.LastContact == b.LastContact
}
