package logstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// The numbers in this file are on the wire between nodes of different versions:
// they never change without a new formatVersion. docs/FORMAT.md has the byte
// tables.
const (
	exportMagic      = "DIURNEXP"
	exportHeaderSize = 128
	// A section holds the frames of one segment.
	sectionMagic      = "DIURNSEC"
	sectionHeaderSize = 64

	// streamChunk is how much is read and checked at a time: small enough for a
	// processor's cache, large enough for a disk. A larger entry has a chunk of
	// its own.
	streamChunk = 512 << 10
)

// exportHeader begins a stream: where the log starts, what its first frame
// continues, and where it ends.
type exportHeader struct {
	id         logID
	start, end tail // pos and synced are not part of it
	size       int64
}

func (h *exportHeader) encode() []byte {
	b := make([]byte, exportHeaderSize)
	le := binary.LittleEndian
	copy(b[preambleSize:], h.id[:])
	le.PutUint64(b[32:], h.start.index+1)
	le.PutUint64(b[40:], h.start.offset)
	le.PutUint64(b[48:], h.start.term)
	le.PutUint64(b[56:], uint64(h.start.time))
	le.PutUint32(b[64:], h.start.crc)
	le.PutUint32(b[68:], h.end.crc)
	le.PutUint64(b[72:], h.end.index)
	le.PutUint64(b[80:], h.end.offset)
	le.PutUint64(b[88:], h.end.term)
	le.PutUint64(b[96:], uint64(h.end.time))
	le.PutUint64(b[104:], uint64(h.size))
	// The rest is reserved and zero.
	return sealPreamble(b, exportMagic)
}

// sectionHeader stands before the frames of each segment, whose checksums begin
// with that segment's seed.
type sectionHeader struct {
	id    logID
	first uint64 // index
	last  uint64 // index
	bytes int64  // of frames
}

func (h *sectionHeader) encode() []byte {
	b := make([]byte, sectionHeaderSize)
	le := binary.LittleEndian
	copy(b[preambleSize:], h.id[:])
	le.PutUint64(b[32:], h.first)
	le.PutUint64(b[40:], h.last)
	le.PutUint64(b[48:], uint64(h.bytes))
	// The rest is reserved and zero.
	return sealPreamble(b, sectionMagic)
}

// Export is a log on its way to another node, as a stream that Import reads:
// all entries from the log's first one through a certain one, as they were when
// it was made. Nothing is copied in advance.
//
// It holds the segments' files open, one descriptor for each, until each has
// been read or Close is called. What is appended, truncated or deleted
// meanwhile does not change what is read; deleted files take up space until
// then. It does not end with the log's Close.
//
// Read and WriteTo are for one goroutine; Close may be called from any other to
// end them.
type Export struct {
	l      *Log
	header exportHeader
	parts  []exportPart

	mu     vfs.Mutex // guards the parts' files
	closed bool

	next  int      // the part to read next; the stream's header is before part 0
	file  vfs.File // of the part that is being read
	s     *segment // its segment
	pos   int64    // in file: what is to be read next
	end   int64    // in file: where the part's frames end
	tail  tail     // of what was checked
	buf   []byte   // of the file up to pos
	have  int      // bytes in buf
	used  int      // of these, checked and handed to ready
	ready []byte   // checked, to be returned by Read
	err   error    // sticky, io.EOF at the end
}

type exportPart struct {
	section sectionHeader
	s       *segment
	file    vfs.File // nil when closed
}

// exports are those that are not closed. A truncation asks them whether it may
// change a file.
type exports struct {
	mu   sync.Mutex
	open map[*Export]uint64 // up to which index
}

func (es *exports) add(x *Export, through uint64) {
	es.mu.Lock()
	defer es.mu.Unlock()
	if es.open == nil {
		es.open = make(map[*Export]uint64)
	}
	es.open[x] = through
}

func (es *exports) remove(x *Export) {
	es.mu.Lock()
	defer es.mu.Unlock()
	delete(es.open, x)
}

// unlessHeld publishes a state without the entries from an index on, unless an
// export reads one of them; then it returns false. Exports that come later see
// that state.
func (es *exports) unlessHeld(from uint64, publish func()) bool {
	es.mu.Lock()
	defer es.mu.Unlock()
	for _, through := range es.open {
		if through >= from {
			return false
		}
	}
	publish()
	return true
}

// Export makes a stream of the log from its first entry through the one with
// that index, which need not be kept: with one less than FirstIndex only the
// start of the log is exported.
//
// Errors: a *RangeError (which is an ErrNotFound) where the log starts behind
// or ends before that index, a *CorruptError for damage where Export has to
// look; damage elsewhere is one from Read.
func (l *Log) Export(through uint64) (*Export, error) {
	x := &Export{l: l}
	// Before the state is looked at: from now on a truncation keeps its hands
	// off the files.
	l.exports.add(x, through)
	err := l.retry(func(st *state) error {
		if err := x.open(st, through); err != nil {
			return errors.Join(err, x.closeFiles())
		}
		if l.state.Load().cuts != st.cuts {
			// A file may have been another by the time it was opened.
			return errors.Join(errStateChanged, x.closeFiles())
		}
		return nil
	})
	if err != nil {
		l.exports.remove(x)
		return nil, err
	}
	return x, nil
}

var errStateChanged = errors.New("the log was truncated or deleted from meanwhile")

// open opens what st has up to an index.
func (x *Export) open(st *state, through uint64) error {
	first := st.segs[0].firstIndex
	if through+1 < first || through > st.tail.index {
		return &RangeError{Index: through, First: first, Last: st.tail.index}
	}
	x.parts = nil
	x.header = exportHeader{id: x.l.id, start: st.segs[0].start(), size: exportHeaderSize}
	k := st.segmentOf(max(through, first))
	for i, s := range st.segs[:k+1] {
		var end tail
		err := x.l.withIndex(st, i, func(o *openSegment, index *frameIndex) (err error) {
			if i == k {
				end, err = tailBefore(o, index, s, through+1)
				return err
			}
			end.index, end.pos = s.last, index.end
			return o.damage
		})
		if err != nil {
			return err
		}
		if i == k {
			x.header.end = end
		}
		if end.pos == segmentHeaderSize {
			continue
		}
		f, err := x.l.fs.Open(s.file)
		if err != nil {
			return err
		}
		section := sectionHeader{id: x.l.id, first: s.firstIndex, last: end.index, bytes: end.pos - segmentHeaderSize}
		x.parts = append(x.parts, exportPart{section: section, s: s, file: f})
		x.header.size += sectionHeaderSize + section.bytes
		if h, err := readSegmentHeader(f, s.file, s.firstIndex); err != nil {
			return err
		} else if h != s.segmentHeader {
			return s.corrupt(0, "the header is not the one that the log was opened with")
		}
	}
	x.tail = x.header.start
	return nil
}

// Size is the exact length of the stream in bytes.
func (x *Export) Size() int64 { return x.header.size }

// FirstIndex is that of the log when it was exported.
func (x *Export) FirstIndex() uint64 { return x.header.start.index + 1 }

// FirstOffset is that of the log when it was exported.
func (x *Export) FirstOffset() uint64 { return x.header.start.offset }

// LastIndex is the index through which it goes.
func (x *Export) LastIndex() uint64 { return x.header.end.index }

// LastTerm is the term of the entry at LastIndex, also if that is not kept.
func (x *Export) LastTerm() uint64 { return x.header.end.term }

// NextOffset is the offset of the first record behind LastIndex.
func (x *Export) NextOffset() uint64 { return x.header.end.offset }

// LastAppendTime is the append time of the entry at LastIndex, in nanoseconds
// since 1970 UTC.
func (x *Export) LastAppendTime() int64 { return x.header.end.time }

// Read implements io.Reader. Every frame's checksums are checked before a byte
// of it is returned; damage is a *CorruptError.
func (x *Export) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := x.fill(); err != nil {
		return 0, err
	}
	n := copy(p, x.ready)
	x.ready = x.ready[n:]
	return n, nil
}

// WriteTo implements io.WriterTo: it writes what Read would return, from the
// buffer that it was read from the disk into.
func (x *Export) WriteTo(w io.Writer) (written int64, err error) {
	for {
		if err := x.fill(); errors.Is(err, io.EOF) {
			return written, nil
		} else if err != nil {
			return written, err
		}
		n, err := w.Write(x.ready)
		x.ready = x.ready[n:]
		written += int64(n)
		if err != nil {
			return written, err
		}
		if len(x.ready) > 0 {
			return written, io.ErrShortWrite
		}
	}
}

// Close releases the files and lets the log cut them. Further calls do nothing.
func (x *Export) Close() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return nil
	}
	x.closed = true
	x.l.exports.remove(x)
	return x.closeFilesLocked()
}

func (x *Export) closeFiles() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.closeFilesLocked()
}

func (x *Export) closeFilesLocked() error {
	var err error
	for i := range x.parts {
		if f := x.parts[i].file; f != nil {
			err = errors.Join(err, f.Close())
			x.parts[i].file = nil
		}
	}
	return err
}

// fill makes ready not empty.
func (x *Export) fill() error {
	for x.err == nil && len(x.ready) == 0 {
		if x.err = x.step(); x.err != nil && !errors.Is(x.err, io.EOF) && x.isClosed() {
			x.err = ErrClosed // and not what the file says
		}
	}
	if len(x.ready) > 0 {
		return nil
	}
	return x.err
}

func (x *Export) step() error {
	switch {
	case x.isClosed():
		return ErrClosed
	case x.buf == nil:
		x.buf = make([]byte, streamChunk)
		x.ready = x.header.encode()
		return nil
	case x.pos < x.end || x.used < x.have:
		return x.readFrames()
	}
	return x.nextPart()
}

func (x *Export) isClosed() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.closed
}

// nextPart ends one part and begins the next one, with its header.
func (x *Export) nextPart() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return ErrClosed
	}
	if x.next > 0 {
		p := &x.parts[x.next-1]
		if x.tail.index != p.section.last {
			return p.s.corrupt(x.end, "the frames end at index %d, the index file says %d", x.tail.index, p.section.last)
		}
		// A deleted file's space is free from here on.
		err := p.file.Close()
		if p.file = nil; err != nil {
			return err
		}
	}
	if x.next == len(x.parts) {
		if err := sameEnd(&x.tail, &x.header.end); err != nil {
			return fmt.Errorf("export: %w", err) // the checks of each frame leave no way to get here
		}
		return io.EOF
	}
	p := &x.parts[x.next]
	x.next++
	if h := x.tail.header(x.header.id); h != p.s.segmentHeader {
		return p.s.corrupt(0, "the segment follows index %d, checksum %08x; the one before it ends at index %d, checksum %08x", p.s.firstIndex-1, p.s.prevCRC, x.tail.index, x.tail.crc)
	}
	x.file, x.s = p.file, p.s
	x.pos, x.end = segmentHeaderSize, segmentHeaderSize+p.section.bytes
	x.tail.pos = segmentHeaderSize
	x.have, x.used = 0, 0
	x.ready = p.section.encode()
	return nil
}

// sameEnd compares where frames ended with where they should.
func sameEnd(got, want *tail) error {
	if got.index != want.index || got.crc != want.crc || got.offset != want.offset || got.term != want.term || got.time != want.time {
		return fmt.Errorf("the frames end at index %d, term %d, offset %d with checksum %08x, not at index %d, term %d, offset %d with checksum %08x",
			got.index, got.term, got.offset, got.crc, want.index, want.term, want.offset, want.crc)
	}
	return nil
}

// readFrames reads a chunk and makes the whole frames in it ready.
func (x *Export) readFrames() error {
	x.have = copy(x.buf, x.buf[x.used:x.have])
	x.used = 0
	n := min(int64(len(x.buf)-x.have), x.end-x.pos)
	got, err := x.file.ReadAt(x.buf[x.have:x.have+int(n)], x.pos)
	if int64(got) < n {
		if err == nil || errors.Is(err, io.EOF) {
			return x.s.corrupt(x.pos+int64(got), "the file ends where an entry goes on")
		}
		return fmt.Errorf("read %s: %w", x.s.file, err)
	}
	x.pos += n
	x.have += int(n)

	for x.used < x.have {
		b := x.buf[x.used:x.have]
		h, need, err := nextFrame(b, x.s.seed, &x.tail)
		if err != nil {
			return x.s.corrupt(x.tail.pos, "%v", err)
		}
		if need > len(b) {
			if x.pos == x.end {
				return x.s.corrupt(x.tail.pos, "a frame of %d bytes goes past the last one's end", need)
			}
			if x.used == 0 && need > len(x.buf) {
				x.buf = append(x.buf[:x.have:x.have], make([]byte, need-x.have)...)
			}
			break
		}
		x.tail.advance(&h)
		x.used += need
	}
	x.ready = x.buf[:x.used]
	return nil
}

// nextFrame checks the frame at the start of b, which follows t. need is its
// size; above len(b), more bytes are needed to tell, and h is not complete.
func nextFrame(b []byte, seed uint32, t *tail) (h frameHeader, need int, err error) {
	if len(b) < HeaderSize {
		return h, HeaderSize, nil
	}
	if h, err = checkHeader(b, seed); err != nil {
		return h, 0, err
	}
	if need = int(h.size()); need > len(b) {
		return h, need, nil
	}
	if h, err = parseFrame(b, seed); err != nil {
		return h, 0, err
	}
	return h, need, t.check(&h)
}
