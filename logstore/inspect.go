package logstore

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/diurnalog/diurna/logstore/vfs"
)

var (
	// ErrNotASegment: the file is something else, and its name does not claim
	// otherwise.
	ErrNotASegment = errors.New("not a segment file")
	// ErrChanged: the segment was truncated or removed while it was inspected.
	ErrChanged = errors.New("the segment was truncated or removed while it was read, inspect it again")
)

// Frame is one frame of a segment file, as it stands there.
type Frame struct {
	// Entry's payload is valid until visit returns.
	Entry
	Position     int64 // from the start of the file
	Size         int64 // with header and padding
	Synced       uint64
	CRC, PrevCRC uint32
}

// Ending says what stands behind the last good frame of a segment.
type Ending int

const (
	// EndClean: nothing, or zeros, as preallocation leaves them.
	EndClean Ending = iota
	// EndTorn: bytes that nobody was told are durable: a write that a crash cut
	// short, or one that is under way. Opening the log cuts them off.
	EndTorn
	// EndDamaged: bytes that were durable are not what was written.
	EndDamaged
)

func (e Ending) String() string {
	if e < EndClean || e > EndDamaged {
		return fmt.Sprintf("Ending(%d)", int(e))
	}
	return [...]string{"clean", "torn", "damaged"}[e]
}

// Beside says what a file that lies beside a segment is worth.
type Beside int

const (
	// Missing: there is no such file.
	Missing Beside = iota
	// OK: it agrees with the segment.
	OK
	// Stale: it describes the beginning of the segment, correctly: an index
	// from before the log was opened last. Closing the log replaces it.
	Stale
	// Wrong: it is damaged or describes something else. Of an index, that is
	// no loss: it is rebuilt from the segment.
	Wrong
)

func (b Beside) String() string {
	if b < Missing || b > Wrong {
		return fmt.Sprintf("Beside(%d)", int(b))
	}
	return [...]string{"missing", "ok", "stale", "wrong"}[b]
}

// Report is what Inspect found out about a segment file.
type Report struct {
	File string
	Size int64 // with what is preallocated

	// From the segment's header; zero if that is damaged.
	LogID                   [16]byte
	FirstIndex, FirstOffset uint64
	PrevTerm                uint64
	PrevTime                int64
	PrevCRC                 uint32

	// Of the good frames. With none, LastIndex is FirstIndex-1 and the others
	// are those of the header.
	Frames     int
	Records    uint64
	LastIndex  uint64
	LastTerm   uint64
	LastTime   int64
	NextOffset uint64
	LastCRC    uint32

	// Sealed: a later segment of the same log is there, or was, so that no
	// frame will be added to this one.
	Sealed bool
	// Leftover: the segment belongs to what was deleted, by a truncation or a
	// prefix deletion that a crash cut short; opening the log removes it.
	Leftover bool
	// Durable is the index up to which entries are known to have been durable,
	// from the frames, the checkpoint and the next segment.
	Durable uint64

	Ending   Ending
	Position int64 // where the last good frame ends
	// Damage says what is wrong, if Ending is EndDamaged; Detail also of a torn
	// end.
	Damage *CorruptError
	Detail string

	Index            Beside
	IndexDetail      string // why the index is stale or wrong, or how far it was compared
	Checkpoint       Beside
	CheckpointDetail string
}

// Inspect reads one segment file, checks all of it and calls visit (which may
// be nil) for every good frame, in order. If files of the same log lie beside
// it, it checks the index against the frames, and lets the checkpoint and the
// next segment say how far this one must reach.
//
// It writes nothing, and the log may be open at the same time, in another
// process too. What it finds wrong with the file is in the report; an error
// means that there is none: the file cannot be read, is of a newer format
// (*VersionError) or no segment (ErrNotASegment), was truncated meanwhile
// (ErrChanged), or visit returned it.
func Inspect(fsys vfs.FS, file string, visit func(Frame) error) (r Report, err error) {
	f, err := fsys.Open(file)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	i := inspection{fs: fsys, f: f, visit: visit}
	i.r.File = file
	err = i.run()
	return i.r, err
}

type inspection struct {
	fs    vfs.FS
	f     vfs.File
	visit func(Frame) error
	r     Report

	s      *segment
	sc     *scanner
	around surroundings
	index  indexCheck
	last   int64 // position of the last good frame, if there is one
}

func (i *inspection) run() error {
	h, err := i.header()
	if err != nil || i.r.Damage != nil {
		return err
	}
	i.s = newSegment(filepath.Dir(i.r.File), h)
	// The file may be a copy with another name.
	i.s.file = i.r.File
	i.s.idx = strings.TrimSuffix(i.r.File, segmentSuffix) + indexSuffix

	// Before the frames: what these files say to be durable is in the segment
	// by then, whatever is appended meanwhile.
	if i.around, err = i.lookAround(); err != nil {
		return err
	}
	if i.sc, err = newScanner(i.f, i.s); err != nil {
		return err
	}
	i.last = i.sc.tail.pos
	if err := i.index.load(i.fs, i.s, i.sc.size); err != nil {
		return err
	}
	if err := i.scan(); err != nil {
		return err
	}
	return i.conclude()
}

// header reads the segment's header. One that is damaged ends up in the report.
func (i *inspection) header() (h segmentHeader, err error) {
	if i.r.Size, err = i.f.Size(); err != nil {
		return h, err
	}
	b := make([]byte, segmentHeaderSize)
	n, err := i.f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return h, err
	}
	first, named := parseSegmentName(filepath.Base(i.r.File))
	h, err = parseSegmentHeader(i.r.File, b[:n])
	if err == nil && named && h.firstIndex != first {
		err = &CorruptError{i.r.File, 32, fmt.Sprintf("the header says that the segment starts at index %d, the name says %d", h.firstIndex, first)}
	}
	var bad *CorruptError
	switch {
	case err == nil:
	case errors.As(err, &bad) && bad.Position == 0 && !named:
		return h, fmt.Errorf("%s: %w%s", i.r.File, ErrNotASegment, otherKind(b[:n]))
	case errors.As(err, &bad):
		i.damaged(bad)
		return h, nil
	default:
		return h, err
	}
	i.r.LogID = h.id
	i.r.FirstIndex, i.r.FirstOffset = h.firstIndex, h.firstOffset
	i.r.PrevTerm, i.r.PrevTime, i.r.PrevCRC = h.prevTerm, h.prevTime, h.prevCRC
	return h, nil
}

// otherKind tells people which of our files they have taken for a segment.
func otherKind(b []byte) string {
	switch {
	case strings.HasPrefix(string(b), indexMagic):
		return ", but the index of one"
	case strings.HasPrefix(string(b), checkpointMagic):
		return ", but the checkpoint of a log"
	}
	return ""
}

func (i *inspection) damaged(bad *CorruptError) {
	i.r.Ending, i.r.Damage, i.r.Detail = EndDamaged, bad, bad.Detail
}

// scan visits the good frames and judges what follows them.
func (i *inspection) scan() error {
	for {
		done, err := i.atEnd()
		if err != nil || done {
			return err
		}
		err = i.next()
		var bad *CorruptError
		switch {
		case errors.As(err, &bad):
			more, err := i.judge(bad)
			if err != nil || !more {
				return err
			}
		case err != nil:
			return err
		}
	}
}

// next reads a frame and shows it.
func (i *inspection) next() error {
	pos := i.sc.tail.pos
	if err := i.sc.next(); err != nil {
		return err
	}
	h := &i.sc.header
	i.last = pos
	i.r.Frames++
	i.r.Records += uint64(h.count)
	i.index.add(i.sc.entry, h.crc, i.sc.tail.pos)
	if i.visit == nil {
		return nil
	}
	return i.visit(Frame{
		Entry:    h.entry(i.sc.frame),
		Position: pos,
		Size:     h.size(),
		Synced:   h.synced,
		CRC:      h.crc,
		PrevCRC:  h.prevCRC,
	})
}

// atEnd tells whether the last frame read is where other files say that the
// segment ends, and whether it is the frame that they know.
func (i *inspection) atEnd() (bool, error) {
	t, a := &i.sc.tail, &i.around
	var bad *CorruptError
	c := &a.checkpoint
	mine := a.hasCheckpoint && c.segment == i.s.firstIndex && c.tail.index == t.index
	end := mine && c.cut
	if mine && c.tail.crc != t.crc {
		bad = &CorruptError{i.r.File, t.pos, fmt.Sprintf("the frame before has checksum %08x, the checkpoint knows it as %08x", t.crc, c.tail.crc)}
	}
	if a.hasNext && a.next.firstIndex == t.index+1 {
		end = true
		if a.next.prevCRC != t.crc {
			bad = &CorruptError{i.r.File, t.pos, fmt.Sprintf("the frame before has checksum %08x, %s follows %08x", t.crc, segmentName(a.next.firstIndex), a.next.prevCRC)}
		}
	}
	if bad != nil {
		changed, err := i.refresh()
		if err != nil {
			return false, err
		}
		if changed {
			return i.atEnd()
		}
		i.damaged(bad)
		return true, nil
	}
	if !end {
		return false, nil
	}
	zero, _, err := i.sc.remains()
	if err == nil && !zero {
		i.r.Ending, i.r.Detail = EndTorn, "bytes that belong to no entry follow the last one"
		if mine && c.cut {
			i.r.Detail = fmt.Sprintf("a truncation down to index %d was begun and not completed", t.index)
		}
	}
	return true, err
}

// judge decides, by the rule of opening.scanTail, what the bytes behind the
// last good frame are. With more, they have meanwhile become something else.
func (i *inspection) judge(bad *CorruptError) (more bool, err error) {
	zero, later, err := i.sc.remains()
	if err != nil {
		return false, err
	}
	t := &i.sc.tail
	known := max(i.durable(), later)
	sealed := i.around.sealed(i.s)
	if zero && known <= t.index {
		i.r.Ending = EndClean
		return false, nil
	}
	// The log may be open. A frame that was read while it was being written is
	// whole by the time that something else calls it durable; so it has to be
	// read again after that, and only then is it known to be bad.
	if changed, err := i.refresh(); err != nil || changed {
		return changed, err
	}
	err = i.next()
	switch again := (*CorruptError)(nil); {
	case err == nil:
		return true, nil
	case !errors.As(err, &again):
		return false, err
	}
	switch {
	case i.around.hasNext && known == i.around.next.firstIndex-1 && zero:
		i.damaged(&CorruptError{i.r.File, t.pos, fmt.Sprintf("the segment ends at index %d, the next one, %s, starts at index %d", t.index, segmentName(i.around.next.firstIndex), i.around.next.firstIndex)})
	case known > t.index:
		i.damaged(&CorruptError{i.r.File, bad.Position, fmt.Sprintf("%s; entries up to index %d were durable, the last good one is %d", bad.Detail, known, t.index)})
	case sealed:
		i.damaged(&CorruptError{i.r.File, bad.Position, bad.Detail + "; the segment was sealed, so that all of it was durable"})
	default:
		i.r.Ending, i.r.Detail = EndTorn, bad.Detail
	}
	i.r.Durable = later
	return false, nil
}

// refresh forgets what was read ahead and looks around again. It tells whether
// that gave anything new.
func (i *inspection) refresh() (changed bool, err error) {
	if err := i.stillThere(); err != nil {
		return false, err
	}
	i.sc.bufLen = 0
	if i.sc.size, err = i.f.Size(); err != nil {
		return false, err
	}
	was := i.around
	if i.around, err = i.lookAround(); err != nil {
		return false, err
	}
	return i.around != was, nil
}

// stillThere makes sure that the frames visited are still those of the file
// with that name, which a truncation may have replaced: the checksum of the
// last one covers the others, and the header's those in other segments.
func (i *inspection) stillThere() (err error) {
	f, err := i.fs.Open(i.r.File)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", i.r.File, ErrChanged)
	} else if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b := make([]byte, segmentHeaderSize+i.sc.tail.pos-i.last)
	head, frame := b[:segmentHeaderSize], b[segmentHeaderSize:]
	if _, err := f.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if _, err := f.ReadAt(frame, i.last); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if !bytes.Equal(head, i.s.encode()) {
		return fmt.Errorf("%s: %w", i.r.File, ErrChanged)
	}
	if i.r.Frames == 0 {
		return nil
	}
	if h, err := parseFrame(frame, i.s.seed); err != nil || h.crc != i.sc.tail.crc {
		return fmt.Errorf("%s: %w", i.r.File, ErrChanged)
	}
	return nil
}

// durable is the index up to which the frames read so far and the files beside
// call the log durable, as far as it concerns this segment.
func (i *inspection) durable() uint64 {
	d := max(i.sc.tail.synced, i.s.firstIndex-1)
	a := &i.around
	if a.hasCheckpoint && a.checkpoint.segment == i.s.firstIndex {
		d = max(d, a.checkpoint.tail.index)
	}
	if a.hasNext {
		d = max(d, a.next.firstIndex-1)
	}
	return d
}

func (i *inspection) conclude() error {
	t := &i.sc.tail
	i.r.Size = i.sc.size
	i.r.LastIndex, i.r.LastTerm, i.r.LastTime = t.index, t.term, t.time
	i.r.NextOffset, i.r.LastCRC, i.r.Position = t.offset, t.crc, t.pos
	a := &i.around
	i.r.Sealed = a.sealed(i.s)
	if a.hasCheckpoint {
		c := &a.checkpoint
		i.r.Leftover = c.cut && i.s.firstIndex > c.segment || a.hasNext && a.next.firstIndex <= c.first
	}
	i.r.Durable = max(i.r.Durable, i.durable())
	i.r.Index, i.r.IndexDetail = i.index.result(i.s, &i.r)
	if i.r.Index != Wrong {
		return nil
	}
	if c := &a.checkpoint; a.hasCheckpoint && c.cut && c.segment == i.s.firstIndex {
		i.r.Index, i.r.IndexDetail = Stale, "the truncation that was begun removes it"
		return nil
	}
	replaced, err := i.index.replaced(i.fs, i.s, i.r.Size)
	if replaced {
		i.r.Index, i.r.IndexDetail = Stale, "it was replaced while the segment was read"
	}
	return err
}
