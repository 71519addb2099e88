package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"sort"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// regionLog serves endless batches out of one region of memory, which a read
// copies as a read of a file in the page cache would.
type regionLog struct {
	*memLog
	region  []byte // frames, back to back
	frames  []Batch
	records uint64
}

func newRegionLog(tb testing.TB, batchBytes, regionBytes int) *regionLog {
	l := &regionLog{memLog: newMemLog()}
	var run []byte
	count := uint32(0)
	for len(run) < batchBytes {
		run = append(run, encode(tb, record(int(count), min(batchBytes, 1000)))...)
		count++
	}
	for len(l.region) < regionBytes {
		start := len(l.region) + memFrame
		l.region = append(append(l.region, make([]byte, memFrame)...), run...)
		l.frames = append(l.frames, Batch{BaseOffset: l.records, Count: count, AppendTime: epoch, Start: start, End: len(l.region)})
		l.records += uint64(count)
	}
	l.hw, l.end = math.MaxUint64>>1, math.MaxUint64>>1
	return l
}

func (l *regionLog) ReadBatches(from uint64, buf []byte, dst []Batch) ([]Batch, error) {
	lap := from / l.records * l.records
	i := sort.Search(len(l.frames), func(i int) bool { return l.frames[i].BaseOffset > from-lap }) - 1
	begin := l.frames[i].Start - memFrame
	end := begin
	for ; i < len(l.frames) && l.frames[i].End-begin <= len(buf); i++ {
		b := l.frames[i]
		b.BaseOffset += lap
		b.Start, b.End = b.Start-begin, b.End-begin
		end = begin + b.End
		dst = append(dst, b)
	}
	if len(dst) == 0 {
		return dst, &ShortBufferError{Need: l.frames[i].End - begin}
	}
	copy(buf, l.region[begin:end])
	return dst, nil
}

// discard is a client's codec that throws away what it receives, so that a
// benchmark is about the server.
type discard struct{ encoding.CodecV2 }

func (d discard) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*int) = data.Len()
	return nil
}

func discarding() grpc.CallOption {
	return grpc.ForceCodecV2(discard{encoding.GetCodecV2("proto")})
}

// windows are the same for both sides of a comparison, and small against what
// is pulled at a time, so that what one side sends ahead while the other is
// measured does not count.
var windows = []grpc.DialOption{grpc.WithStaticStreamWindowSize(1 << 20), grpc.WithStaticConnWindowSize(1 << 20)}

// bareStream is gRPC with nothing of ours: a server that pushes messages out
// of ready buffers.
func bareStream(b *testing.B, messageBytes int) (grpc.ClientStream, func()) {
	message := make([]byte, messageBytes)
	srv := grpc.NewServer(grpc.ForceServerCodecV2(bytesCodec{}))
	desc := grpc.StreamDesc{StreamName: "Push", ServerStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
		var req []byte
		if err := stream.RecvMsg(&req); err != nil {
			return err
		}
		for {
			if err := stream.SendMsg(&message); err != nil {
				return err
			}
		}
	}}
	srv.RegisterService(&grpc.ServiceDesc{ServiceName: "bare", HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{desc}}, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), append(windows, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := conn.NewStream(ctx, &desc, "/bare/Push", discarding())
	if err != nil {
		b.Fatal(err)
	}
	if err := errors.Join(stream.SendMsg(&v1.ConsumeRequest{}), stream.CloseSend()); err != nil {
		b.Fatal(err)
	}
	return stream, func() {
		cancel()
		if err := conn.Close(); err != nil {
			b.Error(err)
		}
		srv.Stop()
		if err := <-served; err != nil {
			b.Error(err)
		}
	}
}

// pull receives until so many bytes have come and returns bytes per second.
func pull(b *testing.B, stream grpc.ClientStream, bytes int) float64 {
	begin := time.Now()
	for got := 0; got < bytes; {
		var n int
		if err := stream.RecvMsg(&n); err != nil {
			b.Fatal(err)
		}
		got += n
	}
	return float64(bytes) / time.Since(begin).Seconds()
}

// BenchmarkConsumeStream reads over TCP; "of-bare" is the throughput as a part
// of what gRPC alone does with messages of the same size.
func BenchmarkConsumeStream(b *testing.B) {
	for _, batch := range []int{1 << 10, 16 << 10, 128 << 10, 1 << 20} {
		for _, aim := range []int{128 << 10, 256 << 10, 512 << 10} {
			if aim != (Limits{}).mustDefaults().ConsumeBytes && batch != 16<<10 {
				continue
			}
			b.Run(fmt.Sprintf("batch=%dKiB/aim=%dKiB", batch>>10, aim>>10), func(b *testing.B) {
				const step = 32 << 20
				f := serve(b, Config{Log: newRegionLog(b, batch, 32<<20), Limits: Limits{ConsumeBytes: aim}}, true, windows...)
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				desc := grpc.StreamDesc{ServerStreams: true}
				stream, err := f.conn.NewStream(ctx, &desc, v1.Log_ConsumeStream_FullMethodName, discarding())
				if err != nil {
					b.Fatal(err)
				}
				if err := errors.Join(stream.SendMsg(&v1.ConsumeRequest{}), stream.CloseSend()); err != nil {
					b.Fatal(err)
				}
				bare, stop := bareStream(b, max(aim, batch))
				defer stop()
				pull(b, stream, step) // flow-control windows grow
				pull(b, bare, step)

				b.SetBytes(step)
				b.ReportAllocs()
				b.ResetTimer()
				for b.Loop() {
					pull(b, stream, step)
				}
				b.StopTimer()
				// Both once more, taking turns, so that a busy machine hits both.
				var ours, theirs []float64
				for range 10 {
					ours = append(ours, pull(b, stream, step))
					theirs = append(theirs, pull(b, bare, step))
				}
				sort.Float64s(ours)
				sort.Float64s(theirs)
				b.ReportMetric(ours[len(ours)/2]/theirs[len(theirs)/2], "of-bare")
			})
		}
	}
}

func (l Limits) mustDefaults() Limits {
	l, err := l.withDefaults()
	if err != nil {
		panic(err)
	}
	return l
}

// BenchmarkProduceStream appends to a log that acknowledges at once.
func BenchmarkProduceStream(b *testing.B) {
	for _, size := range []int{100, 1 << 10, 64 << 10} {
		b.Run(fmt.Sprintf("batch=%dB", size), func(b *testing.B) {
			f := serve(b, Config{Log: &sink{newMemLog()}}, true)
			b.ReportAllocs()
			push(b, f, size)
		})
	}
}

// BenchmarkForwardStream appends through a node that does not lead, and says
// how fast that is beside the same to the leader.
func BenchmarkForwardStream(b *testing.B) {
	for _, size := range []int{100, 1 << 10, 64 << 10} {
		b.Run(fmt.Sprintf("batch=%dB", size), func(b *testing.B) {
			leader := serve(b, Config{Log: &sink{newMemLog()}, Peer: &member{}}, true)
			forward, err := NewForwarder(ForwarderConfig{Dial: func(ctx context.Context, _ string) (net.Conn, error) { return leader.dial(ctx) }})
			if err != nil {
				b.Fatal(err)
			}
			follower := serve(b, Config{Log: follows{newMemLog()}, Peer: &member{}, Forward: forward}, true)
			direct := push(b, leader, size)
			forwarded := push(b, follower, size)
			b.ReportMetric(float64(direct)/float64(forwarded), "ratio")
			if err := follower.svc.Shutdown(context.Background()); err != nil {
				b.Fatal(err)
			}
			if err := forward.Close(context.Background()); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// follows is a log of which another node leads.
type follows struct{ *memLog }

func (follows) Propose(context.Context, Proposal, bool) (Pending, error) {
	return nil, &NotLeaderError{LeaderID: "a", LeaderAddress: "a:1"}
}

// push sends b.N batches over one stream and returns how long that took.
func push(b *testing.B, f *fixture, size int) time.Duration {
	b.Helper()
	stream, err := f.client.ProduceStream(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	req := &v1.ProduceRequest{Records: []*v1.Record{record(0, size)}}
	done := make(chan error, 1)
	b.SetBytes(int64(proto.Size(req)))
	b.ResetTimer()
	start := time.Now()
	go func() {
		for {
			if _, err := stream.Recv(); err != nil {
				done <- err
				return
			}
		}
	}()
	for range b.N {
		if err := stream.Send(req); err != nil {
			b.Fatal(err)
		}
	}
	if err := stream.CloseSend(); err != nil {
		b.Fatal(err)
	}
	if err := <-done; !errors.Is(err, io.EOF) {
		b.Fatal(err)
	}
	return time.Since(start)
}

// sink acknowledges and forgets.
type sink struct{ *memLog }

var sunk = func() *memPending {
	p := &memPending{done: make(chan struct{}), ack: Ack{NextOffset: 1}}
	close(p.done)
	return p
}()

func (*sink) Propose(context.Context, Proposal, bool) (Pending, error) { return sunk, nil }

func BenchmarkParseProduceRequest(b *testing.B) {
	lim := testLimits(b)
	var records []*v1.Record
	for i := range 100 {
		records = append(records, record(i, 1000))
	}
	raw := encode(b, records...)
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseProduceRequest(raw, lim); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkAssemble shows from which size on a batch is better sent as a
// buffer of its own than moved; compactBytes is set by it. Encoding and
// reference counts as gRPC does them are included.
func BenchmarkAssemble(b *testing.B) {
	for _, batch := range []int{256, 1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10} {
		for _, compact := range []int{0, 1 << 20} {
			b.Run(fmt.Sprintf("batch=%dB/move=%v", batch, compact > 0), func(b *testing.B) {
				log := newRegionLog(b, batch, 1<<20)
				buf := make([]byte, 256<<10)
				batches, err := log.ReadBatches(0, buf, nil)
				if err != nil {
					b.Fatal(err)
				}
				var pool chunkPool
				work := pool.Get(len(buf))
				b.SetBytes(int64(len(buf)))
				var pieces []piece
				var w [][]byte
				rng := rand.New(rand.NewPCG(1, 1))
				for b.Loop() {
					pieces = layout(*work, batches, rng.Uint64(), 1, compact, pieces[:0])
					whole := mem.NewBuffer(work, &pool)
					data := make(mem.BufferSlice, len(pieces))
					for i, p := range pieces {
						data[i] = whole.Slice(p.start, p.end)
					}
					whole.Free()
					data.Ref()
					r := data.Reader()
					data.Free()
					for r.Remaining() > 0 {
						n := min(16<<10, r.Remaining())
						if w, err = r.Peek(n, w[:0]); err != nil {
							b.Fatal(err)
						}
						if _, err := r.Discard(n); err != nil {
							b.Fatal(err)
						}
					}
					if err := r.Close(); err != nil {
						b.Fatal(err)
					}
					data.Free()
					work = pool.Get(len(buf))
				}
			})
		}
	}
}
