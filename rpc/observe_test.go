package rpc

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// observations is an Observer that remembers.
type observations struct {
	mu    sync.Mutex
	begun []string
	ended []CallEnd
}

func (o *observations) CallBegins(method string, stream bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if stream {
		method += " stream"
	}
	o.begun = append(o.begun, method)
}

func (o *observations) CallEnds(_ string, _ bool, end CallEnd) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if end.Took <= 0 {
		end.Reason += " in no time"
	}
	end.Took = 0
	o.ended = append(o.ended, end)
}

func TestObserver(t *testing.T) {
	var seen observations
	log := newMemLog()
	f := serve(t, Config{Log: log, Limits: Limits{OpenCalls: 1}, Observer: &seen}, false)
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	produce := func(want codes.Code) {
		t.Helper()
		_, err := f.client.Produce(testContext(t), &v1.ProduceRequest{Records: []*v1.Record{{Value: make([]byte, 1000)}}})
		if got := status.Code(err); got != want {
			t.Fatalf("got %v, want %v", err, want)
		}
	}
	produce(codes.OK)
	log.mu.Lock()
	log.proposeErr = func(int) error { return ErrOverloaded }
	log.mu.Unlock()
	produce(codes.ResourceExhausted)
	log.mu.Lock()
	log.proposeErr = func(int) error { panic("oops") }
	log.mu.Unlock()
	produce(codes.Internal)

	stream, err := f.client.ConsumeStream(ctx, &v1.ConsumeRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	produce(codes.ResourceExhausted)
	if s := f.svc.Stats(); s.Connections != 1 || s.Received < 4000 || s.Sent < 1000 || s.Sent > s.Received {
		t.Errorf("%+v", s)
	}
	cancel()
	eventually(t, "the stream is over", func() bool {
		seen.mu.Lock()
		defer seen.mu.Unlock()
		return len(seen.ended) == 5
	})

	const p = "/diurna.v1.Log/Produce"
	if want := []string{p, p, p, "/diurna.v1.Log/ConsumeStream stream", p}; !slices.Equal(seen.begun, want) {
		t.Errorf("begun: %q", seen.begun)
	}
	want := []CallEnd{
		{}, {Code: codes.ResourceExhausted, Reason: ReasonOverloaded}, {Code: codes.Internal, Reason: ReasonInternal},
		{Code: codes.ResourceExhausted, Reason: ReasonTooManyCalls}, {Code: codes.Canceled, Reason: ReasonCanceled},
	}
	if !slices.Equal(seen.ended, want) {
		t.Errorf("ended: %+v", seen.ended)
	}
	// A connection that is closed is not counted any more.
	if err := f.conn.Close(); err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	eventually(t, "the connection is closed", func() bool { return f.svc.Stats().Connections == 0 })
}
