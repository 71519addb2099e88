package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/diurnalog/diurna/rpc/client"
)

// simClient is a machine that uses the cluster, one operation after another,
// and writes down what it tried and saw.
type simClient struct {
	c    *simCluster
	id   int
	host string
	rng  *rand.Rand

	conns  map[string]*client.Client // by address
	batch  int
	stream int
	tail   uint64   // the end of the log as last seen
	liked  *simNode // it answered last
	limit  int      // of operations; 0 is none
	think  time.Duration
	follow bool // it does nothing but follow the log
	// user: it leaves it to package client which node to use, and to try again.
	// All others want to know which node said what.
	user bool
}

func newSimClient(c *simCluster, id int) *simClient {
	return &simClient{
		c: c, id: id, host: fmt.Sprintf("c%d", id), rng: rand.New(rand.NewPCG(c.rng.Uint64(), 3)),
		conns: map[string]*client.Client{}, think: time.Second / 2,
	}
}

// extra is one more client, which does only what it is told. It has to be
// closed.
func (c *simCluster) extra() *simClient {
	c.extras++
	return newSimClient(c, 100+c.extras)
}

func (cl *simClient) close() {
	for _, conn := range cl.conns {
		_ = conn.Close() // it may have been closed by the network
	}
	clear(cl.conns)
}

// address is where the client finds a node, or all of them.
func (cl *simClient) address(n *simNode) string {
	if !cl.user {
		return n.address()
	}
	var all []string
	for _, n := range cl.c.all() {
		all = append(all, n.address())
	}
	return strings.Join(all, ",")
}

// conn returns a connection to a node, as it is addressed now.
func (cl *simClient) conn(n *simNode) *client.Client {
	address := cl.address(n)
	conn := cl.conns[address]
	if conn == nil {
		opts := []client.Option{client.WithDialer(cl.c.net.Host(cl.host).Dial)}
		if !cl.user {
			opts = append(opts, client.WithRetry(0))
		}
		var err error
		if conn, err = client.Dial(address, opts...); err != nil {
			panic(err)
		}
		cl.conns[address] = conn
	}
	return conn
}

// place is what is known of where an answer comes from.
func (cl *simClient) place(n *simNode) simPlace {
	if cl.user {
		return simPlace{"some node", 0}
	}
	return n.place()
}

// drop forgets a connection that is of no use: gRPC would wait longer and
// longer before it tries again, and this client has little time.
func (cl *simClient) drop(n *simNode, err error) {
	var e *client.Error
	if errors.As(err, &e) && (e.Reason == client.ReasonUnreachable || e.Reason == client.ReasonConnectionLost || e.Reason == client.ReasonTimeout) {
		address := cl.address(n)
		if conn := cl.conns[address]; conn != nil && !cl.user {
			_ = conn.Close()
			delete(cl.conns, address)
		}
	}
}

// run works until ctx ends or the limit is reached.
func (cl *simClient) run(ctx context.Context) {
	for done := 0; ctx.Err() == nil && (cl.limit == 0 || done < cl.limit); done++ {
		if cl.follow {
			cl.following(ctx, cl.choose())
			continue
		}
		cl.one()
		// Sometimes several at about the same time as others, sometimes alone.
		think := cl.think
		if cl.rng.IntN(2) == 0 {
			think /= 50
		}
		timer := time.NewTimer(time.Duration(cl.rng.Int64N(int64(2*think) + 1)))
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// choose prefers the node that answered last.
func (cl *simClient) choose() *simNode {
	if cl.liked != nil && cl.rng.IntN(2) == 0 {
		return cl.liked
	}
	all := cl.c.all()
	return all[cl.rng.IntN(len(all))]
}

// one does one thing.
func (cl *simClient) one() {
	n := cl.choose()
	switch p := cl.rng.IntN(100); {
	case p < 35:
		cl.append(n, 1+cl.rng.IntN(4), nil, cl.timeout())
	case p < 55:
		cl.conditional(n)
	case p < 60:
		cl.produceStream(n, 1+cl.rng.IntN(8))
	case p < 80:
		cl.readAll(n, func(r *simRead) { r.linear = true })
	case p < 90:
		cl.get(n, cl.tail-min(cl.tail, uint64(cl.rng.IntN(3)))+uint64(cl.rng.IntN(3)))
	default:
		cl.readAll(n, func(*simRead) {})
	}
}

func (cl *simClient) timeout() time.Duration {
	return time.Duration(200+cl.rng.IntN(4000)) * time.Millisecond
}

// conditional appends at the end as it was last seen, and tries again, with the
// same batch and condition, when it does not know what became of it.
func (cl *simClient) conditional(n *simNode) {
	expected := cl.tail
	if cl.rng.IntN(10) == 0 {
		expected += uint64(cl.rng.IntN(3))
	}
	a := cl.append(n, 1, &expected, cl.timeout())
	for range 2 {
		if a.outcome != simUnknown {
			return
		}
		a = cl.again(a, cl.choose(), cl.timeout())
	}
}

// append tries to append a new batch.
func (cl *simClient) append(n *simNode, count int, expected *uint64, timeout time.Duration) *simAppend {
	cl.batch++
	return cl.try(n, simAppend{client: cl.id, batch: cl.batch, count: count, expected: expected}, timeout)
}

// again tries to append a batch that was tried before.
func (cl *simClient) again(a *simAppend, n *simNode, timeout time.Duration) *simAppend {
	return cl.try(n, simAppend{client: a.client, batch: a.batch, count: a.count, expected: a.expected}, timeout)
}

func (cl *simClient) records(batch, count int) (records []*client.Record) {
	for i := range count {
		key := simKey(cl.id, batch, i, count)
		records = append(records, &client.Record{Key: []byte(key), Value: simValue(key)})
	}
	return records
}

func (cl *simClient) try(n *simNode, attempt simAppend, timeout time.Duration) *simAppend {
	attempt.node = cl.place(n)
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var opts []client.ProduceOption
	if attempt.expected != nil {
		opts = append(opts, client.ExpectOffset(*attempt.expected))
	}
	conn := cl.conn(n)
	a := cl.c.h.beginAppend(attempt)
	ack, err := conn.Produce(ctx, cl.records(a.batch, a.count), opts...)
	cl.c.h.endAppend(a, func(a *simAppend) { outcomeOf(a, ack.BaseOffset, err) })
	switch {
	case err == nil:
		cl.liked, cl.tail = n, max(cl.tail, ack.NextOffset)
	case a.next != nil:
		cl.tail = *a.next
	}
	cl.drop(n, err)
	return a
}

// outcomeOf notes what a produce returned.
func outcomeOf(a *simAppend, base uint64, err error) {
	var e *client.Error
	switch {
	case err == nil:
		a.outcome, a.base = simAcked, base
		return
	case errors.As(err, &e) && e.Definite:
		a.outcome = simRefused
		if next, ok := e.Uint("next"); ok && e.Reason == client.ReasonOffsetMismatch {
			a.next = &next
		}
	default:
		a.outcome = simUnknown
	}
	a.why = err.Error()
}

// produceStream sends several batches over one stream without waiting.
func (cl *simClient) produceStream(n *simNode, batches int) {
	cl.stream++
	stream := cl.id*1000 + cl.stream
	ctx, cancel := context.WithTimeout(context.Background(), cl.timeout())
	defer cancel()
	var attempts []*simAppend
	var acks []client.Ack
	p, err := cl.conn(n).NewProducer(ctx, client.ProducerOptions{
		BatchRecords: 1, Linger: -1, AckTimeout: cl.timeout(),
		OnAck: func(ack client.Ack) {
			// In order, from one goroutine; the batches of one record each.
			cl.c.h.mu.Lock()
			defer cl.c.h.mu.Unlock()
			a := attempts[len(acks)]
			acks = append(acks, ack)
			a.returned, a.until = cl.c.h.tick()
			a.outcome, a.base = simAcked, ack.BaseOffset
		},
	})
	if err != nil {
		cl.drop(n, err)
		return
	}
	for i := range batches {
		cl.batch++
		a := cl.c.h.beginAppend(simAppend{client: cl.id, batch: cl.batch, count: 1, stream: stream, position: i, node: cl.place(n)})
		cl.c.h.mu.Lock()
		attempts = append(attempts, a)
		cl.c.h.mu.Unlock()
		if err = p.Append(ctx, cl.records(a.batch, 1)[0]); err != nil {
			// Not accepted.
			cl.c.h.endAppend(a, func(a *simAppend) { a.outcome, a.why = simRefused, "not accepted: "+err.Error() })
			cl.c.h.mu.Lock()
			attempts = attempts[:len(attempts)-1]
			cl.c.h.mu.Unlock()
			break
		}
	}
	outcome, err := p.Close(ctx)
	var e *client.Error
	for i, a := range attempts {
		if i < len(acks) {
			cl.tail = max(cl.tail, acks[i].NextOffset)
			continue
		}
		cl.c.h.endAppend(a, func(a *simAppend) {
			a.outcome, a.why = simUnknown, fmt.Sprint(err)
			if errors.As(err, &e) && outcome.Unknown == 0 && outcome.AppendedAfter == 0 {
				a.outcome = simRefused
			}
		})
	}
	cl.drop(n, err)
}

// readAll reads all of the log that a node shows.
func (cl *simClient) readAll(n *simNode, change func(*simRead)) *simRead {
	r := simRead{client: cl.id, node: cl.place(n)}
	change(&r)
	return cl.read(n, r, client.ConsumeOptions{Start: client.AtOffset(0), Linearizable: r.linear})
}

// get reads one record, linearizably.
func (cl *simClient) get(n *simNode, offset uint64) *simRead {
	return cl.read(n, simRead{client: cl.id, node: cl.place(n), linear: true, from: offset, limit: 1},
		client.ConsumeOptions{Start: client.AtOffset(offset), MaxRecords: 1, Linearizable: true})
}

func (cl *simClient) read(n *simNode, read simRead, opts client.ConsumeOptions) *simRead {
	timeout := cl.timeout()
	if read.final {
		timeout = 10 * time.Second
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	conn := cl.conn(n)
	r := cl.c.h.beginRead(read)
	records, err := cl.consume(ctx, conn, opts, nil)
	cl.c.h.endRead(r, func(r *simRead) {
		r.records = records
		r.complete = err == nil
		if opts.Start == client.Earliest() && len(records) > 0 {
			r.from = records[0].offset
		}
		if r.limit == 0 {
			r.end = r.from + uint64(len(records))
		}
		var e *client.Error
		switch {
		case errors.As(err, &e) && e.Reason == client.ReasonOffsetOutOfRange:
			// There is nothing there, is an answer.
			r.complete = r.limit == 1
		case err != nil:
			r.why = err.Error()
		}
		if cl.user || n.place() != r.node {
			// Some node, or one that was started again meanwhile.
			r.node.life = -int(r.call)
		}
	})
	if err == nil && r.limit == 0 {
		cl.liked, cl.tail = n, max(cl.tail, r.end)
	}
	cl.drop(n, err)
	return r
}

func (cl *simClient) consume(ctx context.Context, conn *client.Client, opts client.ConsumeOptions, seen func(simRecord)) (records []simRecord, err error) {
	reader, err := conn.Consume(ctx, opts)
	if err != nil {
		return nil, err
	}
	defer reader.Close()
	for reader.Next() {
		got := reader.Record()
		rec := simRecord{got.Offset, string(got.Key), simSum(got.Value), got.Time.UnixNano()}
		if seen != nil {
			seen(rec)
			continue
		}
		records = append(records, rec)
	}
	return records, reader.Err()
}

// following reads on from where it was, at any node, as records come.
func (cl *simClient) following(ctx context.Context, n *simNode) {
	ctx, cancel := context.WithTimeout(ctx, 10*cl.timeout())
	defer cancel()
	r := cl.c.h.beginRead(simRead{client: cl.id, node: cl.place(n), from: cl.tail})
	_, err := cl.consume(ctx, cl.conn(n), client.ConsumeOptions{Start: client.AtOffset(cl.tail), Follow: true}, func(rec simRecord) {
		cl.c.h.mu.Lock()
		defer cl.c.h.mu.Unlock()
		r.records = append(r.records, rec)
		cl.tail = rec.offset + 1
	})
	cl.c.h.endRead(r, func(r *simRead) { r.why = fmt.Sprint("follow: ", err) })
	var e *client.Error
	if errors.As(err, &e) && e.Code == codes.OutOfRange {
		// It was promised: what was read stays.
		cl.c.t.Errorf("client %d had read up to %d, of which %s knows nothing: %v", cl.id, cl.tail, n.name, err)
	}
	cl.drop(n, err)
	timer := time.NewTimer(100 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
