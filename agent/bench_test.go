package agent_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
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

// benchNode is a node in another process.
type benchNode struct {
	addr string
	cmd  *exec.Cmd
}

// startBenchNode builds the program and runs it until the benchmark ends.
func startBenchNode(b *testing.B) *benchNode {
	b.Helper()
	dir := b.TempDir()
	bin := filepath.Join(dir, "diurna")
	build := exec.Command("go", "build", "-o", bin, "github.com/diurnalog/diurna")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build: %v\n%s", err, out)
	}
	cmd := exec.Command(bin, "agent", "-dev", "-data-dir", filepath.Join(dir, "data"), "-rpc-addr", "127.0.0.1:0", "-log-level", "info")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		b.Fatal(err)
	}
	n := startProcess(b, cmd)
	n.addr = awaitLine(b, stderr, "diurna: ready", " address=")
	return n
}

func startProcess(b *testing.B, cmd *exec.Cmd) *benchNode {
	b.Helper()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			b.Errorf("node: %v", err)
		}
	})
	return &benchNode{cmd: cmd}
}

// awaitLine reads a process's output until a line with until, and returns the
// word behind key in any line before. The rest of the output is thrown away.
func awaitLine(b *testing.B, output interface{ Read([]byte) (int, error) }, until, key string) (value string) {
	b.Helper()
	scan := bufio.NewScanner(output)
	for scan.Scan() {
		if _, rest, ok := strings.Cut(scan.Text(), key); ok && value == "" {
			value = strings.Fields(rest)[0]
		}
		if strings.Contains(scan.Text(), until) {
			go func() {
				for scan.Scan() {
				}
			}()
			return value
		}
	}
	b.Fatalf("the process ended before it said %q", until)
	return ""
}

// anonymous is the process's memory that no file backs: heap and stacks.
func (n *benchNode) anonymous(b *testing.B) int64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "RssAnon:")
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return kib << 10
}

func benchClient(b *testing.B, addr string) *client.Client {
	b.Helper()
	c, err := client.Dial(addr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := c.Close(); err != nil {
			b.Error(err)
		}
	})
	return c
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
	node := startBenchNode(b)
	c := benchClient(b, node.addr)
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
	node := startBenchNode(b)
	c := benchClient(b, node.addr)
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
	node := startBenchNode(b)
	c := benchClient(b, node.addr)
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

const bareTotalEnv = "DIURNA_BENCH_BARE"

// startBarePusher runs TestBarePusher of this very test program.
func startBarePusher(b *testing.B, total int) (addr string) {
	b.Helper()
	cmd := exec.Command(os.Args[0], "-test.run", "^TestBarePusher$", "-test.v")
	cmd.Env = append(os.Environ(), bareTotalEnv+"="+strconv.Itoa(total))
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	startProcess(b, cmd)
	return awaitLine(b, stdout, "serving address=", " address=")
}

// TestBarePusher is not a test but the process that BenchmarkConsumeStream
// compares with.
func TestBarePusher(t *testing.T) {
	total, err := strconv.Atoi(os.Getenv(bareTotalEnv))
	if err != nil {
		t.SkipNow()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("serving address=%s\n", l.Addr())
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
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	go func() {
		<-signals
		server.Stop()
	}()
	if err := server.Serve(l); err != nil {
		t.Fatal(err)
	}
}

// pushCodec sends byte slices as they are.
type pushCodec struct{}

func (pushCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}
func (pushCodec) Unmarshal(mem.BufferSlice, any) error { return nil }
func (pushCodec) Name() string                         { return "proto" }
