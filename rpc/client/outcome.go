package client

import (
	"strconv"
	"strings"
)

// Outcome counts what became of the records that a Producer accepted. Records
// that are in none of its counts are still under way.
type Outcome struct {
	// Acknowledged records are durable on a quorum.
	Acknowledged uint64
	// First and Last are the lowest and highest acknowledged offset; they mean
	// nothing when Acknowledged is 0. Where they span more than Acknowledged
	// offsets, other producers appended in between.
	First, Last uint64
	// AppendedAfter records came after a batch that failed, and were appended
	// all the same, as the server said with the failure, but not where to.
	AppendedAfter uint64
	// NotAppended records were definitely not appended and never will be.
	NotAppended uint64
	// Unknown records were sent, and may or may not have been appended.
	Unknown uint64
}

// Metadata of the error that ends a ProduceStream: the position on the stream,
// from 0, of the request that failed, and those of later ones that were
// appended or may have been, as "5,7-9".
const (
	metaRequest       = "request"
	metaAppendedAfter = "appended_after"
	metaUnknownAfter  = "unknown_after"
)

// settle counts the batches that were sent and not acknowledged when the
// stream ended with e; acked were acknowledged before them. What the error does
// not account for beyond doubt is unknown.
func (o *Outcome) settle(e *Error, acked int, sent []*batch) {
	request, told := e.Uint(metaRequest)
	appended, ok1 := parseRanges(e.Metadata[metaAppendedAfter])
	unknown, ok2 := parseRanges(e.Metadata[metaUnknownAfter])
	trusted := ok1 && ok2 && (!told || request == uint64(acked))
	for i, b := range sent {
		position, n := uint64(acked+i), uint64(b.count)
		switch {
		case !trusted, !told && !e.Definite, unknown.contain(position):
			o.Unknown += n
		case appended.contain(position):
			o.AppendedAfter += n
		case i == 0 && !e.Definite:
			o.Unknown += n
		default:
			o.NotAppended += n
		}
	}
}

// nothingAfter reports whether e, which is definite and ended a stream after so
// many acknowledgements, leaves no doubt that none of the batches after them
// was appended.
func (e *Error) nothingAfter(acked int) bool {
	request, told := e.Uint(metaRequest)
	return (!told || request == uint64(acked)) && e.Metadata[metaAppendedAfter] == "" && e.Metadata[metaUnknownAfter] == ""
}

type ranges [][2]uint64

func (r ranges) contain(n uint64) bool {
	for _, x := range r {
		if x[0] <= n && n <= x[1] {
			return true
		}
	}
	return false
}

func parseRanges(s string) (r ranges, ok bool) {
	if s == "" {
		return nil, true
	}
	for part := range strings.SplitSeq(s, ",") {
		from, to, ranged := strings.Cut(part, "-")
		if !ranged {
			to = from
		}
		a, err := strconv.ParseUint(from, 10, 64)
		if err != nil {
			return nil, false
		}
		b, err := strconv.ParseUint(to, 10, 64)
		if err != nil {
			return nil, false
		}
		r = append(r, [2]uint64{a, b})
	}
	return r, true
}
