package client

import (
	"errors"
	"fmt"
	"unicode/utf8"

	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// Field numbers and tags of log.proto. A test compares what is written and
// read with them to what the generated code does.
const (
	fieldRequestLog      = 1
	fieldRequestExpected = 2
	fieldRecords         = 15 // of ProduceRequest and of RecordBatch

	fieldResponseBatches       = 1
	fieldResponseNextOffset    = 2
	fieldResponseHighWatermark = 3

	fieldBatchBaseOffset = 1
	fieldBatchAppendTime = 2

	tagRecord       = fieldRecords<<3 | byte(protowire.BytesType)
	tagKey          = 1<<3 | byte(protowire.BytesType)
	tagValue        = 2<<3 | byte(protowire.BytesType)
	tagHeader       = 3<<3 | byte(protowire.BytesType)
	tagHeaderName   = 1<<3 | byte(protowire.BytesType)
	tagHeaderValue  = 2<<3 | byte(protowire.BytesType)
	tagTimeSeconds  = 1<<3 | byte(protowire.VarintType)
	tagTimeNanos    = 2<<3 | byte(protowire.VarintType)
	tagRequestLog   = fieldRequestLog<<3 | byte(protowire.BytesType)
	tagRequestExpct = fieldRequestExpected<<3 | byte(protowire.VarintType)
)

// appendRequestHead writes a ProduceRequest up to its records.
func appendRequestHead(b []byte, log string, expected *uint64) []byte {
	if log != "" {
		b = append(b, tagRequestLog)
		b = protowire.AppendString(b, log)
	}
	if expected != nil {
		b = append(b, tagRequestExpct)
		b = protowire.AppendVarint(b, *expected)
	}
	return b
}

// sizeBytes is the wire size of a bytes field with a one-byte tag; an empty
// one is not written at all.
func sizeBytes(n int) int {
	if n == 0 {
		return 0
	}
	return 1 + protowire.SizeBytes(n)
}

func headerSize(h *Header) int {
	return sizeBytes(len(h.GetName())) + sizeBytes(len(h.GetValue()))
}

// RecordSize is the number of bytes that r takes in a batch, without the few
// bytes around it: what a server's record limit counts.
func RecordSize(r *Record) int {
	n := sizeBytes(len(r.GetKey())) + sizeBytes(len(r.GetValue()))
	for _, h := range r.GetHeaders() {
		n += 1 + protowire.SizeBytes(headerSize(h))
	}
	return n
}

// appendRecord writes r, which has the given RecordSize, as one records field.
func appendRecord(b []byte, r *Record, size int) []byte {
	b = append(b, tagRecord)
	b = protowire.AppendVarint(b, uint64(size))
	if len(r.Key) > 0 {
		b = append(b, tagKey)
		b = protowire.AppendBytes(b, r.Key)
	}
	if len(r.Value) > 0 {
		b = append(b, tagValue)
		b = protowire.AppendBytes(b, r.Value)
	}
	for _, h := range r.Headers {
		b = append(b, tagHeader)
		b = protowire.AppendVarint(b, uint64(headerSize(h)))
		if name := h.GetName(); name != "" {
			b = append(b, tagHeaderName)
			b = protowire.AppendString(b, name)
		}
		if value := h.GetValue(); len(value) > 0 {
			b = append(b, tagHeaderValue)
			b = protowire.AppendBytes(b, value)
		}
	}
	return b
}

// checkRecord refuses what no reader could decode: a server stores records
// without looking into them.
func checkRecord(r *Record) error {
	if r == nil {
		return errors.New("record is nil")
	}
	for _, h := range r.Headers {
		if !utf8.ValidString(h.GetName()) {
			return fmt.Errorf("header name %q is not valid UTF-8", h.GetName())
		}
	}
	return nil
}

// encoded is a request in its wire form. Sending it gives it away.
type encoded struct{ buf mem.Buffer }

// received is a response in its wire form; its buffer is reused by the next
// message received into it.
type received struct {
	buf []byte
	// fresh says that it is the first of a stream that goes on for another.
	fresh bool
}

// codec is the usual protobuf codec, except that encoded goes out and received
// comes in as bytes: building a struct for every record would cost more than
// everything else the client does.
type codec struct{ encoding.CodecV2 }

var wireCodec = codec{encoding.GetCodecV2(protocodec.Name)}

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if e, ok := v.(*encoded); ok {
		return mem.BufferSlice{e.buf}, nil
	}
	return c.CodecV2.Marshal(v)
}

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(*received)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	n := data.Len()
	if cap(r.buf) < n {
		r.buf = make([]byte, n)
	}
	r.buf = r.buf[:n]
	data.CopyTo(r.buf)
	return nil
}
