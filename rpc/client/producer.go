package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// Producer appends a stream of records in batches, several of them in flight.
// It is safe for concurrent use; records of one goroutine keep their order.
//
// It outlives a node: when its stream ends and nothing of what was sent can be
// in the log without being acknowledged, it goes on with another stream, for as
// long as WithRetry allows without an acknowledgement, and the order is kept.
// Any other failure ends it: every record that is not acknowledged by then is
// counted as not appended or unknown, and Append and Flush return the error
// from then on. Nothing is ever appended twice.
type Producer struct {
	client *Client
	opts   ProducerOptions
	ctx    context.Context
	cancel context.CancelFunc
	pool   batchPool

	wake   chan struct{} // capacity 1: the sender has something to look at
	failed chan struct{} // closed by the first failure
	ended  chan struct{} // closed when the last stream has ended
	done   chan struct{} // closed when every goroutine has ended

	mu sync.Mutex // protects all below
	// A batch moves from open (taking records) to queue (closed, not sent) to
	// sent (handed to the connection, not acknowledged).
	open      *batch
	openSince time.Time
	queue     []*batch
	sent      []*batch
	pending   int // bytes in the three of them
	accepted  uint64
	acked     int // batches, on this stream
	// What is tried when a stream has ended; anew after an acknowledgement.
	attempts attempts
	trouble  *Error // why the last stream ended; nil after an acknowledgement
	outcome  Outcome
	progress time.Time // of the last acknowledgement, or the first send after none was awaited
	closing  bool
	err      error
	changed  chan struct{} // closed, and forgotten, when room or outcome change; nil while nobody waits
}

type batch struct {
	buf   *[]byte
	count int
	bytes int // its share of pending
	// wire is buf as it is sent; it is kept, and buf out of the pool, until the
	// batch is acknowledged.
	wire mem.Buffer
}

// NewProducer opens a stream to append to a log. ctx bounds the opening, not
// the life of the producer, which ends with Close.
func (c *Client) NewProducer(ctx context.Context, opts ProducerOptions) (*Producer, error) {
	opts.applyDefaults()
	p := &Producer{
		client:   c,
		opts:     opts,
		wake:     make(chan struct{}, 1),
		failed:   make(chan struct{}),
		ended:    make(chan struct{}),
		done:     make(chan struct{}),
		attempts: attempts{client: c},
	}
	p.ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	stream, err := p.connect(ctx)
	if err != nil {
		p.cancel()
		return nil, err
	}
	var wg sync.WaitGroup
	wg.Go(func() { p.run(stream) })
	if opts.AckTimeout > 0 {
		wg.Go(p.watch)
	}
	go func() {
		wg.Wait()
		close(p.done)
	}()
	return p, nil
}

// producerStream is one stream of a producer.
type producerStream struct {
	grpc.ClientStream
	ep     *endpoint
	cancel context.CancelFunc
}

// connect opens a stream, at whichever node can be reached, while ctx lasts.
// It does not live longer than the producer.
func (p *Producer) connect(ctx context.Context) (*producerStream, error) {
	for {
		ep := p.client.endpoint()
		s, e := p.openStream(ctx, ep)
		if e == nil {
			return s, nil
		}
		if ctx.Err() != nil || !p.attempts.again(ctx, ep, e) {
			return nil, e
		}
	}
}

func (p *Producer) openStream(ctx context.Context, ep *endpoint) (*producerStream, *Error) {
	streamCtx, cancel := context.WithCancel(p.ctx)
	stop := context.AfterFunc(ctx, cancel)
	stream, err := ep.conn.NewStream(streamCtx, &v1.Log_ServiceDesc.Streams[0], v1.Log_ProduceStream_FullMethodName, grpc.ForceCodecV2(wireCodec))
	if err == nil && !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		stop()
		cancel()
		if ctx.Err() != nil {
			e := ep.timeoutError(context.Cause(ctx), "no answer while the stream was being opened")
			e.Definite = true
			return nil, e
		}
		return nil, ep.wrap(err, false)
	}
	return &producerStream{ClientStream: stream, ep: ep, cancel: cancel}, nil
}

// run uses one stream after another until the producer is closed and all is
// acknowledged, or has failed.
func (p *Producer) run(stream *producerStream) {
	defer close(p.ended)
	for {
		e := p.use(stream)
		p.mu.Lock()
		p.trouble = e
		p.mu.Unlock()
		if !p.resumable(e) || !p.attempts.again(p.ctx, stream.ep, e) {
			p.fail(e)
			return
		}
		next, err := p.connect(p.ctx)
		if err != nil {
			p.fail(err)
			return
		}
		stream = next
	}
}

// use sends and receives on a stream until it has ended, and returns why.
func (p *Producer) use(stream *producerStream) *Error {
	defer stream.cancel()
	gone := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { p.send(stream, gone) })
	e := p.receive(stream)
	close(gone)
	stream.cancel() // the sender may be waiting for room
	wg.Wait()
	return e
}

// resumable reports whether the producer can go on with another stream, and
// prepares that: what was sent and not acknowledged is to be sent again. That
// is so only where none of it is in the log or may get there, since sending it
// again would then append it twice, or behind what came after it.
func (p *Producer) resumable(e *Error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.err != nil || p.finishedLocked() || p.client.retry == 0:
		return false
	case len(p.sent) == 0:
		if e.Code != codes.Unavailable {
			return false
		}
	case e.Code != codes.Unavailable || !e.Definite || !e.nothingAfter(p.acked):
		return false
	}
	p.queue = append(p.sent, p.queue...)
	p.sent, p.acked = nil, 0
	return true
}

// Append hands r over to be appended; it copies r, which may be reused at
// once. It blocks while MaxInFlightBytes are on their way. An error means that
// r was not accepted, will not be appended and is in no count: the error that
// ended the producer, ErrClosed, ctx's error, or one about r itself, which
// leaves the producer usable.
func (p *Producer) Append(ctx context.Context, r *Record) error {
	if err := checkRecord(r); err != nil {
		return invalid("%v", err)
	}
	size := RecordSize(r)
	total := 1 + protowire.SizeBytes(size)

	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.closing:
			return ErrClosed
		case p.err != nil:
			return p.err
		}
		if p.pending == 0 || p.pending+total <= p.opts.MaxInFlightBytes {
			break
		}
		// What fills the room may be the open batch: it has to leave before
		// its linger ends, or nothing would.
		p.closeBatchLocked()
		if err := p.waitLocked(ctx); err != nil {
			return err
		}
	}
	if p.open != nil && len(*p.open.buf)+total > p.opts.BatchBytes {
		p.closeBatchLocked()
	}
	if p.open == nil {
		p.openBatchLocked()
	}
	b := p.open
	*b.buf = appendRecord(*b.buf, r, size)
	b.count++
	b.bytes += total
	p.accepted++
	p.pending += total
	if b.count >= p.opts.BatchRecords || len(*b.buf) >= p.opts.BatchBytes || p.opts.Linger < 0 {
		p.closeBatchLocked()
	}
	return nil
}

// Flush sends what is buffered without waiting for its linger and returns once
// every record accepted before the call is acknowledged, or with the error
// that ended the producer, or with ctx's.
func (p *Producer) Flush(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closeBatchLocked()
	for target := p.accepted; p.outcome.Acknowledged < target; {
		if p.err != nil {
			return p.err
		}
		if err := p.waitLocked(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Close sends what is buffered, waits for the acknowledgements and ends the
// producer; when ctx ends first, it gives up on what is not acknowledged by
// then. The Outcome accounts for every accepted record. The error is nil if
// and only if all of them are acknowledged. Further calls return the same.
func (p *Producer) Close(ctx context.Context) (Outcome, error) {
	p.mu.Lock()
	p.closing = true
	p.closeBatchLocked()
	p.wakeSender()
	p.changedLocked()
	p.mu.Unlock()

	select {
	case <-p.done:
	case <-ctx.Done():
		p.mu.Lock()
		message := "gave up waiting for acknowledgements"
		if p.trouble != nil {
			message += "; before that: " + p.trouble.Error()
		}
		p.mu.Unlock()
		p.fail(p.client.endpoint().timeoutError(context.Cause(ctx), message))
		<-p.done
	}
	p.cancel()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.outcome.Acknowledged == p.accepted {
		return p.outcome, nil // the stream may have broken, but after its work
	}
	return p.outcome, p.err
}

// Failed is closed when the producer has failed; Err then tells why.
func (p *Producer) Failed() <-chan struct{} { return p.failed }

// Err is the error that ended the producer; nil while it has not failed. Unlike
// that of Close it is told even if every record was acknowledged before.
func (p *Producer) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Outcome returns the counts as they are now.
func (p *Producer) Outcome() Outcome {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.outcome
}

func (p *Producer) openBatchLocked() {
	b := &batch{buf: p.pool.Get(0)}
	var expected *uint64
	if p.accepted == 0 {
		expected = p.opts.ExpectedOffset
	}
	*b.buf = appendRequestHead((*b.buf)[:0], p.opts.Log, expected)
	p.open, p.openSince = b, time.Now()
	p.wakeSender() // to wait for the linger
}

func (p *Producer) closeBatchLocked() {
	if p.open == nil {
		return
	}
	p.queue = append(p.queue, p.open)
	p.open = nil
	p.wakeSender()
}

func (p *Producer) wakeSender() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// waitLocked lets go of the lock until something has changed.
func (p *Producer) waitLocked(ctx context.Context) error {
	if p.changed == nil {
		p.changed = make(chan struct{})
	}
	changed := p.changed
	p.mu.Unlock()
	defer p.mu.Lock()
	select {
	case <-changed:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (p *Producer) changedLocked() {
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

// send hands batches to the stream, in order, until the producer is closed and
// nothing is left, or has failed, or gone tells that the stream has ended.
func (p *Producer) send(stream *producerStream, gone <-chan struct{}) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-gone:
			return // before a batch counts as sent
		default:
		}
		b, wait, end := p.nextToSend()
		switch {
		case end:
			// Its only error is that the stream has ended, which receive sees.
			_ = stream.CloseSend()
			return
		case b != nil:
			err := stream.SendMsg(&encoded{b.wire})
			if errors.Is(err, io.EOF) {
				return // receive gets the reason
			}
			if err != nil {
				p.fail(stream.ep.wrap(err, true))
				return
			}
			continue
		case wait > 0:
			timer.Reset(wait)
		}
		var lingered <-chan time.Time
		if wait > 0 {
			lingered = timer.C
		}
		select {
		case <-p.wake:
		case <-lingered:
		case <-gone:
			return
		case <-p.failed:
			return
		}
	}
}

// nextToSend returns a batch, counted as sent already; or how long to wait for
// the open one, 0 where there is none; or that there will be nothing more.
func (p *Producer) nextToSend() (b *batch, wait time.Duration, end bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return nil, 0, true
	}
	if len(p.queue) == 0 && p.open != nil {
		if wait = p.opts.Linger - time.Since(p.openSince); wait > 0 {
			return nil, wait, false
		}
		p.queue = append(p.queue, p.open)
		p.open = nil
	}
	if len(p.queue) == 0 {
		return nil, 0, p.closing
	}
	b = p.queue[0]
	p.queue = p.queue[1:]
	if len(p.sent) == 0 {
		p.progress = time.Now()
	}
	// Counted as sent before it is: if the stream ends in between, the batch is
	// called unknown though it was not appended. The other order could call a
	// batch not appended that was.
	p.sent = append(p.sent, b)
	if b.wire == nil {
		b.wire = mem.NewBuffer(b.buf, &p.pool)
	}
	b.wire.Ref() // given away with the message; ours lasts until it is acknowledged
	return b, 0, false
}

// receive takes the acknowledgements until the stream ends, and returns why it
// did.
func (p *Producer) receive(stream *producerStream) *Error {
	var resp v1.ProduceResponse
	for {
		resp.Reset()
		if err := stream.RecvMsg(&resp); err != nil {
			return stream.ep.wrap(err, true)
		}
		ack := ackOf(&resp)
		if err := p.acknowledge(stream.ep, ack); err != nil {
			return stream.ep.wrap(err, true)
		}
		if p.opts.OnAck != nil {
			p.opts.OnAck(ack)
		}
		p.mu.Lock()
		p.changedLocked()
		p.mu.Unlock()
	}
}

func (p *Producer) finishedLocked() bool {
	return p.err == nil && p.closing && p.outcome.Acknowledged == p.accepted
}

func (p *Producer) acknowledge(ep *endpoint, ack Ack) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return p.err // too late: it is counted as unknown already
	}
	if len(p.sent) == 0 {
		return ep.protocolError(true, "the server acknowledged more batches than were sent")
	}
	b := p.sent[0]
	if ack.NextOffset-ack.BaseOffset != uint64(b.count) {
		return ep.protocolError(true, "a batch of %d records was acknowledged with offsets %d up to, not including, %d", b.count, ack.BaseOffset, ack.NextOffset)
	}
	p.sent = p.sent[1:]
	b.wire.Free()
	p.acked++
	p.attempts.succeeded()
	p.trouble = nil
	p.pending -= b.bytes
	p.progress = time.Now()
	if p.outcome.Acknowledged == 0 {
		p.outcome.First = ack.BaseOffset
	}
	p.outcome.Acknowledged += uint64(b.count)
	p.outcome.Last = ack.NextOffset - 1
	return nil
}

// fail ends the producer with its first error and settles what is not
// acknowledged. What was not sent was not appended.
func (p *Producer) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.finishedLocked() {
		p.cancel() // nothing is left to fail, and nothing to wait for
		return
	}
	if p.err != nil {
		return
	}
	e := p.client.endpoint().wrap(err, true)
	p.outcome.settle(e, p.acked, p.sent)
	for _, b := range p.queue {
		p.outcome.NotAppended += uint64(b.count)
	}
	if p.open != nil {
		p.outcome.NotAppended += uint64(p.open.count)
	}
	// The buffers of queued batches go to the garbage collector, not to the
	// pool: whether the sender holds one is not worth knowing.
	p.open, p.queue, p.sent, p.pending = nil, nil, nil, 0
	p.err = e
	close(p.failed)
	p.cancel()
	p.changedLocked()
}

// watch fails the producer when the server stops acknowledging.
func (p *Producer) watch() {
	limit := p.opts.AckTimeout
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		select {
		case <-p.failed:
			return
		case <-p.ended:
			return
		case <-timer.C:
		}
		p.mu.Lock()
		waiting, since := len(p.sent) > 0, time.Since(p.progress)
		p.mu.Unlock()
		if !waiting {
			timer.Reset(limit)
			continue
		}
		if since < limit {
			timer.Reset(limit - since)
			continue
		}
		p.fail(p.client.endpoint().timeoutError(context.DeadlineExceeded, fmt.Sprintf("the server acknowledged nothing for %s", limit)))
		return
	}
}

// batchPool recycles the buffers of sent batches. gRPC returns them when the
// connection has written them.
type batchPool struct {
	pool sync.Pool
	// The capacity of the last one returned: a new one starts with that, or a
	// busy producer would spend its time growing buffers.
	grown atomic.Int64
}

func (p *batchPool) Get(int) *[]byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, 0, max(4<<10, p.grown.Load()))
	return &b
}

func (p *batchPool) Put(b *[]byte) {
	p.grown.Store(int64(cap(*b)))
	p.pool.Put(b)
}
