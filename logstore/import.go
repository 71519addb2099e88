package logstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// importName is the file that marks a directory which an import is filling. It
// is the first file there and the last one removed.
const importName = "importing"

// importChunk is how much is appended, and with that synced, at a time.
const importChunk = 2 << 20

// ImportStats say what an Import made, or a CheckExport read: exactly what was
// exported.
type ImportStats struct {
	FirstIndex, LastIndex   uint64
	FirstOffset, NextOffset uint64
	LastTerm                uint64
	LastAppendTime          int64 // nanoseconds since 1970 UTC
	Bytes                   int64 // of the stream
}

// Import makes a log in dir of the stream of an Export, checks all of it, makes
// it durable, directory included, and closes it. Open then opens it like any
// other log; segments have the size that opts say, and it has an id of its own.
// opts.FirstIndex and opts.FirstOffset are ignored: the stream knows. It holds
// no more than a few MiB in memory, or twice the largest entry.
//
// The directory must be empty or missing (else ErrNotEmpty, or ErrUnfinished if
// another Import left it). The stream is read to its end, so r must end where
// the stream does. Import does not return while r blocks; to abandon it, make r
// fail.
//
// Whatever goes wrong, the directory is not a log afterwards: Import removes
// what it has made, as well as it can. After a crash, Open refuses the directory
// with ErrUnfinished; Remove empties it.
//
// Errors: a *StreamError for a stream that is not a whole and undamaged export,
// a *VersionError for one of a newer format, ErrFull for want of space, r's.
func Import(dir string, opts Options, r io.Reader) (ImportStats, error) {
	stats, err := importLog(dir, opts, r)
	if err != nil {
		return ImportStats{}, fmt.Errorf("import log: %w", err)
	}
	return stats, nil
}

func importLog(dir string, opts Options, r io.Reader) (stats ImportStats, err error) {
	if err := opts.applyDefaultsAndValidate(); err != nil {
		return stats, err
	}
	fsys := opts.FS
	if err := checkEmpty(fsys, dir); err != nil {
		return stats, err
	}
	in := &importStream{r: r}
	if err := in.readHeader(); err != nil {
		return stats, err // nothing is there yet
	}
	if err := fsys.MkdirAll(dir); err != nil {
		return stats, full(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Remove(fsys, dir))
		}
	}()
	marker := filepath.Join(dir, importName)
	if err := createEmpty(fsys, marker); err != nil {
		return stats, full(err)
	}
	opts.start = &in.header.start
	opts.CheckpointInterval = -1 // Close writes the only one that counts
	l, err := Open(dir, opts)
	if err != nil {
		return stats, full(err)
	}
	if err := errors.Join(in.copyTo(l.Append), l.Close()); err != nil {
		return stats, err
	}
	if err := fsys.Remove(marker); err != nil {
		return stats, err
	}
	if err := fsys.SyncDir(dir); err != nil {
		return stats, err
	}
	return in.stats(), nil
}

// CheckExport reads a stream to its end, as Import does, and checks all that
// Import checks, but keeps nothing of it.
//
// Errors: a *StreamError for a stream that is not a whole and undamaged export,
// a *VersionError for one of a newer format, r's.
func CheckExport(r io.Reader) (ImportStats, error) {
	in := &importStream{r: r}
	err := in.readHeader()
	if err == nil {
		err = in.copyTo(func([]Entry) error { return nil })
	}
	if err != nil {
		return ImportStats{}, fmt.Errorf("check an exported log: %w", err)
	}
	return in.stats(), nil
}

func (in *importStream) stats() ImportStats {
	start, end := &in.header.start, &in.header.end
	return ImportStats{
		FirstIndex: start.index + 1, LastIndex: end.index,
		FirstOffset: start.offset, NextOffset: end.offset,
		LastTerm: end.term, LastAppendTime: end.time,
		Bytes: in.header.size,
	}
}

func checkEmpty(fsys vfs.FS, dir string) error {
	names, err := fsys.List(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case slices.Contains(names, importName):
		return fmt.Errorf("%s: %w", dir, ErrUnfinished)
	case len(names) > 0:
		return fmt.Errorf("%s: %w: it holds %s", dir, ErrNotEmpty, names[0])
	}
	return nil
}

func createEmpty(fsys vfs.FS, name string) error {
	f, err := fsys.Create(name)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(name))
}

// Remove deletes the files of a log, or of one that an unfinished Import left,
// and leaves the directory empty. After a crash on the way Open refuses the
// directory, or finds it empty, and Remove can be called again. A directory
// that holds anything else is ErrNotALog and not touched; a missing one is no
// error. The log must not be open.
func Remove(fsys vfs.FS, dir string) error {
	names, err := fsys.List(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var files []string
	for _, name := range names {
		_, isSegment := parseSegmentName(name)
		switch {
		case isSegment, strings.HasSuffix(name, indexSuffix), strings.HasSuffix(name, tempSuffix):
			files = append(files, name)
		case name != checkpointName && name != importName:
			return fmt.Errorf("%s: %w: it holds %s", dir, ErrNotALog, name)
		}
	}
	// Without a checkpoint, segments are nothing that opens; without segments a
	// checkpoint might be.
	for _, step := range [][]string{{checkpointName}, files, {importName}} {
		for _, name := range step {
			if err := vfs.RemoveIfThere(fsys, filepath.Join(dir, name)); err != nil {
				return err
			}
		}
		if err := fsys.SyncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// importStream reads and checks a stream.
type importStream struct {
	r      io.Reader
	header exportHeader
	at     int64 // bytes read from r
}

func (in *importStream) corrupt(at int64, format string, args ...any) error {
	return &StreamError{Position: at, Detail: fmt.Sprintf(format, args...)}
}

// read fills b.
func (in *importStream) read(b []byte) error {
	n, err := io.ReadFull(in.r, b)
	in.at += int64(n)
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return &StreamError{Position: in.at, Detail: "it ends early", Err: io.ErrUnexpectedEOF}
	case err != nil:
		return fmt.Errorf("read the stream at byte %d: %w", in.at, err)
	}
	return nil
}

// readPreamble reads a header of either kind.
func (in *importStream) readPreamble(b []byte, magic, what string) error {
	at := in.at
	if err := in.read(b); err != nil {
		return err
	}
	err := checkPreamble("the export stream", b, magic, what)
	var damage *CorruptError
	if errors.As(err, &damage) {
		return in.corrupt(at+damage.Position, "%s", damage.Detail)
	}
	return err
}

func (in *importStream) readHeader() error {
	b := make([]byte, exportHeaderSize)
	if err := in.readPreamble(b, exportMagic, "an export's header"); err != nil {
		return err
	}
	le := binary.LittleEndian
	h := &in.header
	copy(h.id[:], b[preambleSize:])
	first := le.Uint64(b[32:])
	h.start = tail{
		index: first - 1, synced: first - 1,
		offset: le.Uint64(b[40:]),
		term:   le.Uint64(b[48:]),
		time:   int64(le.Uint64(b[56:])),
		crc:    le.Uint32(b[64:]),
		pos:    segmentHeaderSize,
	}
	h.end = tail{
		crc:    le.Uint32(b[68:]),
		index:  le.Uint64(b[72:]),
		offset: le.Uint64(b[80:]),
		term:   le.Uint64(b[88:]),
		time:   int64(le.Uint64(b[96:])),
	}
	h.size = int64(le.Uint64(b[104:]))
	if first == 0 || h.end.index < h.start.index || h.end.index == ^uint64(0) || h.size < exportHeaderSize {
		return in.corrupt(32, "it claims entries %d to %d in %d bytes", first, h.end.index, h.size)
	}
	return nil
}

// copyTo hands all entries of the stream to a log that has its start, and
// checks that the stream ends where it should. The entries are valid during the
// call.
func (in *importStream) copyTo(add func([]Entry) error) error {
	t := in.header.start
	buf := make([]byte, max(sectionHeaderSize, min(importChunk, in.header.size-exportHeaderSize)))
	for t.index < in.header.end.index {
		var err error
		if buf, err = in.readSection(add, &t, buf); err != nil {
			return err
		}
	}
	if err := sameEnd(&t, &in.header.end); err != nil {
		return in.corrupt(in.at, "%v", err)
	}
	if in.at != in.header.size {
		return in.corrupt(in.at, "it claims %d bytes and ends here", in.header.size)
	}
	for {
		n, err := in.r.Read(buf[:1])
		switch {
		case n > 0:
			return in.corrupt(in.at, "it goes on behind its end")
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read the stream's end: %w", err)
		}
	}
}

// readSection hands on the entries of one section.
func (in *importStream) readSection(add func([]Entry) error, t *tail, buf []byte) ([]byte, error) {
	at := in.at
	if at+sectionHeaderSize > in.header.size {
		return buf, in.corrupt(at, "it claims %d bytes and goes on", in.header.size)
	}
	b := buf[:sectionHeaderSize]
	if err := in.readPreamble(b, sectionMagic, "a section's header"); err != nil {
		return buf, err
	}
	le := binary.LittleEndian
	h := sectionHeader{first: le.Uint64(b[32:]), last: le.Uint64(b[40:]), bytes: int64(le.Uint64(b[48:]))}
	copy(h.id[:], b[preambleSize:])
	switch {
	case h.id != in.header.id:
		return buf, in.corrupt(at+16, "the section is of another log")
	case h.first != t.index+1:
		return buf, in.corrupt(at+32, "the section begins at index %d where %d belongs", h.first, t.index+1)
	case h.last < h.first || h.last > in.header.end.index:
		return buf, in.corrupt(at+40, "the section ends at index %d", h.last)
	case h.bytes < HeaderSize || h.bytes > in.header.size-in.at:
		return buf, in.corrupt(at+48, "the section claims %d bytes of frames", h.bytes)
	}

	seed := (&segmentHeader{id: h.id, firstIndex: h.first}).seed()
	left := h.bytes
	var entries []Entry
	have := 0
	for left > 0 || have > 0 {
		n := int(min(int64(len(buf)-have), left))
		at := in.at - int64(have)
		if err := in.read(buf[have : have+n]); err != nil {
			return buf, err
		}
		left -= int64(n)
		have += n

		used := 0
		entries = entries[:0]
		for used < have {
			b := buf[used:have]
			f, need, err := nextFrame(b, seed, t)
			if err != nil {
				return buf, in.corrupt(at+int64(used), "%v", err)
			}
			if need > len(b) {
				if int64(need-len(b)) > left {
					return buf, in.corrupt(at+int64(used), "a frame of %d bytes goes past the section's end", need)
				}
				if used == 0 && need > len(buf) {
					buf = append(buf[:have:have], make([]byte, need-have)...)
				}
				break
			}
			t.advance(&f)
			entries = append(entries, f.entry(b))
			used += need
		}
		if err := add(entries); errors.Is(err, ErrRejected) || errors.Is(err, ErrTooLarge) {
			return buf, in.corrupt(at, "%v", err) // only a forged stream gets here
		} else if err != nil {
			return buf, err
		}
		have = copy(buf, buf[used:have])
	}
	if t.index != h.last {
		return buf, in.corrupt(in.at, "the section's frames end at index %d, not %d", t.index, h.last)
	}
	return buf, nil
}
