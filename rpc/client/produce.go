package client

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"

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
// it is durable on a quorum. It is sent at most once; an *Error whose Definite
// is false means that it may have been appended.
func (c *Client) Produce(ctx context.Context, records []*Record, opts ...ProduceOption) (Ack, error) {
	var o produceOptions
	for _, opt := range opts {
		opt(&o)
	}
	if len(records) == 0 {
		return Ack{}, invalid("a batch needs at least one record")
	}
	total := 0
	for i, r := range records {
		if err := checkRecord(r); err != nil {
			return Ack{}, invalid("record %d: %v", i, err)
		}
		total += RecordSize(r) + 8
	}
	buf := appendRequestHead(make([]byte, 0, total+len(o.log)+32), o.log, o.expected)
	for _, r := range records {
		buf = appendRecord(buf, r, RecordSize(r))
	}

	// Not Invoke: opening and sending are told apart here, because what fails
	// before the send was definitely not appended.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.conn.NewStream(ctx, &grpc.StreamDesc{}, v1.Log_Produce_FullMethodName, grpc.ForceCodecV2(wireCodec))
	if err != nil {
		return Ack{}, c.wrap(err, false)
	}
	// A failed send says no more than that the answer holds the reason.
	sendErr := stream.SendMsg(&encoded{mem.SliceBuffer(buf)})
	var resp v1.ProduceResponse
	if err := stream.RecvMsg(&resp); err != nil {
		return Ack{}, c.wrap(err, true)
	}
	if sendErr != nil {
		return Ack{}, c.wrap(sendErr, true)
	}
	ack := ackOf(&resp)
	if ack.NextOffset-ack.BaseOffset != uint64(len(records)) {
		return Ack{}, c.protocolError(true, "%d records were acknowledged with offsets %d up to, not including, %d", len(records), ack.BaseOffset, ack.NextOffset)
	}
	return ack, nil
}

func ackOf(resp *v1.ProduceResponse) Ack {
	return Ack{BaseOffset: resp.BaseOffset, NextOffset: resp.NextOffset, AppendTime: resp.AppendTime.AsTime()}
}

func invalid(format string, args ...any) *Error {
	return &Error{Code: codes.InvalidArgument, Message: fmt.Sprintf(format, args...), Definite: true}
}
