package rpc

import (
	"errors"
	"math/bits"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

var errStoredRecords = errors.New("stored records are not a run of records")

// cutRecords finds a part of a run of records: without the first skip ones, at
// most keep of those that follow, and of these, after the first, only as many
// as fit into maxBytes. It walks tags and lengths and looks into no record.
func cutRecords(records []byte, skip, keep uint32, maxBytes int) (start, end int, kept uint32, err error) {
	for range skip {
		n := recordLen(records[start:])
		if n < 0 {
			return 0, 0, 0, errStoredRecords
		}
		start += n
	}
	for end = start; kept < keep && end < len(records); kept++ {
		n := recordLen(records[end:])
		if n < 0 {
			return 0, 0, 0, errStoredRecords
		}
		if kept > 0 && end+n-start > maxBytes {
			break
		}
		end += n
	}
	return start, end, kept, nil
}

// recordLen is the length of the first record of a run with its tag and
// length, or -1.
func recordLen(b []byte) int {
	num, typ, n := consumeTag(b)
	if n < 0 || num != fieldRecords {
		return -1
	}
	_, m := consumeBytes(typ, b[n:])
	if m < 0 {
		return -1
	}
	return n + m
}

// The most that putBatchHeader and putResponseHeader write. Both together fit
// into Headroom, so that a response can begin in front of its first batch.
const (
	maxTimeBytes           = 1 + 10 + 1 + 5
	maxBatchHeaderBytes    = 1 + 5 + 1 + 10 + 1 + 1 + maxTimeBytes
	maxResponseHeaderBytes = 2 * (1 + 10)

	_ = uint(Headroom - maxBatchHeaderBytes - maxResponseHeaderBytes) // compiles while it fits
)

// putBatchHeader completes the records at buf[start:end] to one element of
// ConsumeResponse.batches by writing what comes before them backwards from
// start, and returns where the element now begins.
func putBatchHeader(buf []byte, start, end int, base uint64, appended time.Time) int {
	pos := start

	timeEnd := pos
	if nanos := appended.Nanosecond(); nanos != 0 {
		pos = putUintField(buf, pos, fieldTimeNanos, uint64(nanos))
	}
	if seconds := appended.Unix(); seconds != 0 {
		pos = putUintField(buf, pos, fieldTimeSeconds, uint64(seconds))
	}
	pos = putVarintBefore(buf, pos, uint64(timeEnd-pos))
	pos = putTagBefore(buf, pos, fieldBatchTime, protowire.BytesType)

	if base != 0 {
		pos = putUintField(buf, pos, fieldBatchBase, base)
	}
	pos = putVarintBefore(buf, pos, uint64(end-pos))
	return putTagBefore(buf, pos, fieldResponseBatches, protowire.BytesType)
}

// putResponseHeader writes ConsumeResponse's own scalars backwards from pos
// and returns where they begin. A message's fields may come in any order.
func putResponseHeader(buf []byte, pos int, next, highWatermark uint64) int {
	pos = putUintField(buf, pos, fieldResponseHighWatermark, highWatermark)
	return putUintField(buf, pos, fieldResponseNext, next)
}

func putUintField(buf []byte, pos int, num protowire.Number, v uint64) int {
	return putTagBefore(buf, putVarintBefore(buf, pos, v), num, protowire.VarintType)
}

func putTagBefore(buf []byte, pos int, num protowire.Number, typ protowire.Type) int {
	return putVarintBefore(buf, pos, protowire.EncodeTag(num, typ))
}

func putVarintBefore(buf []byte, pos int, v uint64) int {
	pos -= (bits.Len64(v|1) + 6) / 7
	i := pos
	for ; v >= 0x80; i++ {
		buf[i] = byte(v) | 0x80
		v >>= 7
	}
	buf[i] = byte(v)
	return pos
}
