package rpc

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// bytesCodec is a client's codec that sends what it is given.
type bytesCodec struct{}

func (bytesCodec) Name() string { return "proto" }
func (bytesCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (bytesCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

func TestProduce(t *testing.T) {
	log := newMemLog()
	f := serve(t, Config{Log: log}, false)
	ctx := testContext(t)
	for i, req := range []*v1.ProduceRequest{
		{Records: []*v1.Record{record(0, 10), record(1, 500)}},
		{Log: "default", Records: []*v1.Record{{}}},
		{ExpectedOffset: ptr(uint64(3)), Records: []*v1.Record{record(3, 100)}},
	} {
		resp, err := f.client.Produce(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		base := []uint64{0, 2, 3, 4}
		if resp.BaseOffset != base[i] || resp.NextOffset != base[i+1] || !resp.AppendTime.AsTime().Equal(log.batches[i].time) {
			t.Errorf("request %d: %v", i, resp)
		}
		if !bytes.Equal(log.batches[i].records, encode(t, req.Records...)) {
			t.Errorf("request %d: stored other bytes than were sent", i)
		}
	}

	_, err := f.client.Produce(ctx, &v1.ProduceRequest{ExpectedOffset: ptr(uint64(1)), Records: []*v1.Record{{}}})
	if m := wantStatus(t, err, codes.Aborted, ReasonOffsetMismatch); m["expected"] != "1" || m["next"] != "4" {
		t.Errorf("metadata %v", m)
	}
	_, err = f.client.Produce(ctx, &v1.ProduceRequest{Log: "audit", Records: []*v1.Record{{}}})
	if m := wantStatus(t, err, codes.NotFound, ReasonLogNotFound); m["log"] != "audit" {
		t.Errorf("metadata %v", m)
	}
}

func TestProduceRefuses(t *testing.T) {
	log := newMemLog()
	f := serve(t, Config{Log: log}, false)
	for name, c := range badRequests(t) {
		reason := ReasonInvalidArgument
		switch c.want.(type) {
		case *RecordTooLargeError:
			reason = ReasonRecordTooLarge
		case *BatchTooLargeError:
			reason = ReasonBatchTooLarge
		case *InvalidArgumentError:
		default:
			reason = ReasonEmptyBatch
		}
		t.Run(name, func(t *testing.T) {
			ctx := testContext(t)
			var resp []byte
			err := f.conn.Invoke(ctx, v1.Log_Produce_FullMethodName, &c.raw, &resp, grpc.ForceCodecV2(bytesCodec{}))
			wantStatus(t, err, codes.InvalidArgument, reason)

			// On a stream, a good one before it is acknowledged all the same.
			stream, err := f.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true},
				v1.Log_ProduceStream_FullMethodName, grpc.ForceCodecV2(bytesCodec{}))
			if err != nil {
				t.Fatal(err)
			}
			before := log.proposals()
			good := encode(t, record(0, 10))
			if err := errors.Join(stream.SendMsg(&good), stream.SendMsg(&c.raw)); err != nil {
				t.Fatal(err)
			}
			if err := stream.RecvMsg(&resp); err != nil {
				t.Fatal(err)
			}
			m := wantStatus(t, stream.RecvMsg(&resp), codes.InvalidArgument, reason)
			if m[MetaRequest] != "1" {
				t.Errorf("metadata %v", m)
			}
			if n := log.proposals(); n != before+1 {
				t.Errorf("%d proposals, want 1", n-before)
			}
		})
	}
}

// Above the limit for typed refusals gRPC itself refuses; nothing is appended.
func TestProduceFarTooLarge(t *testing.T) {
	log := newMemLog()
	f := serve(t, Config{Log: log}, false)
	_, err := f.client.Produce(testContext(t), &v1.ProduceRequest{Records: []*v1.Record{{Value: make([]byte, 4<<20)}}})
	if status.Code(err) != codes.ResourceExhausted || log.proposals() != 0 {
		t.Errorf("got %v, %d proposals", err, log.proposals())
	}
}

func TestProduceErrors(t *testing.T) {
	for _, c := range []struct {
		name   string
		err    error
		code   codes.Code
		reason string
		retry  bool
	}{
		{"overloaded", ErrOverloaded, codes.ResourceExhausted, ReasonOverloaded, true},
		{"no leader", ErrNoLeader, codes.Unavailable, ReasonNoLeader, true},
		{"not leader", &NotLeaderError{LeaderID: "b", LeaderAddress: "b:1"}, codes.Unavailable, ReasonNotLeader, true},
		{"closed", ErrClosed, codes.Unavailable, ReasonShuttingDown, true},
		{"unknown", ErrUnknownOutcome, codes.Unknown, ReasonUnknownOutcome, false},
		{"bug", errors.New("bug"), codes.Internal, ReasonInternal, false},
		{"forwarded", statusOf(&OffsetMismatchError{Expected: 1, Next: 2}), codes.Aborted, ReasonOffsetMismatch, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			log := newMemLog()
			log.hold = true
			f := serve(t, Config{Log: log}, false)
			ctx := testContext(t)
			req := &v1.ProduceRequest{Records: []*v1.Record{{}}}

			done := make(chan error, 1)
			go func() {
				_, err := f.client.Produce(ctx, req)
				done <- err
			}()
			eventually(t, "proposed", func() bool { return log.proposals() == 1 })
			log.resolve(0, Ack{}, c.err)
			check := func(err error) {
				t.Helper()
				wantStatus(t, err, c.code, c.reason)
				var retry bool
				for _, d := range status.Convert(err).Details() {
					if r, ok := d.(*errdetails.RetryInfo); ok {
						retry = r.RetryDelay.AsDuration() > 0
					}
				}
				if retry != c.retry {
					t.Errorf("retry info %v, want %v", retry, c.retry)
				}
			}
			check(<-done)

			log.proposeErr = func(int) error { return c.err }
			_, err := f.client.Produce(ctx, req)
			check(err)
		})
	}
}

// A call that ends while its batch is under way must not claim that nothing
// happened.
func TestProduceOutcomeUnknown(t *testing.T) {
	for _, cause := range []error{context.Canceled, context.DeadlineExceeded} {
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(nil)
		if cause == context.DeadlineExceeded {
			var stop context.CancelFunc
			ctx, stop = context.WithTimeout(context.Background(), 0)
			defer stop()
		}
		_, err := await(ctx, &memPending{done: make(chan struct{})})
		want := status.FromContextError(cause).Code()
		wantStatus(t, statusOf(err), want, ReasonUnknownOutcome)
	}

	// A known outcome is not thrown away because the call ended as well.
	log := newMemLog()
	p, err := log.Propose(context.Background(), Proposal{Count: 1}, false)
	if err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for range 100 {
		if _, err := await(ended, p); err != nil {
			t.Fatal(err)
		}
	}

	log.hold = true
	f := serve(t, Config{Log: log}, false)
	ctx, cancel := context.WithCancel(testContext(t))
	done := make(chan error, 1)
	go func() {
		_, err := f.client.Produce(ctx, &v1.ProduceRequest{Records: []*v1.Record{{}}})
		done <- err
	}()
	eventually(t, "proposed", func() bool { return log.proposals() == 2 })
	cancel()
	if err := <-done; status.Code(err) != codes.Canceled {
		t.Error(err)
	}
	eventually(t, "the call is over", func() bool { return f.svc.calls.count() == 0 })
}

func TestProduceStream(t *testing.T) {
	log := newMemLog()
	f := serve(t, Config{Log: log}, false)
	stream, err := f.client.ProduceStream(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	const n, size = 3000, 2000 // well past the window, and large enough for gRPC to pool buffers
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range n {
			if err := stream.Send(&v1.ProduceRequest{Records: []*v1.Record{record(i, size), {}}}); err != nil {
				t.Error(err)
				return
			}
		}
		if err := stream.CloseSend(); err != nil {
			t.Error(err)
		}
	})
	for i := range uint64(n) {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if resp.BaseOffset != 2*i || resp.NextOffset != 2*i+2 {
			t.Fatalf("acknowledgement %d is %v", i, resp)
		}
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v at the end", err)
	}
	wg.Wait()
	for i, stored := range log.proposed {
		if !bytes.Equal(stored, encode(t, record(i, size), &v1.Record{})) {
			t.Fatalf("request %d: stored other bytes than were sent", i)
		}
	}
}

// Outcomes that arrive in any order are acknowledged in that of the requests.
func TestProduceStreamOrder(t *testing.T) {
	log := newMemLog()
	log.hold = true
	f := serve(t, Config{Log: log}, false)
	stream, err := f.client.ProduceStream(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	const n = 20
	for i := range n {
		if err := stream.Send(&v1.ProduceRequest{Records: []*v1.Record{record(i, 10)}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all proposed", func() bool { return log.proposals() == n })
	for i := n - 1; i >= 0; i-- {
		log.resolve(i, Ack{BaseOffset: uint64(i), NextOffset: uint64(i) + 1, AppendTime: epoch}, nil)
	}
	for i := range uint64(n) {
		if resp, err := stream.Recv(); err != nil || resp.BaseOffset != i {
			t.Fatalf("acknowledgement %d: %v, %v", i, resp, err)
		}
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v at the end", err)
	}
}

// What became of requests behind the first that failed is told.
func TestProduceStreamFailure(t *testing.T) {
	type outcomes = []error
	unknown, mismatch := ErrUnknownOutcome, &OffsetMismatchError{Expected: 1, Next: 9}
	for _, c := range []struct {
		name            string
		outcomes        outcomes // nil: appended
		code            codes.Code
		reason          string
		request         string
		after, afterUnk string
	}{
		{"the rest fails too", outcomes{nil, mismatch, mismatch, ErrNoLeader}, codes.Aborted, ReasonOffsetMismatch, "1", "", ""},
		{"the rest is appended", outcomes{mismatch, nil, nil, nil}, codes.Aborted, ReasonOffsetMismatch, "0", "1-3", ""},
		{"some of the rest", outcomes{nil, mismatch, nil, unknown, nil, nil, ErrNoLeader, unknown}, codes.Aborted, ReasonOffsetMismatch, "1", "2,4-5", "3,7"},
		{"unknown all over", outcomes{nil, unknown, unknown}, codes.Unknown, ReasonUnknownOutcome, "1", "", "2"},
		{"forwarded", outcomes{statusOf(mismatch), nil}, codes.Aborted, ReasonOffsetMismatch, "0", "1", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			log := newMemLog()
			log.hold = true
			f := serve(t, Config{Log: log}, false)
			stream, err := f.client.ProduceStream(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			for i := range c.outcomes {
				if err := stream.Send(&v1.ProduceRequest{Records: []*v1.Record{record(i, 10)}}); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "all proposed", func() bool { return log.proposals() == len(c.outcomes) })
			for i := len(c.outcomes) - 1; i >= 0; i-- {
				log.resolve(i, Ack{BaseOffset: uint64(i)}, c.outcomes[i])
			}
			for {
				if _, err = stream.Recv(); err != nil {
					break
				}
			}
			m := wantStatus(t, err, c.code, c.reason)
			if m[MetaRequest] != c.request || m[MetaAppendedAfter] != c.after || m[MetaUnknownAfter] != c.afterUnk {
				t.Errorf("metadata %v", m)
			}
		})
	}
}

func TestProduceStreamManyRanges(t *testing.T) {
	log := newMemLog()
	log.hold = true
	f := serve(t, Config{Log: log}, false)
	stream, err := f.client.ProduceStream(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	const n = 400
	for i := range n {
		if err := stream.Send(&v1.ProduceRequest{Records: []*v1.Record{record(i, 10)}}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all proposed", func() bool { return log.proposals() == n })
	for i := range n {
		var err error
		if i%2 == 0 {
			err = ErrNoLeader
		}
		log.resolve(i, Ack{}, err)
	}
	_, err = stream.Recv()
	if m := wantStatus(t, err, codes.Unavailable, ReasonNoLeader); m[MetaUnknownAfter] != "1-399" || m[MetaAppendedAfter] != "" {
		t.Errorf("metadata %v", m)
	}
}

// A stream whose outcomes do not come is not read past its window.
func TestProduceStreamBackPressure(t *testing.T) {
	for _, c := range []struct {
		name            string
		limits          Limits
		size            int
		atLeast, atMost int
	}{
		{"requests", Limits{StreamRequests: 7}, 10, 7, 7},
		{"bytes", Limits{StreamBytes: 64 << 10}, 20 << 10, 4, 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			log := newMemLog()
			log.hold = true
			f := serve(t, Config{Log: log, Limits: c.limits}, false)
			ctx, cancel := context.WithCancel(testContext(t))
			stream, err := f.client.ProduceStream(ctx)
			if err != nil {
				t.Fatal(err)
			}
			const n = 500
			sent := make(chan error, 1)
			go func() {
				for i := range n {
					if err := stream.Send(&v1.ProduceRequest{Records: []*v1.Record{record(i, c.size)}}); err != nil {
						sent <- err
						return
					}
				}
				sent <- nil
			}()
			eventually(t, "the window is full", func() bool { return log.proposals() >= c.atLeast })
			// Every further acknowledgement lets exactly one more in.
			for i := range 50 {
				if got := log.proposals(); got > c.atMost+i {
					t.Fatalf("%d proposals with %d outcomes", got, i)
				}
				log.resolve(i, Ack{BaseOffset: uint64(i)}, nil)
				if _, err := stream.Recv(); err != nil {
					t.Fatal(err)
				}
				eventually(t, "one more", func() bool { return log.proposals() >= c.atLeast+i+1 })
			}
			cancel()
			if err := <-sent; err == nil && c.size > 1000 {
				t.Error("the client was never held back")
			}
		})
	}
}

func TestProduceStreamCancel(t *testing.T) {
	log := newMemLog()
	log.hold = true
	f := serve(t, Config{Log: log}, false)
	ctx, cancel := context.WithCancel(testContext(t))
	stream, err := f.client.ProduceStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&v1.ProduceRequest{Records: []*v1.Record{{}}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "proposed", func() bool { return log.proposals() == 1 })
	cancel()
	eventually(t, "the call is over", func() bool { return f.svc.calls.count() == 0 })
	f.svc.background.Wait()
}

func TestAuthorize(t *testing.T) {
	log := newMemLog()
	denied := func(_ context.Context, action Action, name string) error {
		return &DeniedError{Subject: "nobody", Object: name, Action: string(action)}
	}
	f := serve(t, Config{Log: log, Authorize: denied}, false)
	ctx := testContext(t)
	check := func(err error, action string) {
		t.Helper()
		m := wantStatus(t, err, codes.PermissionDenied, ReasonDenied)
		if m["subject"] != "nobody" || m["object"] != "default" || m["action"] != action {
			t.Errorf("metadata %v", m)
		}
	}
	_, err := f.client.Produce(ctx, &v1.ProduceRequest{Records: []*v1.Record{{}}})
	check(err, "produce")
	_, err = f.client.Consume(ctx, &v1.ConsumeRequest{})
	check(err, "consume")
	cs, err := f.client.ConsumeStream(ctx, &v1.ConsumeRequest{Log: "default"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = cs.Recv()
	check(err, "consume")
	ps, err := f.client.ProduceStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := ps.Send(&v1.ProduceRequest{Records: []*v1.Record{{}}}); err != nil {
		t.Fatal(err)
	}
	_, err = ps.Recv()
	check(err, "produce")
	if log.proposals() != 0 {
		t.Error("proposed without permission")
	}
}

// What is received after a stream has ended is not proposed: the client may
// have been told so already.
func TestProduceStreamEnded(t *testing.T) {
	log := newMemLog()
	p := &producing{log: log, window: newWindow(1, 1), queue: make(chan outcome, 2)}
	p.propose, p.cancelPropose = context.WithCancelCause(testContext(t))
	req := produceRequest{records: encode(t, &v1.Record{}), count: 1}
	if err := p.proposeOne(&req, 1); err != nil || log.proposals() != 1 {
		t.Fatalf("%d proposals, %v", log.proposals(), err)
	}
	p.end(nil)
	p.end(errors.New("too late"))
	if err := p.proposeOne(&req, 1); err != nil || log.proposals() != 1 {
		t.Errorf("%d proposals, %v", log.proposals(), err)
	}
	if o := <-p.queue; o.pending == nil {
		t.Errorf("queue begins with %v", o)
	}
	if o, ok := <-p.queue; ok {
		t.Errorf("queue goes on with %v", o)
	}
}
