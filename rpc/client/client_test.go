package client

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/diurnalog/diurna/rpc/client/clienttest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// connect starts s and dials it.
func connect(t *testing.T, s *clienttest.Server, opts ...Option) *Client {
	t.Helper()
	s.Start(t)
	c, err := Dial("fake:1", append(opts, WithDialer(s.Dialer()))...)
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

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func values(vs ...string) []*Record {
	records := make([]*Record, len(vs))
	for i, v := range vs {
		records[i] = &Record{Value: []byte(v)}
	}
	return records
}

func TestAddress(t *testing.T) {
	for in, want := range map[string]string{
		"127.0.0.1:8400":  "127.0.0.1:8400",
		"db.example":      "db.example:8400",
		"db.example:":     "db.example:8400",
		":9000":           ":9000",
		"::1":             "[::1]:8400",
		"[::1]":           "[::1]:8400",
		"[::1]:9":         "[::1]:9",
		"":                "",
		"http://a:1":      "",
		"a:b:c":           "",
		"dns:///a.b:8400": "",
	} {
		got, err := withPort(in)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("withPort(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestProduce(t *testing.T) {
	s := clienttest.New()
	c := connect(t, s)
	ctx := testContext(t)

	s.Append(values("old")...)
	ack, err := c.Produce(ctx, values("a", "b"), ExpectOffset(1))
	if err != nil || ack.BaseOffset != 1 || ack.NextOffset != 3 || time.Since(ack.AppendTime) > time.Minute {
		t.Fatalf("Produce = %+v, %v", ack, err)
	}
	_, err = c.Produce(ctx, values("c"), ExpectOffset(1))
	var e *Error
	if !errors.As(err, &e) || e.Reason != ReasonOffsetMismatch || !e.Definite || e.Code != codes.Aborted || e.Advice != "Read from there." {
		t.Fatalf("Produce at a wrong offset: %#v", err)
	}
	if next, ok := e.Uint("next"); !ok || next != 3 {
		t.Errorf("next = %d, %v", next, ok)
	}
	for name, records := range map[string][]*Record{
		"none":       nil,
		"nil record": {nil},
		"bad header": {{Headers: []*Header{{Name: "\xff"}}}},
	} {
		if _, err := c.Produce(ctx, records); !errors.As(err, &e) || !e.Definite {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := len(s.Values()); got != 3 {
		t.Errorf("the log holds %d records, want 3", got)
	}
}

// What an error says about the outcome is the one thing a producer cannot find
// out otherwise.
func TestDefinite(t *testing.T) {
	for _, tc := range []struct {
		name     string
		answer   error
		definite bool
		reason   string
	}{
		{"named by the server", clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", ""), true, ReasonNoLeader},
		{"unknown by the server", clienttest.Failure(codes.Unknown, "UNKNOWN_OUTCOME", "who knows", ""), false, ReasonUnknownOutcome},
		{"without a reason", errors.New("boom"), false, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := clienttest.New()
			s.OnBatch = func(context.Context, int, *v1.ProduceRequest) error { return tc.answer }
			c := connect(t, s, WithRetry(0))
			_, err := c.Produce(testContext(t), values("a"))
			var e *Error
			if !errors.As(err, &e) || e.Definite != tc.definite || e.Reason != tc.reason {
				t.Errorf("got %#v", err)
			}
		})
	}

	t.Run("canceled while waiting", func(t *testing.T) {
		s := clienttest.New()
		ctx, cancel := context.WithCancel(testContext(t))
		s.OnBatch = func(ctx context.Context, _ int, _ *v1.ProduceRequest) error {
			cancel()
			<-ctx.Done()
			return ctx.Err()
		}
		c := connect(t, s)
		_, err := c.Produce(ctx, values("a"))
		var e *Error
		if !errors.As(err, &e) || e.Definite || !errors.Is(err, context.Canceled) {
			t.Errorf("got %#v", err)
		}
	})

	t.Run("killed while waiting", func(t *testing.T) {
		s := clienttest.New()
		reached := make(chan struct{})
		s.OnBatch = func(ctx context.Context, _ int, _ *v1.ProduceRequest) error {
			close(reached)
			<-ctx.Done()
			return ctx.Err()
		}
		c := connect(t, s)
		go func() {
			<-reached
			s.Stop()
		}()
		_, err := c.Produce(testContext(t), values("a"))
		var e *Error
		if !errors.As(err, &e) || e.Definite || e.Reason != ReasonConnectionLost {
			t.Errorf("got %#v", err)
		}
	})
}

func TestUnreachable(t *testing.T) {
	// A port that nothing listens on: it was ours a moment ago.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	c, err := Dial(addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	ctx := testContext(t)
	calls := map[string]func() error{
		"Produce":     func() error { _, err := c.Produce(ctx, values("a")); return err },
		"NewProducer": func() error { _, err := c.NewProducer(ctx, ProducerOptions{}); return err },
		"Consume":     func() error { _, err := c.Consume(ctx, ConsumeOptions{}); return err },
		"Servers":     func() error { _, err := c.Servers(ctx); return err },
		"Health":      func() error { _, _, err := c.Health(ctx); return err },
	}
	for name, call := range calls {
		var e *Error
		err := call()
		if !errors.As(err, &e) || e.Reason != ReasonUnreachable || !e.Definite || e.Addr != addr {
			t.Errorf("%s: %#v", name, err)
			continue
		}
		if want := "cannot reach a node at " + addr + ": connection refused"; e.Message != want {
			t.Errorf("%s: message %q, want %q", name, e.Message, want)
		}
		var op *net.OpError
		if !errors.As(err, &op) {
			t.Errorf("%s: the cause is lost: %v", name, err)
		}
	}
}

func TestServersAndHealth(t *testing.T) {
	s := clienttest.New()
	s.Nodes.Servers = append(s.Nodes.Servers, &v1.Server{
		Id: "b", Name: "node-b", Role: v1.Server_ROLE_NONVOTER, LastContact: durationpb.New(time.Second),
	})
	c := connect(t, s)
	ctx := testContext(t)
	list, err := c.Servers(ctx)
	if err != nil {
		t.Fatal(err)
	}
	self, _ := list.Self()
	leader, _ := list.Leader()
	if self.ID != "a" || leader.ID != "a" || !self.Voter || self.Term != 3 || self.LastContact >= 0 {
		t.Errorf("self %+v, leader %+v", self, leader)
	}
	if b := list.Servers[1]; b.Voter || b.Leader || b.LastContact != time.Second {
		t.Errorf("second server %+v", b)
	}
	if ok, text, err := c.Health(ctx); !ok || text != "SERVING" || err != nil {
		t.Errorf("Health = %v %q %v", ok, text, err)
	}
	s.Health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	if ok, text, err := c.Health(ctx); ok || text != "NOT_SERVING" || err != nil {
		t.Errorf("Health = %v %q %v", ok, text, err)
	}
}
