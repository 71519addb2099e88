package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/diurnalog/diurna/rpc/client/clienttest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func consume(t *testing.T, c *Client, opts ConsumeOptions) *Consumer {
	t.Helper()
	r, err := c.Consume(testContext(t), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func offsets(r *Consumer) (got []uint64) {
	for r.Next() {
		got = append(got, r.Record().Offset)
	}
	return got
}

func TestConsume(t *testing.T) {
	s := clienttest.New()
	s.PerResponse = 3
	before := time.Now()
	for i := range 5 {
		s.Append(
			&Record{Key: fmt.Append(nil, "k", i), Value: fmt.Append(nil, "v", i), Headers: []*Header{
				{Name: "n", Value: []byte{byte(i)}}, {Name: "n"}, {},
			}},
			&Record{},
		)
	}
	c := connect(t, s)

	r := consume(t, c, ConsumeOptions{})
	records := s.Records()
	for i, want := range records {
		if !r.Next() {
			t.Fatalf("ends before offset %d: %v", i, r.Err())
		}
		got := r.Record()
		if got.Offset != uint64(i) || got.Time.Before(before.Add(-time.Minute)) || got.Time.Location() != time.UTC {
			t.Errorf("record %d has offset %d and time %s", i, got.Offset, got.Time)
		}
		if string(got.Key) != string(want.Key) || string(got.Value) != string(want.Value) || len(got.Headers) != len(want.Headers) {
			t.Errorf("record %d: %q %q %v", i, got.Key, got.Value, got.Headers)
		}
		for j, h := range got.Headers {
			if h.Name != want.Headers[j].Name || string(h.Value) != string(want.Headers[j].Value) {
				t.Errorf("record %d header %d: %v", i, j, h)
			}
		}
	}
	if r.Next() || r.Err() != nil {
		t.Errorf("goes on after the end: %v", r.Err())
	}
	if next, known := r.NextOffset(); next != 10 || !known {
		t.Errorf("next offset %d, %v", next, known)
	}

	seven := uint64(7)
	for _, tc := range []struct {
		name string
		opts ConsumeOptions
		want []uint64
	}{
		{"offset", ConsumeOptions{Start: AtOffset(7)}, []uint64{7, 8, 9}},
		{"latest", ConsumeOptions{Start: Latest()}, nil},
		{"last", ConsumeOptions{Start: Last(2)}, []uint64{8, 9}},
		{"last of few", ConsumeOptions{Start: Last(200), MaxRecords: 2}, []uint64{0, 1}},
		{"time", ConsumeOptions{Start: AtTime(before.Add(-time.Hour)), MaxRecords: 1}, []uint64{0}},
		{"future", ConsumeOptions{Start: AtTime(before.Add(time.Hour))}, nil},
		{"end", ConsumeOptions{Start: AtOffset(5), End: &seven}, []uint64{5, 6}},
		{"end and follow", ConsumeOptions{Start: AtOffset(5), End: &seven, Follow: true}, []uint64{5, 6}},
		{"count and follow", ConsumeOptions{MaxRecords: 4, Follow: true}, []uint64{0, 1, 2, 3}},
	} {
		r := consume(t, c, tc.opts)
		if got := offsets(r); !slices.Equal(got, tc.want) || r.Err() != nil {
			t.Errorf("%s: %v, %v; want %v", tc.name, got, r.Err(), tc.want)
		}
	}
}

// A server that ignores the bounds, or sends whole batches, does not change
// what is delivered; one that leaves a hole is found out.
func TestConsumeDoubts(t *testing.T) {
	whole := func(resp *v1.ConsumeResponse) {
		if len(resp.Batches) > 0 {
			resp.Batches[0] = &v1.RecordBatch{BaseOffset: 0, Records: values("0", "1", "2", "3", "4", "5")}
			resp.Batches = resp.Batches[:1]
		}
	}
	three := uint64(3)
	for _, tc := range []struct {
		name   string
		spoil  func(*v1.ConsumeResponse)
		opts   ConsumeOptions
		want   []uint64
		reason string
	}{
		{"before the start", whole, ConsumeOptions{Start: AtOffset(4)}, []uint64{4, 5}, ""},
		{"after the end", whole, ConsumeOptions{End: &three}, []uint64{0, 1, 2}, ""},
		{"more than wanted", whole, ConsumeOptions{MaxRecords: 2}, []uint64{0, 1}, ""},
		{"hole", func(resp *v1.ConsumeResponse) {
			for i, b := range resp.Batches {
				b.BaseOffset += uint64(i)
			}
		}, ConsumeOptions{}, []uint64{0, 1, 2}, ReasonProtocol},
		{"again", func(resp *v1.ConsumeResponse) {
			for _, b := range resp.Batches {
				b.BaseOffset = 0
			}
		}, ConsumeOptions{}, []uint64{0, 1, 2}, ReasonProtocol},
		{"hole at the start", func(resp *v1.ConsumeResponse) {
			for _, b := range resp.Batches {
				b.BaseOffset++
			}
		}, ConsumeOptions{Start: AtOffset(0)}, nil, ReasonProtocol},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := clienttest.New()
			s.OnResponse = tc.spoil
			s.Append(values("0", "1", "2")...)
			s.Append(values("3", "4", "5")...)
			c := connect(t, s)
			r := consume(t, c, tc.opts)
			got := offsets(r)
			var e *Error
			reason := ""
			if errors.As(r.Err(), &e) {
				reason = e.Reason
			}
			if !slices.Equal(got, tc.want) || reason != tc.reason {
				t.Errorf("%v, %v; want %v", got, r.Err(), tc.want)
			}
		})
	}
}

func TestConsumeFollow(t *testing.T) {
	s := clienttest.New()
	s.Append(values("a")...)
	var seen bool // by the goroutine that calls Next, as OnIdle is
	idle := make(chan struct{}, 100)
	onIdle := func() {
		if seen {
			idle <- struct{}{}
		}
	}
	c := connect(t, s)
	ctx, cancel := context.WithCancel(testContext(t))
	r, err := c.Consume(ctx, ConsumeOptions{Follow: true, OnIdle: onIdle})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if !r.Next() {
		t.Fatal(r.Err())
	}
	seen = true
	go func() {
		<-idle // it waits: only now is there more
		s.Append(values("b")...)
	}()
	if !r.Next() || string(r.Record().Value) != "b" {
		t.Fatalf("got %q, %v", r.Record().Value, r.Err())
	}
	go func() {
		<-idle
		cancel()
	}()
	if r.Next() || !errors.Is(r.Err(), context.Canceled) {
		t.Errorf("after cancel: %v", r.Err())
	}
	if next, _ := r.NextOffset(); next != 2 {
		t.Errorf("next offset %d", next)
	}
}

func TestConsumeErrors(t *testing.T) {
	s := clienttest.New()
	s.OnConsume = func(*v1.ConsumeRequest) error {
		return clienttest.Failure(codes.OutOfRange, ReasonOffsetOutOfRange, "gone", "Start at first.", "first", "5", "next", "9")
	}
	c := connect(t, s)
	r := consume(t, c, ConsumeOptions{Start: AtOffset(1)})
	var e *Error
	if r.Next() || !errors.As(r.Err(), &e) || e.Reason != ReasonOffsetOutOfRange || e.Message != "gone" || e.Advice != "Start at first." {
		t.Errorf("got %#v", r.Err())
	}
	if first, _ := e.Uint("first"); first != 5 {
		t.Errorf("first %d", first)
	}
}

func TestConsumeServerKilled(t *testing.T) {
	s := clienttest.New()
	s.Append(values("a")...)
	c := connect(t, s, WithRetry(0))
	r := consume(t, c, ConsumeOptions{Follow: true})
	if !r.Next() {
		t.Fatal(r.Err())
	}
	s.Stop()
	var e *Error
	if r.Next() || !errors.As(r.Err(), &e) || e.Reason != ReasonConnectionLost {
		t.Errorf("got %#v", r.Err())
	}
}

func TestConsumeCloseEarly(t *testing.T) {
	s := clienttest.New()
	s.PerResponse = 1
	for range 100 {
		s.Append(values("a")...)
	}
	c := connect(t, s)
	r := consume(t, c, ConsumeOptions{Follow: true})
	if !r.Next() {
		t.Fatal(r.Err())
	}
	r.Close() // goleak would see what it leaves behind
	r.Close()
}

// What is written and read by hand is what the generated code writes and reads.
func TestWireForm(t *testing.T) {
	expected := uint64(1 << 40)
	records := []*Record{
		{}, {Value: []byte("v")}, {Key: []byte("k")}, {Key: make([]byte, 127), Value: make([]byte, 128)},
		{Value: make([]byte, 1<<15), Headers: []*Header{{}, {Name: "ä"}, {Name: "n", Value: make([]byte, 300)}, nil}},
	}
	b := appendRequestHead(nil, "some log", &expected)
	for _, r := range records {
		b = appendRecord(b, r, RecordSize(r))
	}
	var req v1.ProduceRequest
	if err := proto.Unmarshal(b, &req); err != nil {
		t.Fatal(err)
	}
	records[4].Headers[3] = &Header{}
	want := &v1.ProduceRequest{Log: "some log", ExpectedOffset: &expected, Records: records}
	if !proto.Equal(&req, want) {
		t.Errorf("got %v", &req)
	}
	for i, r := range records {
		if RecordSize(r) != proto.Size(r) {
			t.Errorf("record %d: size %d, want %d", i, RecordSize(r), proto.Size(r))
		}
	}

	at := time.Date(1960, 2, 3, 4, 5, 6, 7, time.UTC)
	resp := &v1.ConsumeResponse{
		Batches: []*v1.RecordBatch{
			{},
			{BaseOffset: 7, AppendTime: timestamppb.New(at), Records: records},
			{BaseOffset: 99, Records: records[1:2]},
		},
		NextOffset: 100, HighWatermark: 1000,
	}
	message, err := proto.Marshal(resp)
	if err != nil {
		t.Fatal(err)
	}
	var w walker
	if next, err := w.reset(message); next != nil || err != nil {
		t.Fatalf("reset = %v, %v", next, err)
	}
	for i, want := range append(slices.Clone(records), records[1]) {
		ok, err := w.next()
		if !ok || err != nil {
			t.Fatalf("record %d: %v, %v", i, ok, err)
		}
		if i < 5 && (w.record.Offset != uint64(7+i) || !w.record.Time.Equal(at)) || i == 5 && (w.record.Offset != 99 || w.record.Time.Unix() != 0) {
			t.Errorf("record %d: offset %d time %s", i, w.record.Offset, w.record.Time)
		}
		if got := toRecord(&w.record); !proto.Equal(got, want) {
			t.Errorf("record %d: %v", i, got)
		}
	}
	if ok, err := w.next(); ok || err != nil {
		t.Errorf("at the end: %v, %v", ok, err)
	}
	if next, err := w.reset([]byte{0x10, 5}); next == nil || *next != 5 || err != nil {
		t.Errorf("an empty response: %v, %v", next, err)
	}
}

func toRecord(r *ConsumedRecord) *Record {
	out := &Record{Key: r.Key, Value: r.Value}
	for _, h := range r.Headers {
		out.Headers = append(out.Headers, &Header{Name: h.Name, Value: h.Value})
	}
	return out
}

// Whatever bytes come, the walker ends without a panic; and what the generated
// code accepts, it reads the same or refuses.
func FuzzWalker(f *testing.F) {
	seed, err := proto.Marshal(&v1.ConsumeResponse{Batches: []*v1.RecordBatch{
		{BaseOffset: 3, AppendTime: timestamppb.Now(), Records: []*Record{{Key: []byte("k"), Value: []byte("v"), Headers: []*Header{{Name: "n"}}}}},
	}, NextOffset: 4})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte("\x0a\x02\x7a\x00"))
	f.Fuzz(func(t *testing.T, message []byte) {
		var w walker
		var got []*Record
		var at []uint64
		_, err := w.reset(message)
		for err == nil {
			var ok bool
			if ok, err = w.next(); !ok || err != nil {
				break
			}
			got = append(got, proto.Clone(toRecord(&w.record)).(*Record))
			at = append(at, w.record.Offset)
		}
		var resp v1.ConsumeResponse
		if err != nil || proto.Unmarshal(message, &resp) != nil {
			return
		}
		// Where to resume, of a message as a server writes it.
		canonical, merr := proto.Marshal(&resp)
		if merr != nil {
			t.Fatal(merr)
		}
		p, perr := placeOf(canonical)
		if perr != nil || p.next != resp.NextOffset || p.batches != (len(resp.Batches) > 0) || p.batches && p.base != resp.Batches[0].BaseOffset {
			t.Fatalf("place %+v, %v of %v", p, perr, &resp)
		}
		i := 0
		for _, b := range resp.Batches {
			for j, want := range b.Records {
				want.ProtoReflect().SetUnknown(nil)
				for _, h := range want.Headers {
					h.ProtoReflect().SetUnknown(nil)
				}
				if i == len(got) || at[i] != b.BaseOffset+uint64(j) || !proto.Equal(got[i], want) {
					t.Fatalf("record %d differs", i)
				}
				i++
			}
		}
		if i != len(got) {
			t.Fatalf("%d records, want %d", len(got), i)
		}
	})
}
