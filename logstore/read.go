package logstore

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
)

// Batch is the place of one entry's records in a buffer that ReadBatches
// filled. The HeaderSize bytes before Start belong to the batch and may be
// overwritten.
type Batch struct {
	BaseOffset uint64
	AppendTime int64 // nanoseconds since 1970 UTC
	Count      uint32
	// Start and End bound the payload in the buffer.
	Start, End int
}

// Entry reads the entry with a Raft index into buf, which is grown as needed,
// and returns it with the buffer; the payload aliases the buffer. ErrNotFound
// means that the log does not hold the index (any more, or yet), a
// *CorruptError that its bytes are damaged.
func (l *Log) Entry(index uint64, buf []byte) (Entry, []byte, error) {
	var entry Entry
	err := l.retry(func(st *state) error {
		if index < st.segs[0].firstIndex || index > st.tail.index {
			return ErrNotFound
		}
		k := st.segmentOf(index)
		return l.withIndex(st, k, func(o *openSegment, x *frameIndex) error {
			s := st.segs[k]
			i := int(index - s.firstIndex)
			if err := x.covers(i, o); err != nil {
				return err
			}
			from, to := x.span(i)
			buf = slices.Grow(buf[:0], int(to-from))[:to-from]
			if err := readAt(o, s, buf, from); err != nil {
				return err
			}
			h, err := checkFrame(s, buf, from, index, x.at(i))
			if err != nil {
				return err
			}
			entry = h.entry(buf)
			return nil
		})
	})
	return entry, buf, err
}

// ReadBatches reads entries with records, in order, as many whole ones as fit
// into buf, the first being the one that holds offset from, up to the end of a
// segment, and none whose base offset is limit or above. It appends their
// places in buf to dst, and always at least one: what it returns has been
// checked against its CRC.
//
// Errors: ErrNotFound if from is not below limit or not in the log,
// *ShortBufferError if the first entry does not fit, *CorruptError if bytes
// are damaged. Damage behind the first entry ends the run before it.
func (l *Log) ReadBatches(from, limit uint64, buf []byte, dst []Batch) ([]Batch, error) {
	base := len(dst)
	err := l.retry(func(st *state) error {
		dst = dst[:base]
		if from < st.segs[0].firstOffset || from >= min(limit, st.tail.offset) {
			return ErrNotFound
		}
		// The last segment that starts at or before the offset: one without
		// records of its own starts where the next one does.
		k := sort.Search(len(st.segs), func(i int) bool { return st.segs[i].firstOffset > from }) - 1
		return l.withIndex(st, k, func(o *openSegment, x *frameIndex) (err error) {
			dst, err = readRun(o, x, st.segs[k], from, limit, buf, dst)
			return err
		})
	})
	return dst, err
}

func readRun(o *openSegment, x *frameIndex, s *segment, from, limit uint64, buf []byte, dst []Batch) ([]Batch, error) {
	i := x.byOffset(uint32(from - s.firstOffset))
	if o.damage != nil && i == x.len()-1 {
		// The index ends early: the record may be in what it does not cover.
		if holds, err := x.holds(o, s, i, from); err != nil || !holds {
			return dst, errors.Join(err, o.damage)
		}
	}
	start, end := x.span(i)
	if end-start > int64(len(buf)) {
		return dst, &ShortBufferError{int(end - start)}
	}
	// As many frames as fit: the positions are sorted.
	limitRel := min(limit-s.firstOffset, maxSegmentRecords+1)
	n := sort.Search(x.len()-i-1, func(j int) bool {
		_, to := x.span(i + 1 + j)
		return to-start > int64(len(buf)) || uint64(x.at(i+1+j).offset) >= limitRel
	}) + 1
	_, end = x.span(i + n - 1)
	buf = buf[:end-start]
	if err := readAt(o, s, buf, start); err != nil {
		return dst, err
	}
	first := true
	for j := i; j < i+n; j++ {
		at, to := x.span(j)
		h, err := checkFrame(s, buf[at-start:to-start], at, s.firstIndex+uint64(j), x.at(j))
		if err != nil {
			if first {
				return dst, err
			}
			return dst, nil
		}
		if h.count == 0 {
			continue
		}
		payload := int(at-start) + HeaderSize
		dst = append(dst, Batch{BaseOffset: h.base, AppendTime: h.time, Count: h.count, Start: payload, End: payload + int(h.length)})
		first = false
	}
	return dst, nil
}

// holds reads the header of frame i to tell whether it holds a record.
func (x *frameIndex) holds(o *openSegment, s *segment, i int, offset uint64) (bool, error) {
	if i < 0 {
		return false, nil
	}
	var b [HeaderSize]byte
	from, _ := x.span(i)
	if err := readAt(o, s, b[:], from); err != nil {
		return false, err
	}
	h := parseHeader(b[:])
	return offset < h.base+uint64(h.count), nil
}

// OffsetAtTime returns the offset of the first record that was appended at t,
// in nanoseconds since 1970 UTC, or later; NextOffset when there is none.
func (l *Log) OffsetAtTime(t int64) (offset uint64, err error) {
	err = l.retry(func(st *state) error {
		if t > st.tail.time {
			offset = st.tail.offset
			return nil
		}
		k := sort.Search(len(st.segs)-1, func(i int) bool { return st.segs[i].lastTime >= t })
		return l.withIndex(st, k, func(o *openSegment, x *frameIndex) error {
			s := st.segs[k]
			i := x.byTime(uint64(max(t-s.prevTime, 0)))
			if i == x.len() {
				if o.damage != nil {
					return o.damage
				}
				offset = st.tail.offset
				return nil
			}
			// The base offset of an entry without records is that of the next
			// one with some.
			offset = s.firstOffset + uint64(x.at(i).offset)
			return nil
		})
	})
	return offset, err
}

// IndexOfOffset returns the Raft index of the entry that holds an offset.
func (l *Log) IndexOfOffset(offset uint64) (index uint64, err error) {
	err = l.retry(func(st *state) error {
		if offset < st.segs[0].firstOffset || offset >= st.tail.offset {
			return ErrNotFound
		}
		k := sort.Search(len(st.segs), func(i int) bool { return st.segs[i].firstOffset > offset }) - 1
		return l.withIndex(st, k, func(o *openSegment, x *frameIndex) error {
			s := st.segs[k]
			i := x.byOffset(uint32(offset - s.firstOffset))
			if i < 0 || i == x.len()-1 && o.damage != nil {
				return o.damage
			}
			index = s.firstIndex + uint64(i)
			return nil
		})
	})
	return index, err
}

// covers tells whether frame i is in an index that damage may have ended early.
func (x *frameIndex) covers(i int, o *openSegment) error {
	if i < x.len() {
		return nil
	}
	if o.damage != nil {
		return o.damage
	}
	return ErrNotFound
}

// retry runs a read on the current state, again if it failed on a state that a
// truncation or deletion has replaced in the meantime: both publish the new
// state before they touch a file, so that a reader that stumbled over their
// work finds the state changed. Every repetition needs another truncation.
func (l *Log) retry(read func(*state) error) error {
	for {
		st := l.state.Load()
		err := read(st)
		if err == nil || errors.Is(err, ErrClosed) || l.state.Load().cuts == st.cuts {
			return err
		}
	}
}

// withIndex runs a read on the open k-th segment of st.
func (l *Log) withIndex(st *state, k int, read func(*openSegment, *frameIndex) error) error {
	s := st.segs[k]
	o, err := l.handles.acquire(s)
	if err != nil {
		return err
	}
	defer l.handles.release(s)
	if k == len(st.segs)-1 {
		return read(o, &st.active)
	}
	return read(o, o.index)
}

func readAt(o *openSegment, s *segment, b []byte, pos int64) error {
	n, err := o.file.ReadAt(b, pos)
	switch {
	case n == len(b):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return s.corrupt(pos+int64(n), "the file ends where an entry goes on")
	default:
		return fmt.Errorf("read %s: %w", s.file, err)
	}
}

// checkFrame checks that b, read from pos, is the frame that the index means.
func checkFrame(s *segment, b []byte, pos int64, index uint64, e indexEntry) (frameHeader, error) {
	h, err := parseFrame(b, s.seed)
	switch {
	case err != nil:
		return h, s.corrupt(pos, "%v", err)
	case h.index != index:
		return h, s.corrupt(pos, "frame has index %d where %d belongs", h.index, index)
	case h.base != s.firstOffset+uint64(e.offset):
		return h, s.corrupt(pos, "frame has base offset %d where %d belongs", h.base, s.firstOffset+uint64(e.offset))
	case h.size() != int64(len(b)):
		return h, s.corrupt(pos, "frame takes %d bytes where the index has %d", h.size(), len(b))
	}
	return h, nil
}
