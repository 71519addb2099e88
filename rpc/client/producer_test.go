package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/diurnalog/diurna/rpc/client/clienttest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func newProducer(t *testing.T, c *Client, opts ProducerOptions) *Producer {
	t.Helper()
	p, err := c.NewProducer(testContext(t), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_, _ = p.Close(ctx) // the tests that care have closed it
	})
	return p
}

func appendAll(t *testing.T, p *Producer, vs ...string) {
	t.Helper()
	for _, v := range vs {
		if err := p.Append(testContext(t), &Record{Value: []byte(v)}); err != nil {
			t.Fatalf("append %q: %v", v, err)
		}
	}
}

// gate is an OnBatch that takes a token for every batch.
func gate(reached chan<- int, tokens <-chan error) func(context.Context, int, *v1.ProduceRequest) error {
	return func(ctx context.Context, position int, _ *v1.ProduceRequest) error {
		if reached != nil {
			reached <- position
		}
		select {
		case err := <-tokens:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func TestProducerBatches(t *testing.T) {
	for _, tc := range []struct {
		name string
		opts ProducerOptions
		want []int // records of each batch
	}{
		{"by count", ProducerOptions{BatchRecords: 3, Linger: time.Hour}, []int{3, 3, 1}},
		{"by bytes", ProducerOptions{BatchBytes: 2 * (4 + 10), Linger: time.Hour}, []int{2, 2, 2, 1}},
		{"none", ProducerOptions{Linger: -1}, []int{1, 1, 1, 1, 1, 1, 1}},
		{"all", ProducerOptions{Linger: time.Hour}, []int{7}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := clienttest.New()
			var got []int
			s.OnBatch = func(_ context.Context, _ int, req *v1.ProduceRequest) error {
				got = append(got, len(req.Records)) // one stream: no race
				return nil
			}
			c := connect(t, s)
			var acks []Ack
			tc.opts.OnAck = func(a Ack) { acks = append(acks, a) }
			p := newProducer(t, c, tc.opts)
			var want []string
			for i := range 7 {
				want = append(want, fmt.Sprintf("value %04d", i))
			}
			appendAll(t, p, want...)
			outcome, err := p.Close(testContext(t))
			if err != nil || outcome != (Outcome{Acknowledged: 7, First: 0, Last: 6}) {
				t.Fatalf("Close = %+v, %v", outcome, err)
			}
			if !slices.Equal(got, tc.want) || len(acks) != len(got) {
				t.Errorf("batches %v with %d acknowledgements, want %v", got, len(acks), tc.want)
			}
			if !slices.Equal(s.Values(), want) {
				t.Errorf("log %q", s.Values())
			}
			if err := p.Append(testContext(t), &Record{}); !errors.Is(err, ErrClosed) {
				t.Errorf("append after close: %v", err)
			}
			if err := p.Err(); err != nil {
				t.Errorf("a producer that ended well failed: %v", err)
			}
			if again, err := p.Close(testContext(t)); again != outcome || err != nil {
				t.Errorf("second Close = %+v, %v", again, err)
			}
		})
	}
}

// A lone record must not wait for company for ever.
func TestProducerLinger(t *testing.T) {
	s := clienttest.New()
	acked := make(chan Ack, 2)
	c := connect(t, s)
	p := newProducer(t, c, ProducerOptions{Linger: time.Millisecond, OnAck: func(a Ack) { acked <- a }})
	for i := range 2 {
		appendAll(t, p, "x")
		select {
		case a := <-acked:
			if a.BaseOffset != uint64(i) {
				t.Errorf("got %+v", a)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("not sent")
		}
	}
}

func TestProducerFlush(t *testing.T) {
	s := clienttest.New()
	c := connect(t, s)
	p := newProducer(t, c, ProducerOptions{Linger: time.Hour})
	if err := p.Flush(testContext(t)); err != nil {
		t.Fatal(err)
	}
	appendAll(t, p, "a", "b")
	if err := p.Flush(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if got := s.Values(); len(got) != 2 {
		t.Errorf("log %q", got)
	}
}

func TestProducerBlocksWhenFull(t *testing.T) {
	s := clienttest.New()
	tokens := make(chan error)
	s.OnBatch = gate(nil, tokens)
	c := connect(t, s)
	p := newProducer(t, c, ProducerOptions{Linger: time.Hour, MaxInFlightBytes: 100})
	appendAll(t, p, strings.Repeat("a", 80))

	ctx, cancel := context.WithCancel(testContext(t))
	result := make(chan error)
	go func() { result <- p.Append(ctx, &Record{Value: make([]byte, 80)}) }()
	select {
	case err := <-result:
		t.Fatalf("append above the limit: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Fatalf("append: %v", err)
	}

	go func() { result <- p.Append(testContext(t), &Record{Value: []byte("second")}) }()
	tokens <- nil // the blocked append has sent the first batch
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	// One record always fits, however large.
	go func() { tokens <- nil }()
	go func() { result <- p.Append(testContext(t), &Record{Value: make([]byte, 1000)}) }()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	go func() { tokens <- nil }()
	outcome, err := p.Close(testContext(t))
	if err != nil || outcome.Acknowledged != 3 {
		t.Fatalf("Close = %+v, %v", outcome, err)
	}
}

// One record a batch, four batches, the third fails, for each kind of failure.
func TestProducerOutcome(t *testing.T) {
	for _, tc := range []struct {
		name string
		err  error
		want Outcome
	}{
		{
			"definite",
			clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", "", "request", "2"),
			Outcome{Acknowledged: 2, Last: 1, NotAppended: 3},
		}, {
			"definite, position not told",
			clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", ""),
			Outcome{Acknowledged: 2, Last: 1, NotAppended: 3},
		}, {
			"unknown",
			clienttest.Failure(codes.Unknown, "UNKNOWN_OUTCOME", "who knows", "", "request", "2", "unknown_after", "3"),
			Outcome{Acknowledged: 2, Last: 1, NotAppended: 1, Unknown: 2},
		}, {
			"unknown, position not told",
			clienttest.Failure(codes.Unknown, "UNKNOWN_OUTCOME", "who knows", ""),
			Outcome{Acknowledged: 2, Last: 1, Unknown: 3},
		}, {
			"later ones appended all the same",
			clienttest.Failure(codes.ResourceExhausted, "OVERLOADED", "full", "", "request", "2", "appended_after", "3-4"),
			Outcome{Acknowledged: 2, Last: 1, NotAppended: 1, AppendedAfter: 2},
		}, {
			"a position that cannot be",
			clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", "", "request", "1"),
			Outcome{Acknowledged: 2, Last: 1, Unknown: 3},
		}, {
			"ranges that cannot be read",
			clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", "", "request", "2", "appended_after", "3-x"),
			Outcome{Acknowledged: 2, Last: 1, Unknown: 3},
		}, {
			"not by Diurna",
			errors.New("boom"),
			Outcome{Acknowledged: 2, Last: 1, Unknown: 3},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := clienttest.New()
			reached, tokens := make(chan int, 10), make(chan error)
			s.OnBatch = gate(reached, tokens)
			c := connect(t, s, WithRetry(0))
			p := newProducer(t, c, ProducerOptions{Linger: -1})
			appendAll(t, p, "a", "b", "c", "d", "e")
			tokens <- nil
			tokens <- nil
			awaitSent(t, p, 2, 3)
			tokens <- tc.err
			outcome, err := p.Close(testContext(t))
			if outcome != tc.want {
				t.Errorf("outcome %+v, want %+v", outcome, tc.want)
			}
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("error %v", err)
			}
			if err := p.Append(testContext(t), &Record{}); err == nil {
				t.Error("a failed producer accepts records")
			}
			if got := len(s.Values()); got != 2 {
				t.Errorf("the log holds %d records", got)
			}
		})
	}
}

// awaitSent returns when so many batches are acknowledged, and n more are with
// the connection. The number of the latter alone says nothing: it is 1 also
// when the first batch is on its way and the second has yet to be sent.
func awaitSent(t *testing.T, p *Producer, acked, n int) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		p.mu.Lock()
		sent, gotAcked := len(p.sent), int(p.acked)
		p.mu.Unlock()
		if sent == n && gotAcked == acked {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d batches are acknowledged and %d more sent, want %d and %d", gotAcked, sent, acked, n)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestProducerServerKilled(t *testing.T) {
	s := clienttest.New()
	reached, tokens := make(chan int, 10), make(chan error)
	s.OnBatch = gate(reached, tokens)
	c := connect(t, s)
	p := newProducer(t, c, ProducerOptions{BatchRecords: 2, Linger: time.Hour})
	appendAll(t, p, "a", "b", "c", "d")
	tokens <- nil
	awaitSent(t, p, 1, 1)
	appendAll(t, p, "not sent")
	<-reached
	<-reached
	s.Stop()
	<-p.Failed()
	outcome, err := p.Close(testContext(t))
	var e *Error
	if !errors.As(err, &e) || e.Definite || e.Reason != ReasonConnectionLost {
		t.Errorf("error %#v", err)
	}
	if want := (Outcome{Acknowledged: 2, Last: 1, NotAppended: 1, Unknown: 2}); outcome != want {
		t.Errorf("outcome %+v, want %+v", outcome, want)
	}
}

func TestProducerCloseGivesUp(t *testing.T) {
	s := clienttest.New()
	reached, tokens := make(chan int, 10), make(chan error)
	s.OnBatch = gate(reached, tokens)
	c := connect(t, s)
	p := newProducer(t, c, ProducerOptions{Linger: -1})
	appendAll(t, p, "a", "b")
	tokens <- nil
	awaitSent(t, p, 1, 1)
	ctx, cancel := context.WithCancel(testContext(t))
	cancel()
	outcome, err := p.Close(ctx)
	if !errors.Is(err, context.Canceled) || outcome != (Outcome{Acknowledged: 1, Unknown: 1}) {
		t.Errorf("Close = %+v, %v", outcome, err)
	}
}

func TestProducerAckTimeout(t *testing.T) {
	s := clienttest.New()
	s.OnBatch = gate(nil, nil)
	c := connect(t, s)
	p := newProducer(t, c, ProducerOptions{AckTimeout: 30 * time.Millisecond})
	select {
	case <-p.Failed():
		t.Fatal("timed out with nothing to wait for")
	case <-time.After(100 * time.Millisecond):
	}
	appendAll(t, p, "a")
	<-p.Failed()
	outcome, err := p.Close(testContext(t))
	var e *Error
	if !errors.As(err, &e) || e.Reason != ReasonTimeout || outcome.Unknown != 1 {
		t.Errorf("Close = %+v, %v", outcome, err)
	}
}

func TestProducerIdleConnectionLost(t *testing.T) {
	s := clienttest.New()
	c := connect(t, s, WithRetry(0))
	p := newProducer(t, c, ProducerOptions{})
	appendAll(t, p, "a")
	if err := p.Flush(testContext(t)); err != nil {
		t.Fatal(err)
	}
	s.Stop()
	<-p.Failed()
	if err := p.Append(testContext(t), &Record{}); err == nil {
		t.Error("a broken producer accepts records")
	}
	if outcome, err := p.Close(testContext(t)); err != nil || outcome.Acknowledged != 1 {
		t.Errorf("everything was acknowledged, but Close = %+v, %v", outcome, err)
	}
}

func TestProducerExpectedOffset(t *testing.T) {
	for _, tc := range []struct {
		expected uint64
		want     Outcome
	}{
		{1, Outcome{Acknowledged: 3, First: 1, Last: 3}},
		{0, Outcome{NotAppended: 3}},
	} {
		s := clienttest.New()
		s.Append(values("old")...)
		var conditions int
		s.OnBatch = func(_ context.Context, _ int, req *v1.ProduceRequest) error {
			if req.ExpectedOffset != nil {
				conditions++
			}
			if req.Log != "default" {
				t.Errorf("log %q", req.Log)
			}
			return nil
		}
		c := connect(t, s)
		p := newProducer(t, c, ProducerOptions{Log: "default", Linger: time.Hour, BatchRecords: 2, ExpectedOffset: &tc.expected})
		appendAll(t, p, "a")
		appendAll(t, p, "b")
		if err := p.Append(testContext(t), &Record{Value: []byte("c")}); err != nil && tc.want.Acknowledged > 0 {
			t.Fatal(err)
		} else if err != nil {
			tc.want.NotAppended-- // it came after the refusal
		}
		outcome, err := p.Close(testContext(t))
		if outcome != tc.want || (err != nil) != (tc.want.NotAppended > 0) || conditions != 1 {
			t.Errorf("expecting %d: %+v, %v, %d conditions", tc.expected, outcome, err, conditions)
		}
	}
}

func TestProducerProtocolViolation(t *testing.T) {
	s := clienttest.New()
	s.OnBatch = func(_ context.Context, _ int, req *v1.ProduceRequest) error {
		req.Records = req.Records[:1] // appends less than it was given
		return nil
	}
	c := connect(t, s)
	p := newProducer(t, c, ProducerOptions{Linger: time.Hour})
	appendAll(t, p, "a", "b")
	outcome, err := p.Close(testContext(t))
	var e *Error
	if !errors.As(err, &e) || e.Reason != ReasonProtocol || outcome != (Outcome{Unknown: 2}) {
		t.Errorf("Close = %+v, %v", outcome, err)
	}
}

func TestProducerConcurrentAppends(t *testing.T) {
	s := clienttest.New()
	c := connect(t, s)
	p := newProducer(t, c, ProducerOptions{BatchRecords: 10, MaxInFlightBytes: 2000, Linger: time.Millisecond})
	const writers, each = 4, 300
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			r := &Record{}
			for i := range each {
				r.Value = fmt.Appendf(r.Value[:0], "%d-%05d", w, i) // reused: Append copies
				if err := p.Append(testContext(t), r); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	outcome, err := p.Close(testContext(t))
	if err != nil || outcome.Acknowledged != writers*each {
		t.Fatalf("Close = %+v, %v", outcome, err)
	}
	last := map[byte]string{}
	for _, v := range s.Values() {
		if v <= last[v[0]] {
			t.Fatalf("%q after %q", v, last[v[0]])
		}
		last[v[0]] = v
	}
}

func TestNewProducerCanceled(t *testing.T) {
	s := clienttest.New()
	c := connect(t, s)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	var e *Error
	if _, err := c.NewProducer(ctx, ProducerOptions{}); !errors.Is(err, context.Canceled) || !errors.As(err, &e) || !e.Definite {
		t.Errorf("got %v", err)
	}

	// But ctx bounds only the opening.
	ctx, cancel = context.WithCancel(context.Background())
	p, err := c.NewProducer(ctx, ProducerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	appendAll(t, p, "a")
	if outcome, err := p.Close(testContext(t)); err != nil || outcome.Acknowledged != 1 {
		t.Errorf("Close = %+v, %v", outcome, err)
	}
}

func TestProducerReusesBuffersSafely(t *testing.T) {
	s := clienttest.New()
	c := connect(t, s)
	p := newProducer(t, c, ProducerOptions{BatchBytes: 2 << 10, MaxInFlightBytes: 20 << 10})
	var want []string
	for i := range 2000 {
		want = append(want, string(bytes.Repeat([]byte{byte('a' + i%26)}, i%97)))
	}
	appendAll(t, p, want...)
	if _, err := p.Close(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(s.Values(), want) {
		t.Error("the log differs from what was appended")
	}
}
