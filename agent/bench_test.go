package agent

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/rpc/client"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// The benchmarks of a whole node: the real program in a process of its own,
// and a client in this one. Each prints a ratio against a baseline taken in
// the same run.

// anonymous is the process's memory that no file backs: heap and stacks.
func (n *node) anonymous(b *testing.B) int64 {
	b.Helper()
	return memory(b, n, "RssAnon")
}

// benchNode runs the program until the benchmark ends.
func benchNode(b *testing.B) *node {
	b.Helper()
	n := startNode(b, filepath.Join(b.TempDir(), "data"))
	b.Cleanup(func() { n.terminate(b) })
	return n
}

// groupCommit is the baseline of the produce benchmarks: the log store alone,
// in this process, which appends batches of 64 records of 1 KiB and syncs each.
func groupCommit(b *testing.B, batches int) (recordsPerSecond float64) {
	b.Helper()
	l, err := logstore.Open(b.TempDir(), logstore.Options{})
	if err != nil {
		b.Fatal(err)
	}
	payload := make([]byte, 64<<10)
	begin := time.Now()
	for i := range batches {
		if err := l.Append([]logstore.Entry{{Index: uint64(i + 1), Term: 1, Count: 64, BaseOffset: uint64(i) * 64, Payload: payload}}); err != nil {
			b.Fatal(err)
		}
	}
	elapsed := time.Since(begin)
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	return float64(batches) * 64 / elapsed.Seconds()
}

func reportProduce(b *testing.B, records int, elapsed time.Duration, latencies []time.Duration, baseline float64) {
	slices.Sort(latencies)
	rate := float64(records) / elapsed.Seconds()
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(rate, "records/s")
	b.ReportMetric(rate*1024/1e6, "MB/s")
	b.ReportMetric(latencies[len(latencies)/2].Seconds()*1000, "p50-ms")
	b.ReportMetric(latencies[len(latencies)*99/100].Seconds()*1000, "p99-ms")
	b.ReportMetric(baseline, "store-records/s")
	b.ReportMetric(rate/baseline, "ratio")
}

// BenchmarkProduceUnary: 64 callers, each one record of 1 KiB at a time.
func BenchmarkProduceUnary(b *testing.B) {
	node := benchNode(b)
	c := dial(b, node.addr)
	records := []*client.Record{{Value: make([]byte, 1<<10)}}
	const callers = 64
	each := max(b.N/callers, 1500)
	before := groupCommit(b, 3000)
	latencies := make([][]time.Duration, callers)
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range callers {
		wg.Go(func() {
			for range each {
				sent := time.Now()
				if _, err := c.Produce(context.Background(), records); err != nil {
					b.Error(err)
					return
				}
				latencies[i] = append(latencies[i], time.Since(sent))
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(begin)
	after := groupCommit(b, 3000)
	reportProduce(b, callers*each, elapsed, slices.Concat(latencies...), (before+after)/2)
}

// BenchmarkProduceStream: one stream of batches of 64 records of 1 KiB, 8 MiB
// of them in flight.
func BenchmarkProduceStream(b *testing.B) {
	node := benchNode(b)
	c := dial(b, node.addr)
	before := groupCommit(b, 5000)
	batches := max(b.N, 20000)
	sent := make(chan time.Time, batches+1)
	var latencies []time.Duration
	begin := time.Now()
	p, err := c.NewProducer(context.Background(), client.ProducerOptions{
		BatchRecords: 64,
		OnAck: func(ack client.Ack) {
			// A batch leaves early when the window is full, so by records.
			for uint64(len(latencies)+1)*64 <= ack.NextOffset {
				latencies = append(latencies, time.Since(<-sent))
			}
		},
	})
	if err != nil {
		b.Fatal(err)
	}
	record := &client.Record{Value: make([]byte, 1<<10)}
	for range batches {
		for i := range 64 {
			if i == 63 {
				sent <- time.Now()
			}
			if err := p.Append(context.Background(), record); err != nil {
				b.Fatal(err)
			}
		}
	}
	outcome, err := p.Close(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	elapsed := time.Since(begin)
	if outcome.Acknowledged != uint64(batches)*64 {
		b.Fatalf("%+v", outcome)
	}
	after := groupCommit(b, 5000)
	reportProduce(b, batches*64, elapsed, latencies, (before+after)/2)
}

// discardCodec counts the bytes of what it receives.
type discardCodec struct{ encoding.CodecV2 }

func (discardCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*int) = data.Len()
	return nil
}

// drain reads a stream to its end and returns how many bytes came.
func drain(b *testing.B, conn *grpc.ClientConn, method string, request any) (bytes int64) {
	b.Helper()
	stream, err := conn.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, method,
		grpc.ForceCodecV2(discardCodec{encoding.GetCodecV2("proto")}), grpc.MaxCallRecvMsgSize(8<<20))
	if err != nil {
		b.Fatal(err)
	}
	if err := stream.SendMsg(request); err != nil {
		b.Fatal(err)
	}
	if err := stream.CloseSend(); err != nil {
		b.Fatal(err)
	}
	for {
		var n int
		if err := stream.RecvMsg(&n); err != nil {
			if err.Error() != "EOF" {
				b.Fatal(err)
			}
			return bytes
		}
		bytes += int64(n)
	}
}

func dialBench(b *testing.B, addr string) *grpc.ClientConn {
	b.Helper()
	// Windows that do not adapt, the same for both sides of a comparison.
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithInitialWindowSize(1<<20), grpc.WithInitialConnWindowSize(8<<20))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = conn.Close() })
	return conn
}

// BenchmarkConsumeStream reads a log of 1 GiB from a node in another process.
// Baseline: a bare gRPC stream, from another process too, that pushes the same
// number of bytes through a codec that does nothing.
func BenchmarkConsumeStream(b *testing.B) {
	node := benchNode(b)
	c := dial(b, node.addr)
	const total = 1 << 30
	p, err := c.NewProducer(context.Background(), client.ProducerOptions{})
	if err != nil {
		b.Fatal(err)
	}
	record := &client.Record{Value: make([]byte, 1<<10)}
	for range total >> 10 {
		if err := p.Append(context.Background(), record); err != nil {
			b.Fatal(err)
		}
	}
	if _, err := p.Close(context.Background()); err != nil {
		b.Fatal(err)
	}
	ours := dialBench(b, node.addr)
	bare := dialBench(b, startBarePusher(b, total))

	before := node.anonymous(b)
	peak := before
	var took, baseTook time.Duration
	var bytes int64
	rounds := max(b.N, 4)
	for range rounds {
		begin := time.Now()
		bytes = drain(b, ours, v1.Log_ConsumeStream_FullMethodName, &v1.ConsumeRequest{})
		took += time.Since(begin)
		peak = max(peak, node.anonymous(b))
		begin = time.Now()
		drain(b, bare, "/bare/Push", &v1.ConsumeRequest{})
		baseTook += time.Since(begin)
	}
	if bytes < total {
		b.Fatalf("only %d bytes came", bytes)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(rounds)*total/1e6/took.Seconds(), "MB/s")
	b.ReportMetric(float64(rounds)*total/1e6/baseTook.Seconds(), "bare-MB/s")
	b.ReportMetric(baseTook.Seconds()/took.Seconds(), "ratio")
	b.ReportMetric(float64(peak-before)/(1<<20), "growth-MiB")
}

// pushEnv makes this binary the process that BenchmarkConsumeStream compares
// with, which pushes so many bytes.
const pushEnv = "DIURNA_TEST_PUSH_BYTES"

// startBarePusher runs this very test program as that process.
func startBarePusher(b *testing.B, total int) (addr string) {
	b.Helper()
	p := startProcess(b, "env", pushEnv+"="+strconv.Itoa(total), os.Args[0])
	_, addr, _ = strings.Cut(p.stdout.mustAwait(b, "\n"), "address=")
	return strings.TrimSpace(addr)
}

// push serves a bare gRPC stream until the process is killed.
func push(bytes string) error {
	total, err := strconv.Atoi(bytes)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := grpc.NewServer(grpc.ForceServerCodecV2(pushCodec{}), grpc.InitialWindowSize(1<<20), grpc.InitialConnWindowSize(8<<20))
	server.RegisterService(&grpc.ServiceDesc{ServiceName: "bare", Streams: []grpc.StreamDesc{{
		StreamName: "Push", ServerStreams: true,
		Handler: func(_ any, stream grpc.ServerStream) error {
			if err := stream.RecvMsg(nil); err != nil {
				return err
			}
			chunk := make([]byte, 256<<10)
			for range total / len(chunk) {
				if err := stream.SendMsg(chunk); err != nil {
					return err
				}
			}
			return nil
		},
	}}}, nil)
	fmt.Printf("serving address=%s\n", l.Addr())
	return server.Serve(l)
}

// pushCodec sends byte slices as they are.
type pushCodec struct{}

func (pushCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}
func (pushCodec) Unmarshal(mem.BufferSlice, any) error { return nil }
func (pushCodec) Name() string                         { return "proto" }
