package rpc

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func TestServiceDescMatchesGenerated(t *testing.T) {
	got, want := logServiceDesc(), v1.Log_ServiceDesc
	if got.ServiceName != want.ServiceName || got.Metadata != want.Metadata {
		t.Errorf("got %s in %v", got.ServiceName, got.Metadata)
	}
	var methods [2][]string
	for i, d := range []*grpc.ServiceDesc{got, &want} {
		for _, m := range d.Methods {
			methods[i] = append(methods[i], m.MethodName)
		}
		for _, s := range d.Streams {
			name := s.StreamName
			if s.ClientStreams {
				name += " from client"
			}
			if s.ServerStreams {
				name += " from server"
			}
			methods[i] = append(methods[i], name)
		}
		slices.Sort(methods[i])
	}
	if !slices.Equal(methods[0], methods[1]) {
		t.Errorf("serves %v, the contract says %v", methods[0], methods[1])
	}
}

func TestLimits(t *testing.T) {
	for _, c := range []struct {
		name string
		in   Limits
		ok   bool
	}{
		{"defaults", Limits{}, true},
		{"largest record", Limits{MaxRecordBytes: HardBatchBytes - recordOverhead}, true},
		{"record over the cap", Limits{MaxRecordBytes: HardBatchBytes}, false},
		{"batch over the cap", Limits{MaxBatchBytes: HardBatchBytes + 1}, false},
		{"batch smaller than a record", Limits{MaxRecordBytes: 1000, MaxBatchBytes: 1000}, false},
		{"negative", Limits{OpenCalls: -1}, false},
		{"negative timeout", Limits{HandshakeTimeout: -1}, false},
	} {
		svc, err := New(Config{Log: newMemLog(), Cluster: memCluster{}, Limits: c.in})
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil {
			if err := svc.Shutdown(t.Context()); err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
		}
	}
	if _, err := New(Config{Log: newMemLog()}); err == nil {
		t.Error("no cluster")
	}
}

func TestGetServers(t *testing.T) {
	list := ServerList{Self: "a", Servers: []Server{
		{ID: "a", Name: "one", Address: "a:8400", Voter: true, Leader: true, Term: 3, LastContact: -1, AppliedIndex: 9, FirstOffset: 1, HighWatermark: 2},
		{ID: "b", LastContact: time.Second, Version: "0.1"},
		{ID: "c", Voter: true, LastContact: -1},
	}}
	f := serve(t, Config{Log: newMemLog(), Cluster: memCluster{list}, Version: "1.2"}, false)
	got, err := f.client.GetServers(testContext(t), &v1.GetServersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	s := got.Servers
	want := &v1.Server{Id: "a", Name: "one", Address: "a:8400", Role: v1.Server_ROLE_VOTER, Leader: true, Term: 3, AppliedIndex: 9, FirstOffset: 1, HighWatermark: 2, Version: "1.2"}
	if got.AnsweredBy != "a" || len(s) != 3 || !proto.Equal(s[0], want) {
		t.Errorf("got %v", got)
	}
	if s[1].Role != v1.Server_ROLE_NONVOTER || s[1].LastContact.AsDuration() != time.Second || s[1].Version != "0.1" || s[2].LastContact != nil {
		t.Errorf("got %v", got)
	}
}

type panicking struct{ *memLog }

func (panicking) Propose(context.Context, Proposal, bool) (Pending, error) { panic("in the log") }
func (panicking) Bounds() Bounds                                           { panic("in the log") }

// Panics end their call and nothing else.
func TestPanics(t *testing.T) {
	f := serve(t, Config{Log: panicking{newMemLog()}}, false)
	ctx := testContext(t)
	for range 3 {
		req := &v1.ProduceRequest{Records: []*v1.Record{{}}}
		_, err := f.client.Produce(ctx, req)
		wantStatus(t, err, codes.Internal, ReasonInternal)
		_, err = f.client.Consume(ctx, &v1.ConsumeRequest{})
		wantStatus(t, err, codes.Internal, ReasonInternal)
		cs, err := f.client.ConsumeStream(ctx, &v1.ConsumeRequest{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = cs.Recv()
		wantStatus(t, err, codes.Internal, ReasonInternal)
		ps, err := f.client.ProduceStream(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := ps.Send(req); err != nil {
			t.Fatal(err)
		}
		_, err = ps.Recv()
		wantStatus(t, err, codes.Internal, ReasonInternal)
	}
	if strings.Contains(status.Convert(f.svc.panicked("m", "secret", nil)).Message(), "secret") {
		t.Error("a panic's text reaches clients")
	}
	eventually(t, "all calls are over", func() bool { return f.svc.calls.count() == 0 })
}

func TestOpenCalls(t *testing.T) {
	log := newMemLog()
	f := serve(t, Config{Log: log, Limits: Limits{OpenCalls: 3}}, false)
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	follow := &v1.ConsumeRequest{Follow: true}
	for range 3 {
		stream, err := f.client.ConsumeStream(ctx, follow)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	stream, err := f.client.ConsumeStream(ctx, follow)
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	if m := wantStatus(t, err, codes.ResourceExhausted, ReasonTooManyCalls); m["limit"] != "3" {
		t.Errorf("metadata %v", m)
	}
	_, err = f.client.GetServers(ctx, &v1.GetServersRequest{})
	wantStatus(t, err, codes.ResourceExhausted, ReasonTooManyCalls)
	if _, err := healthpb.NewHealthClient(f.conn).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
		t.Errorf("health under load: %v", err)
	}
	cancel()
	eventually(t, "room again", func() bool { return f.svc.calls.count() == 0 })
	if _, err := f.client.GetServers(testContext(t), &v1.GetServersRequest{}); err != nil {
		t.Error(err)
	}
}

func TestHealthAndReflection(t *testing.T) {
	f := serve(t, Config{Log: newMemLog()}, false)
	ctx := testContext(t)
	health := healthpb.NewHealthClient(f.conn)
	check := func(want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for _, name := range []string{"", "diurna.v1.Log"} {
			resp, err := health.Check(ctx, &healthpb.HealthCheckRequest{Service: name})
			if err != nil || resp.Status != want {
				t.Errorf("%q is %v, %v", name, resp.GetStatus(), err)
			}
		}
	}
	check(healthpb.HealthCheckResponse_SERVING)
	f.svc.SetServing(false)
	check(healthpb.HealthCheckResponse_NOT_SERVING)
	f.svc.SetServing(true)
	check(healthpb.HealthCheckResponse_SERVING)

	stream, err := reflectionpb.NewServerReflectionClient(f.conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "diurna.v1.Log"}}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil || len(resp.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
		t.Errorf("reflection: %v, %v", resp, err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Error(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// A shutdown with every kind of stream open loses no answer and waits for
// nobody who would never go.
func TestShutdown(t *testing.T) {
	log := newMemLog()
	log.fill(t, rand.New(rand.NewPCG(1, 1)), 0, 5, 1, 10)
	f := serve(t, Config{Log: log, Limits: Limits{HandshakeTimeout: time.Hour}}, true)
	ctx := testContext(t)

	silent, err := f.dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	eventually(t, "the silent connection is known", func() bool {
		f.svc.conns.mu.Lock()
		defer f.svc.conns.mu.Unlock()
		return len(f.svc.conns.conns) == 1
	})

	follower, err := f.client.ConsumeStream(ctx, &v1.ConsumeRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	for next := uint64(0); next < 5; {
		resp, err := follower.Recv()
		if err != nil {
			t.Fatal(err)
		}
		next, _ = collect(t, resp, next)
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := f.client.Consume(ctx, &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Latest{Latest: true}, Follow: true})
		waiting <- err
	}()

	log.mu.Lock()
	log.hold = true
	log.mu.Unlock()
	producer, err := f.client.ProduceStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if err := producer.Send(&v1.ProduceRequest{Records: []*v1.Record{record(i, 10)}}); err != nil {
			t.Fatal(err)
		}
	}
	idle, err := f.client.ProduceStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	single := make(chan error, 1)
	go func() {
		_, err := f.client.Produce(ctx, &v1.ProduceRequest{Records: []*v1.Record{record(3, 10)}})
		single <- err
	}()
	watch, err := healthpb.NewHealthClient(f.conn).Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := watch.Recv(); err != nil || resp.Status != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("%v, %v", resp, err)
	}
	reflection, err := reflectionpb.NewServerReflectionClient(f.conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "all is under way", func() bool { return log.proposals() == 4 && f.svc.calls.count() == 5 })

	down := make(chan error, 1)
	go func() { down <- f.svc.Shutdown(ctx) }()

	if resp, err := watch.Recv(); err != nil || resp.Status != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health %v, %v", resp, err)
	}
	_, err = follower.Recv()
	if m := wantStatus(t, err, codes.Unavailable, ReasonShuttingDown); m["next_offset"] != "5" {
		t.Errorf("metadata %v", m)
	}
	if !strings.Contains(err.Error(), "go on at offset 5 elsewhere") {
		t.Error(err)
	}
	err = <-waiting
	wantStatus(t, err, codes.Unavailable, ReasonShuttingDown)
	_, err = idle.Recv()
	wantStatus(t, err, codes.Unavailable, ReasonShuttingDown)
	// The silent connection goes at once and not when its handshake times out.
	if _, err := silent.Read(make([]byte, 1<<10)); err == nil {
		_, err = io.Copy(io.Discard, silent)
		if err != nil && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") {
			t.Error(err)
		}
	}

	// What comes now is not proposed any more.
	if err := producer.Send(&v1.ProduceRequest{Records: []*v1.Record{record(9, 10)}}); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-down:
		t.Fatalf("down with requests under way: %v", err)
	default:
	}
	for i := range 4 {
		log.resolve(i, Ack{BaseOffset: uint64(i), NextOffset: uint64(i) + 1}, nil)
	}
	for i := range 3 {
		if _, err := producer.Recv(); err != nil {
			t.Fatalf("acknowledgement %d: %v", i, err)
		}
	}
	_, err = producer.Recv()
	if m := wantStatus(t, err, codes.Unavailable, ReasonShuttingDown); m[MetaRequest] != "3" {
		t.Errorf("metadata %v", m)
	}
	if err := <-single; err != nil {
		t.Error(err)
	}
	_, err = watch.Recv()
	wantStatus(t, err, codes.Unavailable, ReasonShuttingDown)
	_, err = reflection.Recv()
	wantStatus(t, err, codes.Unavailable, ReasonShuttingDown)
	if err := <-down; err != nil {
		t.Error(err)
	}
	if n := log.proposals(); n != 4 {
		t.Errorf("%d proposals", n)
	}
	if err := f.svc.Shutdown(ctx); err != nil {
		t.Errorf("again: %v", err)
	}
}

// A shutdown whose time is up cuts off what is left.
func TestShutdownHard(t *testing.T) {
	log := newMemLog()
	log.hold = true
	f := serve(t, Config{Log: log}, false)
	ctx := testContext(t)
	producer, err := f.client.ProduceStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := producer.Send(&v1.ProduceRequest{Records: []*v1.Record{{}}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "proposed", func() bool { return log.proposals() == 1 })
	soon, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if err := f.svc.Shutdown(soon); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if _, err := producer.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
}

// Shutting down while clients keep producing: every request was either
// acknowledged or is not in the log.
func TestShutdownUnderLoad(t *testing.T) {
	for range 2 {
		log := newMemLog()
		f := serve(t, Config{Log: log}, true)
		ctx := testContext(t)
		var wg sync.WaitGroup
		var mu sync.Mutex
		acked := 0
		for range 4 {
			conn := f.connect(t)
			stream, err := v1.NewLogClient(conn).ProduceStream(ctx)
			if err != nil {
				t.Fatal(err)
			}
			// The first one shows that the connection stands.
			if err := stream.Send(&v1.ProduceRequest{Records: []*v1.Record{{}}}); err != nil {
				t.Fatal(err)
			}
			if _, err := stream.Recv(); err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				for i := 0; stream.Send(&v1.ProduceRequest{Records: []*v1.Record{record(i, 100)}}) == nil; i++ {
				}
			})
			wg.Go(func() {
				n := 1
				_, err := stream.Recv()
				for ; err == nil; n++ {
					_, err = stream.Recv()
				}
				if reasonOf(err) != ReasonShuttingDown {
					t.Errorf("ended with %v", err)
				}
				mu.Lock()
				acked += n
				mu.Unlock()
			})
		}
		eventually(t, "under load", func() bool { return log.proposals() > 2000 })
		if err := f.svc.Shutdown(ctx); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		if n := log.proposals(); acked != n {
			t.Fatalf("%d acknowledged, %d appended", acked, n)
		}
	}
}

// Bytes that are not gRPC cost their sender the connection and nobody else
// anything.
func TestGarbageConnections(t *testing.T) {
	log := newMemLog()
	f := serve(t, Config{Log: log}, true)
	ctx := testContext(t)
	rng := rand.New(rand.NewPCG(4, 2))
	random := make([]byte, 4096)
	for i := range random {
		random[i] = byte(rng.Uint32())
	}
	preface := "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	for name, garbage := range map[string][]byte{
		"random":              random,
		"http/1":              []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"tls":                 {0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"garbage in http/2":   append([]byte(preface), random...),
		"giant frame":         append([]byte(preface), 0xff, 0xff, 0xff, 4, 0, 0, 0, 0, 0),
		"data before headers": append([]byte(preface), 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0),
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := f.dial(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Write(garbage); err != nil {
				t.Fatal(err)
			}
			if _, err := f.client.Produce(ctx, &v1.ProduceRequest{Records: []*v1.Record{{}}}); err != nil {
				t.Error(err)
			}
			// Until the server hangs up, or, where the garbage is a valid
			// beginning, we do.
			if name != "data before headers" {
				if _, err := io.Copy(io.Discard, conn); err != nil && !strings.Contains(err.Error(), "reset") {
					t.Error(err)
				}
			}
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSilentConnections(t *testing.T) {
	log := newMemLog()
	f := serve(t, Config{Log: log, Limits: Limits{HandshakeTimeout: time.Hour}}, true)
	ctx := testContext(t)
	for range 500 {
		conn, err := f.dial(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	conn := f.connect(t)
	for range 20 {
		if _, err := v1.NewLogClient(conn).Produce(ctx, &v1.ProduceRequest{Records: []*v1.Record{{}}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.svc.Shutdown(ctx); err != nil {
		t.Errorf("shutdown: %v", err)
	}
}

// A silent connection does not stay.
func TestHandshakeTimeout(t *testing.T) {
	f := serve(t, Config{Log: newMemLog(), Limits: Limits{HandshakeTimeout: time.Millisecond}}, true)
	conn, err := f.dial(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.Copy(io.Discard, conn); err != nil && !strings.Contains(err.Error(), "reset") {
		t.Error(err)
	}
}
