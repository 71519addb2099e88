package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func request(n int) *v1.ProduceRequest {
	return &v1.ProduceRequest{Records: []*v1.Record{record(n, 20)}}
}

func TestForwardProduce(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, nil)
	ctx := testContext(t)
	resp, err := c["b"].client.Produce(ctx, &v1.ProduceRequest{Records: []*v1.Record{record(0, 9), record(1, 9)}})
	if err != nil || resp.GetBaseOffset() != 0 || resp.GetNextOffset() != 2 || !resp.GetAppendTime().AsTime().Equal(epoch) {
		t.Fatalf("Produce: %v, %v", resp, err)
	}
	stream := c["b"].stream(t)
	for i := range 3 {
		if err := stream.Send(request(i)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		resp, err := stream.Recv()
		if err != nil || resp.GetBaseOffset() != uint64(2+i) {
			t.Fatalf("answer %d: %v, %v", i, resp, err)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Fatalf("the stream ends with %v", err)
	}
	if n := c["b"].proposals(); n != 0 {
		t.Errorf("%d batches went into the follower's own log", n)
	}
	if got := c["a"].proposed[0]; string(got) != string(encode(t, record(0, 9), record(1, 9))) {
		t.Errorf("the records' bytes have changed: %x", got)
	}
	// The refused in between ends nothing for the others.
	_, err = c["b"].client.Produce(ctx, &v1.ProduceRequest{ExpectedOffset: ptr(uint64(1)), Records: []*v1.Record{record(0, 9)}})
	if meta := wantStatus(t, err, codes.Aborted, ReasonOffsetMismatch); meta["expected"] != "1" || meta["next"] != "5" || len(meta) != 2 {
		t.Errorf("metadata %v", meta)
	}
	if resp, err = c["b"].client.Produce(ctx, &v1.ProduceRequest{ExpectedOffset: ptr(uint64(5)), Records: []*v1.Record{record(0, 9)}}); err != nil || resp.GetBaseOffset() != 5 {
		t.Errorf("Produce: %v, %v", resp, err)
	}
}

// TestForwardErrors: what is wrong with a batch reaches the client as the
// leader said it, what is wrong with the leader as such.
func TestForwardErrors(t *testing.T) {
	for name, tc := range map[string]struct {
		err     error
		pending bool // comes as the outcome, not from Propose
		code    codes.Code
		reason  string
		meta    map[string]string
	}{
		"full":           {err: ErrDiskFull, code: codes.ResourceExhausted, reason: ReasonDiskFull},
		"full, later":    {err: ErrDiskFull, pending: true, code: codes.ResourceExhausted, reason: ReasonDiskFull},
		"too large":      {err: &BatchTooLargeError{Size: 9, Limit: 8}, code: codes.InvalidArgument, reason: ReasonBatchTooLarge, meta: map[string]string{"size": "9", "limit": "8"}},
		"unknown":        {err: ErrUnknownOutcome, pending: true, code: codes.Unknown, reason: ReasonUnknownOutcome},
		"deposed":        {err: &NotLeaderError{"c", "c:1"}, pending: true, code: codes.Unavailable, reason: ReasonNotLeader, meta: map[string]string{"leader_id": "c", "leader_address": "c:1"}},
		"deposed before": {err: &NotLeaderError{"c", "c:1"}, code: codes.Unavailable, reason: ReasonNotLeader, meta: map[string]string{"leader_id": "c", "leader_address": "c:1"}},
		"election":       {err: ErrNoLeader, code: codes.Unavailable, reason: ReasonNoLeader},
		"leaving":        {err: ErrClosed, code: codes.Unavailable, reason: ReasonNoLeader},
		"bug":            {err: errors.New("bug"), code: codes.Internal, reason: ReasonInternal},
	} {
		t.Run(name, func(t *testing.T) {
			_, c := newCluster(t, []string{"a", "b"}, nil)
			if tc.pending {
				c["a"].hold = true
			} else {
				c["a"].proposeErr = func(int) error { return tc.err }
			}
			settle := func() {
				if tc.pending {
					n := c["a"].proposals()
					eventually(t, "the batch reaches the leader", func() bool { return c["a"].proposals() > n-1 && c["a"].heldCount() > 0 })
					c["a"].resolve(c["a"].heldCount()-1, Ack{}, tc.err)
				}
			}
			got := make(chan error, 1)
			go func() {
				_, err := c["b"].client.Produce(testContext(t), request(0))
				got <- err
			}()
			settle()
			err := <-got
			meta := wantStatus(t, err, tc.code, tc.reason)
			if fmt.Sprint(meta) != fmt.Sprint(tc.meta) && len(meta)+len(tc.meta) > 0 {
				t.Errorf("metadata %v, want %v", meta, tc.meta)
			}
			if tc.reason == ReasonDiskFull {
				var info *errdetails.RetryInfo
				for _, d := range status.Convert(err).Details() {
					if r, ok := d.(*errdetails.RetryInfo); ok {
						info = r
					}
				}
				if info.GetRetryDelay().AsDuration() != retryFull {
					t.Errorf("the time to wait did not survive: %v", info)
				}
			}
		})
	}
}

// TestForwardOrder: batches of one stream keep their order whatever others do.
func TestForwardOrder(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, nil)
	const streams, each = 16, 300
	var wg sync.WaitGroup
	for s := range streams {
		stream := c["b"].stream(t)
		wg.Go(func() {
			for i := range each {
				if err := stream.Send(&v1.ProduceRequest{Records: []*v1.Record{{Value: fmt.Appendf(nil, "%d", i), Key: fmt.Appendf(nil, "%d", s)}}}); err != nil {
					t.Errorf("stream %d: %v", s, err)
					return
				}
			}
			if err := stream.CloseSend(); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			last := -1
			for i := range each {
				resp, err := stream.Recv()
				if err != nil {
					t.Errorf("stream %d, answer %d: %v", s, i, err)
					return
				}
				// Each answer is that of its own request.
				if got := c["a"].at(int(resp.GetBaseOffset())); string(got.GetKey()) != fmt.Sprint(s) || string(got.GetValue()) != fmt.Sprint(i) {
					t.Errorf("stream %d, answer %d: offset %d holds %v", s, i, resp.GetBaseOffset(), got)
				}
				if int(resp.GetBaseOffset()) <= last {
					t.Errorf("stream %d: offset %d after %d", s, resp.GetBaseOffset(), last)
				}
				last = int(resp.GetBaseOffset())
			}
		})
	}
	wg.Wait()
	if b := c["a"].Bounds(); b.End != streams*each {
		t.Errorf("the log has %d records", b.End)
	}
}

func (l *memLog) at(offset int) *v1.Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range l.batches {
		if b.base == uint64(offset) {
			batch := new(v1.RecordBatch)
			if proto.Unmarshal(b.records, batch) != nil || len(batch.GetRecords()) != 1 {
				return nil
			}
			return batch.GetRecords()[0]
		}
	}
	return nil
}

func (l *memLog) heldCount() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.held)
}

// TestForwardSplit: what a broken stream leaves behind is unknown if it was
// sent, and definite if not, and the leader's word on how far it got counts.
func TestForwardSplit(t *testing.T) {
	lost := status.Error(codes.Unavailable, "connection reset")
	told := func(n int, err error) error { return statusWith(err, map[string]string{MetaRequest: itoa(n)}) }
	for name, tc := range map[string]struct {
		err            error
		answered, sent int
		queued         int
		want           string
	}{
		"nothing":                 {lost, 0, 0, 0, ""},
		"never opened":            {lost, 0, 0, 2, "NO_LEADER NO_LEADER"},
		"all sent":                {lost, 3, 2, 0, "? ?"},
		"some sent":               {lost, 3, 2, 2, "? ? NO_LEADER NO_LEADER"},
		"ended without an answer": {nil, 0, 2, 1, "? ? NO_LEADER"},
		"leader told, none taken": {told(3, &shutdownError{}), 3, 2, 1, "NO_LEADER NO_LEADER NO_LEADER"},
		"leader told, some taken": {told(4, &shutdownError{}), 3, 2, 1, "? NO_LEADER NO_LEADER"},
		"leader told, new one":    {told(3, &NotLeaderError{"c", "c:1"}), 3, 2, 1, "NOT_LEADER NOT_LEADER NOT_LEADER"},
		"leader told, foreign":    {told(0, &ForeignClusterError{"x", "y"}), 0, 1, 1, "NO_LEADER NO_LEADER"},
		"leader says no number":   {statusOf(errors.New("panic")), 3, 2, 1, "? ? NO_LEADER"},
		"no such service":         {status.Error(codes.Unimplemented, "no Peer"), 0, 2, 1, "NO_LEADER NO_LEADER NO_LEADER"},
		"answers out of turn":     {errors.New("out of turn"), 3, 2, 1, "? ? NO_LEADER"},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := NewForwarder(ForwarderConfig{Dial: (&network{}).dial})
			if err != nil {
				t.Fatal(err)
			}
			st := newForwardStream(f, "a:1", nil)
			defer st.cancel()
			st.answered = uint64(tc.answered)
			var all []*forwarded
			for i := range tc.sent + tc.queued {
				fw := &forwarded{f: f, size: 1, done: make(chan struct{})}
				if err := f.room.Acquire(t.Context(), 1); err != nil {
					t.Fatal(err)
				}
				all = append(all, fw)
				if i < tc.sent {
					st.sent = append(st.sent, fw)
				} else {
					st.queue = append(st.queue, fw)
				}
			}
			st.end(tc.err)
			var got []string
			for _, fw := range all {
				<-fw.Done()
				_, err := fw.Result()
				switch {
				case errors.Is(err, ErrUnknownOutcome):
					got = append(got, "?")
					if code := status.Code(statusOf(err)); code != codes.Unknown {
						t.Errorf("an unknown outcome has code %v", code)
					}
				default:
					got = append(got, reasonOf(statusOf(err)))
				}
			}
			if s := strings.Join(got, " "); s != tc.want {
				t.Errorf("got %q, want %q", s, tc.want)
			}
			if st.enqueue(&forwarded{}) {
				t.Error("it takes more after its end")
			}
			if !f.room.TryAcquire(int64(f.cfg.InFlightBytes)) {
				t.Error("room was lost")
			}
		})
	}
}

// TestForwardBroken: the same with a real connection that breaks.
func TestForwardBroken(t *testing.T) {
	net, c := newCluster(t, []string{"a", "b"}, nil)
	c["a"].hold = true
	stream := c["b"].stream(t)
	for i := range 5 {
		if err := stream.Send(request(i)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all reach the leader", func() bool { return c["a"].heldCount() == 5 })
	c["a"].resolve(0, Ack{NextOffset: 1}, nil)
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	back := net.cut("a:1")
	_, err := stream.Recv()
	if meta := wantStatus(t, err, codes.Unknown, ReasonUnknownOutcome); meta[MetaRequest] != "1" || meta[MetaUnknownAfter] != "2-4" {
		t.Errorf("metadata %v", meta)
	}
	// Nothing can be sent: definite.
	_, err = c["b"].client.Produce(testContext(t), request(9))
	wantStatus(t, err, codes.Unavailable, ReasonNoLeader)
	// And it works again when the leader is back.
	back()
	c["a"].mu.Lock()
	c["a"].hold = false
	c["a"].mu.Unlock()
	eventually(t, "batches are forwarded again", func() bool {
		_, err := c["b"].client.Produce(testContext(t), request(10))
		return err == nil
	})
	for i := 1; i < 5; i++ {
		c["a"].resolve(i, Ack{}, ErrUnknownOutcome)
	}
}

// TestForwardLeaderChange: batches go to the new leader, after those to the old
// one have their outcome.
func TestForwardLeaderChange(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b", "c"}, nil)
	c["a"].hold = true
	stream := c["b"].stream(t)
	send := func(i int) {
		t.Helper()
		if err := stream.Send(request(i)); err != nil {
			t.Fatal(err)
		}
	}
	send(0)
	send(1)
	eventually(t, "both reach the old leader", func() bool { return c["a"].heldCount() == 2 })
	for _, m := range c {
		m.setLeader("c")
	}
	send(2)
	send(3)
	// Retired, and not overtaken.
	eventually(t, "the stream to the old leader takes no more", func() bool {
		c["b"].forward.mu.Lock()
		defer c["b"].forward.mu.Unlock()
		return c["b"].forward.current.address == "c:1"
	})
	if n := c["c"].proposals(); n != 0 {
		t.Fatalf("%d batches overtook those before them", n)
	}
	c["a"].resolve(0, Ack{BaseOffset: 10, NextOffset: 11}, nil)
	c["a"].resolve(1, Ack{BaseOffset: 11, NextOffset: 12}, nil)
	for _, want := range []uint64{10, 11, 0, 1} {
		resp, err := stream.Recv()
		if err != nil || resp.GetBaseOffset() != want {
			t.Fatalf("got %v, %v, want offset %d", resp, err, want)
		}
	}
}

// TestForwardSilentLeader: a leader that was replaced and never answers leaves
// its batches unknown, even where nothing comes that would bring the news.
func TestForwardSilentLeader(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b", "c"}, nil)
	c["a"].hold = true
	got := make(chan error, 1)
	go func() {
		_, err := c["b"].client.Produce(testContext(t), request(0))
		got <- err
	}()
	eventually(t, "it reaches the old leader", func() bool { return c["a"].heldCount() == 1 })
	c["b"].setLeader("c")
	wantStatus(t, <-got, codes.Unknown, ReasonUnknownOutcome)
	c["a"].resolve(0, Ack{}, ErrUnknownOutcome)
}

// TestForwardHint: a follower that still takes a former leader for the leader
// goes where that one points.
func TestForwardHint(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b", "c"}, nil)
	c["a"].setLeader("c")
	c["c"].setLeader("c")
	ctx := testContext(t)
	_, err := c["b"].client.Produce(ctx, request(0))
	if meta := wantStatus(t, err, codes.Unavailable, ReasonNotLeader); meta["leader_address"] != "c:1" || meta["leader_id"] != "c" || meta[MetaRequest] != "" {
		t.Errorf("metadata %v", meta)
	}
	if _, err := c["b"].client.Produce(ctx, request(0)); err != nil {
		t.Errorf("the second time: %v", err)
	}
	if n := c["c"].proposals(); n != 1 {
		t.Errorf("the new leader has %d batches", n)
	}
}

// TestForwardLoop: two nodes that take each other for the leader pass nothing
// back and forth.
func TestForwardLoop(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, nil)
	c["a"].setLeader("b")
	c["b"].setLeader("a")
	ctx := testContext(t)
	for range 3 {
		_, err := c["b"].client.Produce(ctx, request(0))
		if meta := wantStatus(t, err, codes.Unavailable, ReasonNotLeader); meta["leader_id"] != "b" {
			t.Errorf("metadata %v", meta)
		}
	}
	_, err := c["b"].client.Consume(ctx, &v1.ConsumeRequest{Linearizable: true})
	wantStatus(t, err, codes.Unavailable, ReasonNotLeader)
	_, err = v1.NewAdminClient(c["b"].conn).RemovePeer(ctx, &v1.RemovePeerRequest{Id: "a"})
	wantStatus(t, err, codes.Unavailable, ReasonNotLeader)
	if a, b := c["a"].proposals(), c["b"].proposals(); a+b != 0 {
		t.Errorf("%d and %d batches were proposed", a, b)
	}
}

// TestForwardForeign: an address that belongs to another cluster now takes
// nothing.
func TestForwardForeign(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, func(m *member, _ *ForwarderConfig) { m.cluster = "of " + m.id })
	ctx := testContext(t)
	_, err := c["b"].client.Produce(ctx, request(0))
	wantStatus(t, err, codes.Unavailable, ReasonNoLeader)
	_, err = c["b"].client.Consume(ctx, &v1.ConsumeRequest{Linearizable: true})
	wantStatus(t, err, codes.Unavailable, ReasonNoLeader)
	if n := c["a"].proposals(); n != 0 {
		t.Errorf("%d batches went into the other cluster", n)
	}
	// What is not known is no difference.
	c["b"].mu.Lock()
	c["b"].cluster = ""
	c["b"].mu.Unlock()
	if _, err := c["b"].client.Produce(ctx, request(0)); err != nil {
		t.Error(err)
	}
}

// TestForwardOverload: a single Produce is refused where there is no room, a
// stream waits.
func TestForwardOverload(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, func(_ *member, cfg *ForwarderConfig) { cfg.InFlightBytes = 4 << 20 })
	c["a"].hold = true
	big := func() *v1.ProduceRequest {
		return &v1.ProduceRequest{Records: []*v1.Record{{Value: make([]byte, 900<<10)}}}
	}
	stream := c["b"].stream(t)
	for range 6 {
		if err := stream.Send(big()); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the room is used up", func() bool { return c["b"].forward.under.Load() == 4 && c["a"].heldCount() == 4 })
	_, err := c["b"].client.Produce(testContext(t), big())
	wantStatus(t, err, codes.ResourceExhausted, ReasonOverloaded)
	for i := range 6 {
		eventually(t, "it reaches the leader", func() bool { return c["a"].heldCount() > i })
		c["a"].resolve(i, Ack{BaseOffset: uint64(i), NextOffset: uint64(i + 1)}, nil)
		if resp, err := stream.Recv(); err != nil || resp.GetBaseOffset() != uint64(i) {
			t.Fatalf("answer %d: %v, %v", i, resp, err)
		}
	}
}

// TestForwardShutdown: neither side loses an answer when it goes away.
func TestForwardShutdown(t *testing.T) {
	for _, who := range []string{"a", "b"} {
		t.Run("of "+who, func(t *testing.T) {
			_, c := newCluster(t, []string{"a", "b"}, nil)
			c["a"].hold = true
			stream := c["b"].stream(t)
			for i := range 4 {
				if err := stream.Send(request(i)); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "all reach the leader", func() bool { return c["a"].heldCount() == 4 })
			down := make(chan error, 1)
			go func() { down <- c[who].svc.Shutdown(testContext(t)) }()
			<-c[who].svc.stopping.Done()
			for i := range 4 {
				c["a"].resolve(i, Ack{BaseOffset: uint64(i), NextOffset: uint64(i + 1)}, nil)
			}
			for i := range 4 {
				if resp, err := stream.Recv(); err != nil || resp.GetBaseOffset() != uint64(i) {
					t.Fatalf("answer %d: %v, %v", i, resp, err)
				}
			}
			if who == "b" {
				_, err := stream.Recv()
				wantStatus(t, err, codes.Unavailable, ReasonShuttingDown)
			}
			if err := <-down; err != nil {
				t.Errorf("shutdown: %v", err)
			}
			if who == "a" {
				// The leader is gone, and the client hears that.
				if err := stream.Send(request(4)); err != nil {
					t.Fatal(err)
				}
				_, err := stream.Recv()
				if meta := wantStatus(t, err, codes.Unavailable, ReasonNoLeader); meta[MetaRequest] != "4" {
					t.Errorf("metadata %v", meta)
				}
			}
			if who == "b" {
				if err := c["b"].forward.Close(testContext(t)); err != nil {
					t.Errorf("close: %v", err)
				}
			}
		})
	}
}

// TestForwarderClose: it waits for outcomes, then gives up on them.
func TestForwarderClose(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, nil)
	c["a"].hold = true
	log := c["b"].svc.log
	one, err := log.Propose(testContext(t), Proposal{Records: encode(t, record(0, 9)), Count: 1}, true)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it reaches the leader", func() bool { return c["a"].heldCount() == 1 })
	ctx, cancel := context.WithCancel(testContext(t))
	closed := make(chan error, 1)
	go func() { closed <- c["b"].forward.Close(ctx) }()
	eventually(t, "nothing more is taken", func() bool {
		_, err := log.Propose(ctx, Proposal{Records: encode(t, record(0, 9)), Count: 1}, true)
		return errors.Is(err, ErrClosed)
	})
	select {
	case err := <-closed:
		t.Fatalf("it did not wait: %v", err)
	case <-one.Done():
		t.Fatal("it has an outcome already")
	default:
	}
	cancel()
	if err := <-closed; !errors.Is(err, context.Canceled) {
		t.Errorf("Close: %v", err)
	}
	if _, err := one.Result(); !errors.Is(err, ErrUnknownOutcome) {
		t.Errorf("outcome %v", err)
	}
}

// TestForwardIdle: a stream that nobody uses ends, and the next batch gets a
// new one.
func TestForwardIdle(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, func(_ *member, cfg *ForwarderConfig) { cfg.IdleTimeout = 20 * time.Millisecond })
	for i := range 2 {
		if _, err := c["b"].client.Produce(testContext(t), request(i)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the leader has no stream open", func() bool { return c["a"].svc.calls.count() == 0 })
	}
}

// TestForwardBecomesLeader: a node that comes to lead proposes by itself.
func TestForwardBecomesLeader(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, nil)
	c["a"].hold = true
	stream := c["b"].stream(t)
	for i := range 2 {
		if err := stream.Send(request(i)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "they reach the old leader", func() bool { return c["a"].heldCount() == 2 })
	c["b"].setLeader("b")
	if err := stream.Send(request(2)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is in the own log", func() bool { return c["b"].proposals() == 1 })
	// The old one answers in time for the first, and then never.
	c["a"].resolve(0, Ack{NextOffset: 1}, nil)
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	_, err := stream.Recv()
	if meta := wantStatus(t, err, codes.Unknown, ReasonUnknownOutcome); meta[MetaRequest] != "1" || meta[MetaAppendedAfter] != "2" {
		t.Errorf("metadata %v", meta)
	}
	c["a"].resolve(1, Ack{}, ErrUnknownOutcome)
}
