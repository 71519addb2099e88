package rpc

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/mem"
)

const (
	// compactBytes is up to which size moving a batch in memory is cheaper
	// than what gRPC spends on one more buffer of a message. Measured by
	// BenchmarkAssemble.
	compactBytes = 4 << 10

	// maxResponseBytes bounds the records of a response even if a stored batch
	// is larger than any that is accepted today.
	maxResponseBytes = HardBatchBytes + 512<<10

	// maxReadBytes is the largest stored batch that a read makes room for.
	maxReadBytes = 64 << 20
)

// chunk is what one read of the log gave, ready to be sent.
type chunk struct {
	response *rawResponse
	next     uint64 // the offset after the last record
	records  uint64
	bytes    int // of the response, not counting its own few
}

// chunkReader reads for one call. Not safe for concurrent use.
type chunkReader struct {
	log     Log
	pool    *chunkPool
	batches []Batch // reused
	pieces  []piece // reused
}

// piece is a part of a buffer.
type piece struct{ start, end int }

// read fills a response from the records of at: about as many as fit into
// buffer bytes, at least one. Where most is set, records after the first are
// left out that would make the response exceed it.
func (r *chunkReader) read(at span, buffer, most int) (chunk, error) {
	buf := r.pool.Get(buffer)
	batches, err := r.log.ReadBatches(at.from, *buf, r.batches[:0])
	var short *ShortBufferError
	// More than once only if what is stored at the offset changes in between.
	for try := 0; errors.As(err, &short) && try < 3; try++ {
		need := short.Need
		if need <= len(*buf) || need > maxReadBytes {
			err = fmt.Errorf("read at offset %d: a buffer of %d bytes was asked for", at.from, need)
			break
		}
		r.pool.Put(buf)
		buf = r.pool.Get(need)
		batches, err = r.log.ReadBatches(at.from, *buf, r.batches[:0])
	}
	if err != nil {
		r.pool.Put(buf)
		return chunk{}, err
	}
	r.batches = batches

	if most == 0 || most > maxResponseBytes {
		most = maxResponseBytes
	}
	c, err := r.assemble(buf, batches, at, most)
	if err != nil {
		r.pool.Put(buf)
	}
	return c, err
}

// assemble trims what was read to at and most and makes it a response in
// place. It takes over buf unless it fails.
func (r *chunkReader) assemble(buf *[]byte, batches []Batch, at span, most int) (chunk, error) {
	batches, c, err := trim(*buf, batches, at, most)
	if err != nil {
		return chunk{}, err
	}
	// Known only after the read: then no record is above it.
	highWatermark := max(r.log.Bounds().HighWatermark, c.next)

	r.pieces = layout(*buf, batches, c.next, highWatermark, compactBytes, r.pieces[:0])
	whole := mem.NewBuffer(buf, r.pool)
	data := make(mem.BufferSlice, len(r.pieces))
	for i, p := range r.pieces {
		data[i] = whole.Slice(p.start, p.end)
		c.bytes += p.end - p.start
	}
	whole.Free() // the slices keep it
	c.response = &rawResponse{data: data}
	return c, nil
}

// trim cuts batches down to at and most. That they are dense and begin where
// they should is checked again here, because after this point nobody can tell.
func trim(buf []byte, batches []Batch, at span, most int) ([]Batch, chunk, error) {
	c := chunk{next: at.from}
	if len(batches) == 0 {
		return nil, c, fmt.Errorf("read at offset %d: got nothing", at.from)
	}
	size := 0
	for i := range batches {
		b := &batches[i]
		if b.BaseOffset > c.next || b.Count == 0 || c.next-b.BaseOffset >= uint64(b.Count) || i > 0 && b.BaseOffset != c.next {
			return nil, c, fmt.Errorf("read at offset %d: got a batch of %d records at offset %d", c.next, b.Count, b.BaseOffset)
		}
		skip := uint32(c.next - b.BaseOffset)
		keep := uint32(min(uint64(b.Count-skip), at.until-c.next, at.records-c.records))
		room := most - size
		full := keep == b.Count && b.End-b.Start <= room
		if !full && keep > 0 {
			if i > 0 && room <= 0 {
				return batches[:i], c, nil
			}
			start, end, kept, err := cutRecords(buf[b.Start:b.End], skip, keep, room)
			if err != nil || kept == 0 {
				return nil, c, fmt.Errorf("read at offset %d: %w", c.next, errStoredRecords)
			}
			if i > 0 && end-start > room {
				return batches[:i], c, nil
			}
			b.BaseOffset += uint64(skip)
			b.Start, b.End = b.Start+start, b.Start+end
			full = kept == b.Count-skip // nothing was left out at its end
			b.Count = kept
			keep = kept
		}
		if keep == 0 {
			return batches[:i], c, nil
		}
		size += b.End - b.Start + maxBatchHeaderBytes
		c.next += uint64(keep)
		c.records += uint64(keep)
		if !full {
			return batches[:i+1], c, nil
		}
	}
	return batches, c, nil
}

// layout completes every batch with its header and returns the pieces of buf
// that, one after the other, are the response. Batches do not touch each other
// in the buffer; those of up to compact bytes are moved to the ones before, so
// that a response of many small batches is not many pieces.
func layout(buf []byte, batches []Batch, next, highWatermark uint64, compact int, pieces []piece) []piece {
	for i, b := range batches {
		start := putBatchHeader(buf, b.Start, b.End, b.BaseOffset, b.AppendTime)
		if i == 0 {
			start = putResponseHeader(buf, start, next, highWatermark)
		} else if b.End-start <= compact {
			last := &pieces[len(pieces)-1]
			last.end += copy(buf[last.end:], buf[start:b.End])
			continue
		}
		pieces = append(pieces, piece{start, b.End})
	}
	return pieces
}

// emptyResponse has no batches: it only tells where the reader stands.
func emptyResponse(next, highWatermark uint64) *rawResponse {
	buf := make([]byte, maxResponseHeaderBytes)
	start := putResponseHeader(buf, len(buf), next, highWatermark)
	return &rawResponse{data: mem.BufferSlice{mem.SliceBuffer(buf[start:])}}
}
