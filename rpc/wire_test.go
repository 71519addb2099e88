package rpc

import (
	"bytes"
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func testLimits(tb testing.TB) Limits {
	tb.Helper()
	l, err := Limits{}.withDefaults()
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

// field builds one length-delimited field.
func field(num protowire.Number, content []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, num, protowire.BytesType), content)
}

func varintField(num protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, num, protowire.VarintType), v)
}

func join(parts ...[]byte) []byte { return slices.Concat(parts...) }

func TestFieldNumbers(t *testing.T) {
	for _, c := range []struct {
		message proto.Message
		names   map[string]protowire.Number
	}{
		{&v1.ProduceRequest{}, map[string]protowire.Number{"log": fieldRequestLog, "expected_offset": fieldRequestExpected, "records": fieldRecords}},
		{&v1.ProposeRequest{}, map[string]protowire.Number{"log": fieldRequestLog, "expected_offset": fieldRequestExpected, "sequence": fieldProposeSequence, "cluster_id": fieldProposeCluster, "records": fieldRecords}},
		{&v1.Record{}, map[string]protowire.Number{"key": fieldRecordKey, "value": fieldRecordValue, "headers": fieldRecordHeaders}},
		{&v1.Header{}, map[string]protowire.Number{"name": fieldHeaderName, "value": fieldHeaderValue}},
		{&v1.RecordBatch{}, map[string]protowire.Number{"base_offset": fieldBatchBase, "append_time": fieldBatchTime, "records": fieldRecords}},
		{&v1.ConsumeResponse{}, map[string]protowire.Number{"batches": fieldResponseBatches, "next_offset": fieldResponseNext, "high_watermark": fieldResponseHighWatermark}},
		{&timestamppb.Timestamp{}, map[string]protowire.Number{"seconds": fieldTimeSeconds, "nanos": fieldTimeNanos}},
	} {
		fields := c.message.ProtoReflect().Descriptor().Fields()
		// As many as are known here: a new field of a request or a record must
		// not slip past the walkers.
		if fields.Len() != len(c.names) {
			t.Errorf("%T has %d fields, %d are known", c.message, fields.Len(), len(c.names))
		}
		for name, num := range c.names {
			if got := fields.ByName(protoreflect.Name(name)); got == nil || got.Number() != num {
				t.Errorf("%T.%s is %v, known as %d", c.message, name, got, num)
			}
		}
	}
}

func TestParseProduceRequest(t *testing.T) {
	lim := testLimits(t)
	records := encode(t, record(0, 10), record(1, 300), &v1.Record{})
	one := encode(t, record(7, 20))
	padded := []byte{0x7a, 0x83, 0x80, 0x80, 0x80, 0x00, 0x0a, 0x01, 'k'} // length in five bytes

	for _, c := range []struct {
		name     string
		raw      []byte
		log      string
		expected *uint64
		records  []byte
		count    uint32
	}{
		{"records only", records, "", nil, records, 3},
		{"everything", join(field(1, []byte("default")), varintField(2, 0), records), "default", ptr(uint64(0)), records, 3},
		{"scalars last", join(records, varintField(2, 1<<40), field(1, []byte("x"))), "x", ptr(uint64(1 << 40)), records, 3},
		{"the last scalar wins", join(field(1, []byte("a")), records, varintField(2, 5), field(1, []byte("b")), varintField(2, 6)), "b", ptr(uint64(6)), records, 3},
		{"records apart", join(records, field(1, []byte("x")), one, varintField(2, 9), records), "x", ptr(uint64(9)), join(records, one, records), 7},
		{"unknown fields", join(varintField(99, 7), records, field(77, []byte("later"))), "", nil, records, 3},
		{"unknown field of a record", field(15, field(9, []byte("new"))), "", nil, field(15, field(9, []byte("new"))), 1},
		{"padded length", padded, "", nil, padded, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseProduceRequest(c.raw, lim)
			if err != nil {
				t.Fatal(err)
			}
			if got.log != c.log || got.count != c.count || !bytes.Equal(got.records, c.records) {
				t.Errorf("got %q, %d records, %x", got.log, got.count, got.records)
			}
			if (got.expected == nil) != (c.expected == nil) || got.expected != nil && *got.expected != *c.expected {
				t.Errorf("got expected offset %v", got.expected)
			}
		})
	}
	t.Run("in place", func(t *testing.T) {
		raw := join(field(1, []byte("default")), records, varintField(2, 3))
		if n := testing.AllocsPerRun(10, func() {
			if _, err := parseProduceRequest(raw, lim); err != nil {
				t.Error(err)
			}
		}); n > 2 { // the name and the offset
			t.Errorf("%v allocations", n)
		}
	})
}

// badRequests must be refused, none of their records stored.
func badRequests(tb testing.TB) map[string]struct {
	raw  []byte
	want error
} {
	good := encode(tb, record(0, 10))
	type bad = struct {
		raw  []byte
		want error
	}
	invalid := &InvalidArgumentError{}
	return map[string]bad{
		"empty":                       {nil, ErrEmptyBatch},
		"no records":                  {field(1, []byte("default")), ErrEmptyBatch},
		"cut off":                     {good[:len(good)-1], invalid},
		"lone tag":                    {join(good, []byte{0x7a}), invalid},
		"record as varint":            {varintField(15, 1), invalid},
		"log as varint":               {join(good, varintField(1, 1)), invalid},
		"log not UTF-8":               {join(good, field(1, []byte{0xff})), invalid},
		"expected offset as bytes":    {join(good, field(2, nil)), invalid},
		"varint without end":          {join(good, []byte{0x10, 0xff}), invalid},
		"field number 0":              {join(good, []byte{0x02, 0x00}), invalid},
		"group":                       {join(good, []byte{0x2b, 0x2c}), invalid},
		"wire type 7":                 {join(good, []byte{0x2f, 0x00}), invalid},
		"long tag":                    {join(good, []byte{0xfa, 0x80, 0x80, 0x80, 0x80, 0x00, 0x00}), invalid},
		"long length":                 {[]byte{0x7a, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00}, invalid},
		"garbage record":              {field(15, []byte{0xff, 0xff}), invalid},
		"key as varint":               {field(15, varintField(1, 1)), invalid},
		"value as fixed32":            {field(15, []byte{0x15, 1, 2, 3, 4}), invalid},
		"headers as varint":           {field(15, varintField(3, 1)), invalid},
		"key over the end":            {field(15, []byte{0x0a, 0x05, 'k'}), invalid},
		"group in a record":           {field(15, []byte{0x2b, 0x2c}), invalid},
		"unknown field cut off":       {field(15, []byte{0x4a, 0x05}), invalid},
		"header name not UTF-8":       {field(15, field(3, field(1, []byte{0xc0}))), invalid},
		"first header name not UTF-8": {field(15, field(3, join(field(1, []byte{0xc0}), field(1, []byte("ok"))))), invalid},
		"header name as varint":       {field(15, field(3, varintField(1, 1))), invalid},
		"header value as varint":      {field(15, field(3, varintField(2, 1))), invalid},
		"garbage header":              {field(15, field(3, []byte{0x07})), invalid},
		"group in a header":           {field(15, field(3, []byte{0x2b, 0x2c})), invalid},
		"second record bad":           {join(good, field(15, []byte{0x07})), invalid},
		"record too large":            {join(good, field(15, field(2, make([]byte, 1<<20)))), &RecordTooLargeError{}},
		"batch too large":             {join(field(15, field(2, make([]byte, 1<<20-16))), field(15, field(2, make([]byte, 1<<16+1)))), &BatchTooLargeError{}},
	}
}

func TestParseRefuses(t *testing.T) {
	lim := testLimits(t)
	for name, c := range badRequests(t) {
		t.Run(name, func(t *testing.T) {
			_, err := parseProduceRequest(c.raw, lim)
			if !sameKind(err, c.want) {
				t.Errorf("got %v (%T), want %T", err, err, c.want)
			}
		})
	}
}

func sameKind(err, want error) bool {
	switch want.(type) {
	case *InvalidArgumentError:
		var e *InvalidArgumentError
		return errors.As(err, &e)
	case *RecordTooLargeError:
		var e *RecordTooLargeError
		return errors.As(err, &e) && e.Position == 1 && e.Limit == 1<<20 && e.Size == 1<<20+4
	case *BatchTooLargeError:
		var e *BatchTooLargeError
		return errors.As(err, &e) && e.Limit == 1<<20+64<<10 && e.Size > e.Limit
	default:
		return errors.Is(err, want)
	}
}

func FuzzProduceRequest(f *testing.F) {
	for _, c := range badRequests(f) {
		if len(c.raw) < 1<<10 {
			f.Add(c.raw)
		}
	}
	f.Add(join(field(1, []byte("a")), encode(f, record(0, 3)), varintField(2, 5), encode(f, record(1, 200), &v1.Record{})))
	f.Add(append(appendProposeHead(nil, 7, ptr(uint64(9)), "c1"), encode(f, record(0, 3))...))
	lim := testLimits(f)
	f.Fuzz(func(t *testing.T, raw []byte) {
		before := bytes.Clone(raw)
		got, err := parseProduceRequest(raw, lim)
		if !bytes.Equal(raw, before) {
			t.Fatal("the input was changed")
		}
		var want v1.ProduceRequest
		perr := proto.Unmarshal(raw, &want)
		if err != nil {
			// What proto itself would write is never refused, but for its size.
			if perr != nil || len(want.Records) == 0 {
				return
			}
			canonical, merr := proto.Marshal(knownOnly(&want))
			if merr != nil {
				t.Fatal(merr)
			}
			var r *RecordTooLargeError
			var b *BatchTooLargeError
			if _, cerr := parseProduceRequest(canonical, lim); cerr != nil && !errors.As(cerr, &r) && !errors.As(cerr, &b) {
				t.Fatalf("canonical form refused: %v", cerr)
			}
			return
		}
		if perr != nil {
			t.Fatalf("accepted, but proto says %v", perr)
		}
		if got.log != want.Log || int(got.count) != len(want.Records) || (got.expected == nil) != (want.ExpectedOffset == nil) ||
			got.expected != nil && *got.expected != *want.ExpectedOffset {
			t.Fatalf("got %q %v %d, proto %q %v %d", got.log, got.expected, got.count, want.Log, want.ExpectedOffset, len(want.Records))
		}
		// The same as what another node sends.
		var proposed v1.ProposeRequest
		if proto.Unmarshal(raw, &proposed) == nil && (got.sequence != proposed.Sequence || got.cluster != proposed.ClusterId) {
			t.Fatalf("got %d %q, proto %d %q", got.sequence, got.cluster, proposed.Sequence, proposed.ClusterId)
		}
		var stored v1.RecordBatch
		if err := proto.Unmarshal(got.records, &stored); err != nil {
			t.Fatalf("stored records: %v", err)
		}
		if len(stored.ProtoReflect().GetUnknown()) > 0 || len(stored.Records) != len(want.Records) {
			t.Fatalf("stored %d records and something else", len(stored.Records))
		}
		for i, r := range stored.Records {
			if !proto.Equal(r, want.Records[i]) {
				t.Fatalf("record %d differs", i)
			}
		}
		if _, end, kept, err := cutRecords(got.records, 0, got.count, math.MaxInt); err != nil || kept != got.count || end != len(got.records) {
			t.Fatalf("the walker finds %d records in %d of %d bytes, %v", kept, end, len(got.records), err)
		}
	})
}

func knownOnly(req *v1.ProduceRequest) *v1.ProduceRequest {
	out := &v1.ProduceRequest{Log: req.Log, ExpectedOffset: req.ExpectedOffset}
	for _, r := range req.Records {
		rec := &v1.Record{Key: r.Key, Value: r.Value}
		for _, h := range r.Headers {
			rec.Headers = append(rec.Headers, &v1.Header{Name: h.Name, Value: h.Value})
		}
		out.Records = append(out.Records, rec)
	}
	return out
}

func FuzzConsumeRequest(f *testing.F) {
	for _, req := range []*v1.ConsumeRequest{
		{}, {Start: &v1.ConsumeRequest_Offset{Offset: 5}, EndOffset: ptr(uint64(3))},
		{Start: &v1.ConsumeRequest_LastN{LastN: math.MaxUint64}, MaxRecords: 1, MaxBytes: math.MaxUint64},
		{Start: &v1.ConsumeRequest_Time{Time: &timestamppb.Timestamp{Seconds: -1}}},
		{Start: &v1.ConsumeRequest_Time{}},
	} {
		b, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	log := newMemLog()
	log.appendLocked(encode(f, record(0, 9), record(1, 0), record(2, 3)), 3)
	log.appendLocked(encode(f, record(3, 9)), 1)
	svc, err := New(Config{Log: log, Cluster: memCluster{}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		if err := svc.Shutdown(context.Background()); err != nil {
			f.Error(err)
		}
	})
	f.Fuzz(func(t *testing.T, raw []byte) {
		req, _, err := svc.consumeRequest(t.Context(), &rawRequest{data: raw})
		if err != nil {
			return
		}
		at, err := locate(t.Context(), log, req)
		if err != nil {
			return
		}
		if at.from > 4 || !req.GetFollow() && at.until > 4 {
			t.Fatalf("located %+v in a log of 4 records", at)
		}
	})
}

func TestCutRecords(t *testing.T) {
	run := encode(t, record(0, 10), record(1, 300), &v1.Record{}, record(3, 50))
	sizes := []int{}
	for rest := run; len(rest) > 0; rest = rest[sizes[len(sizes)-1]:] {
		sizes = append(sizes, recordLen(rest))
	}
	sum := func(sizes []int) (n int) {
		for _, size := range sizes {
			n += size
		}
		return n
	}
	for skip := range uint32(4) {
		for keep := uint32(1); keep <= 5; keep++ {
			for most := range len(run) + 10 {
				kept := min(int(keep), len(sizes)-int(skip))
				for kept > 1 && sum(sizes[skip:int(skip)+kept]) > most {
					kept--
				}
				wantStart := sum(sizes[:skip])
				wantEnd := wantStart + sum(sizes[skip:int(skip)+kept])
				start, end, got, err := cutRecords(run, skip, keep, most)
				if err != nil || start != wantStart || end != wantEnd || int(got) != kept {
					t.Fatalf("skip %d keep %d most %d: got %d to %d, %d records, %v; want %d to %d, %d",
						skip, keep, most, start, end, got, err, wantStart, wantEnd, kept)
				}
			}
		}
	}
	if _, _, _, err := cutRecords(run, 5, 1, 10); err == nil {
		t.Error("skipped more than there is")
	}
	if _, _, _, err := cutRecords(run[1:], 0, 1, 10); err == nil {
		t.Error("walked over garbage")
	}
}

func FuzzTrim(f *testing.F) {
	f.Add(encode(f, record(0, 10), record(1, 300), &v1.Record{}), uint32(1), uint32(1), 100)
	f.Add([]byte{0x7a, 0xff}, uint32(0), uint32(1), 1)
	f.Fuzz(func(t *testing.T, run []byte, skip, keep uint32, most int) {
		skip %= 1 << 12 // or the model takes for ever
		start, end, kept, err := cutRecords(run, skip, keep, most)
		if err != nil {
			return
		}
		if start < 0 || end < start || end > len(run) || kept > keep {
			t.Fatalf("cut %d to %d of %d, kept %d of %d", start, end, len(run), kept, keep)
		}
		// The same by the library's walker.
		n := 0
		for rest := run[:end]; len(rest) > 0; n++ {
			num, _, m := protowire.ConsumeField(rest)
			if m < 0 || num != fieldRecords {
				t.Fatalf("cut at no boundary")
			}
			rest = rest[m:]
		}
		if n != int(skip)+int(kept) {
			t.Fatalf("%d records up to the cut, want %d and %d", n, skip, kept)
		}
		if kept > 1 && end-start > most {
			t.Fatalf("%d bytes kept of at most %d", end-start, most)
		}
	})
}

func TestHeaders(t *testing.T) {
	run := encode(t, record(0, 10), record(1, 300))
	for _, base := range []uint64{0, 1, 127, 128, 1 << 40, math.MaxUint64} {
		for _, at := range []time.Time{{}, time.Unix(0, 0), time.Unix(1, 0), epoch, time.Unix(1<<40, 999_999_999), time.Unix(-5, 7)} {
			buf := append(bytes.Repeat([]byte{0xEE}, Headroom+3), run...)
			start := putBatchHeader(buf, Headroom+3, len(buf), base, at)
			start = putResponseHeader(buf, start, math.MaxUint64, base)
			if start < 3 || !bytes.Equal(buf[:3], []byte{0xEE, 0xEE, 0xEE}) {
				t.Fatalf("offset %d, %v: %d bytes of header", base, at, Headroom+3-start)
			}
			var got v1.ConsumeResponse
			if err := proto.Unmarshal(buf[start:], &got); err != nil {
				t.Fatal(err)
			}
			want := &v1.ConsumeResponse{
				NextOffset: math.MaxUint64, HighWatermark: base,
				Batches: []*v1.RecordBatch{{BaseOffset: base, AppendTime: timestamppb.New(at), Records: []*v1.Record{record(0, 10), record(1, 300)}}},
			}
			if !proto.Equal(&got, want) {
				t.Fatalf("got %s", strings.TrimSpace(got.String()))
			}
		}
	}
}
