package logstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/diurnalog/diurna/logstore/vfs"
)

const (
	checkpointName  = "checkpoint"
	checkpointMagic = "DIURNCHK"
	// Two slots, written in turn and far enough apart that a torn write cannot
	// reach both.
	checkpointSlots    = 2
	checkpointDistance = 4096
	checkpointSize     = 128
	checkpointFile     = checkpointSlots * checkpointDistance
)

// checkpoint is what a log remembers outside of its segments: how far it is
// known to be durable. Frames say so too, but only of those before them, so
// that without it rot in the last group of an idle log would look like a torn
// write. It also makes opening after a clean close a matter of one read.
type checkpoint struct {
	id    logID
	seq   uint64 // grows by one with every write; the greater one counts
	clean bool   // the log was closed; nothing was written since
	// first is the index the log starts at. Segments below it are leftovers of
	// a prefix deletion; a log that starts above it has lost a file.
	first uint64
	// cut: a suffix truncation down to tail was begun and may not be complete;
	// whatever stands behind tail is to be removed.
	cut bool
	// segment is the first index of the active segment.
	segment uint64
	// What is durable. pos, crc, offset and the like are of that segment's end
	// when index was its last entry.
	tail tail
}

func (c *checkpoint) encode() []byte {
	b := make([]byte, checkpointSize)
	le := binary.LittleEndian
	copy(b[preambleSize:], c.id[:])
	le.PutUint64(b[32:], c.seq)
	if c.clean {
		b[40] = 1
	}
	if c.cut {
		b[41] = 1
	}
	le.PutUint64(b[48:], c.segment)
	le.PutUint64(b[56:], c.tail.index)
	le.PutUint64(b[64:], c.tail.term)
	le.PutUint64(b[72:], c.tail.offset)
	le.PutUint64(b[80:], uint64(c.tail.time))
	le.PutUint64(b[88:], uint64(c.tail.pos))
	le.PutUint32(b[96:], c.tail.crc)
	le.PutUint64(b[104:], c.first)
	// The rest is reserved and zero.
	return sealPreamble(b, checkpointMagic)
}

func parseCheckpoint(file string, b []byte) (c checkpoint, err error) {
	if err := checkPreamble(file, b[:min(checkpointSize, len(b))], checkpointMagic, "a checkpoint"); err != nil {
		return c, err
	}
	le := binary.LittleEndian
	copy(c.id[:], b[preambleSize:])
	c.seq = le.Uint64(b[32:])
	c.clean = b[40] == 1
	c.cut = b[41] == 1
	c.segment = le.Uint64(b[48:])
	c.first = le.Uint64(b[104:])
	c.tail = tail{
		index:  le.Uint64(b[56:]),
		term:   le.Uint64(b[64:]),
		offset: le.Uint64(b[72:]),
		time:   int64(le.Uint64(b[80:])),
		pos:    int64(le.Uint64(b[88:])),
		crc:    le.Uint32(b[96:]),
	}
	c.tail.synced = c.tail.index
	return c, nil
}

// checkpointWriter owns the checkpoint file of an open log. It belongs to one
// goroutine at a time.
type checkpointWriter struct {
	f    vfs.File
	last checkpoint
}

// createCheckpoint makes the file, complete and durable or not at all.
func createCheckpoint(fs vfs.FS, dir string, c checkpoint) error {
	name := filepath.Join(dir, checkpointName)
	content := make([]byte, checkpointFile)
	copy(content, c.encode())
	return vfs.WriteFile(fs, name, content)
}

// readCheckpoint returns the newer of the two slots. One damaged slot is what a
// crash in the middle of a write leaves; two are damage.
func readCheckpoint(fs vfs.FS, dir string) (c checkpoint, err error) {
	name := filepath.Join(dir, checkpointName)
	f, err := fs.Open(name)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b := make([]byte, checkpointFile)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return c, err
	}
	if n != len(b) {
		return c, &CorruptError{name, int64(n), fmt.Sprintf("the file has %d bytes, not %d", n, len(b))}
	}
	var found bool
	var damage error
	for i := range checkpointSlots {
		slot, err := parseCheckpoint(name, b[i*checkpointDistance:])
		var version *VersionError
		switch {
		case errors.As(err, &version):
			return c, err
		case err != nil:
			damage = err
		case !found || slot.seq > c.seq:
			c, found = slot, true
		}
	}
	if !found {
		return c, damage
	}
	return c, nil
}

// record makes c durable. Where the one before may be taken for c, should c's
// slot rot, because it only knows less, that is enough. But one that says
// "clean", or "cut", or that counts on files or entries which are now gone,
// must not be found again: then both slots get c.
func (w *checkpointWriter) record(c checkpoint) error {
	last := w.last
	onward := !last.clean && !last.cut && !c.cut && c.first == last.first && c.tail.index >= last.tail.index
	if err := w.write(c); err != nil || onward {
		return err
	}
	return w.write(c)
}

// write makes c durable in the slot that does not hold the newest one.
func (w *checkpointWriter) write(c checkpoint) error {
	c.seq = w.last.seq + 1
	slot := int64(c.seq % checkpointSlots)
	if _, err := w.f.WriteAt(c.encode(), slot*checkpointDistance); err != nil {
		return err
	}
	if err := w.f.Sync(); err != nil {
		return err
	}
	w.last = c
	return nil
}

func allZero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}
