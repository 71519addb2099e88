package agent

import (
	"context"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/diurnalog/diurna/rpc/client"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// collector is a real OTLP receiver.
type collector struct {
	collectorpb.UnimplementedTraceServiceServer
	addr   string
	server *grpc.Server
	fail   func(context.Context) error

	mu    sync.Mutex
	got   []*tracepb.Span
	nodes map[string]bool // service.instance.id
}

// Export implements the service of a collector's.
func (c *collector) Export(ctx context.Context, req *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	if c.fail != nil {
		if err := c.fail(ctx); err != nil {
			return nil, err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range req.ResourceSpans {
		for _, a := range r.Resource.Attributes {
			if a.Key == "service.instance.id" {
				c.nodes[a.Value.GetStringValue()] = true
			}
		}
		for _, s := range r.ScopeSpans {
			c.got = append(c.got, s.Spans...)
		}
	}
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

// startCollector serves at an address, any if it is empty.
func startCollector(t *testing.T, addr string, fail func(context.Context) error, opts ...grpc.ServerOption) *collector {
	t.Helper()
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	c := &collector{addr: l.Addr().String(), server: grpc.NewServer(opts...), fail: fail, nodes: map[string]bool{}}
	collectorpb.RegisterTraceServiceServer(c.server, c)
	served := make(chan error, 1)
	go func() { served <- c.server.Serve(l) }()
	t.Cleanup(func() {
		c.server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
	return c
}

// spans are those with a name.
func (c *collector) spans(name string) (found []*tracepb.Span) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.got {
		if s.Name == name {
			found = append(found, s)
		}
	}
	return found
}

func number(s *tracepb.Span, key string) int64 {
	for _, a := range s.Attributes {
		if a.Key == key {
			return a.Value.GetIntValue()
		}
	}
	return -1
}

func text(s *tracepb.Span, key string) string {
	for _, a := range s.Attributes {
		if a.Key == key {
			return a.Value.GetStringValue()
		}
	}
	return ""
}

// rawLog is a client without one of ours in between.
func rawLog(t *testing.T, addr string) v1.LogClient {
	t.Helper()
	c, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return v1.NewLogClient(c)
}

func TestTraces(t *testing.T) {
	c := startCollector(t, "", nil)
	cfg := testConfig(t, t.TempDir())
	cfg.Telemetry.OTLPEndpoint, cfg.Telemetry.OTLPInsecure, cfg.Telemetry.SampleOneIn = c.addr, true, 1
	a := startReady(t, cfg, Options{Version: "1.2.3"})
	log := rawLog(t, a.Address())

	const traceID, spanID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	within := func(flags string) context.Context {
		return metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+traceID+"-"+spanID+"-"+flags)
	}
	two := &v1.ProduceRequest{Records: []*v1.Record{{}, {}}}
	if _, err := log.Produce(within("01"), two); err != nil {
		t.Fatal(err)
	}
	if _, err := log.Produce(within("00"), two); err != nil { // the caller says that it is not to be
		t.Fatal(err)
	}
	wrong := uint64(77)
	if _, err := log.Produce(t.Context(), &v1.ProduceRequest{Records: two.Records, ExpectedOffset: &wrong}); err == nil {
		t.Fatal("took a batch at another offset")
	}
	if _, err := log.Consume(within("01"), &v1.ConsumeRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := log.GetServers(within("01"), &v1.GetServersRequest{}); err != nil {
		t.Fatal(err)
	}
	stream, err := log.ProduceStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := stream.Send(two); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	// Our own client's calls are then of their own, and not gathered into one.
	const ours = "4bf92f3577b34da6a3ce929d0e0e4736"
	traced := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+ours+"-"+spanID+"-01")
	if _, err := dial(t, a.Address()).Produce(traced, []*client.Record{{}}); err != nil {
		t.Fatal(err)
	}
	a.mustStop(t) // which sends what is left

	if !c.nodes[a.NodeID()] || len(c.nodes) != 1 {
		t.Errorf("spans of %v", c.nodes)
	}
	calls := c.spans("diurna.v1.Log/Produce")
	if len(calls) != 3 || hex.EncodeToString(calls[2].TraceId) != ours || hex.EncodeToString(calls[0].TraceId) != traceID || hex.EncodeToString(calls[0].ParentSpanId) != spanID || len(calls[1].ParentSpanId) != 0 {
		t.Fatalf("calls: %v", calls)
	}
	appends := c.spans("append")
	if len(appends) != 6 {
		t.Fatalf("%d appends", len(appends))
	}
	first, refused := appends[0], appends[1]
	if !slices.Equal(first.TraceId, calls[0].TraceId) || !slices.Equal(first.ParentSpanId, calls[0].SpanId) || number(first, "diurna.base_offset") != 0 ||
		number(first, "diurna.records") != 2 || number(first, "diurna.bytes") <= 0 {
		t.Errorf("append: %v", first)
	}
	if !slices.Equal(refused.TraceId, calls[1].TraceId) || text(refused, "error.type") != "OFFSET_MISMATCH" || refused.Status.Code != tracepb.Status_STATUS_CODE_ERROR {
		t.Errorf("refused: %v", refused)
	}
	streams := c.spans("diurna.v1.Log/ProduceStream")
	if len(streams) != 1 {
		t.Fatalf("streams: %v", streams)
	}
	for i, s := range appends[2:5] {
		if slices.Equal(s.TraceId, streams[0].TraceId) || len(s.ParentSpanId) != 0 || len(s.Links) != 1 || !slices.Equal(s.Links[0].SpanId, streams[0].SpanId) ||
			number(s, "diurna.base_offset") != int64(4+2*i) {
			t.Errorf("append on a stream: %v", s)
		}
	}
	if got := c.spans("diurna.v1.Log/Consume"); len(got) != 1 || hex.EncodeToString(got[0].ParentSpanId) != spanID {
		t.Errorf("consume: %v", got)
	}
	if len(c.got) != 3+6+1+1 {
		t.Errorf("%d spans: %v", len(c.got), c.got)
	}
}

// TestTracesAreFew: of what comes by streams one in so many is traced.
func TestTracesAreFew(t *testing.T) {
	c := startCollector(t, "", nil)
	cfg := testConfig(t, t.TempDir())
	cfg.Telemetry.OTLPEndpoint, cfg.Telemetry.OTLPInsecure, cfg.Telemetry.SampleOneIn = c.addr, true, 10
	a := startReady(t, cfg, Options{})
	stream, err := rawLog(t, a.Address()).ProduceStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if err := stream.Send(&v1.ProduceRequest{Records: []*v1.Record{{}}}); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	a.mustStop(t)
	if got := len(c.spans("append")); got != 10 {
		t.Errorf("%d appends of 100 are traced", got)
	}
}

// TestTracesTLS: collectors are believed by their certificates.
func TestTracesTLS(t *testing.T) {
	ca, other := newTestCA(t), newTestCA(t)
	server := ca.server(t)
	server.NextProtos = nil
	c := startCollector(t, "", nil, grpc.Creds(credentials.NewTLS(server)))
	for _, trusted := range []*testCA{ca, other} {
		file := filepath.Join(t.TempDir(), "ca.pem")
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: trusted.cert.Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg := testConfig(t, t.TempDir())
		cfg.Telemetry.OTLPEndpoint, cfg.Telemetry.OTLPCAFile, cfg.Telemetry.SampleOneIn = c.addr, file, 1
		a := startReady(t, cfg, Options{})
		before := len(c.spans("append"))
		if _, err := rawLog(t, a.Address()).Produce(t.Context(), &v1.ProduceRequest{Records: []*v1.Record{{}}}); err != nil {
			t.Fatal(err)
		}
		a.mustStop(t)
		if got, want := len(c.spans("append"))-before, map[bool]int{true: 1}[trusted == ca]; got != want {
			t.Errorf("%d spans arrived, want %d", got, want)
		}
	}
	for name, text := range map[string]string{"missing.pem": "", "empty.pem": "nothing"} {
		file := filepath.Join(t.TempDir(), name)
		if text != "" {
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cfg := testConfig(t, t.TempDir())
		cfg.Telemetry.OTLPEndpoint, cfg.Telemetry.OTLPCAFile = c.addr, file
		if _, err := Start(t.Context(), cfg, Options{}); err == nil || !strings.Contains(err.Error(), "telemetry.otlp_ca_file") || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestTracesWithoutCollector: one that is not there, or hangs, costs traces and
// one line of the log.
func TestTracesWithoutCollector(t *testing.T) {
	produceSome := func(t *testing.T, a *testAgent, n int) {
		t.Helper()
		c := dial(t, a.Address())
		for range n {
			if _, err := c.Produce(t.Context(), []*client.Record{{}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	traced := func(t *testing.T, addr string) *testAgent {
		t.Helper()
		cfg := testConfig(t, t.TempDir())
		cfg.Telemetry.OTLPEndpoint, cfg.Telemetry.OTLPInsecure, cfg.Telemetry.SampleOneIn = addr, true, 1
		return startReady(t, cfg, Options{traceRetry: 10 * time.Millisecond})
	}
	const gone, back = "the collector takes no traces", "the collector takes traces again"
	t.Run("not there", func(t *testing.T) {
		addr := freeAddress(t)
		a := traced(t, addr)
		produceSome(t, a, 3)
		a.log.mustAwait(t, gone)
		failed := counterOf(t, a, "diurna_trace_spans_failed_total")
		produceSome(t, a, 2000)
		for counterOf(t, a, "diurna_trace_spans_failed_total") == failed { // until another attempt has failed
			produceSome(t, a, 1)
		}
		if n := strings.Count(a.log.text(), gone); n != 1 {
			t.Errorf("said so %d times", n)
		}
		c := startCollector(t, addr, nil)
		for len(c.spans("append")) == 0 {
			produceSome(t, a, 10)
		}
		a.log.mustAwait(t, back)
		if counterOf(t, a, "diurna_trace_spans_sent_total") == 0 {
			t.Error("none was sent")
		}
		a.mustStop(t)
	})
	t.Run("hangs", func(t *testing.T) {
		asked := make(chan struct{}, 100)
		c := startCollector(t, "", func(ctx context.Context) error {
			asked <- struct{}{}
			<-ctx.Done()
			return ctx.Err()
		})
		a := traced(t, c.addr)
		produceSome(t, a, 3)
		<-asked
		produceSome(t, a, traceQueue+100) // more than fits while it waits
		a.mustStop(t)
		if all, failed := counterOf(t, a, "diurna_trace_spans_total"), counterOf(t, a, "diurna_trace_spans_failed_total"); all <= failed || failed == 0 {
			t.Errorf("of %v spans %v failed: none was dropped", all, failed)
		}
	})
	t.Run("refuses", func(t *testing.T) {
		c := startCollector(t, "", func(context.Context) error { return errors.New("out of space") })
		a := traced(t, c.addr)
		produceSome(t, a, 3)
		if text := a.log.mustAwait(t, gone); !strings.Contains(text, "out of space") || !strings.Contains(text, c.addr) {
			t.Error(text)
		}
		a.mustStop(t)
	})
}

func counterOf(t *testing.T, a *testAgent, name string) float64 {
	t.Helper()
	families, err := a.metrics.Gather()
	if err != nil && !strings.Contains(err.Error(), "closed") {
		t.Fatal(err)
	}
	at := slices.IndexFunc(families, func(f *dto.MetricFamily) bool { return f.GetName() == name })
	if at < 0 {
		t.Fatalf("there is no %s", name)
	}
	return families[at].GetMetric()[0].GetCounter().GetValue()
}
