package rpc

import (
	"context"
	"errors"
	"math"
	"time"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// span is what a read is to return: offsets [from, until), at most records of
// them.
type span struct {
	from, until uint64
	records     uint64
	// named says that the client chose from itself. A start that the server
	// worked out moves along when retention overtakes it; a named one fails.
	named bool
}

// checkConsume refuses what cannot mean anything, whatever the log holds.
func checkConsume(req *v1.ConsumeRequest) error {
	switch start := req.GetStart().(type) {
	case *v1.ConsumeRequest_Earliest:
		if !start.Earliest {
			return &InvalidArgumentError{Field: "earliest", Detail: "can only be true; leave it out instead"}
		}
	case *v1.ConsumeRequest_Latest:
		if !start.Latest {
			return &InvalidArgumentError{Field: "latest", Detail: "can only be true; leave it out instead"}
		}
	case *v1.ConsumeRequest_Offset:
		if req.EndOffset != nil && req.GetEndOffset() < start.Offset {
			return &InvalidArgumentError{Field: "end_offset", Detail: "is before the start offset"}
		}
	case *v1.ConsumeRequest_Time:
		if err := start.Time.CheckValid(); err != nil {
			return &InvalidArgumentError{Field: "time", Detail: "is not a time from year 1 to 9999"}
		}
		if start.Time.GetSeconds() < 0 {
			return &InvalidArgumentError{Field: "time", Detail: "is before 1970"}
		}
	}
	return nil
}

// locate turns a valid request into offsets of the log as it is now.
func locate(ctx context.Context, log Log, req *v1.ConsumeRequest) (span, error) {
	if req.GetLinearizable() {
		if err := log.Linearize(ctx); err != nil {
			return span{}, err
		}
	}
	b := log.Bounds()
	at := span{until: math.MaxUint64, records: math.MaxUint64}
	switch start := req.GetStart().(type) {
	case nil, *v1.ConsumeRequest_Earliest:
		at.from = b.First
	case *v1.ConsumeRequest_Latest:
		at.from = b.HighWatermark
	case *v1.ConsumeRequest_LastN:
		at.from = b.First
		if start.LastN < b.HighWatermark-b.First {
			at.from = b.HighWatermark - start.LastN
		}
	case *v1.ConsumeRequest_Time:
		offset, err := offsetAtTime(log, start.Time.AsTime())
		if err != nil {
			return span{}, err
		}
		// The log may have grown, or lost its beginning, since b was taken.
		b = log.Bounds()
		at.from = max(offset, b.First)
	case *v1.ConsumeRequest_Offset:
		at.from, at.named = start.Offset, true
		if at.from > b.End && !req.GetLinearizable() {
			// This copy of the log may only be behind, for instance when a
			// reader goes on here that was elsewhere before. Saying that the
			// offset does not exist takes a quorum.
			if err := log.Linearize(ctx); err != nil {
				return span{}, err
			}
			b = log.Bounds()
		}
		if at.from < b.First || at.from > b.End {
			return span{}, &OffsetOutOfRangeError{Offset: at.from, First: b.First, Next: b.HighWatermark}
		}
	}
	if !req.GetFollow() {
		at.until = b.HighWatermark
	}
	if req.EndOffset != nil {
		at.until = min(at.until, req.GetEndOffset())
	}
	if n := req.GetMaxRecords(); n > 0 {
		at.records = n
	}
	return at, nil
}

func offsetAtTime(log Log, t time.Time) (uint64, error) {
	offset, err := log.OffsetAtTime(t)
	var gone *OffsetOutOfRangeError
	if errors.As(err, &gone) {
		return gone.First, nil // retention was faster than the search
	}
	return offset, err
}
