package replica

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
)

// A saved snapshot is a copy of a log outside of any cluster, as one stream:
//
//	header   32 bytes: magic, checksum, version, length of info, size of all
//	info     SavedInfo, as JSON
//	content  a snapshot on its way, see snapstream.go
//	trailer  64 bytes: magic, checksum, version, size of all, SHA-256 of all before
//
// So what was cut off shows by the trailer, and any other byte by the SHA-256.
// The numbers never change without another version: docs/FORMAT.md has the table.
const (
	savedMagic     = "DIURNSAV"
	savedEndMagic  = "DIURNEND"
	savedVersion   = 1
	savedHeader    = 32
	savedTrailer   = 64
	savedInfoLimit = 64 << 10

	savedName = "the snapshot"
	// snapshotPatience is how long Raft may take until it can take a snapshot.
	snapshotPatience = 30 * time.Second
)

// SavedInfo says what a saved snapshot holds.
type SavedInfo struct {
	// ClusterID, ClusterName and NodeID are where it was taken, Version the
	// program that did it.
	ClusterID   string `json:"cluster_id"`
	ClusterName string `json:"cluster,omitempty"`
	NodeID      string `json:"node_id"`
	Version     string `json:"version,omitempty"`
	// Taken is when, by the node's clock.
	Taken time.Time `json:"taken"`
	// FirstOffset is that of the first record, NextOffset that after the last one.
	FirstOffset uint64 `json:"first_offset"`
	NextOffset  uint64 `json:"next_offset"`
	// Index and Term are those of the last entry of Raft's.
	Index uint64 `json:"index"`
	Term  uint64 `json:"term"`
	// LastAppendTime is that of the last record, in nanoseconds since 1970 UTC; 0
	// where there never was one.
	LastAppendTime int64 `json:"last_append_time,omitempty"`
	// SegmentSize is how large segments were to become where it was taken; 0 for
	// the default.
	SegmentSize int64 `json:"segment_size,omitempty"`

	// Size is that of all of it, in bytes.
	Size int64 `json:"-"`
	// SHA256 is that of all of it, in hexadecimal. Only whoever has read all of
	// it knows it.
	SHA256 string `json:"-"`
}

// Records is how many there are.
func (i *SavedInfo) Records() uint64 { return i.NextOffset - i.FirstOffset }

// Saved is a snapshot that is being saved: the stream of it. What it holds was
// committed when Save returned; nothing is copied in advance. Until Close it
// keeps the files open that have yet to be read, so that what retention deletes
// meanwhile is still in it, and takes up space until then. It is for one
// goroutine, but for Close, which ends it.
type Saved struct {
	Info SavedInfo // all but SHA256, until Read has returned io.EOF

	head   io.Reader
	stream *streamReader
	sum    hash.Hash
	at     int64
	tail   []byte // not nil: content is read
}

// Save begins to save the log: all that was committed on this server when it was
// called. about says who it is: NodeID, ClusterName, Version; the rest is filled
// in. It must be closed.
//
// Errors: ErrClosed, an ErrDamaged's cause, ctx's.
func (r *Replica) Save(ctx context.Context, about SavedInfo) (*Saved, error) {
	ctx, cancel := context.WithTimeout(ctx, snapshotPatience)
	defer cancel()
	gen, f, err := r.holdSnapshot(ctx)
	if err != nil {
		return nil, fmt.Errorf("save the log: %w", err)
	}
	s, err := r.save(gen, f, about)
	if err != nil {
		r.gens.release(gen)
		return nil, fmt.Errorf("save the log: %w", err)
	}
	return s, nil
}

func (r *Replica) save(gen *generation, f *snapshotFile, info SavedInfo) (*Saved, error) {
	var state fsmState
	if err := unmarshalStrictly(f.State, &state); err != nil {
		return nil, err
	}
	// Retention need not wait: the export holds the files that it has yet to read.
	stream, err := openStream(gen, f, r.damaged, func() { r.gens.release(gen) })
	if err != nil {
		r.damaged(err)
		return nil, err
	}
	info.ClusterID, info.Taken = state.ClusterID, r.cfg.Now().UTC()
	info.FirstOffset = max(state.FirstOffset, stream.export.FirstOffset())
	info.NextOffset, info.Index, info.Term = state.NextOffset, f.Index, f.Term
	info.LastAppendTime, info.SegmentSize = stream.export.LastAppendTime(), r.cfg.SegmentSize
	head, err := encodeSavedHead(&info, stream.size)
	if err != nil {
		return nil, errors.Join(err, stream.export.Close())
	}
	return &Saved{Info: info, head: bytes.NewReader(head), stream: stream, sum: sha256.New()}, nil
}

// holdSnapshot returns a snapshot of all that was applied when it was called,
// and the generation that it is of, which is in use until it is released.
func (r *Replica) holdSnapshot(ctx context.Context) (*generation, *snapshotFile, error) {
	wanted := r.applied.Load()
	for {
		err := r.ask(ctx, func() error { return r.raft.Snapshot().Error() })
		switch {
		// Nothing was applied since the start: then there is one of all of it.
		case err == nil, errors.Is(err, raft.ErrNothingNewToSnapshot):
		// Who the members are is not agreed on yet, or who leads.
		case strings.HasPrefix(err.Error(), "cannot take snapshot now"), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		default:
			return nil, nil, err
		}
		gen := r.gens.use()
		f, _, err := gen.snapshots.newest()
		if err == nil && f != nil && f.Index >= wanted {
			return gen, f, nil
		}
		r.gens.release(gen)
		if err != nil {
			return nil, nil, err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("waiting for raft to take a snapshot: %w", ctx.Err())
		}
	}
}

// encodeSavedHead makes header and info for a content of a size, and notes the
// size of all.
func encodeSavedHead(info *SavedInfo, content int64) ([]byte, error) {
	body, err := json.Marshal(info)
	if err != nil {
		return nil, err
	}
	if len(body) > savedInfoLimit {
		return nil, fmt.Errorf("%d bytes about a snapshot are too many", len(body))
	}
	info.Size = savedHeader + int64(len(body)) + content + savedTrailer
	b := make([]byte, savedHeader, savedHeader+len(body))
	le := binary.LittleEndian
	copy(b, savedMagic)
	le.PutUint32(b[12:], savedVersion)
	le.PutUint64(b[16:], uint64(len(body)))
	le.PutUint64(b[24:], uint64(info.Size))
	b = append(b, body...)
	le.PutUint32(b[8:], crc32.Checksum(b[12:], castagnoli))
	return b, nil
}

func encodeSavedTrailer(size int64, sum []byte) []byte {
	b := make([]byte, savedTrailer)
	le := binary.LittleEndian
	copy(b, savedEndMagic)
	le.PutUint32(b[12:], savedVersion)
	le.PutUint64(b[16:], uint64(size))
	copy(b[32:], sum)
	le.PutUint32(b[8:], crc32.Checksum(b[12:], castagnoli))
	return b
}

// Read implements io.Reader. Every checksum is checked before a byte is
// returned.
func (s *Saved) Read(p []byte) (n int, err error) {
	if s.tail == nil {
		n, err = s.head.Read(p)
		if errors.Is(err, io.EOF) {
			n, err = s.stream.Read(p)
		}
		s.sum.Write(p[:n]) // never fails
		s.at += int64(n)
		if !errors.Is(err, io.EOF) || n > 0 {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return n, err
		}
		if s.at != s.Info.Size-savedTrailer {
			return 0, fmt.Errorf("the log had %d bytes, not %d", s.at, s.Info.Size-savedTrailer)
		}
		s.tail = encodeSavedTrailer(s.Info.Size, s.sum.Sum(nil))
		s.sum.Write(s.tail)
		s.Info.SHA256 = hex.EncodeToString(s.sum.Sum(nil))
	}
	if len(s.tail) == 0 {
		return 0, io.EOF
	}
	n = copy(p, s.tail)
	s.tail = s.tail[n:]
	return n, nil
}

// Close ends it, also where it was not read to its end.
func (s *Saved) Close() error { return s.stream.Close() }

// CheckSaved reads a saved snapshot to its end and checks all of it, and that
// nothing follows. It holds no more than a few MiB in memory, or twice the
// largest entry.
//
// Errors: a *CorruptError or a *logstore.StreamError for what is not a whole and
// unaltered snapshot, a *VersionError or *logstore.VersionError for one of a
// newer format, r's.
func CheckSaved(r io.Reader) (SavedInfo, error) {
	return readSaved(r, func(_ *snapshotFile, _ *fsmState, log io.Reader) (logstore.ImportStats, error) {
		return logstore.CheckExport(log)
	})
}

// counted counts and sums what is read.
type counted struct {
	r   io.Reader
	at  int64
	sum hash.Hash
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.sum.Write(p[:n])
	c.at += int64(n)
	return n, err
}

// readFull reads a part of a snapshot.
func (c *counted) readFull(b []byte) error {
	_, err := io.ReadFull(c, b)
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return &CorruptError{savedName, fmt.Sprintf("it ends early, at byte %d", c.at)}
	case err != nil:
		return fmt.Errorf("read %s at byte %d: %w", savedName, c.at, err)
	}
	return nil
}

// readSaved checks a snapshot. take gets the log, which it has to read to its
// end; what it makes of it counts only if readSaved returns no error.
func readSaved(r io.Reader, take func(f *snapshotFile, state *fsmState, log io.Reader) (logstore.ImportStats, error)) (info SavedInfo, err error) {
	in := &counted{r: r, sum: sha256.New()}
	if info, err = readSavedHead(in); err != nil {
		return info, err
	}
	content := info.Size - savedTrailer - in.at
	f, state, err := readSavedMeta(in, content)
	if err != nil {
		return info, err
	}
	stats, err := take(f, state, io.LimitReader(in, info.Size-savedTrailer-in.at))
	if err != nil {
		return info, err
	}
	bad := func(format string, args ...any) error {
		return &CorruptError{savedName, fmt.Sprintf(format, args...)}
	}
	switch {
	case f.Index != info.Index || f.Term != info.Term || state.NextOffset != info.NextOffset || state.ClusterID != info.ClusterID:
		return info, bad("its parts are of different snapshots")
	case stats.LastIndex != f.Index || stats.LastTerm != f.Term || stats.NextOffset != state.NextOffset || stats.LastAppendTime != info.LastAppendTime:
		return info, bad("it is of index %d, term %d, next offset %d, but its log ends at index %d, term %d, next offset %d", f.Index, f.Term, state.NextOffset, stats.LastIndex, stats.LastTerm, stats.NextOffset)
	case info.FirstOffset != max(state.FirstOffset, stats.FirstOffset) || info.FirstOffset > info.NextOffset:
		return info, bad("it claims offsets from %d on, its log begins at %d", info.FirstOffset, max(state.FirstOffset, stats.FirstOffset))
	case in.at != info.Size-savedTrailer:
		return info, bad("it claims %d bytes, and its log ends at byte %d", info.Size, in.at)
	}
	sum := in.sum.Sum(nil)
	trailer := make([]byte, savedTrailer)
	if err := in.readFull(trailer); err != nil {
		return info, err
	}
	if !bytes.Equal(trailer, encodeSavedTrailer(info.Size, sum)) {
		return info, bad("its bytes are not those that were saved: their SHA-256 is not the one at its end")
	}
	info.SHA256 = hex.EncodeToString(in.sum.Sum(nil))
	n, err := in.Read(make([]byte, 1))
	switch {
	case n > 0:
		return info, bad("something follows its end, at byte %d", info.Size)
	case err != nil && !errors.Is(err, io.EOF):
		return info, fmt.Errorf("read the end of %s: %w", savedName, err)
	}
	return info, nil
}

func readSavedHead(in *counted) (info SavedInfo, err error) {
	b := make([]byte, savedHeader)
	if err := in.readFull(b); err != nil {
		return info, err
	}
	le := binary.LittleEndian
	if string(b[:8]) != savedMagic {
		return info, &CorruptError{savedName, "this is not one that Diurna has saved"}
	}
	length, size := le.Uint64(b[16:]), le.Uint64(b[24:])
	if length > savedInfoLimit || size > 1<<62 || size < savedHeader+length+savedTrailer {
		return info, &CorruptError{savedName, fmt.Sprintf("it claims %d bytes about itself, in %d", length, size)}
	}
	b = append(b, make([]byte, length)...)
	if err := in.readFull(b[savedHeader:]); err != nil {
		return info, err
	}
	if le.Uint32(b[8:]) != crc32.Checksum(b[12:], castagnoli) {
		return info, &CorruptError{savedName, "the checksum of its header is wrong"}
	}
	// What came before is the same in every version.
	if v := le.Uint32(b[12:]); v != savedVersion {
		return info, &VersionError{savedName, fmt.Sprint("format version ", v)}
	}
	if err := json.Unmarshal(b[savedHeader:], &info); err != nil {
		return info, &CorruptError{savedName, err.Error()}
	}
	info.Size = int64(size)
	return info, nil
}

// readSavedMeta reads the content's own header and the state machine's numbers.
func readSavedMeta(in *counted, content int64) (*snapshotFile, *fsmState, error) {
	b := make([]byte, streamHeader)
	if err := in.readFull(b); err != nil {
		return nil, nil, err
	}
	length, err := parseStreamHeader(b)
	if version := (*VersionError)(nil); errors.As(err, &version) {
		return nil, nil, err
	} else if err != nil {
		return nil, nil, &CorruptError{savedName, err.Error()}
	}
	if int64(length) > content-streamHeader {
		return nil, nil, &CorruptError{savedName, fmt.Sprintf("its metadata claims %d bytes of %d", length, content)}
	}
	b = make([]byte, length)
	if err := in.readFull(b); err != nil {
		return nil, nil, err
	}
	f, err := parseSnapshot(savedName, b)
	if err != nil {
		return nil, nil, err
	}
	state := new(fsmState)
	if err := unmarshalStrictly(f.State, state); err != nil {
		return nil, nil, &VersionError{savedName, err.Error()}
	}
	return f, state, nil
}
