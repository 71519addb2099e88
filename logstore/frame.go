package logstore

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// The numbers in this file are on disk: they never change without a new
// formatVersion. docs/FORMAT.md has the byte tables.
const (
	frameVersion = 1

	// HeaderSize is the size of a frame's header. The payload follows it
	// directly, so a reader that holds a frame owns HeaderSize bytes in front
	// of its payload.
	HeaderSize = 64

	// frameAlign: frames start at multiples of it, so that recovery can look
	// for frames behind damaged bytes.
	frameAlign = 8
)

// castagnoli has an instruction of its own on amd64 and arm64.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Entry is one entry of the log: what Raft replicates as one unit and what a
// frame stores.
type Entry struct {
	// Index is the Raft index; entries are stored at consecutive ones.
	Index uint64
	// Term is the Raft term; it never falls from one entry to the next.
	Term uint64
	// Type is the Raft entry type, opaque here.
	Type uint8
	// Count is the number of records in Payload. Entries without records
	// (elections, configurations) take no offset.
	Count uint32
	// BaseOffset is the offset of the first record. Append checks it on entries
	// with records, and fills it in on others with the next offset.
	BaseOffset uint64
	// AppendTime is when the leader appended the entry, in nanoseconds since
	// 1970 UTC. It never falls; Append raises it on entries without records.
	AppendTime int64
	// Payload is opaque here.
	Payload []byte
}

// frameHeader is the fixed part of a frame, decoded.
type frameHeader struct {
	crc     uint32
	prevCRC uint32
	length  uint32 // of the payload, in bytes
	typ     uint8
	count   uint32
	index   uint64
	term    uint64
	base    uint64
	time    int64
	// synced is the index of the last entry that was known to be durable when
	// this frame was written: bad bytes at or below it are damage, not a torn
	// write.
	synced uint64
}

// frameSize is the space a frame with such a payload takes in a file.
func frameSize(payload int) int64 {
	return (HeaderSize + int64(payload) + frameAlign - 1) &^ (frameAlign - 1)
}

func (h *frameHeader) size() int64 { return frameSize(int(h.length)) }

// appendFrame encodes a frame and returns its checksum. seed ties the checksum
// to one segment of one log, see segmentHeader.seed.
func appendFrame(dst []byte, seed, prevCRC uint32, synced uint64, e *Entry) ([]byte, uint32) {
	start := len(dst)
	dst = append(dst, make([]byte, HeaderSize)...)
	dst = append(dst, e.Payload...)
	for int64(len(dst)-start) < frameSize(len(e.Payload)) {
		dst = append(dst, 0)
	}
	f := dst[start:]
	le := binary.LittleEndian
	le.PutUint32(f[4:], prevCRC)
	le.PutUint32(f[8:], uint32(len(e.Payload)))
	f[12] = frameVersion
	f[13] = e.Type
	// f[14:16] is reserved and zero.
	le.PutUint64(f[16:], e.Index)
	le.PutUint64(f[24:], e.Term)
	le.PutUint64(f[32:], e.BaseOffset)
	le.PutUint64(f[40:], uint64(e.AppendTime))
	le.PutUint64(f[48:], synced)
	le.PutUint32(f[56:], e.Count)
	sum := headerSum(f, seed)
	le.PutUint32(f[60:], sum)
	crc := frameSum(f, sum)
	le.PutUint32(f, crc)
	return dst, crc
}

// headerSum is a checksum of the header alone. It makes the length something
// to rely on before that many bytes are read, and it lets recovery tell frames
// from records that imitate them at the cost of a header, not of a payload.
func headerSum(f []byte, seed uint32) uint32 { return crc32.Update(seed, castagnoli, f[4:60]) }

// frameSum is a frame's checksum: that of its header, gone on with over payload
// and padding. It leaves out the four bytes of the header's sum itself: a CRC
// of bytes and their own CRC is the same for all bytes, and the frame's would
// then say nothing of the header, nor through it of the frames before.
func frameSum(f []byte, headerSum uint32) uint32 {
	return crc32.Update(headerSum, castagnoli, f[HeaderSize:])
}

// checkHeader decodes a header and checks that it is one of this segment's.
func checkHeader(b []byte, seed uint32) (frameHeader, error) {
	if len(b) < HeaderSize {
		return frameHeader{}, fmt.Errorf("%d bytes are too few for a frame header", len(b))
	}
	h := parseHeader(b)
	if b[12] != frameVersion {
		return h, fmt.Errorf("frame version is %d, not %d", b[12], frameVersion)
	}
	if want, got := binary.LittleEndian.Uint32(b[60:]), headerSum(b, seed); got != want {
		return h, fmt.Errorf("the frame header's checksum is %08x, its bytes give %08x", want, got)
	}
	if h.length > MaxPayload {
		return h, fmt.Errorf("payload length %d is over the limit", h.length)
	}
	return h, nil
}

// parseHeader decodes a header without checking it. b holds at least
// HeaderSize bytes.
func parseHeader(b []byte) (h frameHeader) {
	le := binary.LittleEndian
	h.crc = le.Uint32(b)
	h.prevCRC = le.Uint32(b[4:])
	h.length = le.Uint32(b[8:])
	h.typ = b[13]
	h.index = le.Uint64(b[16:])
	h.term = le.Uint64(b[24:])
	h.base = le.Uint64(b[32:])
	h.time = int64(le.Uint64(b[40:]))
	h.synced = le.Uint64(b[48:])
	h.count = le.Uint32(b[56:])
	return h
}

// parseFrame decodes and checks the frame at the start of b. The error says
// what is wrong with it, for people. It never reads past b.
func parseFrame(b []byte, seed uint32) (frameHeader, error) {
	h, err := checkHeader(b, seed)
	if err != nil {
		return h, err
	}
	if h.size() > int64(len(b)) {
		return h, fmt.Errorf("payload length %d goes past the end", h.length)
	}
	if got := frameSum(b[:h.size()], binary.LittleEndian.Uint32(b[60:])); got != h.crc {
		return h, fmt.Errorf("checksum is %08x, the bytes give %08x", h.crc, got)
	}
	return h, nil
}

// entry makes an Entry whose payload aliases b, the frame's bytes.
func (h *frameHeader) entry(b []byte) Entry {
	return Entry{
		Index:      h.index,
		Term:       h.term,
		Type:       h.typ,
		Count:      h.count,
		BaseOffset: h.base,
		AppendTime: h.time,
		Payload:    b[HeaderSize : HeaderSize+int(h.length) : HeaderSize+int(h.length)],
	}
}

// tail is where a chain of frames ends: everything the next frame must fit.
type tail struct {
	index  uint64 // of the last entry
	term   uint64
	crc    uint32
	offset uint64 // the next one to assign
	time   int64
	synced uint64 // the greatest synced mark seen
	pos    int64  // in the segment file, where the next frame goes
}

// check tells whether a frame with a good checksum is the one that follows t.
func (t *tail) check(h *frameHeader) error {
	switch {
	case h.prevCRC != t.crc:
		return fmt.Errorf("frame follows checksum %08x, the previous frame's is %08x", h.prevCRC, t.crc)
	case h.index != t.index+1:
		return fmt.Errorf("frame has index %d where %d belongs", h.index, t.index+1)
	case h.term < t.term:
		return fmt.Errorf("frame has term %d after term %d", h.term, t.term)
	case h.base != t.offset:
		return fmt.Errorf("frame has base offset %d where %d belongs", h.base, t.offset)
	case h.time < t.time:
		return fmt.Errorf("frame has append time %d after %d", h.time, t.time)
	case h.synced > t.index:
		return fmt.Errorf("frame claims that index %d is synced, but follows index %d", h.synced, t.index)
	}
	return nil
}

func (t *tail) advance(h *frameHeader) {
	t.index, t.term, t.crc = h.index, h.term, h.crc
	t.offset += uint64(h.count)
	t.time = h.time
	t.synced = max(t.synced, h.synced)
	t.pos += h.size()
}
