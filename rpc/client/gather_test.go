package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/diurnalog/diurna/rpc/client/clienttest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// valve holds the batches that come to a server until the test lets them pass.
type valve struct {
	came chan *v1.ProduceRequest
	pass chan error
}

func newValve(s *clienttest.Server) *valve {
	g := &valve{came: make(chan *v1.ProduceRequest, 100), pass: make(chan error, 100)}
	s.OnBatch = func(ctx context.Context, _ int, req *v1.ProduceRequest) error {
		g.came <- req
		select {
		case err := <-g.pass:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return g
}

// appender runs calls of Produce and keeps what came of them.
type appender struct {
	t    *testing.T
	c    *Client
	wg   sync.WaitGroup
	mu   sync.Mutex
	acks map[string]Ack
	errs map[string]error
}

func newAppender(t *testing.T, c *Client) *appender {
	return &appender{t: t, c: c, acks: map[string]Ack{}, errs: map[string]error{}}
}

func (a *appender) start(ctx context.Context, value string, opts ...ProduceOption) {
	a.wg.Go(func() {
		ack, err := a.c.Produce(ctx, values(value), opts...)
		a.mu.Lock()
		defer a.mu.Unlock()
		if err != nil {
			a.errs[value] = err
		} else {
			a.acks[value] = ack
		}
	})
}

// queue starts a call that waits for others, and returns when it does.
func (a *appender) queue(ctx context.Context, value string, opts ...ProduceOption) {
	a.t.Helper()
	g := a.c.gatherer
	g.mu.Lock()
	before := len(g.waiting)
	g.mu.Unlock()
	a.start(ctx, value, opts...)
	a.awaitQueue(before + 1)
}

func (a *appender) awaitQueue(n int) {
	a.t.Helper()
	g := a.c.gatherer
	eventually(a.t, fmt.Sprintf("%d calls wait", n), func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return len(g.waiting) == n
	})
}

// awaitIdle returns when nothing is counted any more.
func (a *appender) awaitIdle() {
	a.t.Helper()
	g := a.c.gatherer
	eventually(a.t, "nothing is under way", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.inFlight == 0 && g.queued == 0
	})
}

// eventually waits for what nothing announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// fill occupies the client with one large call, so that small ones wait.
func (a *appender) fill(g *valve) {
	a.t.Helper()
	large := make([]byte, 10<<10)
	a.start(testContext(a.t), string(large))
	<-g.came
}

func TestGather(t *testing.T) {
	s := clienttest.New()
	g := newValve(s)
	c := connect(t, s)
	a := newAppender(t, c)
	ctx := testContext(t)
	a.fill(g)
	for i := range 5 {
		a.queue(ctx, fmt.Sprint("x", i))
	}
	g.pass <- nil
	if req := <-g.came; len(req.Records) != 5 {
		t.Errorf("%d records came together, want 5", len(req.Records))
	}
	// Calls that are not like others do not wait for them.
	a.start(ctx, "conditional", ExpectOffset(99))
	if req := <-g.came; len(req.Records) != 1 || req.ExpectedOffset == nil {
		t.Errorf("came: %v", req)
	}
	a.start(metadata.AppendToOutgoingContext(ctx, "a", "b"), "marked")
	<-g.came
	for range 3 {
		g.pass <- nil
	}
	a.wg.Wait()
	if len(a.acks) != 7 || len(a.errs) != 1 {
		t.Fatalf("%d were acknowledged; errors %v", len(a.acks), a.errs)
	}
	got := s.Values()
	for value, ack := range a.acks {
		if ack.NextOffset != ack.BaseOffset+1 || got[ack.BaseOffset] != value {
			t.Errorf("%.20q was acknowledged at %d, where %.20q is", value, ack.BaseOffset, got[ack.BaseOffset])
		}
	}
}

// What waits goes out as soon as it is as large as what is under way.
func TestGatherDoesNotWaitForLong(t *testing.T) {
	s := clienttest.New()
	g := newValve(s)
	c := connect(t, s)
	a := newAppender(t, c)
	ctx := testContext(t)
	for i := range 2 {
		a.start(ctx, fmt.Sprint(i)) // one in flight: the second is as large
		<-g.came
	}
	a.queue(ctx, "2")
	a.start(ctx, "3")
	if req := <-g.came; len(req.Records) != 2 {
		t.Errorf("%d records came together, want 2", len(req.Records))
	}
	for range 3 {
		g.pass <- nil
	}
	a.wg.Wait()
	if len(a.acks) != 4 {
		t.Errorf("errors: %v", a.errs)
	}
}

func TestGatherKeepsLogsAndSizesApart(t *testing.T) {
	s := clienttest.New()
	g := newValve(s)
	c := connect(t, s)
	a := newAppender(t, c)
	ctx := testContext(t)
	a.fill(g)
	a.queue(ctx, "a1")
	a.queue(ctx, "b1", ToLog("b"))
	a.queue(ctx, "b2", ToLog("b"))
	a.queue(ctx, "b3", ToLog("b"))
	c.gatherer.limit.Store(14) // two of them
	g.pass <- nil
	got := map[string]bool{}
	for range 3 {
		req := <-g.came
		got[fmt.Sprint(req.Log, len(req.Records))] = true
		g.pass <- nil
	}
	a.wg.Wait()
	if !got["1"] || !got["b2"] || !got["b1"] || len(a.errs) > 0 {
		t.Errorf("came: %v; errors %v", got, a.errs)
	}
}

// One caller's record that the server will not have is nobody else's trouble.
func TestGatherRefused(t *testing.T) {
	s := clienttest.New()
	g := newValve(s)
	c := connect(t, s)
	a := newAppender(t, c)
	ctx := testContext(t)
	a.fill(g)
	a.queue(ctx, "good")
	a.queue(ctx, "bad")
	a.queue(ctx, "fine")
	g.pass <- nil
	if req := <-g.came; len(req.Records) != 3 {
		t.Fatalf("%d records came together", len(req.Records))
	}
	g.pass <- clienttest.Failure(codes.InvalidArgument, ReasonBatchTooLarge, "too large", "", "limit", "5000")
	for range 3 {
		req := <-g.came
		if len(req.Records) != 1 {
			t.Fatalf("%d records came together", len(req.Records))
		}
	}
	// Whoever gets it.
	g.pass <- clienttest.Failure(codes.InvalidArgument, ReasonRecordTooLarge, "too large", "")
	g.pass <- nil
	g.pass <- nil
	a.wg.Wait()
	if len(a.acks) != 3 || len(a.errs) != 1 {
		t.Errorf("acknowledged %d, errors %v", len(a.acks), a.errs)
	}
	if got := c.gatherer.limit.Load(); got != 5000 {
		t.Errorf("the limit is %d now", got)
	}
}

func TestGatherErrorIsEverybodys(t *testing.T) {
	s := clienttest.New()
	g := newValve(s)
	c := connect(t, s)
	a := newAppender(t, c)
	a.fill(g)
	a.queue(testContext(t), "a")
	a.queue(testContext(t), "b")
	g.pass <- nil
	<-g.came
	g.pass <- clienttest.Failure(codes.Unknown, ReasonUnknownOutcome, "who knows", "")
	a.wg.Wait()
	for _, value := range []string{"a", "b"} {
		var e *Error
		if !errors.As(a.errs[value], &e) || e.Definite || e.Reason != ReasonUnknownOutcome {
			t.Errorf("%s: %v", value, a.errs[value])
		}
	}
}

// A caller that gives up gives up for itself.
func TestGatherCanceled(t *testing.T) {
	s := clienttest.New()
	g := newValve(s)
	c := connect(t, s)
	a := newAppender(t, c)
	ctx := testContext(t)
	a.fill(g)

	early, cancelEarly := context.WithCancel(ctx)
	late, cancelLate := context.WithCancel(ctx)
	a.queue(ctx, "stays")
	a.queue(early, "early")
	a.queue(late, "late")
	cancelEarly()
	a.awaitQueue(2)
	g.pass <- nil
	if req := <-g.came; len(req.Records) != 2 {
		t.Errorf("%d records came together, want 2", len(req.Records))
	}
	cancelLate()
	eventually(t, "late has left", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.errs["late"] != nil })
	g.pass <- nil
	a.wg.Wait()
	if _, ok := a.acks["stays"]; !ok {
		t.Errorf("stays: %v", a.errs["stays"])
	}
	for value, definite := range map[string]bool{"early": true, "late": false} {
		var e *Error
		if !errors.As(a.errs[value], &e) || e.Definite != definite || !errors.Is(e, context.Canceled) {
			t.Errorf("%s: %v", value, a.errs[value])
		}
	}

	// The last one takes the call with it.
	a.fill(g)
	last, cancelLast := context.WithCancel(ctx)
	a.queue(last, "last")
	g.pass <- nil
	<-g.came
	cancelLast()
	a.wg.Wait()
	a.awaitIdle()
}

func TestGatherClosed(t *testing.T) {
	s := clienttest.New()
	g := newValve(s)
	s.Start(t)
	c, err := Dial("fake:1", WithDialer(s.Dialer()))
	if err != nil {
		t.Fatal(err)
	}
	a := newAppender(t, c)
	a.fill(g)
	a.queue(testContext(t), "a")
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	a.wg.Wait()
	var e *Error
	if !errors.As(a.errs["a"], &e) || !e.Definite {
		t.Errorf("a: %v", a.errs["a"])
	}
}

// Everything that many callers are told is so.
func TestGatherMany(t *testing.T) {
	s := clienttest.New()
	c := connect(t, s)
	a := newAppender(t, c)
	ctx := testContext(t)
	const callers, each = 32, 50
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for j := range each {
				value := fmt.Sprintf("%d-%d", i, j)
				ack, err := c.Produce(ctx, values(value, value+"'"))
				a.mu.Lock()
				a.acks[value], a.errs[value] = ack, err
				a.mu.Unlock()
			}
		})
	}
	wg.Wait()
	got := s.Values()
	if len(got) != callers*each*2 {
		t.Fatalf("%d records", len(got))
	}
	for value, ack := range a.acks {
		if a.errs[value] != nil || ack.NextOffset != ack.BaseOffset+2 || got[ack.BaseOffset] != value || got[ack.BaseOffset+1] != value+"'" {
			t.Errorf("%s: %+v, %v", value, ack, a.errs[value])
		}
	}
	t.Logf("%d calls for %d", s.Batches(), callers*each)
	a.awaitIdle()
}

func TestSeparateCalls(t *testing.T) {
	s := clienttest.New()
	g := newValve(s)
	s.Start(t)
	c, err := Dial("fake:1", WithDialer(s.Dialer()), WithSeparateCalls())
	if err != nil {
		t.Fatal(err)
	}
	a := newAppender(t, c)
	for i := range 10 {
		a.start(testContext(t), fmt.Sprint(i))
	}
	for range 10 {
		<-g.came
		g.pass <- nil
	}
	a.wg.Wait()
	if len(a.acks) != 10 {
		t.Errorf("errors: %v", a.errs)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
