package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/diurnalog/diurna/rpc"
)

// The client against the server itself, over the simplest log there can be:
// both write and read the wire form by hand, and have to agree.

type memoryLog struct {
	mu      sync.Mutex
	batches []storedBatch
	next    uint64
	grown   chan struct{}
}

type storedBatch struct {
	base    uint64
	count   uint32
	records []byte
	at      time.Time
}

type settled struct {
	ack rpc.Ack
	err error
}

var closedChannel = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

func (settled) Done() <-chan struct{}      { return closedChannel }
func (s settled) Result() (rpc.Ack, error) { return s.ack, s.err }

func (l *memoryLog) Propose(_ context.Context, p rpc.Proposal, _ bool) (rpc.Pending, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.Expected != nil && *p.Expected != l.next {
		return settled{err: &rpc.OffsetMismatchError{Expected: *p.Expected, Next: l.next}}, nil
	}
	b := storedBatch{l.next, p.Count, p.Records, time.Now().UTC()}
	l.batches = append(l.batches, b)
	l.next += uint64(p.Count)
	close(l.grown)
	l.grown = make(chan struct{})
	return settled{ack: rpc.Ack{BaseOffset: b.base, NextOffset: l.next, AppendTime: b.at}}, nil
}

func (l *memoryLog) Bounds() rpc.Bounds {
	l.mu.Lock()
	defer l.mu.Unlock()
	return rpc.Bounds{HighWatermark: l.next, End: l.next}
}

func (l *memoryLog) WaitReadable(ctx context.Context, offset uint64) error {
	for {
		l.mu.Lock()
		next, grown := l.next, l.grown
		l.mu.Unlock()
		if offset < next {
			return nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (l *memoryLog) Linearize(context.Context) error { return nil }

func (l *memoryLog) OffsetAtTime(t time.Time) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range l.batches {
		if !b.at.Before(t) {
			return b.base, nil
		}
	}
	return l.next, nil
}

func (l *memoryLog) ReadBatches(from uint64, buf []byte, dst []rpc.Batch) ([]rpc.Batch, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if from >= l.next {
		return dst, &rpc.OffsetOutOfRangeError{Offset: from, Next: l.next}
	}
	used := 0
	for _, b := range l.batches {
		if b.base+uint64(b.count) <= from {
			continue
		}
		start := used + rpc.Headroom
		end := start + len(b.records)
		if end > len(buf) {
			if used == 0 {
				return dst, &rpc.ShortBufferError{Need: end}
			}
			break
		}
		copy(buf[start:end], b.records)
		dst = append(dst, rpc.Batch{BaseOffset: b.base, Count: b.count, AppendTime: b.at, Start: start, End: end})
		used = end
	}
	return dst, nil
}

type oneNode struct{}

func (oneNode) Servers(context.Context) (rpc.ServerList, error) {
	return rpc.ServerList{Self: "a", Servers: []rpc.Server{{ID: "a", Address: "a:1", Voter: true, Leader: true, LastContact: -1}}}, nil
}

func TestContract(t *testing.T) {
	svc, err := rpc.New(rpc.Config{Log: &memoryLog{grown: make(chan struct{})}, Cluster: oneNode{}})
	if err != nil {
		t.Fatal(err)
	}
	l := bufconn.Listen(256 << 10)
	served := make(chan error, 1)
	go func() { served <- svc.Serve(l) }()
	defer func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_ = svc.Shutdown(ctx) // hard, so it says that ctx ended
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	c, err := Dial("real", WithDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	ctx := testContext(t)

	var want []*Record
	p := newProducer(t, c, ProducerOptions{BatchRecords: 7})
	for i := range 1000 {
		r := &Record{Value: fmt.Appendf(nil, "value %d", i), Key: make([]byte, i%300)}
		if i%5 == 0 {
			r.Headers = []*Header{{Name: "näme", Value: []byte{byte(i)}}, {}}
		}
		want = append(want, r)
		if err := p.Append(ctx, r); err != nil {
			t.Fatal(err)
		}
	}
	if outcome, err := p.Close(ctx); err != nil || outcome != (Outcome{Acknowledged: 1000, Last: 999}) {
		t.Fatalf("Close = %+v, %v", outcome, err)
	}
	for _, start := range []uint64{0, 5, 999} {
		r := consume(t, c, ConsumeOptions{Start: AtOffset(start), MessageBytes: 1000})
		for i := start; i < 1000; i++ {
			if !r.Next() {
				t.Fatalf("from %d ends before %d: %v", start, i, r.Err())
			}
			if got := r.Record(); got.Offset != i || time.Since(got.Time) > time.Minute || !proto.Equal(toRecord(got), want[i]) {
				t.Fatalf("offset %d: %+v", i, got)
			}
		}
		if r.Next() || r.Err() != nil {
			t.Errorf("goes on after the end: %v", r.Err())
		}
	}
	end := uint64(12)
	if got := offsets(consume(t, c, ConsumeOptions{Start: AtOffset(10), End: &end, Follow: true})); !slices.Equal(got, []uint64{10, 11}) {
		t.Errorf("until 12: %v", got)
	}
	if got := offsets(consume(t, c, ConsumeOptions{Start: Last(3)})); !slices.Equal(got, []uint64{997, 998, 999}) {
		t.Errorf("last three: %v", got)
	}

	wrong := uint64(3)
	p = newProducer(t, c, ProducerOptions{ExpectedOffset: &wrong})
	appendAll(t, p, "a", "b")
	outcome, err := p.Close(ctx)
	var e *Error
	if !errors.As(err, &e) || e.Reason != ReasonOffsetMismatch || !e.Definite || e.Advice == "" || outcome != (Outcome{NotAppended: 2}) {
		t.Errorf("Close = %+v, %#v", outcome, err)
	}
	if _, err := c.Produce(ctx, []*Record{{Value: make([]byte, 2<<20)}}); !errors.As(err, &e) || e.Reason != ReasonRecordTooLarge || !e.Definite {
		t.Errorf("too large: %#v", err)
	}
	if limit, ok := e.Uint("limit"); !ok || limit != 1<<20 {
		t.Errorf("limit %d, %v", limit, ok)
	}
	if _, err := c.Produce(ctx, values("a"), ToLog("other")); !errors.As(err, &e) || e.Reason != ReasonLogNotFound {
		t.Errorf("other log: %#v", err)
	}
	list, err := c.Servers(ctx)
	if self, ok := list.Self(); err != nil || !ok || !self.Leader || self.HighWatermark != 1000 && self.HighWatermark != 0 {
		t.Errorf("Servers = %+v, %v", list, err)
	}
	if ok, text, err := c.Health(ctx); !ok || err != nil {
		t.Errorf("Health = %v %q %v", ok, text, err)
	}
}
