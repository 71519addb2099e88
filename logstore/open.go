package logstore

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// Open opens the log in dir, making an empty one if the directory is missing
// or empty.
//
// After a clean Close it reads no data. After a crash it reads the last
// segment, cuts off what a torn write left behind the last durable entry, and
// tells so in Recovery. Anything else that is not as it was written is refused
// with a *CorruptError, a *VersionError or ErrNotALog, and then nothing on the
// disk has been changed: the log never gets shorter by being opened. Sealed
// segments are checked when they are read.
//
// The caller must keep other processes out of the directory.
func Open(dir string, opts Options) (*Log, error) {
	if err := opts.applyDefaultsAndValidate(); err != nil {
		return nil, err
	}
	o := opening{dir: dir, opts: opts, fs: opts.FS}
	l, err := o.open()
	if err != nil {
		return nil, fmt.Errorf("open log: %w", full(err))
	}
	return l, nil
}

// opening is the state of one Open: first everything is looked at, then
// everything that has to change is changed.
type opening struct {
	dir  string
	opts Options
	fs   vfs.FS

	checkpoint checkpoint
	segs       []*segment
	unknown    []string // neither ours nor temporary
	importing  bool     // an import has not finished
	temporary  []string
	indexes    []string
	dropped    []*segment // left over from a deletion, in the order to remove

	active   vfs.File
	index    frameIndex
	tail     tail
	durable  uint64 // what was synced before, as far as is known
	zeros    bool   // behind the tail there is nothing but zeros
	recovery Recovery
}

func (o *opening) open() (*Log, error) {
	if err := o.list(); err != nil {
		return nil, err
	}
	if o.importing && o.opts.start == nil {
		return nil, fmt.Errorf("%s: %w", o.dir, ErrUnfinished)
	}
	if err := o.readCheckpoint(); err != nil {
		return nil, err
	}
	if err := o.readHeaders(); err != nil {
		return nil, err
	}
	if err := o.readTail(); err != nil {
		return nil, errors.Join(err, o.closeActive())
	}
	l, err := o.accept()
	if err != nil {
		return nil, errors.Join(err, o.closeActive())
	}
	return l, nil
}

func (o *opening) closeActive() error {
	if o.active == nil {
		return nil
	}
	return o.active.Close()
}

func (o *opening) list() error {
	names, err := o.fs.List(o.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, name := range names {
		_, isSegment := parseSegmentName(name)
		switch {
		case name == checkpointName:
		case name == importName:
			o.importing = true
		case isSegment:
			first, _ := parseSegmentName(name)
			o.segs = append(o.segs, newSegment(o.dir, segmentHeader{firstIndex: first}))
		case strings.HasSuffix(name, indexSuffix):
			o.indexes = append(o.indexes, name)
		case strings.HasSuffix(name, tempSuffix):
			o.temporary = append(o.temporary, name)
		default:
			o.unknown = append(o.unknown, name)
		}
	}
	slices.SortFunc(o.segs, func(a, b *segment) int {
		if a.firstIndex < b.firstIndex {
			return -1
		}
		return 1
	})
	return nil
}

// readCheckpoint reads it, or makes a new log where there is nothing.
func (o *opening) readCheckpoint() error {
	c, err := readCheckpoint(o.fs, o.dir)
	switch {
	case err == nil:
		o.checkpoint = c
		if len(o.segs) == 0 && c.seq == 0 {
			// The crash came between the log's first file and its second.
			return o.createSegment()
		}
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	case len(o.segs) > 0:
		return &CorruptError{filepath.Join(o.dir, checkpointName), 0, "the file is missing, but there are segments"}
	case len(o.unknown) > 0 || len(o.indexes) > 0:
		return fmt.Errorf("%s: %w: it holds %s", o.dir, ErrNotALog, slices.Concat(o.unknown, o.indexes)[0])
	}

	if err := o.fs.MkdirAll(o.dir); err != nil {
		return err
	}
	var id logID
	if _, err := rand.Read(id[:]); err != nil {
		return err
	}
	start := tail{index: o.opts.FirstIndex - 1, offset: o.opts.FirstOffset, pos: segmentHeaderSize, synced: o.opts.FirstIndex - 1}
	if o.opts.start != nil {
		start = *o.opts.start
	}
	o.checkpoint = checkpoint{id: id, first: start.index + 1, segment: start.index + 1, tail: start}
	if err := createCheckpoint(o.fs, o.dir, o.checkpoint); err != nil {
		return err
	}
	return o.createSegment()
}

// createSegment makes the first segment of a new log.
func (o *opening) createSegment() (err error) {
	temp := filepath.Join(o.dir, nextName)
	f, err := vfs.CreateOver(o.fs, temp)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Preallocate(o.opts.SegmentSize); err != nil {
		return err
	}
	s := newSegment(o.dir, o.checkpoint.tail.header(o.checkpoint.id))
	o.segs = []*segment{s}
	return installSegment(o.fs, f, temp, s)
}

// readHeaders reads the segments' headers and checks that they are one log
// without holes, as the checkpoint knows it.
func (o *opening) readHeaders() error {
	c := &o.checkpoint
	missing := func(first uint64) error {
		return &CorruptError{filepath.Join(o.dir, segmentName(first)), 0, "the file is missing"}
	}
	if len(o.segs) == 0 || o.segs[len(o.segs)-1].firstIndex < c.segment {
		return missing(c.segment)
	}
	for i, s := range o.segs {
		h, size, err := o.readHeader(s)
		if err != nil {
			return err
		}
		if h.id != c.id {
			return s.corrupt(16, "the segment belongs to another log")
		}
		*s = *newSegment(o.dir, h)
		s.size = size
		if i > 0 {
			next := s.start()
			o.segs[i-1].seal(&next, o.segs[i-1].size)
		}
	}
	// A deletion records what is to remain first; a crash may leave files.
	for n := len(o.segs) - 1; c.cut && o.segs[n].firstIndex > c.segment; n-- {
		o.dropped = append(o.dropped, o.segs[n])
		o.segs = o.segs[:n]
	}
	for len(o.segs) > 1 && o.segs[1].firstIndex <= c.first {
		o.dropped = append(o.dropped, o.segs[0])
		o.segs = o.segs[1:]
	}
	if first := o.segs[0].firstIndex; first != c.first {
		return missing(c.first)
	}
	for i, s := range o.segs[:len(o.segs)-1] {
		if s.firstIndex == c.segment && c.tail.index > s.last {
			return s.corrupt(0, "%s follows index %d, but index %d was durable here", o.segs[i+1].file, s.last, c.tail.index)
		}
		if err := o.checkSeam(s, o.segs[i+1]); err != nil {
			return err
		}
	}
	return nil
}

func (o *opening) readHeader(s *segment) (h segmentHeader, size int64, err error) {
	f, err := o.fs.Open(s.file)
	if err != nil {
		return h, 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if size, err = f.Size(); err != nil {
		return h, 0, err
	}
	h, err = readSegmentHeader(f, s.file, s.firstIndex)
	return h, size, err
}

// checkSeam notices a missing segment between two others: then the one
// before does not end where the one behind continues. Its index, if it has one,
// was written when it was sealed, and tells at the cost of a few bytes; only
// when that disagrees is the segment read.
func (o *opening) checkSeam(s, next *segment) (err error) {
	f, err := o.fs.Open(s.idx)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it will be rebuilt, and checked then
		}
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b := make([]byte, indexHeaderSize)
	if _, err := f.ReadAt(b, 0); err == nil && indexCloses(b, s) {
		return nil
	}
	log, err := o.fs.Open(s.file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	sc, err := newScanner(log, s)
	if err != nil {
		return err
	}
	for sc.tail.index < s.last {
		if err := sc.next(); err != nil {
			zero, later, err2 := sc.remains()
			if err2 != nil {
				return err2
			}
			if zero && later == 0 {
				return s.corrupt(sc.tail.pos, "the segment ends at index %d, the next one, %s, starts at index %d", sc.tail.index, next.file, next.firstIndex)
			}
			return nil // damaged inside: a read of it will say so
		}
	}
	return nil
}

// readTail finds where the log ends.
func (o *opening) readTail() error {
	s := o.segs[len(o.segs)-1]
	f, err := o.fs.OpenReadWrite(s.file)
	if err != nil {
		return err
	}
	o.active = f
	if o.checkpoint.clean && o.checkpoint.segment == s.firstIndex && o.readCleanTail(s) {
		return nil
	}
	return o.scanTail(s)
}

// readCleanTail takes the end of a log from its checkpoint and index. It
// returns false if they do not fit, for scanTail to find out why.
func (o *opening) readCleanTail(s *segment) bool {
	t := o.checkpoint.tail
	if t.index < s.firstIndex-1 || t.pos < segmentHeaderSize {
		return false
	}
	x := &frameIndex{end: t.pos}
	if count := int(t.index - s.firstIndex + 1); count > 0 {
		b, err := readFile(o.fs, s.idx, int64(indexHeaderSize+count*indexEntrySize))
		if err != nil {
			return false
		}
		mapped, err := parseIndex(b, &s.segmentHeader, count, t.crc)
		if err != nil || mapped.end != t.pos {
			return false
		}
		x.mem = make([]indexEntry, count)
		for i := range x.mem {
			x.mem[i] = mapped.at(i)
		}
		// The end is what the next append builds on.
		from, to := x.span(count - 1)
		frame := make([]byte, to-from)
		if _, err := o.active.ReadAt(frame, from); err != nil {
			return false
		}
		h, err := parseFrame(frame, s.seed)
		if err != nil || h.index != t.index || h.crc != t.crc || h.term != t.term || h.time != t.time || h.base+uint64(h.count) != t.offset {
			return false
		}
	} else if t != withSynced(s.start(), t.synced) {
		return false
	}
	o.tail, o.index, o.durable, o.zeros = t, *x, t.index, true
	o.recovery.Clean = true
	return true
}

func withSynced(t tail, synced uint64) tail {
	t.synced = synced
	return t
}

// scanTail reads the last segment to its last good frame and decides whether
// what follows is a torn write or damage. Torn means that nobody was ever told
// that it is durable:
//
//   - the checkpoint does not claim it;
//   - no whole frame behind it does. Frames of one unsynced write can survive a
//     crash behind a hole, but they carry the mark of the sync before them; a
//     mark at or above the hole proves that the hole was once durable.
//
// Of a log whose suffix was being truncated only what the checkpoint names is
// kept.
func (o *opening) scanTail(s *segment) error {
	sc, err := newScanner(o.active, s)
	if err != nil {
		return err
	}
	var mem []indexEntry
	var bad *CorruptError
	c := &o.checkpoint
	for {
		if c.segment == s.firstIndex && sc.tail.index == c.tail.index && sc.tail.crc != c.tail.crc {
			return s.corrupt(sc.tail.pos, "the frame before has checksum %08x, the checkpoint knows it as %08x", sc.tail.crc, c.tail.crc)
		}
		if c.cut && sc.tail.index == c.tail.index {
			o.recovery = Recovery{Torn: s.file, Position: sc.tail.pos, Bytes: sc.size - sc.tail.pos}
			o.tail, o.index, o.durable = sc.tail, frameIndex{mem: mem, end: sc.tail.pos}, sc.tail.index
			return nil
		}
		if err := sc.next(); errors.As(err, &bad) {
			break
		} else if err != nil {
			return err
		}
		mem = append(mem, sc.entry)
	}
	zeros, later, err := sc.remains()
	if err != nil {
		return err
	}
	o.durable = max(c.tail.index, sc.tail.synced, s.firstIndex-1)
	if known := max(o.durable, later); known > sc.tail.index {
		return &CorruptError{bad.File, bad.Position, fmt.Sprintf("%s; entries up to index %d were durable, the last good one is %d", bad.Detail, known, sc.tail.index)}
	}
	if !zeros {
		o.recovery = Recovery{Torn: s.file, Position: sc.tail.pos, Bytes: sc.size - sc.tail.pos}
	}
	o.tail, o.index, o.zeros = sc.tail, frameIndex{mem: mem, end: sc.tail.pos}, zeros
	return nil
}

// accept makes the disk what it was found to be, and durable.
func (o *opening) accept() (*Log, error) {
	for _, s := range o.dropped {
		// One by one, newest first behind a truncation, so that another crash
		// leaves no hole.
		if err := errors.Join(vfs.RemoveIfThere(o.fs, s.file), o.fs.SyncDir(o.dir), vfs.RemoveIfThere(o.fs, s.idx)); err != nil {
			return nil, err
		}
	}
	known := make(map[string]bool, len(o.segs))
	for _, s := range o.segs {
		known[filepath.Base(s.idx)] = true
	}
	for _, name := range slices.Concat(o.temporary, o.indexes) {
		if !known[name] {
			if err := vfs.RemoveIfThere(o.fs, filepath.Join(o.dir, name)); err != nil {
				return nil, err
			}
		}
	}

	s := o.segs[len(o.segs)-1]
	if !o.zeros {
		if err := o.active.Truncate(o.tail.pos); err != nil {
			return nil, fmt.Errorf("cut the torn tail of %s: %w", s.file, err)
		}
	}
	// What there is no space for now, the append that needs it will ask for.
	space, err := preallocateIfRoom(o.active, o.opts.SegmentSize)
	if err != nil {
		return nil, fmt.Errorf("preallocate %s: %w", s.file, err)
	}
	if err := o.rewriteUnsynced(s); err != nil {
		return nil, err
	}
	if err := o.active.Sync(); err != nil {
		return nil, fmt.Errorf("sync %s: %w", s.file, err)
	}

	l := &Log{
		dir:      o.dir,
		opts:     o.opts,
		fs:       o.fs,
		id:       o.checkpoint.id,
		recovery: o.recovery,
		handles:  handles{fs: o.fs, max: o.opts.MaxOpenSegments},
		active:   o.active,
		space:    space,
		failed:   make(chan struct{}),
	}
	o.tail.synced = o.tail.index
	st := &state{segs: o.segs, active: o.index, tail: o.tail, size: space}
	l.state.Store(st)
	l.handles.pin(s, o.active)

	cp, err := o.fs.OpenReadWrite(filepath.Join(o.dir, checkpointName))
	if err != nil {
		return nil, err
	}
	l.keeper.l = l
	l.keeper.checkpoint = checkpointWriter{f: cp, last: o.checkpoint}
	// Also takes the mark of a clean close away, before anything is appended.
	if err := l.keeper.record(st, false); err != nil {
		return nil, errors.Join(err, cp.Close())
	}
	l.keeper.start(l)
	return l, nil
}

// rewriteUnsynced writes the frames again that no sync is known to have
// covered. If a failed sync ended the process before this one, the kernel may
// still show them as written and hold them for clean; then syncing alone would
// not put them on the disk.
func (o *opening) rewriteUnsynced(s *segment) error {
	from := int64(segmentHeaderSize)
	if o.durable >= s.firstIndex {
		_, from = o.index.span(int(o.durable - s.firstIndex))
	}
	buf := make([]byte, min(scanBuffer, o.tail.pos-from))
	for from < o.tail.pos {
		b := buf[:min(int64(len(buf)), o.tail.pos-from)]
		if _, err := o.active.ReadAt(b, from); err != nil {
			return fmt.Errorf("read %s: %w", s.file, err)
		}
		if _, err := o.active.WriteAt(b, from); err != nil {
			return fmt.Errorf("write %s: %w", s.file, err)
		}
		from += int64(len(b))
	}
	return nil
}

// readFile reads a file that must have exactly size bytes.
func readFile(fsys vfs.FS, name string, size int64) (b []byte, err error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	have, err := f.Size()
	if err != nil {
		return nil, err
	}
	if have != size {
		return nil, fmt.Errorf("%s has %d bytes, not %d", name, have, size)
	}
	b = make([]byte, size)
	_, err = f.ReadAt(b, 0)
	return b, err
}
