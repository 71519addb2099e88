package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/stats"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/rpc"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// Bounds of what tracing holds, and of how long it takes. Spans that do not fit
// are dropped; nothing ever waits for a collector.
const (
	traceQueue   = 2048
	traceBatch   = 512
	traceDelay   = time.Second
	traceExport  = 10 * time.Second
	traceRetry   = 5 * time.Second
	traceLastTry = 2 * time.Second
	// One that was out of reach before will be so in the end.
	traceLastTryLost = 100 * time.Millisecond
)

// tracing sends traces of produce and consume to an OpenTelemetry collector. It
// is nil where none is configured, which costs nothing. Nothing of it is global:
// a process may run several nodes.
type tracing struct {
	oneIn    uint64
	exporter *traceExporter
	batches  sdktrace.SpanProcessor
	calls    *sdktrace.TracerProvider
	// Of requests on streams one in so many is traced; this one's tracer traces
	// all that it is asked to.
	streamed *sdktrace.TracerProvider
	tracer   trace.Tracer
	chosen   trace.Tracer
	requests atomic.Uint64
}

var traceMetrics = []about{
	{"diurna_trace_spans_total", counter, "spans", nil, "Spans that were to be sent to the collector. Those that were neither sent nor failed wait, or found the queue full. Only with telemetry.otlp_endpoint."},
	{"diurna_trace_spans_sent_total", counter, "spans", nil, "Spans that the collector took. Only with telemetry.otlp_endpoint."},
	{"diurna_trace_spans_failed_total", counter, "spans", nil, "Spans that could not be sent. Only with telemetry.otlp_endpoint."},
}

// openTracing does not wait for the collector.
func openTracing(cfg *config.Config, opts Options, nodeID string) (*tracing, error) {
	t := cfg.Telemetry
	if t.OTLPEndpoint == "" {
		return nil, nil
	}
	options := []otlptracegrpc.Option{
		otlptracegrpc.WithEndpoint(t.OTLPEndpoint),
		otlptracegrpc.WithTimeout(traceExport),
		otlptracegrpc.WithRetry(otlptracegrpc.RetryConfig{Enabled: true, InitialInterval: opts.traceRetry / 5, MaxInterval: opts.traceRetry / 2, MaxElapsedTime: opts.traceRetry}),
		// gRPC's own goes up to two minutes, long after a collector is back.
		otlptracegrpc.WithReconnectionPeriod(time.Second),
	}
	if t.OTLPInsecure {
		options = append(options, otlptracegrpc.WithInsecure())
	} else {
		tlsConfig, err := collectorTLS(t.OTLPCAFile)
		if err != nil {
			return nil, err
		}
		options = append(options, otlptracegrpc.WithTLSCredentials(credentials.NewTLS(tlsConfig)))
	}
	otlp, err := otlptracegrpc.New(context.Background(), options...)
	if err != nil {
		return nil, fmt.Errorf("telemetry.otlp_endpoint: %w", err)
	}
	tr := &tracing{
		oneIn:    uint64(t.SampleOneIn),
		exporter: newTraceExporter(otlp, t.OTLPEndpoint, opts.Logger.Named("traces")),
	}
	tr.batches = sdktrace.NewBatchSpanProcessor(tr.exporter,
		sdktrace.WithMaxQueueSize(traceQueue), sdktrace.WithMaxExportBatchSize(traceBatch),
		sdktrace.WithBatchTimeout(traceDelay), sdktrace.WithExportTimeout(traceExport))
	node := resource.NewSchemaless(
		attribute.String("service.name", "diurna"),
		attribute.String("service.version", opts.Version),
		attribute.String("service.instance.id", nodeID),
		attribute.String("diurna.node", cfg.Node.Name),
		attribute.String("diurna.cluster", cfg.Cluster.Name),
	)
	provider := func(s sdktrace.Sampler) *sdktrace.TracerProvider {
		return sdktrace.NewTracerProvider(sdktrace.WithSampler(s), sdktrace.WithResource(node), sdktrace.WithSpanProcessor(counted{tr.batches, tr.exporter}))
	}
	tr.calls = provider(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(1 / float64(t.SampleOneIn))))
	tr.streamed = provider(sdktrace.AlwaysSample())
	const scope = "github.com/diurnalog/diurna"
	tr.tracer, tr.chosen = tr.calls.Tracer(scope), tr.streamed.Tracer(scope)
	return tr, nil
}

func collectorTLS(caFile string) (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile == "" {
		return cfg, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("telemetry.otlp_ca_file: %w", err)
	}
	cfg.RootCAs = x509.NewCertPool()
	if !cfg.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("telemetry.otlp_ca_file: %s holds no certificate in PEM", caFile)
	}
	return cfg, nil
}

// serverOptions are what the gRPC server needs to trace calls.
func (t *tracing) serverOptions() []grpc.ServerOption {
	if t == nil {
		return nil
	}
	// What other nodes, health checks and operators call is no news.
	ofLog := "/" + v1.Log_ServiceDesc.ServiceName + "/"
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(
		otelgrpc.WithTracerProvider(t.calls),
		otelgrpc.WithMeterProvider(noop.NewMeterProvider()), // ours are enough
		otelgrpc.WithPropagators(propagation.TraceContext{}),
		otelgrpc.WithFilter(func(info *stats.RPCTagInfo) bool {
			method, ok := strings.CutPrefix(info.FullMethodName, ofLog)
			return ok && (strings.HasPrefix(method, "Produce") || strings.HasPrefix(method, "Consume"))
		}),
	))}
}

// collectors are what there is to register.
func (t *tracing) collectors() []prometheus.Collector {
	if t == nil {
		return nil
	}
	return []prometheus.Collector{t.exporter.spans, t.exporter.sent, t.exporter.failed}
}

// appending begins the span of one batch on its way into the log, nil where it is
// not traced. A batch of a call of its own belongs to the call's trace. On a
// stream, which can carry any number and last for days, one batch in so many
// gets a trace of its own, linked to the stream's.
func (t *tracing) appending(ctx context.Context, p rpc.Proposal, stream bool) trace.Span {
	if t == nil {
		return nil
	}
	attributes := trace.WithAttributes(attribute.Int64("diurna.records", int64(p.Count)), attribute.Int("diurna.bytes", len(p.Records)))
	if !stream {
		_, span := t.tracer.Start(ctx, "append", attributes)
		return span
	}
	if (t.requests.Add(1)-1)%t.oneIn != 0 {
		return nil
	}
	_, span := t.chosen.Start(ctx, "append", attributes, trace.WithNewRoot(), trace.WithLinks(trace.LinkFromContext(ctx)))
	return span
}

// appended ends it.
func appended(span trace.Span, ack rpc.Ack, err error) {
	if span == nil {
		return
	}
	if err != nil {
		_, reason, _ := rpc.Explain(err)
		span.SetStatus(codes.Error, err.Error())
		span.SetAttributes(attribute.String("error.type", reason))
	} else {
		span.SetAttributes(attribute.Int64("diurna.base_offset", int64(ack.BaseOffset)))
	}
	span.End()
}

// close sends what is left, for a moment at most.
func (t *tracing) close(ctx context.Context) error {
	if t == nil {
		return nil
	}
	limit := traceLastTry
	if t.exporter.lost.Load() {
		limit = traceLastTryLost
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	defer context.AfterFunc(ctx, t.exporter.abort)()
	// Not with ctx: what runs in the background is to have ended then, which it
	// does soon after what it does was aborted.
	background := context.WithoutCancel(ctx)
	err := errors.Join(t.calls.Shutdown(background), t.streamed.Shutdown(background))
	t.exporter.abort()
	if err != nil {
		return fmt.Errorf("end traces: %w", err)
	}
	return nil
}

// traceExporter stands before the real one: it counts, says once that a collector
// is out of reach and once that it is back, and can be aborted.
type traceExporter struct {
	inner    *otlptrace.Exporter
	endpoint string
	logger   hclog.Logger

	aborted context.Context
	abort   context.CancelFunc
	// lost: the last attempt failed.
	lost atomic.Bool

	spans, sent, failed prometheus.Counter
}

func newTraceExporter(inner *otlptrace.Exporter, endpoint string, logger hclog.Logger) *traceExporter {
	e := &traceExporter{inner: inner, endpoint: endpoint, logger: logger}
	e.aborted, e.abort = context.WithCancel(context.Background())
	for i, c := range []*prometheus.Counter{&e.spans, &e.sent, &e.failed} {
		*c = prometheus.NewCounter(prometheus.CounterOpts{Name: traceMetrics[i].name, Help: traceMetrics[i].help})
	}
	return e
}

// ExportSpans implements sdktrace.SpanExporter. Its error would go to a logger of
// the whole process's, once for every batch.
func (e *traceExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(e.aborted, cancel)()
	err := e.inner.ExportSpans(ctx, spans)
	if err == nil {
		e.sent.Add(float64(len(spans)))
		if e.lost.Load() {
			e.logger.Info("the collector takes traces again", "endpoint", e.endpoint)
		}
	} else {
		e.failed.Add(float64(len(spans)))
		if !e.lost.Load() {
			e.logger.Warn("the collector takes no traces; they are dropped, and nothing else is affected", "endpoint", e.endpoint, "error", err)
		}
	}
	e.lost.Store(err != nil)
	return nil
}

// Shutdown implements sdktrace.SpanExporter.
func (e *traceExporter) Shutdown(ctx context.Context) error { return e.inner.Shutdown(ctx) }

// counted counts spans on their way into the queue, which may be full.
type counted struct {
	sdktrace.SpanProcessor
	exporter *traceExporter
}

// OnEnd implements sdktrace.SpanProcessor.
func (c counted) OnEnd(s sdktrace.ReadOnlySpan) {
	if s.SpanContext().IsSampled() {
		c.exporter.spans.Inc()
	}
	c.SpanProcessor.OnEnd(s)
}
