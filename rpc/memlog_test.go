package rpc

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// memLog is a Log in memory. Batches lie in it as a segment would hold them:
// each behind a header of its own that a reader may overwrite. By default a
// proposal is committed at once; with hold it stays pending until the test
// decides.
type memLog struct {
	mu       sync.Mutex
	batches  []memBatch
	first    uint64
	hw, end  uint64
	hold     bool
	held     []*memPending
	proposed [][]byte
	grown    chan struct{} // closed and replaced when hw moves

	proposeErr func(n int) error // for proposal number n
	readErr    error
	linearize  func() error
	waits      int
	reads      int
}

type memBatch struct {
	base    uint64
	count   uint32
	time    time.Time
	records []byte
}

type memPending struct {
	done chan struct{}
	ack  Ack
	err  error
}

func (p *memPending) Done() <-chan struct{} { return p.done }
func (p *memPending) Result() (Ack, error)  { return p.ack, p.err }

func newMemLog() *memLog { return &memLog{grown: make(chan struct{})} }

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)

// Propose never waits and so, as the contract allows, does not look at ctx.
func (l *memLog) Propose(_ context.Context, p Proposal, _ bool) (Pending, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.proposeErr != nil {
		if err := l.proposeErr(len(l.proposed)); err != nil {
			return nil, err
		}
	}
	l.proposed = append(l.proposed, p.Records)
	pend := &memPending{done: make(chan struct{})}
	if p.Expected != nil && *p.Expected != l.end {
		pend.err = &OffsetMismatchError{Expected: *p.Expected, Next: l.end}
		close(pend.done)
		return pend, nil
	}
	if l.hold {
		l.held = append(l.held, pend)
		return pend, nil
	}
	pend.ack = l.appendLocked(p.Records, p.Count)
	close(pend.done)
	return pend, nil
}

func (l *memLog) appendLocked(records []byte, count uint32) Ack {
	b := memBatch{base: l.end, count: count, records: records, time: epoch.Add(time.Duration(l.end) * time.Second)}
	l.batches = append(l.batches, b)
	l.end += uint64(count)
	l.hw = l.end
	close(l.grown)
	l.grown = make(chan struct{})
	return Ack{BaseOffset: b.base, NextOffset: l.end, AppendTime: b.time}
}

// resolve decides the held proposal at position i.
func (l *memLog) resolve(i int, ack Ack, err error) {
	l.mu.Lock()
	p := l.held[i]
	l.mu.Unlock()
	p.ack, p.err = ack, err
	close(p.done)
}

func (l *memLog) proposals() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.proposed)
}

func (l *memLog) retain(first uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.first = first
	for len(l.batches) > 0 && l.batches[0].base+uint64(l.batches[0].count) <= first {
		l.batches = l.batches[1:]
	}
}

func (l *memLog) Bounds() Bounds {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Bounds{First: l.first, HighWatermark: l.hw, End: l.end}
}

func (l *memLog) WaitReadable(ctx context.Context, offset uint64) error {
	for {
		l.mu.Lock()
		hw, grown := l.hw, l.grown
		l.waits++
		l.mu.Unlock()
		if offset < hw {
			return nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (l *memLog) Linearize(ctx context.Context) error {
	if l.linearize != nil {
		return l.linearize()
	}
	return ctx.Err()
}

func (l *memLog) OffsetAtTime(t time.Time) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range l.batches {
		if !b.time.Before(t) {
			return b.base, nil
		}
	}
	return l.hw, nil
}

// memFrame is the header in front of a batch: Headroom and a bit, so that
// batches never touch.
const memFrame = Headroom + 13

func (l *memLog) ReadBatches(from uint64, buf []byte, dst []Batch) ([]Batch, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reads++
	if l.readErr != nil {
		return dst, l.readErr
	}
	if from < l.first || from >= l.hw {
		return dst, &OffsetOutOfRangeError{Offset: from, First: l.first, Next: l.hw}
	}
	pos, n := 0, 0
	for _, b := range l.batches {
		if b.base+uint64(b.count) <= from || b.base >= l.hw {
			continue
		}
		need := memFrame + len(b.records)
		if pos+need > len(buf) {
			if n == 0 {
				return dst, &ShortBufferError{Need: need}
			}
			break
		}
		for i := range memFrame {
			buf[pos+i] = 0xEE
		}
		start := pos + memFrame
		copy(buf[start:], b.records)
		dst = append(dst, Batch{BaseOffset: b.base, Count: b.count, AppendTime: b.time, Start: start, End: start + len(b.records)})
		pos += need
		n++
	}
	return dst, nil
}

// record makes a record whose value tells its number and has about size bytes.
func record(n, size int) *v1.Record {
	value := fmt.Appendf(nil, "record %d ", n)
	for len(value) < size {
		value = append(value, byte('a'+len(value)%26))
	}
	return &v1.Record{Key: fmt.Appendf(nil, "k%d", n), Value: value, Headers: []*v1.Header{{Name: "n", Value: []byte{byte(n)}}}}
}

// encode is the wire form of records as a batch.
func encode(tb testing.TB, records ...*v1.Record) []byte {
	tb.Helper()
	var out []byte
	for _, r := range records {
		b, err := proto.Marshal(r)
		if err != nil {
			tb.Fatal(err)
		}
		out = protowire.AppendBytes(protowire.AppendTag(out, fieldRecords, protowire.BytesType), b)
	}
	return out
}

// fill appends records number n0 up to n1 in batches of random sizes.
func (l *memLog) fill(tb testing.TB, rng *rand.Rand, n0, n1, maxBatch, size int) {
	tb.Helper()
	for n0 < n1 {
		count := min(1+rng.IntN(maxBatch), n1-n0)
		var records []*v1.Record
		for i := range count {
			records = append(records, record(n0+i, rng.IntN(size+1)))
		}
		l.mu.Lock()
		l.appendLocked(encode(tb, records...), uint32(count))
		l.mu.Unlock()
		n0 += count
	}
}

type memCluster struct{ list ServerList }

func (c memCluster) Servers(context.Context) (ServerList, error) { return c.list, nil }
