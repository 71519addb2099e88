package rpc

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testTimeout only ever ends a test that has failed anyway.
const testTimeout = time.Minute

func testContext(tb testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	tb.Cleanup(cancel)
	return ctx
}

// fixture is a served Service and a way to it.
type fixture struct {
	svc    *Service
	client v1.LogClient
	conn   *grpc.ClientConn
	dial   func(context.Context) (net.Conn, error)
	// listener is where it listens, unless over TCP.
	listener *bufconn.Listener
}

// serve runs a Service over an in-memory listener, or over TCP on any port,
// until the test is over.
func serve(tb testing.TB, cfg Config, tcp bool, opts ...grpc.DialOption) *fixture {
	tb.Helper()
	if cfg.Cluster == nil {
		cfg.Cluster = memCluster{}
	}
	svc, err := New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	f := &fixture{svc: svc}
	var l net.Listener
	if tcp {
		if l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			tb.Fatal(err)
		}
		addr := l.Addr().String()
		f.dial = func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		}
	} else {
		b := bufconn.Listen(256 << 10)
		f.dial, f.listener, l = b.DialContext, b, b
	}
	served := make(chan error, 1)
	go func() { served <- svc.Serve(l) }()
	tb.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // hard
		if err := svc.Shutdown(ctx); err != nil && !errors.Is(err, context.Canceled) {
			tb.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			tb.Errorf("serve: %v", err)
		}
	})
	f.conn = f.connect(tb, opts...)
	f.client = v1.NewLogClient(f.conn)
	return f
}

func (f *fixture) connect(tb testing.TB, opts ...grpc.DialOption) *grpc.ClientConn {
	tb.Helper()
	opts = append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return f.dial(ctx) }),
	}, opts...)
	conn, err := grpc.NewClient("passthrough:///test", opts...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := conn.Close(); err != nil && status.Code(err) != codes.Canceled {
			tb.Errorf("close connection: %v", err)
		}
	})
	return conn
}

// wantStatus checks an error's code and reason and returns its metadata.
func wantStatus(tb testing.TB, err error, code codes.Code, reason string) map[string]string {
	tb.Helper()
	st := status.Convert(err)
	if st.Code() != code {
		tb.Fatalf("got %v, want code %v and reason %s", err, code, reason)
	}
	var info *errdetails.ErrorInfo
	var text *errdetails.LocalizedMessage
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			info = d
		case *errdetails.LocalizedMessage:
			text = d
		}
	}
	if info.GetDomain() != ErrorDomain || info.GetReason() != reason {
		tb.Fatalf("got %v with %v, want reason %s", err, info, reason)
	}
	if text.GetLocale() != "en-US" || text.GetMessage() == "" {
		tb.Fatalf("got %v with message %v", err, text)
	}
	return info.GetMetadata()
}

// reasonOf is the reason of an error, empty where gRPC itself made it.
func reasonOf(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

func ptr[T any](v T) *T { return &v }

// eventually waits for a condition that another goroutine brings about.
func eventually(tb testing.TB, what string, cond func() bool) {
	tb.Helper()
	ctx := testContext(tb)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			tb.Fatalf("never happened: %s", what)
		}
	}
}
