package logstore

import (
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
	// ErrChanged: the log was truncated while its segment was being inspected.
	ErrChanged = errors.New("the segment was truncated while it was read, inspect it again")
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
	IndexDetail      string // why the index is stale or wrong
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
	prev   int64 // position of the last good frame; 0: there is none
}

// surroundings are what the files beside a segment say about where it ends.
type surroundings struct {
	checkpoint    checkpoint
	hasCheckpoint bool
	// next is the header of the segment that follows this one.
	next    segmentHeader
	hasNext bool
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
	if err := i.index.load(i.fs, i.s, i.sc.size); err != nil {
		return err
	}
	if err := i.scan(); err != nil {
		return err
	}
	i.conclude()
	return nil
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

// lookAround reads the checkpoint and finds the next segment. Files of other
// logs are as good as none.
func (i *inspection) lookAround() (a surroundings, err error) {
	dir := filepath.Dir(i.r.File)
	c, err := readCheckpoint(i.fs, dir)
	var bad *CorruptError
	var version *VersionError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		i.r.Checkpoint, i.r.CheckpointDetail = Missing, ""
	case errors.As(err, &bad), errors.As(err, &version):
		i.r.Checkpoint, i.r.CheckpointDetail = Wrong, err.Error()
	case err != nil:
		return a, err
	case c.id != i.s.id:
		i.r.Checkpoint, i.r.CheckpointDetail = Wrong, "it belongs to another log"
	default:
		i.r.Checkpoint, i.r.CheckpointDetail = OK, ""
		a.checkpoint, a.hasCheckpoint = c, true
	}

	names, err := i.fs.List(dir)
	if err != nil {
		return a, err
	}
	for _, name := range names { // sorted, and so are their numbers
		first, ok := parseSegmentName(name)
		if !ok || first <= i.s.firstIndex {
			continue
		}
		if a.hasCheckpoint && c.cut && first > c.segment {
			break // left over from a truncation
		}
		h, ok, err := i.neighbour(filepath.Join(dir, name), first)
		if err != nil {
			return a, err
		}
		if ok {
			a.next, a.hasNext = h, true
			break
		}
	}
	return a, nil
}

// neighbour reads the header of another segment. One that is gone, damaged or
// of another log says nothing about this one.
func (i *inspection) neighbour(file string, first uint64) (h segmentHeader, ok bool, err error) {
	f, err := i.fs.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return h, false, nil
	} else if err != nil {
		return h, false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h, err = readSegmentHeader(f, file, first)
	var bad *CorruptError
	var version *VersionError
	if errors.As(err, &bad) || errors.As(err, &version) {
		return h, false, nil
	}
	return h, err == nil && h.id == i.s.id, err
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
	i.prev = pos
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
		if changed, err := i.refresh(); err != nil || changed {
			return false, err
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

// stillThere makes sure that the frames visited are still those of the file:
// the checksum of the last one covers the others.
func (i *inspection) stillThere() error {
	if i.prev == 0 {
		return nil
	}
	b := make([]byte, i.sc.tail.pos-i.prev)
	if _, err := i.f.ReadAt(b, i.prev); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if h, err := parseFrame(b, i.s.seed); err != nil || h.crc != i.sc.tail.crc {
		return fmt.Errorf("%s: %w", i.r.File, ErrChanged)
	}
	return nil
}

func (a *surroundings) sealed(s *segment) bool {
	return a.hasNext || a.hasCheckpoint && a.checkpoint.segment > s.firstIndex
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

func (i *inspection) conclude() {
	t := &i.sc.tail
	i.r.Size = i.sc.size
	i.r.LastIndex, i.r.LastTerm, i.r.LastTime = t.index, t.term, t.time
	i.r.NextOffset, i.r.LastCRC, i.r.Position = t.offset, t.crc, t.pos
	i.r.Sealed = i.around.sealed(i.s)
	i.r.Durable = max(i.r.Durable, i.durable())
	i.r.Index, i.r.IndexDetail = i.index.result(i.s, &i.r)
}

// indexCheck compares an index file with the frames, one by one.
type indexCheck struct {
	b       []byte // nil: there is no file
	detail  string // what is wrong with it
	count   int    // entries it claims to have
	seen    int
	crc     uint32 // of frame number count
	end     int64  // where that ends
	differs int    // number of the first entry that is not its frame's, from 1
}

// load reads the index of a segment with at most size bytes.
func (x *indexCheck) load(fsys vfs.FS, s *segment, size int64) (err error) {
	f, err := fsys.Open(s.idx)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	n, err := f.Size()
	if err != nil {
		return err
	}
	x.b = []byte{}
	// Bounded, since anything may lie there under that name.
	most := indexHeaderSize + (size/HeaderSize+1)*indexEntrySize
	if n < indexHeaderSize || n > most || (n-indexHeaderSize)%indexEntrySize != 0 {
		x.detail = fmt.Sprintf("it has %d bytes, which no index of this segment can have", n)
		return nil
	}
	x.b = make([]byte, n)
	if _, err := f.ReadAt(x.b, 0); err != nil {
		return err
	}
	x.count = int(n-indexHeaderSize) / indexEntrySize
	x.crc, x.end = s.prevCRC, segmentHeaderSize
	return nil
}

func (x *indexCheck) add(e indexEntry, crc uint32, end int64) {
	x.seen++
	if x.seen > x.count {
		return
	}
	if x.differs == 0 && parseIndexEntry(x.b[indexHeaderSize+(x.seen-1)*indexEntrySize:]) != e {
		x.differs = x.seen
	}
	x.crc, x.end = crc, end
}

func (x *indexCheck) result(s *segment, r *Report) (Beside, string) {
	switch {
	case x.b == nil:
		return Missing, ""
	case x.detail != "":
		return Wrong, x.detail
	case x.count > x.seen:
		return Wrong, fmt.Sprintf("it has %d entries, the segment %d", x.count, x.seen)
	}
	parsed, err := parseIndex(x.b, &s.segmentHeader, x.count, x.crc)
	switch {
	case err != nil:
		return Wrong, err.Error()
	case x.differs > 0:
		return Wrong, fmt.Sprintf("its entry of index %d is not what the segment has", s.firstIndex+uint64(x.differs-1))
	case parsed.end != x.end:
		return Wrong, fmt.Sprintf("it says that the last frame ends at byte %d, it ends at %d", parsed.end, x.end)
	case x.count < x.seen && r.Sealed:
		return Wrong, fmt.Sprintf("it has %d entries, the segment %d", x.count, x.seen)
	case x.count < x.seen:
		return Stale, fmt.Sprintf("it has %d entries, the segment %d by now", x.count, x.seen)
	}
	return OK, ""
}
