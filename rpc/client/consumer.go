package client

import (
	"context"
	"errors"
	"io"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// Start is where a read begins. The zero value is Earliest.
type Start struct {
	kind   startKind
	number uint64
	time   time.Time
}

type startKind uint8

const (
	startEarliest startKind = iota
	startLatest
	startOffset
	startTime
	startLast
)

// Earliest starts at the first record that is kept.
func Earliest() Start { return Start{} }

// Latest starts at the end of the log: only records that are yet to come.
func Latest() Start { return Start{kind: startLatest} }

// AtOffset starts at this very offset.
func AtOffset(offset uint64) Start { return Start{kind: startOffset, number: offset} }

// AtTime starts at the first record appended at t or later.
func AtTime(t time.Time) Start { return Start{kind: startTime, time: t} }

// Last starts n records before the end, or at the first one kept if there are
// fewer.
func Last(n uint64) Start { return Start{kind: startLast, number: n} }

func (s Start) apply(req *v1.ConsumeRequest) {
	switch s.kind {
	case startEarliest:
		req.Start = &v1.ConsumeRequest_Earliest{Earliest: true}
	case startLatest:
		req.Start = &v1.ConsumeRequest_Latest{Latest: true}
	case startOffset:
		req.Start = &v1.ConsumeRequest_Offset{Offset: s.number}
	case startTime:
		req.Start = &v1.ConsumeRequest_Time{Time: timestamppb.New(s.time)}
	case startLast:
		req.Start = &v1.ConsumeRequest_LastN{LastN: s.number}
	}
}

// ConsumeOptions say what to read. The zero value reads the default log from
// its first record to its end as it is now.
type ConsumeOptions struct {
	// Log names the log; empty means the default log.
	Log   string
	Start Start
	// End, if set, stops the read before this offset.
	End *uint64
	// MaxRecords stops the read after so many records; 0 means no limit.
	MaxRecords uint64
	// MessageBytes is the aim for one message from the server; 0 leaves it to
	// the server. Up to three messages are buffered.
	MessageBytes uint64
	// Follow waits for records that are yet to come.
	Follow bool
	// OnIdle, if set, is called by Next before it waits for the server: the
	// moment to flush what was buffered of the records so far.
	OnIdle func()
	// Linearizable makes the read see every record acknowledged, by any node,
	// before it began, for a round trip to a quorum.
	Linearizable bool
}

// ConsumedRecord is one record that was read. Its slices point into a buffer
// that the next call of Next reuses: copy what is to stay.
type ConsumedRecord struct {
	Offset uint64
	// Time is when the leader appended the record's batch; never earlier than
	// that of a lower offset.
	Time       time.Time
	Key, Value []byte
	Headers    []ConsumedHeader
}

// ConsumedHeader is one piece of metadata beside a record's value.
type ConsumedHeader struct {
	Name  string
	Value []byte
}

// Consumer reads records one by one. It is for one goroutine, except that
// Close may be called from any.
//
// One that follows outlives a node: when its stream breaks it goes on, at the
// next offset, with another, for as long as WithRetry allows without one. No
// record is left out or comes twice. One that does not follow is tried again
// likewise until the first answer to it.
type Consumer struct {
	client *Client
	cancel context.CancelFunc
	onIdle func()

	// Of receive.
	opts     ConsumeOptions
	stream   grpc.ClientStream
	ep       *endpoint
	attempts attempts
	begun    bool   // a message has come
	first    uint64 // offset of the first record there is, once begun
	wanted   uint64 // ConsumeOptions.MaxRecords

	full chan *received // filled, to be read; closed at the end
	free chan *received // read, to be filled
	done chan struct{}  // closed when receive has ended
	// Why the last stream ended, nil at its regular end; read after full is
	// closed.
	ended *Error

	current *received
	walk    walker
	err     error

	next      uint64 // the offset to come, meaningful if known
	known     bool
	started   bool // a record was returned, and of the stream at hand
	end       *uint64
	remaining uint64 // records still wanted
	limited   bool
	stopped   bool
}

// Consume starts a read. The read ends with ctx, or with Close, which must be
// called in any case.
func (c *Client) Consume(ctx context.Context, opts ConsumeOptions) (*Consumer, error) {
	ctx, cancel := context.WithCancel(ctx)
	r := &Consumer{
		client:    c,
		cancel:    cancel,
		onIdle:    opts.OnIdle,
		opts:      opts,
		attempts:  attempts{client: c},
		full:      make(chan *received, consumerMessages),
		free:      make(chan *received, consumerMessages),
		done:      make(chan struct{}),
		end:       opts.End,
		remaining: opts.MaxRecords,
		limited:   opts.MaxRecords > 0,
		wanted:    opts.MaxRecords,
	}
	if opts.Start.kind == startOffset {
		r.next, r.known = opts.Start.number, true
	}
	if err := r.connect(ctx); err != nil {
		cancel()
		return nil, err
	}
	for range consumerMessages {
		r.free <- new(received)
	}
	go r.receive(ctx)
	return r, nil
}

// connect starts a stream, at whichever node can be reached.
func (r *Consumer) connect(ctx context.Context) error {
	for {
		e := r.open(ctx)
		if e == nil {
			return nil
		}
		if !r.attempts.again(ctx, r.ep, e) {
			return e
		}
	}
}

func (r *Consumer) open(ctx context.Context) *Error {
	req := &v1.ConsumeRequest{
		Log:          r.opts.Log,
		EndOffset:    r.opts.End,
		MaxRecords:   r.opts.MaxRecords,
		MaxBytes:     r.opts.MessageBytes,
		Follow:       r.opts.Follow,
		Linearizable: r.opts.Linearizable,
	}
	r.opts.Start.apply(req)
	r.ep = r.client.endpoint()
	stream, err := r.ep.conn.NewStream(ctx, &v1.Log_ServiceDesc.Streams[1], v1.Log_ConsumeStream_FullMethodName, grpc.ForceCodecV2(wireCodec))
	if err != nil {
		return r.ep.wrap(err, false)
	}
	err = stream.SendMsg(req)
	if err == nil {
		err = stream.CloseSend()
	}
	if err != nil && !errors.Is(err, io.EOF) { // after EOF the reason is received
		return r.ep.wrap(err, true)
	}
	r.stream = stream
	return nil
}

// consumerMessages is how many messages are held: one being read, one waiting,
// one being received.
const consumerMessages = 3

func (r *Consumer) receive(ctx context.Context) {
	defer close(r.done)
	defer close(r.full)
	fresh := false // the stream is not the first, and nothing has come of it yet
	for {
		var m *received
		select {
		case m = <-r.free:
		case <-ctx.Done():
			r.ended = r.ep.wrap(status.FromContextError(ctx.Err()).Err(), true)
			return
		}
		err := r.stream.RecvMsg(m)
		for ; err != nil; err = r.stream.RecvMsg(m) {
			if errors.Is(err, io.EOF) {
				return
			}
			r.ended = r.ep.wrap(err, true)
			// A read that ends where the log ended when it began has to be made by one
			// node, once that has begun to answer.
			if r.begun && !r.opts.Follow || !r.resumable(r.ended) || !r.attempts.again(ctx, r.ep, r.ended) {
				return
			}
			if e, ok := asError(r.connect(ctx)); ok {
				r.ended = e
				return
			}
			fresh = true
		}
		r.ended = nil
		r.attempts.succeeded()
		m.fresh, fresh = fresh, false
		if err := r.note(m.buf); err != nil {
			r.ended = r.ep.protocolError(false, "a response could not be decoded: %v", err)
			return
		}
		r.full <- m // has room for every message there is
	}
}

// resumable reports whether another stream may do better than one that ended
// with e.
func (r *Consumer) resumable(e *Error) bool { return r.client.retry > 0 && e.elsewhere() }

// note remembers where to go on after a message.
func (r *Consumer) note(message []byte) error {
	p, err := placeOf(message)
	if err != nil {
		return err
	}
	if !r.begun {
		r.begun, r.first = true, p.next
		if p.batches {
			r.first = p.base
			if r.opts.Start.kind == startOffset { // in the middle of a batch, perhaps
				r.first = max(p.base, r.opts.Start.number)
			}
		}
	}
	r.opts.Start = AtOffset(p.next)
	r.opts.Linearizable = false // has been waited for
	if r.limited {
		// 0 would mean no limit.
		taken := p.next - min(r.first, p.next)
		r.opts.MaxRecords = max(r.wanted, taken+1) - taken
		r.opts.Follow = r.opts.Follow && taken < r.wanted
	}
	return nil
}

// Next moves to the next record and waits for it if need be. It returns false
// at the end of the read, and after an error, which Err tells.
func (r *Consumer) Next() bool {
	for r.err == nil && !r.stopped {
		ok, err := r.walk.next()
		if err != nil {
			return r.fail(r.protocolError("a response could not be decoded: %v", err))
		}
		if ok {
			if deliver := r.check(r.walk.record.Offset); deliver {
				return true
			}
			continue
		}
		if !r.nextMessage() {
			return false
		}
	}
	return false
}

// check decides whether the record at offset is to be delivered: the server
// promises dense offsets and the asked for bounds, and what a broken one sends
// must not pass for the log.
func (r *Consumer) check(offset uint64) bool {
	switch {
	case r.end != nil && offset >= *r.end, r.limited && r.remaining == 0:
		r.stopped = true
		return false
	case r.known && offset < r.next && !r.started:
		return false // the batch that holds the start also holds what is before it
	case r.known && offset != r.next:
		return r.fail(&Error{
			Code: codes.DataLoss, Reason: ReasonProtocol, Addr: r.client.Addr(),
			Message: "the server sent offset " + strconv.FormatUint(offset, 10) + " where " + strconv.FormatUint(r.next, 10) + " is due",
		})
	}
	r.started, r.known = true, true
	r.next = offset + 1
	if r.limited {
		r.remaining--
	}
	return true
}

func (r *Consumer) nextMessage() bool {
	if r.current != nil {
		r.free <- r.current
		r.current = nil
	}
	var m *received
	var ok bool
	select {
	case m, ok = <-r.full:
	default:
		if r.onIdle != nil {
			r.onIdle()
		}
		m, ok = <-r.full
	}
	if !ok {
		r.stopped = true
		if r.ended != nil {
			return r.fail(r.ended)
		}
		return false
	}
	r.current = m
	if m.fresh {
		r.started = false
	}
	next, err := r.walk.reset(m.buf)
	if err != nil {
		return r.fail(r.protocolError("a response could not be decoded: %v", err))
	}
	// A message without records says how far the read has come: past a start
	// that only the server can place, such as the end.
	if next != nil && !r.known {
		r.next, r.known = *next, true
	}
	return true
}

func (r *Consumer) protocolError(format string, args ...any) *Error {
	return r.client.endpoint().protocolError(false, format, args...)
}

func (r *Consumer) fail(err error) bool {
	r.err = err
	return false
}

// Record is the record that Next moved to.
func (r *Consumer) Record() *ConsumedRecord { return &r.walk.record }

// NextOffset is the offset after the last record that Next returned: where to
// go on. Before a first record it is known only if the read began at an offset
// or the server has told.
func (r *Consumer) NextOffset() (offset uint64, known bool) { return r.next, r.known }

// Err is the error that ended the read; nil at its regular end and after
// Close.
func (r *Consumer) Err() error { return r.err }

// Close ends the read and releases everything that belongs to it.
func (r *Consumer) Close() {
	r.cancel()
	<-r.done
}
