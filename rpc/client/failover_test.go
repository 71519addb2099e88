package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/diurnalog/diurna/rpc/client/clienttest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// dialAll is a client of several servers, named a, b, c.
func dialAll(t *testing.T, servers []*clienttest.Server, opts ...Option) *Client {
	t.Helper()
	at := map[string]*clienttest.Server{}
	var names []string
	for i, s := range servers {
		name := string(rune('a' + i))
		names = append(names, name)
		if s != nil {
			at[name+":8400"] = s
		}
	}
	c, err := Dial(strings.Join(names, ", "), append(opts, WithDialer(func(ctx context.Context, addr string) (net.Conn, error) {
		if s := at[addr]; s != nil {
			return s.Dialer()(ctx, addr)
		}
		return nil, errors.New("nobody there")
	}))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c
}

func TestAddresses(t *testing.T) {
	c := dialAll(t, make([]*clienttest.Server, 3))
	if got := strings.Join(c.Addrs(), " "); got != "a:8400 b:8400 c:8400" || c.Addr() != "a:8400" {
		t.Errorf("addresses %s, %s", got, c.Addr())
	}
	for _, bad := range []string{"a,", ",a", "a,,b", "a,http://b"} {
		if _, err := Dial(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	// None can be reached: each is tried once, without waiting.
	var e *Error
	if _, err := c.Produce(testContext(t), values("a")); !errors.As(err, &e) || e.Reason != ReasonUnreachable || e.Addr != "c:8400" {
		t.Errorf("got %#v", err)
	}
	c = dialAll(t, []*clienttest.Server{nil, nil, clienttest.New().Start(t)}, WithRetry(0))
	for what, call := range map[string]func() error{
		"Produce":  func() error { _, err := c.Produce(testContext(t), values("a")); return err },
		"Servers":  func() error { _, err := c.Servers(testContext(t)); return err },
		"Transfer": func() error { return c.TransferLeadership(testContext(t), "") },
	} {
		c.current.Store(0)
		if err := call(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := c.Leave(testContext(t), ""); err == nil {
		t.Error("one of several nodes was made to leave")
	}
}

// TestProduceRetry: what is definitely not appended is sent again, elsewhere
// where that may help; nothing else is.
func TestProduceRetry(t *testing.T) {
	for _, tc := range []struct {
		name     string
		first    error // of the first attempt, before anything is appended
		after    error // of the first attempt, although it is appended
		expected bool
		off      bool
		attempts int
		reason   string // of the error; empty: appended
		definite bool
		records  int // in the log, then
	}{
		{name: "no leader", first: clienttest.Failure(codes.Unavailable, "NO_LEADER", "", ""), attempts: 2, records: 1},
		{name: "not the leader", first: clienttest.Failure(codes.Unavailable, "NOT_LEADER", "", ""), attempts: 2, records: 1},
		{name: "shutting down", first: clienttest.Failure(codes.Unavailable, "SHUTTING_DOWN", "", ""), attempts: 2, records: 1},
		{name: "turned off", first: clienttest.Failure(codes.Unavailable, "NO_LEADER", "", ""), off: true, attempts: 1, reason: ReasonNoLeader, definite: true},
		{name: "full", first: clienttest.Failure(codes.ResourceExhausted, "DISK_FULL", "", ""), attempts: 1, reason: ReasonDiskFull, definite: true},
		{name: "wrong", first: clienttest.Failure(codes.InvalidArgument, "RECORD_TOO_LARGE", "", ""), attempts: 1, reason: ReasonRecordTooLarge, definite: true},
		{name: "unknown", first: clienttest.Failure(codes.Unknown, "UNKNOWN_OUTCOME", "", ""), attempts: 1, reason: ReasonUnknownOutcome},
		{name: "without a reason", first: errors.New("boom"), attempts: 1},
		{name: "unknown, not appended, expected", first: clienttest.Failure(codes.Unknown, "UNKNOWN_OUTCOME", "", ""), expected: true, attempts: 2, records: 1},
		{name: "unknown, appended, expected", after: clienttest.Failure(codes.Unknown, "UNKNOWN_OUTCOME", "", ""), expected: true, attempts: 2, reason: ReasonOffsetMismatch, records: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := clienttest.New()
			attempts := 0
			s.OnBatch = func(_ context.Context, _ int, req *v1.ProduceRequest) error {
				attempts++
				if attempts > 1 {
					return nil
				}
				if tc.after != nil {
					s.Append(req.GetRecords()...)
					return tc.after
				}
				return tc.first
			}
			var opts []Option
			if tc.off {
				opts = append(opts, WithRetry(0))
			}
			c := connect(t, s, opts...)
			var produce []ProduceOption
			if tc.expected {
				produce = append(produce, ExpectOffset(0))
			}
			_, err := c.Produce(testContext(t), values("a"), produce...)
			var e *Error
			if failed := errors.As(err, &e); failed && (e.Reason != tc.reason || e.Definite != tc.definite) || !failed && tc.records == 0 {
				t.Errorf("got %#v", err)
			} else if failed != (tc.reason != "" || tc.name == "without a reason") {
				t.Errorf("got %v", err)
			}
			if attempts != tc.attempts || len(s.Values()) != tc.records {
				t.Errorf("%d attempts, the log has %q", attempts, s.Values())
			}
		})
	}
}

// TestProduceInDoubt: the attempt that nobody knows the outcome of may be on its
// way when the next one is told that the log does not reach that far yet.
func TestProduceInDoubt(t *testing.T) {
	s := clienttest.New()
	attempts := 0
	s.OnBatch = func(context.Context, int, *v1.ProduceRequest) error {
		if attempts++; attempts == 1 {
			return clienttest.Failure(codes.Unknown, "UNKNOWN_OUTCOME", "", "")
		}
		return nil
	}
	_, err := connect(t, s).Produce(testContext(t), values("a"), ExpectOffset(5))
	var e *Error
	if !errors.As(err, &e) || e.Reason != ReasonOffsetMismatch || e.Definite || attempts != 2 {
		t.Errorf("got %#v after %d attempts", err, attempts)
	}
}

// TestProduceRetryEnds: by the caller's context, and by the time for it.
func TestProduceRetryEnds(t *testing.T) {
	s := clienttest.New()
	s.OnBatch = func(context.Context, int, *v1.ProduceRequest) error {
		return clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", "")
	}
	c := connect(t, s, WithRetry(200*time.Millisecond))
	start := time.Now()
	var e *Error
	if _, err := c.Produce(testContext(t), values("a")); !errors.As(err, &e) || e.Reason != ReasonNoLeader || !e.Definite {
		t.Errorf("got %#v", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
	c = dialAll(t, []*clienttest.Server{s})
	ctx, cancel := context.WithCancel(testContext(t))
	attempts := 0
	c.endpoints[0].client.connected.Store(true)
	s.OnBatch = func(context.Context, int, *v1.ProduceRequest) error {
		if attempts++; attempts == 2 {
			cancel()
		}
		return clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", "")
	}
	if _, err := c.Produce(ctx, values("a")); !errors.As(err, &e) || !e.Definite && e.Reason != ReasonTimeout {
		t.Errorf("got %#v", err)
	}
}

// TestProducerOutlives: a producer goes on where nothing that was sent can be
// in the log, keeps the order, and appends nothing twice.
func TestProducerOutlives(t *testing.T) {
	t.Run("no leader for a while", func(t *testing.T) {
		s := clienttest.New()
		var failures atomic.Int32
		s.OnBatch = func(_ context.Context, position int, _ *v1.ProduceRequest) error {
			if position%7 == 3 && failures.Add(1) < 6 {
				return clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", "")
			}
			return nil
		}
		c := connect(t, s)
		p := newProducer(t, c, ProducerOptions{BatchRecords: 1})
		var want []string
		for i := range 50 {
			want = append(want, fmt.Sprint(i))
		}
		appendAll(t, p, want...)
		outcome, err := p.Close(testContext(t))
		if err != nil || outcome.Acknowledged != 50 || outcome.Last != 49 {
			t.Fatalf("Close = %+v, %v", outcome, err)
		}
		if got := s.Values(); !slices.Equal(got, want) {
			t.Errorf("the log has %q", got)
		}
		if failures.Load() < 5 {
			t.Errorf("only %d failures", failures.Load())
		}
	})
	t.Run("its node dies while it is idle", func(t *testing.T) {
		a, b := clienttest.New().Start(t), clienttest.New().Start(t)
		c := dialAll(t, []*clienttest.Server{a, b})
		p := newProducer(t, c, ProducerOptions{})
		appendAll(t, p, "1")
		if err := p.Flush(testContext(t)); err != nil {
			t.Fatal(err)
		}
		a.Stop()
		appendAll(t, p, "2")
		if outcome, err := p.Close(testContext(t)); err != nil || outcome.Acknowledged != 2 {
			// The batch may have been sent to the dead one before that was known.
			if outcome.Unknown != 1 {
				t.Fatalf("Close = %+v, %v", outcome, err)
			}
			return
		}
		if got := b.Values(); !slices.Equal(got, []string{"2"}) {
			t.Errorf("the other one has %q", got)
		}
	})
	for name, meta := range map[string][]string{
		"appended after": {"request", "0", "appended_after", "1"},
		"unknown after":  {"request", "0", "unknown_after", "1"},
		"miscounted":     {"request", "1"},
	} {
		t.Run(name, func(t *testing.T) {
			s := clienttest.New()
			failed := false
			s.OnBatch = func(context.Context, int, *v1.ProduceRequest) error {
				if failed {
					t.Error("something was sent again")
				}
				failed = true
				return clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", "", meta...)
			}
			c := connect(t, s)
			p := newProducer(t, c, ProducerOptions{BatchRecords: 1})
			appendAll(t, p, "a")
			var e *Error
			if outcome, err := p.Close(testContext(t)); !errors.As(err, &e) || e.Reason != ReasonNoLeader || outcome.Acknowledged != 0 {
				t.Errorf("Close = %+v, %v", outcome, err)
			}
		})
	}
	t.Run("gives up in time", func(t *testing.T) {
		s := clienttest.New()
		s.OnBatch = func(context.Context, int, *v1.ProduceRequest) error {
			return clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", "")
		}
		c := connect(t, s, WithRetry(150*time.Millisecond))
		p := newProducer(t, c, ProducerOptions{BatchRecords: 1})
		appendAll(t, p, "a")
		var e *Error
		if outcome, err := p.Close(testContext(t)); !errors.As(err, &e) || e.Reason != ReasonNoLeader || outcome.NotAppended != 1 {
			t.Errorf("Close = %+v, %v", outcome, err)
		}
	})
}

// TestConsumerOutlives: a consumer that follows goes on at the next offset
// elsewhere, with no gap and no duplicate.
func TestConsumerOutlives(t *testing.T) {
	batch := func(n0, n int) []*v1.Record {
		var records []*v1.Record
		for i := range n {
			records = append(records, &v1.Record{Value: fmt.Append(nil, n0+i)})
		}
		return records
	}
	for _, tc := range []struct {
		name   string
		start  Start
		max    uint64
		sizes  []int // of the batches on the second node: not those of the first
		expect []uint64
	}{
		{name: "earliest", start: Earliest(), sizes: []int{7, 7, 7, 7, 2}},
		{name: "in the middle of a batch", start: AtOffset(3), sizes: []int{30}},
		{name: "last", start: Last(25), sizes: []int{1, 29}},
		{name: "limited", start: AtOffset(2), max: 20, sizes: []int{16, 14}},
		{name: "limited by what came before", start: AtOffset(2), max: 8, sizes: []int{30}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, b := clienttest.New(), clienttest.New()
			a.PerResponse, b.PerResponse = 5, 5
			a.Append(batch(0, 5)...)
			a.Append(batch(5, 5)...)
			for at := 0; at < 30; {
				b.Append(batch(at, tc.sizes[0])...)
				at += tc.sizes[0]
				tc.sizes = tc.sizes[1:]
			}
			a.Start(t)
			b.Start(t)
			if tc.start.kind == startLast {
				tc.start = Last(5)
			}
			c := dialAll(t, []*clienttest.Server{a, b})
			r := consume(t, c, ConsumeOptions{Start: tc.start, Follow: true, MaxRecords: tc.max})
			var got []uint64
			var once sync.Once
			until := uint64(30)
			first := tc.start.number
			if tc.start.kind == startLast {
				first = 5
			}
			if tc.max > 0 {
				until = first + tc.max
			}
			for r.Next() {
				rec := r.Record()
				if string(rec.Value) != fmt.Sprint(rec.Offset) {
					t.Errorf("offset %d has %q", rec.Offset, rec.Value)
				}
				got = append(got, rec.Offset)
				if rec.Offset == min(9, until-1) {
					once.Do(a.Stop)
				}
				if rec.Offset == until-1 {
					break
				}
			}
			if r.Err() != nil {
				t.Fatalf("after %v: %v", got, r.Err())
			}
			var want []uint64
			for o := first; o < until; o++ {
				want = append(want, o)
			}
			if !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
			if tc.max > 0 && r.Next() {
				t.Error("goes on after the limit")
			}
		})
	}
}

// TestConsumerShutdown: a node that stops sends its consumers elsewhere; one
// that has no other to go to says so in time.
func TestConsumerShutdown(t *testing.T) {
	s := clienttest.New()
	s.Append(values("a", "b")...)
	calls := 0
	s.OnConsume = func(req *v1.ConsumeRequest) error {
		calls++
		switch calls {
		case 2:
			if req.GetOffset() != 2 || req.GetLinearizable() || req.GetMaxRecords() != 3 {
				t.Errorf("resumed with %v", req)
			}
			return clienttest.Failure(codes.Unavailable, "SHUTTING_DOWN", "", "")
		case 4:
			return clienttest.Failure(codes.OutOfRange, "OFFSET_OUT_OF_RANGE", "gone", "", "first", "9")
		}
		return nil
	}
	s.Start(t)
	c := dialAll(t, []*clienttest.Server{s})
	r := consume(t, c, ConsumeOptions{Follow: true, Linearizable: true, MaxRecords: 5})
	for range 2 {
		if !r.Next() {
			t.Fatal(r.Err())
		}
	}
	s.Break()
	s.AwaitConsume(t, 2) // of those that were let in
	s.Append(values("c")...)
	if !r.Next() || r.Record().Offset != 2 {
		t.Fatalf("got %+v, %v", r.Record(), r.Err())
	}
	s.Break()
	var e *Error
	if r.Next() || !errors.As(r.Err(), &e) || e.Reason != ReasonOffsetOutOfRange {
		t.Errorf("got %v", r.Err())
	}
}

// TestConsumerWaitsForALeader: a read that does not follow is tried again until
// somebody answers it, and not after that.
func TestConsumerWaitsForALeader(t *testing.T) {
	s := clienttest.New()
	s.Append(values("a", "b")...)
	refuse := 2
	s.OnConsume = func(*v1.ConsumeRequest) error {
		if refuse > 0 {
			refuse--
			return clienttest.Failure(codes.Unavailable, "NO_LEADER", "", "")
		}
		return nil
	}
	s.Start(t)
	r := consume(t, dialAll(t, []*clienttest.Server{s}), ConsumeOptions{Linearizable: true})
	for _, want := range []string{"a", "b"} {
		if !r.Next() || string(r.Record().Value) != want {
			t.Fatalf("got %+v, %v", r.Record(), r.Err())
		}
	}
	if r.Next() || r.Err() != nil || refuse != 0 {
		t.Errorf("%v, %d refusals left", r.Err(), refuse)
	}
	refuse = 1
	r = consume(t, dialAll(t, []*clienttest.Server{s}, WithRetry(0)), ConsumeOptions{Linearizable: true})
	var e *Error
	if r.Next() || !errors.As(r.Err(), &e) || e.Reason != ReasonNoLeader {
		t.Errorf("got %v", r.Err())
	}
}
