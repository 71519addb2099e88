package client

import (
	"errors"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

var (
	errTruncated = errors.New("it is cut short")
	errOrder     = errors.New("a batch states its offset after its records")
)

// walker steps through the records of a ConsumeResponse in its wire form,
// without a copy and without an allocation per record.
type walker struct {
	response []byte // what is left of the message
	batch    []byte // what is left of the batch
	inRecord bool   // the batch's records have begun
	offset   uint64 // of the next record
	time     time.Time
	record   ConsumedRecord
}

// reset starts over with a message and returns its next_offset, if that stands
// alone: in a message without batches.
func (w *walker) reset(message []byte) (nextOffset *uint64, err error) {
	w.response, w.batch = message, nil
	place, err := placeOf(message)
	if err != nil || place.batches {
		return nil, err
	}
	return &place.next, nil
}

// place is where a message lies in the log.
type place struct {
	next    uint64 // its next_offset
	batches bool   // it has some
	base    uint64 // the offset of the first
}

// placeOf looks at no more than the top of a message.
func placeOf(message []byte) (p place, err error) {
	for b := message; len(b) > 0; {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return p, errTruncated
		}
		b = b[n:]
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return p, errTruncated
		}
		switch {
		case num == fieldResponseNextOffset && typ == protowire.VarintType:
			p.next, _ = protowire.ConsumeVarint(b)
		case num == fieldResponseBatches && typ == protowire.BytesType && !p.batches:
			p.batches = true
			body, _ := protowire.ConsumeBytes(b)
			if num, typ, n := protowire.ConsumeTag(body); num == fieldBatchBaseOffset && typ == protowire.VarintType {
				p.base, _ = protowire.ConsumeVarint(body[n:])
			}
		}
		b = b[n:]
	}
	return p, nil
}

// next moves to the next record of the message.
func (w *walker) next() (bool, error) {
	for {
		for len(w.batch) > 0 {
			if w.batch[0] != tagRecord {
				if err := w.batchField(); err != nil {
					return false, err
				}
				continue
			}
			body, n := consumeBytes(w.batch[1:])
			if n < 0 {
				return false, errTruncated
			}
			w.batch = w.batch[1+n:]
			w.inRecord = true
			w.record.Offset, w.record.Time = w.offset, w.time
			w.offset++
			return true, w.decode(body)
		}
		if len(w.response) == 0 {
			return false, nil
		}
		if err := w.responseField(); err != nil {
			return false, err
		}
	}
}

// responseField takes one field off the message; a batch becomes the current
// one.
func (w *walker) responseField() error {
	num, typ, n := protowire.ConsumeTag(w.response)
	if n < 0 {
		return errTruncated
	}
	b := w.response[n:]
	if num == fieldResponseBatches && typ == protowire.BytesType {
		body, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return errTruncated
		}
		w.response, w.batch = b[n:], body
		w.inRecord, w.offset, w.time = false, 0, time.Unix(0, 0).UTC()
		return nil
	}
	if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
		return errTruncated
	}
	w.response = b[n:]
	return nil
}

// batchField takes one field other than a record off the batch.
func (w *walker) batchField() error {
	num, typ, n := protowire.ConsumeTag(w.batch)
	if n < 0 {
		return errTruncated
	}
	b := w.batch[n:]
	if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
		return errTruncated
	}
	w.batch = b[n:]
	b = b[:n]
	if num != fieldBatchBaseOffset && num != fieldBatchAppendTime {
		return nil
	}
	// Legal protobuf, but nobody writes it so, and believing it would have
	// given wrong offsets to the records before it.
	if w.inRecord {
		return errOrder
	}
	switch {
	case num == fieldBatchBaseOffset && typ == protowire.VarintType:
		w.offset, _ = protowire.ConsumeVarint(b)
	case num == fieldBatchAppendTime && typ == protowire.BytesType:
		body, _ := protowire.ConsumeBytes(b)
		return w.timestamp(body)
	}
	return nil
}

func (w *walker) timestamp(b []byte) error {
	var seconds, nanos int64
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return errTruncated
		}
		value := b[n:]
		m := protowire.ConsumeFieldValue(num, typ, value)
		if m < 0 {
			return errTruncated
		}
		switch b[0] {
		case tagTimeSeconds:
			v, _ := protowire.ConsumeVarint(value)
			seconds = int64(v)
		case tagTimeNanos:
			v, _ := protowire.ConsumeVarint(value)
			nanos = int64(int32(v))
		}
		b = value[m:]
	}
	w.time = time.Unix(seconds, nanos).UTC()
	return nil
}

func (w *walker) decode(b []byte) error {
	r := &w.record
	r.Key, r.Value, r.Headers = nil, nil, r.Headers[:0]
	for len(b) > 0 {
		tag := b[0]
		if tag != tagKey && tag != tagValue && tag != tagHeader {
			num, typ, n := protowire.ConsumeTag(b)
			if n < 0 {
				return errTruncated
			}
			m := protowire.ConsumeFieldValue(num, typ, b[n:])
			if m < 0 {
				return errTruncated
			}
			b = b[n+m:]
			continue
		}
		body, n := consumeBytes(b[1:])
		if n < 0 {
			return errTruncated
		}
		b = b[1+n:]
		switch tag {
		case tagKey:
			r.Key = body
		case tagValue:
			r.Value = body
		case tagHeader:
			h, err := decodeHeader(body)
			if err != nil {
				return err
			}
			r.Headers = append(r.Headers, h)
		}
	}
	return nil
}

func decodeHeader(b []byte) (h ConsumedHeader, err error) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return h, errTruncated
		}
		m := protowire.ConsumeFieldValue(num, typ, b[n:])
		if m < 0 {
			return h, errTruncated
		}
		switch b[0] {
		case tagHeaderName:
			body, _ := protowire.ConsumeBytes(b[n:])
			h.Name = string(body)
		case tagHeaderValue:
			h.Value, _ = protowire.ConsumeBytes(b[n:])
		}
		b = b[n+m:]
	}
	return h, nil
}

// consumeBytes is protowire.ConsumeBytes with a short cut for the short.
func consumeBytes(b []byte) (body []byte, n int) {
	if len(b) > 0 && b[0] < 0x80 {
		n = 1 + int(b[0])
		if n > len(b) {
			return nil, -1
		}
		return b[1:n:n], n
	}
	body, n = protowire.ConsumeBytes(b)
	if n < 0 {
		return nil, -1
	}
	return body[:len(body):len(body)], n
}
