// Package clienttest is a Diurna server without the cluster: one log in
// memory, behind real gRPC on an in-process or a loopback connection, with
// places to make it misbehave. It is for the tests of whoever uses the client.
package clienttest

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/diurnalog/diurna/agent/peer"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// Server is the fake. Set its hooks before Start.
type Server struct {
	v1.UnimplementedLogServer

	// OnBatch, if set, is called with every batch before it is appended, and
	// its position among all batches, from 0. An error fails the batch; it may
	// block, and then has to return when ctx ends.
	OnBatch func(ctx context.Context, position int, req *v1.ProduceRequest) error
	// OnConsume, if set, is called with every ConsumeStream; an error ends it.
	OnConsume func(req *v1.ConsumeRequest) error
	// OnResponse, if set, may change what a ConsumeStream sends.
	OnResponse func(*v1.ConsumeResponse)
	// PerResponse bounds the records of one response of ConsumeStream.
	// Default 100.
	PerResponse int
	// Nodes is what GetServers and ListPeers answer; see also SetNodes.
	Nodes *v1.GetServersResponse
	// OnAdmin, if set, is called with every call of Admin; see AdminCalls.
	OnAdmin func(call string) error
	// Health may be changed at any time.
	Health *health.Server

	mu      sync.Mutex
	batches []*v1.RecordBatch
	next    uint64
	count   int
	changed chan struct{}
	started int // ConsumeStreams
	consume chan struct{}

	adminCalls []string
	conns      []net.Conn

	server *grpc.Server
	served chan struct{}
	listen net.Listener
	dial   func(context.Context, string) (net.Conn, error)
}

// New returns a server that is not started.
func New() *Server {
	return &Server{
		PerResponse: 100,
		Health:      health.NewServer(),
		changed:     make(chan struct{}),
		consume:     make(chan struct{}),
		Nodes: &v1.GetServersResponse{AnsweredBy: "a", Servers: []*v1.Server{
			{Id: "a", Name: "node-a", Address: "127.0.0.1:8400", Role: v1.Server_ROLE_VOTER, Leader: true, Term: 3, AppliedIndex: 12},
		}},
	}
}

// Start serves in-process, until the test ends.
func (s *Server) Start(t testing.TB) *Server {
	t.Helper()
	l := bufconn.Listen(256 << 10)
	s.dial = func(ctx context.Context, _ string) (net.Conn, error) {
		conn, err := l.DialContext(ctx)
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.conns = append(s.conns, conn)
		return conn, nil
	}
	return s.serve(t, l)
}

// StartTCP serves on a loopback port, until the test ends.
func (s *Server) StartTCP(t testing.TB) *Server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return s.serve(t, l)
}

// StartTLS serves on a loopback port as a node does that secures its port by cfg,
// until the test ends.
func (s *Server) StartTLS(t testing.TB, cfg *tls.Config) *Server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := peer.NewPort(l, peer.PortConfig{TLS: cfg, Self: func() (string, string) { return "a", "c1" }})
	t.Cleanup(func() {
		if err := port.Close(); err != nil {
			t.Errorf("close the port: %v", err)
		}
	})
	return s.serve(t, port.Clients())
}

func (s *Server) serve(t testing.TB, l net.Listener) *Server {
	s.listen, s.served = l, make(chan struct{})
	s.server = grpc.NewServer()
	v1.RegisterLogServer(s.server, s)
	v1.RegisterAdminServer(s.server, admin{s: s})
	healthpb.RegisterHealthServer(s.server, s.Health)
	go func() {
		defer close(s.served)
		// Stop makes it return nil; anything else would fail the calls of the
		// test as well.
		if err := s.server.Serve(l); err != nil {
			t.Errorf("serve: %v", err)
		}
	}()
	t.Cleanup(s.Stop)
	return s
}

// SetNodes changes Nodes while the server runs.
func (s *Server) SetNodes(nodes *v1.GetServersResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Nodes = nodes
}

func (s *Server) nodes() *v1.GetServersResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Nodes
}

// Addr is where it listens.
func (s *Server) Addr() string { return s.listen.Addr().String() }

// Dialer connects to a server that was started in-process; nil otherwise.
func (s *Server) Dialer() func(context.Context, string) (net.Conn, error) { return s.dial }

// Break drops every connection of a server that was started in-process; it can
// be connected to again.
func (s *Server) Break() {
	s.mu.Lock()
	conns := s.conns
	s.conns = nil
	s.mu.Unlock()
	for _, c := range conns {
		_ = c.Close() // it is broken either way
	}
}

// Stop drops every connection at once, like a crash.
func (s *Server) Stop() {
	s.server.Stop()
	<-s.served
}

// Append adds a batch, as if some other client had.
func (s *Server) Append(records ...*v1.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.appendLocked(records)
}

// Values returns the values of all records, in order.
func (s *Server) Values() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var values []string
	for _, b := range s.batches {
		for _, r := range b.Records {
			values = append(values, string(r.Value))
		}
	}
	return values
}

// Batches returns how many batches there are.
func (s *Server) Batches() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.batches)
}

// Records returns all records, in order.
func (s *Server) Records() []*v1.Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	var records []*v1.Record
	for _, b := range s.batches {
		records = append(records, b.Records...)
	}
	return records
}

// AwaitConsume returns when n ConsumeStreams have begun.
func (s *Server) AwaitConsume(t testing.TB, n int) {
	t.Helper()
	for {
		s.mu.Lock()
		started, changed := s.started, s.consume
		s.mu.Unlock()
		if started >= n {
			return
		}
		select {
		case <-changed:
		case <-time.After(10 * time.Second):
			t.Fatal("no consumer came")
		}
	}
}

func (s *Server) appendLocked(records []*v1.Record) (base uint64, at *timestamppb.Timestamp) {
	base, at = s.next, timestamppb.Now()
	s.batches = append(s.batches, &v1.RecordBatch{BaseOffset: base, AppendTime: at, Records: records})
	s.next += uint64(len(records))
	close(s.changed)
	s.changed = make(chan struct{})
	return base, at
}

func (s *Server) produce(ctx context.Context, req *v1.ProduceRequest) (*v1.ProduceResponse, error) {
	s.mu.Lock()
	position := s.count
	s.count++
	s.mu.Unlock()
	if s.OnBatch != nil {
		if err := s.OnBatch(ctx, position, req); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if want := req.ExpectedOffset; want != nil && *want != s.next {
		return nil, Failure(codes.Aborted, "OFFSET_MISMATCH", "not the expected offset", "Read from there.", "next", utoa(s.next))
	}
	base, at := s.appendLocked(req.Records)
	return &v1.ProduceResponse{BaseOffset: base, NextOffset: s.next, AppendTime: at}, nil
}

// Produce implements v1.LogServer.
func (s *Server) Produce(ctx context.Context, req *v1.ProduceRequest) (*v1.ProduceResponse, error) {
	return s.produce(ctx, req)
}

// ProduceStream implements v1.LogServer.
func (s *Server) ProduceStream(stream grpc.BidiStreamingServer[v1.ProduceRequest, v1.ProduceResponse]) error {
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		resp, err := s.produce(stream.Context(), req)
		if err != nil {
			return err
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
}

// ConsumeStream implements v1.LogServer.
func (s *Server) ConsumeStream(req *v1.ConsumeRequest, stream grpc.ServerStreamingServer[v1.ConsumeResponse]) error {
	if s.OnConsume != nil {
		if err := s.OnConsume(req); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.started++
	close(s.consume)
	s.consume = make(chan struct{})
	at, end, left := s.startLocked(req), s.next, req.MaxRecords
	s.mu.Unlock()
	for {
		s.mu.Lock()
		changed, limit := s.changed, end
		if req.Follow {
			limit = s.next
		}
		if req.EndOffset != nil {
			limit = min(limit, *req.EndOffset)
		}
		if req.MaxRecords > 0 {
			limit = min(limit, at+left)
		}
		resp := s.responseLocked(at, limit)
		s.mu.Unlock()
		left -= resp.NextOffset - at
		at = resp.NextOffset
		if s.OnResponse != nil {
			s.OnResponse(resp)
		}
		if len(resp.Batches) > 0 {
			if err := stream.Send(resp); err != nil {
				return err
			}
			continue
		}
		if !req.Follow || req.EndOffset != nil && at >= *req.EndOffset || req.MaxRecords > 0 && left == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (s *Server) startLocked(req *v1.ConsumeRequest) uint64 {
	switch start := req.Start.(type) {
	case *v1.ConsumeRequest_Latest:
		return s.next
	case *v1.ConsumeRequest_Offset:
		return start.Offset
	case *v1.ConsumeRequest_LastN:
		return s.next - min(start.LastN, s.next)
	case *v1.ConsumeRequest_Time:
		for _, b := range s.batches {
			if !b.AppendTime.AsTime().Before(start.Time.AsTime()) {
				return b.BaseOffset
			}
		}
		return s.next
	}
	return 0
}

// responseLocked holds records from at up to limit, in the batches they were
// appended in, at most PerResponse of them.
func (s *Server) responseLocked(at, limit uint64) *v1.ConsumeResponse {
	limit = min(limit, at+uint64(s.PerResponse))
	resp := &v1.ConsumeResponse{NextOffset: max(at, min(limit, s.next)), HighWatermark: s.next}
	for _, b := range s.batches {
		from, to := max(at, b.BaseOffset), min(limit, b.BaseOffset+uint64(len(b.Records)))
		if from < to {
			resp.Batches = append(resp.Batches, &v1.RecordBatch{
				BaseOffset: from, AppendTime: b.AppendTime, Records: b.Records[from-b.BaseOffset : to-b.BaseOffset],
			})
		}
	}
	return resp
}

// GetServers implements v1.LogServer.
func (s *Server) GetServers(context.Context, *v1.GetServersRequest) (*v1.GetServersResponse, error) {
	return s.nodes(), nil
}

// Failure is an error as a server sends it; metadata are names and values in
// turn.
func Failure(code codes.Code, reason, message, advice string, metadata ...string) error {
	info := &errdetails.ErrorInfo{Domain: "diurna", Reason: reason, Metadata: map[string]string{}}
	for i := 0; i+1 < len(metadata); i += 2 {
		info.Metadata[metadata[i]] = metadata[i+1]
	}
	st, err := status.New(code, message).WithDetails(info, &errdetails.LocalizedMessage{Locale: "en-US", Message: advice})
	if err != nil {
		panic(err) // the details are ours: they always marshal
	}
	return st.Err()
}
