package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// collect checks that batches are dense from next on and that their records
// are those that fill appended at these offsets.
func collect(tb testing.TB, resp *v1.ConsumeResponse, next uint64) (uint64, int) {
	tb.Helper()
	bytes := 0
	for _, b := range resp.Batches {
		if b.BaseOffset != next || len(b.Records) == 0 {
			tb.Fatalf("a batch of %d records at offset %d, want one at %d", len(b.Records), b.BaseOffset, next)
		}
		if s := b.AppendTime.AsTime().Sub(epoch) / time.Second; uint64(s) > next {
			tb.Fatalf("batch at %d appended at %v", next, b.AppendTime.AsTime())
		}
		for _, r := range b.Records {
			if want := fmt.Sprintf("k%d", next); string(r.Key) != want {
				tb.Fatalf("record at offset %d has key %q", next, r.Key)
			}
			bytes += proto.Size(r)
			next++
		}
	}
	if resp.NextOffset != next {
		tb.Fatalf("next offset %d after records up to %d", resp.NextOffset, next)
	}
	if len(resp.Batches) > 0 && resp.HighWatermark < next {
		tb.Fatalf("high watermark %d below next offset %d", resp.HighWatermark, next)
	}
	return next, bytes
}

// drainStream reads a stream to its end and returns the offset after it.
func drainStream(tb testing.TB, stream grpc.ServerStreamingClient[v1.ConsumeResponse], from uint64) (next uint64, err error) {
	tb.Helper()
	next = from
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return next, nil
		} else if err != nil {
			return next, err
		}
		next, _ = collect(tb, resp, next)
	}
}

// Every start and every bound, on logs of random batches, against what they
// mean.
func TestConsumeMatrix(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	ctx := testContext(t)
	for round := range 3 {
		log := newMemLog()
		f := serve(t, Config{Log: log, Limits: Limits{ConsumeBytes: 1 + rng.IntN(40<<10)}}, false)
		const last = 300
		log.fill(t, rng, 0, last, 1+rng.IntN(40), rng.IntN(3000))
		first := uint64(rng.IntN(last / 2))
		log.retain(first)
		if round == 0 {
			log.hw -= uint64(log.batches[len(log.batches)-1].count) // the last batch is not committed
		}
		hw := log.hw

		type start struct {
			name string
			req  *v1.ConsumeRequest
			from uint64
		}
		starts := []start{
			{"none", &v1.ConsumeRequest{}, first},
			{"earliest", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Earliest{Earliest: true}}, first},
			{"latest", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Latest{Latest: true}}, hw},
			{"end", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Offset{Offset: log.end}}, log.end},
			{"time before all", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Time{Time: &timestamppb.Timestamp{}}}, first},
			{"time after all", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Time{Time: timestamppb.New(epoch.AddDate(1, 0, 0))}}, hw},
			{"no last", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_LastN{LastN: 0}}, hw},
			{"more than all", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_LastN{LastN: math.MaxUint64}}, first},
		}
		for range 3 {
			at := first + rng.Uint64N(hw-first+1)
			n := rng.Uint64N(last)
			b := log.batches[rng.IntN(len(log.batches))]
			starts = append(starts,
				start{"offset", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Offset{Offset: at}}, at},
				start{"last", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_LastN{LastN: n}}, uint64(max(int64(hw)-int64(n), int64(first)))},
				start{"time", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Time{Time: timestamppb.New(b.time)}}, min(max(b.base, first), hw)},
				start{"just after", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Time{Time: timestamppb.New(b.time.Add(1))}},
					min(max(b.base+uint64(b.count), first), hw)},
			)
		}
		for _, s := range starts {
			for _, end := range []*uint64{nil, ptr(s.from), ptr(s.from + 1), ptr(s.from + rng.Uint64N(last)), ptr(uint64(math.MaxUint64))} {
				for _, records := range []uint64{0, 1, 1 + rng.Uint64N(last)} {
					for _, bytes := range []uint64{0, 1, rng.Uint64N(20 << 10), math.MaxUint64} {
						req := proto.CloneOf(s.req)
						req.EndOffset, req.MaxRecords, req.MaxBytes = end, records, bytes
						req.Linearizable = rng.IntN(2) == 0
						until := max(hw, s.from)
						if end != nil {
							until = min(until, *end)
						}
						if records > 0 {
							until = min(until, s.from+records)
						}
						name := fmt.Sprintf("%s: %v", s.name, req)

						stream, err := f.client.ConsumeStream(ctx, req)
						if err != nil {
							t.Fatal(err)
						}
						if got, err := drainStream(t, stream, s.from); err != nil || got != until {
							t.Fatalf("%s: read %d to %d, want %d; %v", name, s.from, got, until, err)
						}
						if until < hw && end != nil && *end == until || records > 0 && until == s.from+records {
							// Both bounds are above nothing: following changes nothing.
							req.Follow = true
							stream, err := f.client.ConsumeStream(ctx, req)
							if err != nil {
								t.Fatal(err)
							}
							if got, err := drainStream(t, stream, s.from); err != nil || got != until {
								t.Fatalf("%s: followed %d to %d, want %d; %v", name, s.from, got, until, err)
							}
							req.Follow = false
						}

						resp, err := f.client.Consume(ctx, req)
						if err != nil {
							t.Fatalf("%s: %v", name, err)
						}
						got, size := collect(t, resp, s.from)
						if (got == s.from) != (until == s.from) || got > until {
							t.Fatalf("%s: read once %d to %d, want up to %d", name, s.from, got, until)
						}
						if bytes > 0 && bytes < 1<<20 && got > s.from+1 && size > int(bytes) {
							t.Fatalf("%s: %d bytes", name, size)
						}
					}
				}
			}
		}
	}
}

func TestConsumeRefuses(t *testing.T) {
	log := newMemLog()
	log.fill(t, rand.New(rand.NewPCG(1, 2)), 0, 100, 10, 100)
	log.retain(10)
	log.end += 5 // stored, not committed
	f := serve(t, Config{Log: log}, false)
	ctx := testContext(t)
	at := func(n uint64) *v1.ConsumeRequest {
		return &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Offset{Offset: n}}
	}
	for _, c := range []struct {
		name   string
		req    *v1.ConsumeRequest
		code   codes.Code
		reason string
		meta   map[string]string
	}{
		{"below", at(9), codes.OutOfRange, ReasonOffsetOutOfRange, map[string]string{"offset": "9", "first": "10", "next": "100"}},
		{"above", at(106), codes.OutOfRange, ReasonOffsetOutOfRange, map[string]string{"offset": "106", "first": "10", "next": "100"}},
		{"above, following", &v1.ConsumeRequest{Start: at(106).Start, Follow: true}, codes.OutOfRange, ReasonOffsetOutOfRange, nil},
		{"end before start", &v1.ConsumeRequest{Start: at(50).Start, EndOffset: ptr(uint64(49))}, codes.InvalidArgument, ReasonInvalidArgument, map[string]string{"field": "end_offset"}},
		{"negative time", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Time{Time: &timestamppb.Timestamp{Seconds: -1}}}, codes.InvalidArgument, ReasonInvalidArgument, map[string]string{"field": "time"}},
		{"no such time", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Time{Time: &timestamppb.Timestamp{Nanos: -1}}}, codes.InvalidArgument, ReasonInvalidArgument, map[string]string{"field": "time"}},
		{"not earliest", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Earliest{}}, codes.InvalidArgument, ReasonInvalidArgument, map[string]string{"field": "earliest"}},
		{"not latest", &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Latest{}}, codes.InvalidArgument, ReasonInvalidArgument, map[string]string{"field": "latest"}},
		{"other log", &v1.ConsumeRequest{Log: "audit"}, codes.NotFound, ReasonLogNotFound, map[string]string{"log": "audit"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := f.client.Consume(ctx, c.req)
			m := wantStatus(t, err, c.code, c.reason)
			for k, v := range c.meta {
				if m[k] != v {
					t.Errorf("metadata %v, want %v", m, c.meta)
				}
			}
			stream, err := f.client.ConsumeStream(ctx, c.req)
			if err != nil {
				t.Fatal(err)
			}
			_, err = stream.Recv()
			wantStatus(t, err, c.code, c.reason)
		})
	}
	t.Run("garbage", func(t *testing.T) {
		garbage := []byte{0xff}
		var resp []byte
		err := f.conn.Invoke(ctx, v1.Log_Consume_FullMethodName, &garbage, &resp, grpc.ForceCodecV2(bytesCodec{}))
		wantStatus(t, err, codes.InvalidArgument, ReasonInvalidArgument)
	})
	t.Run("stored, not committed", func(t *testing.T) {
		for _, n := range []uint64{100, 103, 105} {
			resp, err := f.client.Consume(ctx, at(n))
			if err != nil || len(resp.Batches) != 0 || resp.NextOffset != n {
				t.Errorf("at %d: %v, %v", n, resp, err)
			}
		}
	})
	t.Run("damage", func(t *testing.T) {
		log.readErr = fmt.Errorf("read: %w", &CorruptError{File: "00.log", Position: 4096, Detail: "checksum"})
		defer func() { log.readErr = nil }()
		_, err := f.client.Consume(ctx, &v1.ConsumeRequest{})
		if m := wantStatus(t, err, codes.DataLoss, ReasonCorrupt); m["file"] != "00.log" || m["position"] != "4096" {
			t.Errorf("metadata %v", m)
		}
	})
}

// An offset that this copy does not have yet is out of range only if a quorum
// says so.
func TestConsumeAheadOfThisCopy(t *testing.T) {
	log := newMemLog()
	log.fill(t, rand.New(rand.NewPCG(1, 2)), 0, 10, 3, 100)
	f := serve(t, Config{Log: log}, false)
	req := &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Offset{Offset: 15}}

	log.linearize = func() error { return ErrNoLeader }
	_, err := f.client.Consume(testContext(t), req)
	wantStatus(t, err, codes.Unavailable, ReasonNoLeader)

	log.linearize = func() error { log.fill(t, rand.New(rand.NewPCG(1, 2)), 10, 20, 3, 100); return nil }
	resp, err := f.client.Consume(testContext(t), req)
	if err != nil {
		t.Fatal(err)
	}
	if next, _ := collect(t, resp, 15); next != 20 {
		t.Errorf("read up to %d", next)
	}
}

func TestConsumeFollow(t *testing.T) {
	log := newMemLog()
	rng := rand.New(rand.NewPCG(3, 4))
	log.fill(t, rng, 0, 50, 5, 500)
	f := serve(t, Config{Log: log}, false)
	ctx, cancel := context.WithCancel(testContext(t))

	stream, err := f.client.ConsumeStream(ctx, &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Latest{Latest: true}, Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil || len(resp.Batches) != 0 || resp.NextOffset != 50 {
		t.Fatalf("at the end: %v, %v", resp, err)
	}
	next := uint64(50)
	for to := 60; to <= 200; to += 10 {
		log.fill(t, rng, to-10, to, 5, 500)
		for next < uint64(to) {
			resp, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			next, _ = collect(t, resp, next)
		}
	}
	log.mu.Lock()
	waits := log.waits
	log.mu.Unlock()
	if waits > 400 {
		t.Errorf("looked %d times for 150 records", waits)
	}

	// With an end, following ends there.
	bounded, err := f.client.ConsumeStream(ctx, &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Offset{Offset: 195}, EndOffset: ptr(uint64(203)), Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	log.fill(t, rng, 200, 210, 5, 500)
	if got, err := drainStream(t, bounded, 195); err != nil || got != 203 {
		t.Errorf("ended at %d, %v", got, err)
	}

	// A single read waits for the first record.
	done := make(chan error, 1)
	go func() {
		resp, err := f.client.Consume(ctx, &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Offset{Offset: 210}, Follow: true})
		if err == nil && resp.NextOffset != 211 {
			err = fmt.Errorf("next offset %d", resp.NextOffset)
		}
		done <- err
	}()
	eventually(t, "the read waits", func() bool { log.mu.Lock(); defer log.mu.Unlock(); return log.waits > waits+1 })
	log.fill(t, rng, 210, 211, 1, 10)
	if err := <-done; err != nil {
		t.Error(err)
	}
	deadline, stop := context.WithTimeout(ctx, time.Millisecond)
	defer stop()
	if _, err := f.client.Consume(deadline, &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Latest{Latest: true}, Follow: true}); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("got %v", err)
	}

	cancel()
	if _, err := drainStream(t, stream, next); status.Code(err) != codes.Canceled {
		t.Errorf("got %v", err)
	}
	eventually(t, "all calls are over", func() bool { return f.svc.calls.count() == 0 })
}

// A reader that retention overtakes is told, and does not skip in silence.
func TestConsumeFallsBehind(t *testing.T) {
	log := newMemLog()
	rng := rand.New(rand.NewPCG(5, 6))
	log.fill(t, rng, 0, 4000, 1, 2000)
	f := serve(t, Config{Log: log, Limits: Limits{ConsumeBytes: 20 << 10}}, false, grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(64<<10))
	stream, err := f.client.ConsumeStream(testContext(t), &v1.ConsumeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	next, _ := collect(t, resp, 0)
	log.retain(3990)
	next, err = drainStream(t, stream, next)
	m := wantStatus(t, err, codes.OutOfRange, ReasonOffsetOutOfRange)
	if m["first"] != "3990" || m["offset"] != utoa(next) {
		t.Errorf("after offset %d: metadata %v", next, m)
	}
}

// commitOnRead lets the watermark move while a read is under way.
type commitOnRead struct{ *memLog }

func (l commitOnRead) ReadBatches(from uint64, buf []byte, dst []Batch) ([]Batch, error) {
	dst, err := l.memLog.ReadBatches(from, buf, dst)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hw = l.end
	return dst, err
}

// Without follow a read ends where the committed log ended when it began.
func TestConsumeEndsWhereTheLogDid(t *testing.T) {
	log := commitOnRead{newMemLog()}
	log.fill(t, rand.New(rand.NewPCG(7, 8)), 0, 100, 1, 3000)
	log.hw = 60
	f := serve(t, Config{Log: log, Limits: Limits{ConsumeBytes: 16 << 10}}, false)
	stream, err := f.client.ConsumeStream(testContext(t), &v1.ConsumeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if next, err := drainStream(t, stream, 0); err != nil || next != 60 {
		t.Errorf("read up to %d, %v", next, err)
	}
}

// retainOnRead lets retention win the race between finding the start and
// reading there.
type retainOnRead struct {
	*memLog
	first uint64
}

func (l *retainOnRead) ReadBatches(from uint64, buf []byte, dst []Batch) ([]Batch, error) {
	l.retain(l.first)
	return l.memLog.ReadBatches(from, buf, dst)
}

func TestConsumeEarliestMoves(t *testing.T) {
	log := &retainOnRead{memLog: newMemLog(), first: 30}
	log.fill(t, rand.New(rand.NewPCG(7, 8)), 0, 100, 1, 100)
	f := serve(t, Config{Log: log}, false)
	resp, err := f.client.Consume(testContext(t), &v1.ConsumeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if next, _ := collect(t, resp, 30); next != 100 {
		t.Errorf("read up to %d", next)
	}
	log.first = 60
	_, err = f.client.Consume(testContext(t), &v1.ConsumeRequest{Start: &v1.ConsumeRequest_Offset{Offset: 40}})
	wantStatus(t, err, codes.OutOfRange, ReasonOffsetOutOfRange)
}

// What a log gives that is not what was asked for must not go unnoticed.
func TestConsumeChecksTheLog(t *testing.T) {
	for name, spoil := range map[string]func([]Batch) []Batch{
		"hole":     func(b []Batch) []Batch { return append(b[:1], b[2:]...) },
		"late":     func(b []Batch) []Batch { return b[1:] },
		"repeated": func(b []Batch) []Batch { b[1] = b[0]; return b },
		"overlap":  func(b []Batch) []Batch { b[1].BaseOffset--; b[1].Count++; return b },
		"empty":    func(b []Batch) []Batch { b[1].Count = 0; return b },
		"swapped":  func(b []Batch) []Batch { b[1], b[2] = b[2], b[1]; return b },
		"nothing":  func(b []Batch) []Batch { return b[:0] },
	} {
		t.Run(name, func(t *testing.T) {
			log := &spoiled{newMemLog(), spoil}
			log.fill(t, rand.New(rand.NewPCG(7, 8)), 0, 100, 5, 100)
			f := serve(t, Config{Log: log}, false)
			_, err := f.client.Consume(testContext(t), &v1.ConsumeRequest{})
			wantStatus(t, err, codes.Internal, ReasonInternal)
			if n := f.svc.chunks.out.Load(); n != 0 {
				t.Errorf("%d buffers lost", n)
			}
		})
	}
}

type spoiled struct {
	*memLog
	spoil func([]Batch) []Batch
}

func (l *spoiled) ReadBatches(from uint64, buf []byte, dst []Batch) ([]Batch, error) {
	dst, err := l.memLog.ReadBatches(from, buf, dst)
	return l.spoil(dst), err
}

// countOnRead notes how many buffers are out when one more is filled.
type countOnRead struct {
	*memLog
	buffers *atomic.Int64
	most    int64
}

func (l *countOnRead) ReadBatches(from uint64, buf []byte, dst []Batch) ([]Batch, error) {
	l.most = max(l.most, l.buffers.Load())
	return l.memLog.ReadBatches(from, buf, dst)
}

// A client that does not read costs a bounded number of buffers.
func TestSlowConsumer(t *testing.T) {
	log := &countOnRead{memLog: newMemLog()}
	log.fill(t, rand.New(rand.NewPCG(9, 9)), 0, 20000, 3, 3000)
	const chunk = 256 << 10
	f := serve(t, Config{Log: log}, false, grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(64<<10))
	log.buffers = &f.svc.chunks.out
	stream, err := f.client.ConsumeStream(testContext(t), &v1.ConsumeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next, total := uint64(0), 0
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		var n int
		next, n = collect(t, resp, next)
		if total += n; n > chunk {
			t.Errorf("a response of %d bytes", n)
		}
	}
	if next != 20000 || total < 20*chunk {
		t.Fatalf("read %d records, %d bytes", next, total)
	}
	if log.most < 2 || log.most > unsentChunks {
		t.Errorf("%d buffers at a time", log.most)
	}
	eventually(t, "all buffers are back", func() bool { return f.svc.chunks.out.Load() == 0 })
}

// The largest record that is accepted reaches a client with default settings.
func TestLargestRecord(t *testing.T) {
	for _, limit := range []int{1 << 20, HardBatchBytes - recordOverhead} {
		log := newMemLog()
		f := serve(t, Config{Log: log, Limits: Limits{MaxRecordBytes: limit}}, false)
		ctx := testContext(t)
		value := make([]byte, limit-4)
		for proto.Size(&v1.Record{Value: value}) > limit {
			value = value[:len(value)-1]
		}
		for i := range value {
			value[i] = byte(i * i)
		}
		want := &v1.Record{Value: value}
		if proto.Size(want) != limit {
			t.Fatalf("the record has %d bytes", proto.Size(want))
		}
		if _, err := f.client.Produce(ctx, &v1.ProduceRequest{Records: []*v1.Record{want}}); err != nil {
			t.Fatal(err)
		}
		resp, err := f.client.Consume(ctx, &v1.ConsumeRequest{})
		if err != nil || !proto.Equal(resp.Batches[0].Records[0], want) {
			t.Fatalf("read: %v", err)
		}
		stream, err := f.client.ConsumeStream(ctx, &v1.ConsumeRequest{MaxBytes: 1})
		if err != nil {
			t.Fatal(err)
		}
		if resp, err = stream.Recv(); err != nil || !proto.Equal(resp.Batches[0].Records[0], want) {
			t.Fatalf("streamed: %v", err)
		}
		_, err = f.client.Produce(ctx, &v1.ProduceRequest{Records: []*v1.Record{{Value: append(value, 0)}}})
		wantStatus(t, err, codes.InvalidArgument, ReasonRecordTooLarge)
	}
}

func TestConsumeAim(t *testing.T) {
	s := &Service{limits: testLimits(t)}
	for _, c := range []struct {
		readers    int64
		most, want int
	}{
		{0, 0, 256 << 10}, {1, 0, 256 << 10}, {300, 0, 256 << 10}, {1000, 0, 256 << 20 / 1000 / 3}, {1 << 30, 0, tailBytes},
		{1, 1, tailBytes}, {1, 3 << 20, 3 << 20}, {1000, 3 << 20, 256 << 20 / 1000 / 3},
	} {
		s.consumers.Store(c.readers)
		if got := s.consumeAim(c.most); got != c.want {
			t.Errorf("%d readers, at most %d: %d, want %d", c.readers, c.most, got, c.want)
		}
	}
}
