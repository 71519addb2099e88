package client

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// Ack says where a batch was appended. It is durable on a quorum.
type Ack struct {
	// BaseOffset is the offset of the batch's first record; the others follow
	// without holes.
	BaseOffset uint64
	// NextOffset is the offset after the batch's last record.
	NextOffset uint64
	// AppendTime is when the leader appended the batch, by its clock.
	AppendTime time.Time
}

// ProduceOption changes one call of Produce.
type ProduceOption func(*produceOptions)

type produceOptions struct {
	log      string
	expected *uint64
}

// ToLog names the log to append to. Without it, the default log.
func ToLog(name string) ProduceOption { return func(o *produceOptions) { o.log = name } }

// ExpectOffset appends only if the first record gets exactly this offset; else
// the call fails with OFFSET_MISMATCH, whose metadata names the next one.
func ExpectOffset(offset uint64) ProduceOption {
	return func(o *produceOptions) { o.expected = &offset }
}

// Produce appends records as one batch, whole or not at all, and returns once
// it is durable on a quorum. It is never appended twice: it is sent again, for
// as long as WithRetry allows, only where it was definitely not appended and
// the reason will pass, or where ExpectOffset makes it safe. An *Error whose
// Definite is false means that it may have been appended.
//
// Calls from several goroutines may travel together, see WithSeparateCalls.
func (c *Client) Produce(ctx context.Context, records []*Record, opts ...ProduceOption) (Ack, error) {
	var o produceOptions
	for _, opt := range opts {
		opt(&o)
	}
	if len(records) == 0 {
		return Ack{}, invalid("a batch needs at least one record")
	}
	size := 0
	for i, r := range records {
		if err := checkRecord(r); err != nil {
			return Ack{}, invalid("record %d: %v", i, err)
		}
		n := RecordSize(r)
		size += 1 + protowire.SizeBytes(n)
	}
	// What is a call's own, conditions and metadata, cannot be shared.
	_, marked := metadata.FromOutgoingContext(ctx)
	if c.gatherer == nil || o.expected != nil || marked || ctx.Err() != nil {
		return c.produceAlone(ctx, o, records, size)
	}
	return c.gatherer.produce(ctx, o.log, records, size)
}

// produceAlone appends records, of the given wire size, with a call of their
// own.
func (c *Client) produceAlone(ctx context.Context, o produceOptions, records []*Record, size int) (Ack, error) {
	buf := appendRequestHead(make([]byte, 0, size+len(o.log)+32), o.log, o.expected)
	for _, r := range records {
		buf = appendRecord(buf, r, RecordSize(r))
	}
	return c.produceEncoded(ctx, buf, len(records), o.expected)
}

// produceEncoded appends so many records, encoded as a request, which it keeps.
func (c *Client) produceEncoded(ctx context.Context, buf []byte, count int, expected *uint64) (Ack, error) {
	a := attempts{client: c}
	doubt := false // an earlier attempt may have appended it
	for {
		ep := c.endpoint()
		ack, e := ep.produce(ctx, buf, count)
		if e == nil {
			return ack, nil
		}
		if doubt {
			e = inDoubt(e)
		}
		if !e.Definite && expected != nil && e.Reason != ReasonOffsetMismatch && e.Reason != ReasonProtocol {
			// At that offset there is room for one: it can be sent again.
			doubt = true
			retry := *e
			retry.Code = codes.Unavailable
			if a.again(ctx, ep, &retry) {
				continue
			}
			return Ack{}, e
		}
		if !e.Definite || !a.again(ctx, ep, e) {
			return Ack{}, e
		}
	}
}

// inDoubt is what e, of a batch with an expected offset, means after an attempt
// with an unknown outcome. If the offset is taken, perhaps by that attempt; if
// the log does not reach that far, the attempt may still be on its way, in a
// node that stands still or on a slow connection, and arrive when it does.
func inDoubt(e *Error) *Error {
	doubtful := *e
	doubtful.Definite = false
	if e.Reason == ReasonOffsetMismatch {
		doubtful.Advice = "The batch was sent more than once and the outcome of an earlier attempt is unknown: it may be that one which is in the log. Read from the expected offset."
	}
	return &doubtful
}

func (ep *endpoint) produce(ctx context.Context, buf []byte, count int) (Ack, *Error) {
	var resp v1.ProduceResponse
	if e := ep.invoke(ctx, v1.Log_Produce_FullMethodName, &encoded{mem.SliceBuffer(buf)}, &resp, grpc.ForceCodecV2(wireCodec)); e != nil {
		return Ack{}, e
	}
	ack := ackOf(&resp)
	if ack.NextOffset-ack.BaseOffset != uint64(count) {
		return Ack{}, ep.protocolError(true, "%d records were acknowledged with offsets %d up to, not including, %d", count, ack.BaseOffset, ack.NextOffset)
	}
	return ack, nil
}

func ackOf(resp *v1.ProduceResponse) Ack {
	return Ack{BaseOffset: resp.BaseOffset, NextOffset: resp.NextOffset, AppendTime: resp.AppendTime.AsTime()}
}

func invalid(format string, args ...any) *Error {
	return &Error{Code: codes.InvalidArgument, Message: fmt.Sprintf(format, args...), Definite: true}
}
