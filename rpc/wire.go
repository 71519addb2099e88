package rpc

import (
	"fmt"
	"math"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// Field numbers of log.proto that this package reads or writes by hand. A test
// compares them with the generated descriptors.
const (
	fieldRequestLog      protowire.Number = 1
	fieldRequestExpected protowire.Number = 2
	fieldRecords         protowire.Number = 15 // of ProduceRequest, ProposeRequest and RecordBatch

	fieldProposeSequence protowire.Number = 13
	fieldProposeCluster  protowire.Number = 14

	fieldRecordKey     protowire.Number = 1
	fieldRecordValue   protowire.Number = 2
	fieldRecordHeaders protowire.Number = 3

	fieldHeaderName  protowire.Number = 1
	fieldHeaderValue protowire.Number = 2

	fieldBatchBase protowire.Number = 1
	fieldBatchTime protowire.Number = 2

	fieldTimeSeconds protowire.Number = 1
	fieldTimeNanos   protowire.Number = 2

	fieldResponseBatches       protowire.Number = 1
	fieldResponseNext          protowire.Number = 2
	fieldResponseHighWatermark protowire.Number = 3
)

// produceRequest is a ProduceRequest, or a ProposeRequest, whose records stay
// in wire form.
type produceRequest struct {
	log      string
	expected *uint64
	records  []byte
	count    uint32

	// Of a ProposeRequest only.
	sequence uint64
	cluster  string
}

// parseProduceRequest reads a ProduceRequest, or a ProposeRequest, which is one
// with two fields more, without decoding its records. The
// records it returns alias raw where they lie there in one piece, as every
// ordinary encoder writes them.
//
// What is accepted here is stored for ever and handed to clients in any
// language, so it is stricter than Go's decoder: no groups, no known field
// with a foreign wire type, no tag or length longer than five bytes (which
// other decoders refuse), only valid UTF-8 where the contract says string.
func parseProduceRequest(raw []byte, lim Limits) (produceRequest, error) {
	var (
		req        produceRequest
		start, end int    // the run of records in raw that is being extended
		gathered   []byte // earlier runs, where there is more than one
		total      int
	)
	for pos := 0; pos < len(raw); {
		num, typ, n := consumeTag(raw[pos:])
		if n < 0 {
			return req, malformed("request", pos)
		}
		value := raw[pos+n:]
		switch num {
		case fieldRecords:
			rec, m := consumeBytes(typ, value)
			if m < 0 {
				return req, malformed("request", pos)
			}
			if err := checkRecord(rec, int(req.count), lim.MaxRecordBytes); err != nil {
				return req, err
			}
			n += m
			if req.count > 0 && pos != end {
				gathered = append(gathered, raw[start:end]...)
				start = pos
			} else if req.count == 0 {
				start = pos
			}
			end = pos + n
			total += n
			req.count++
		case fieldRequestLog:
			name, m := consumeBytes(typ, value)
			if m < 0 {
				return req, malformed("request", pos)
			}
			if !utf8.Valid(name) {
				return req, &InvalidArgumentError{Field: "log", Detail: "is not valid UTF-8"}
			}
			req.log = string(name)
			n += m
		case fieldRequestExpected:
			v, m := protowire.ConsumeVarint(value)
			if typ != protowire.VarintType || m < 0 {
				return req, malformed("request", pos)
			}
			req.expected = &v
			n += m
		default:
			m := skipValue(typ, value)
			if m < 0 {
				return req, malformed("request", pos)
			}
			switch {
			case num == fieldProposeSequence && typ == protowire.VarintType:
				req.sequence, _ = protowire.ConsumeVarint(value)
			case num == fieldProposeCluster && typ == protowire.BytesType:
				id, _ := consumeBytes(typ, value)
				req.cluster = string(id)
			}
			n += m
		}
		pos += n
	}
	if req.count == 0 {
		return req, ErrEmptyBatch
	}
	if total > lim.MaxBatchBytes {
		return req, &BatchTooLargeError{Size: total, Limit: lim.MaxBatchBytes}
	}
	req.records = raw[start:end:end]
	if gathered != nil {
		req.records = append(gathered, req.records...)
	}
	return req, nil
}

// checkRecord makes sure that one encoded Record decodes everywhere.
func checkRecord(rec []byte, position, limit int) error {
	if len(rec) > limit {
		return &RecordTooLargeError{Position: position, Size: len(rec), Limit: limit}
	}
	for pos := 0; pos < len(rec); {
		num, typ, n := consumeTag(rec[pos:])
		if n < 0 {
			return malformedRecord(position, pos)
		}
		value := rec[pos+n:]
		var m int
		switch num {
		case fieldRecordKey, fieldRecordValue:
			_, m = consumeBytes(typ, value)
		case fieldRecordHeaders:
			var header []byte
			if header, m = consumeBytes(typ, value); m >= 0 {
				if err := checkHeader(header, position); err != nil {
					return err
				}
			}
		default:
			m = skipValue(typ, value)
		}
		if m < 0 {
			return malformedRecord(position, pos)
		}
		pos += n + m
	}
	return nil
}

func checkHeader(header []byte, position int) error {
	for pos := 0; pos < len(header); {
		num, typ, n := consumeTag(header[pos:])
		if n < 0 {
			return malformedRecord(position, pos)
		}
		value := header[pos+n:]
		var m int
		switch num {
		case fieldHeaderName:
			var name []byte
			if name, m = consumeBytes(typ, value); m >= 0 && !utf8.Valid(name) {
				return &InvalidArgumentError{
					Field:  "records",
					Detail: fmt.Sprintf("record %d has a header name that is not valid UTF-8", position),
				}
			}
		case fieldHeaderValue:
			_, m = consumeBytes(typ, value)
		default:
			m = skipValue(typ, value)
		}
		if m < 0 {
			return malformedRecord(position, pos)
		}
		pos += n + m
	}
	return nil
}

func malformed(field string, pos int) error {
	return &InvalidArgumentError{Field: field, Detail: fmt.Sprintf("is not a well-formed message at byte %d", pos)}
}

func malformedRecord(position, pos int) error {
	return &InvalidArgumentError{
		Field:  "records",
		Detail: fmt.Sprintf("record %d is not a well-formed message at its byte %d", position, pos),
	}
}

// maxShortVarint is the longest tag or length that all decoders accept.
const maxShortVarint = 5

// consumeTag, consumeBytes and skipValue return how many bytes they took, or
// -1 for what must not be stored.
func consumeTag(b []byte) (protowire.Number, protowire.Type, int) {
	// One byte is the whole tag of every field of the contract.
	if len(b) > 0 && b[0] < 0x80 {
		if b[0] < 8 {
			return 0, 0, -1
		}
		return protowire.Number(b[0] >> 3), protowire.Type(b[0] & 7), 1
	}
	v, n := protowire.ConsumeVarint(b)
	if n < 0 || n > maxShortVarint || v > math.MaxUint32 {
		return 0, 0, -1
	}
	num := protowire.Number(v >> 3)
	if !num.IsValid() {
		return 0, 0, -1
	}
	return num, protowire.Type(v & 7), n
}

func consumeBytes(typ protowire.Type, b []byte) ([]byte, int) {
	if typ != protowire.BytesType {
		return nil, -1
	}
	size, n := protowire.ConsumeVarint(b)
	if n < 0 || n > maxShortVarint || size > uint64(len(b)-n) {
		return nil, -1
	}
	return b[n : n+int(size)], n + int(size)
}

func skipValue(typ protowire.Type, b []byte) int {
	var n int
	switch typ {
	case protowire.VarintType:
		_, n = protowire.ConsumeVarint(b)
	case protowire.Fixed32Type:
		_, n = protowire.ConsumeFixed32(b)
	case protowire.Fixed64Type:
		_, n = protowire.ConsumeFixed64(b)
	case protowire.BytesType:
		_, n = consumeBytes(typ, b)
	default: // groups, and what is not a type at all
		n = -1
	}
	return n
}
