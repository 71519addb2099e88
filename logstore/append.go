package logstore

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// writeChunk bounds the buffer of frames on their way to the file.
const writeChunk = 4 << 20

// Append adds entries to the end of the log and returns once they are durable:
// one write and one fdatasync for all of them, more only where a segment ends
// between them. It does not keep or change the entries.
//
// Entries must continue the log: consecutive indexes, terms and append times
// that do not fall, and, where they have records, the base offset that comes
// next. Otherwise Append fails with ErrRejected or ErrTooLarge and has written
// nothing; so it does with ErrFull where the disk has no space for the segments
// that the entries need. Any other failure ends all writing (see Failed), and
// what became of the entries is not known until the log is opened anew.
func (l *Log) Append(entries []Entry) error {
	if len(entries) == 0 {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.writable(); err != nil {
		return err
	}
	st := l.state.Load()
	if err := checkEntries(entries, st.tail); err != nil {
		return err
	}
	next, err := l.reserve(l.layout(entries, st))
	if vfs.IsFull(err) {
		return full(err)
	} else if err != nil {
		return l.fail(err)
	}
	done := l.opts.Observer.appending(entries)
	g := group{seg: st.last(), active: st.active.mem, tail: st.tail, written: st.tail.pos, synced: st.tail.index, next: next}
	if err := l.appendGroup(&g, entries); err != nil {
		return errors.Join(l.fail(err), closePrepared(g.next))
	}
	if cap(l.buf) > writeChunk+(1<<20) {
		l.buf = nil // one large entry must not pin its size for ever
	}
	l.keeper.appended(g.tail.pos)
	done()
	return nil
}

// appendGroup writes entries that have been checked, to space that has been
// reserved.
func (l *Log) appendGroup(g *group, entries []Entry) error {
	l.buf = l.buf[:0]
	for i := range entries {
		e := entries[i]
		if e.Count == 0 {
			e.BaseOffset = g.tail.offset
			e.AppendTime = max(e.AppendTime, g.tail.time)
		}
		size := frameSize(len(e.Payload))
		if l.rolls(g.tail.pos, size, g.seg.firstOffset, g.tail.offset, e.Count) {
			if err := l.roll(g); err != nil {
				return err
			}
		} else if len(l.buf) > 0 && len(l.buf)+int(size) > writeChunk {
			if err := l.write(g); err != nil {
				return err
			}
		}
		h := frameHeader{length: uint32(len(e.Payload)), index: e.Index, term: e.Term, base: e.BaseOffset, time: e.AppendTime, count: e.Count}
		g.active = append(g.active, g.seg.indexEntry(g.tail.pos, &h))
		l.buf, h.crc = appendFrame(l.buf, g.seg.seed, g.tail.crc, g.synced, &e)
		g.tail.advance(&h)
	}
	return l.flush(g)
}

// checkEntries tells whether entries continue t, before anything is written.
func checkEntries(entries []Entry, t tail) error {
	for i := range entries {
		e := &entries[i]
		switch {
		case e.Index != t.index+1:
			return fmt.Errorf("%w: index %d does not follow index %d", ErrRejected, e.Index, t.index)
		case e.Term < t.term:
			return fmt.Errorf("%w: entry %d has term %d after term %d", ErrRejected, e.Index, e.Term, t.term)
		case len(e.Payload) > MaxPayload:
			return fmt.Errorf("%w: entry %d has %d bytes, the limit is %d", ErrTooLarge, e.Index, len(e.Payload), MaxPayload)
		}
		if e.Count > 0 {
			switch {
			case e.BaseOffset != t.offset:
				return fmt.Errorf("%w: entry %d has base offset %d where %d belongs", ErrRejected, e.Index, e.BaseOffset, t.offset)
			case e.AppendTime < t.time:
				return fmt.Errorf("%w: entry %d has append time %d after %d", ErrRejected, e.Index, e.AppendTime, t.time)
			case t.offset+uint64(e.Count) < t.offset:
				return fmt.Errorf("%w: entry %d passes the last possible offset", ErrRejected, e.Index)
			}
			t.time = e.AppendTime
		} else {
			t.time = max(t.time, e.AppendTime)
		}
		t.index, t.term, t.offset = e.Index, e.Term, t.offset+uint64(e.Count)
	}
	return nil
}

// group is the part of an Append that is not published yet.
type group struct {
	seg     *segment
	active  []indexEntry
	tail    tail
	written int64  // end of what was written to the file
	synced  uint64 // index of the last entry known durable: the mark in frames
	next    []prepared
}

// write hands the buffered frames to the file, not yet durable.
func (l *Log) write(g *group) error {
	if len(l.buf) == 0 {
		return nil
	}
	if _, err := l.active.WriteAt(l.buf, g.written); err != nil {
		return fmt.Errorf("write %s: %w", g.seg.file, err)
	}
	g.written += int64(len(l.buf))
	l.buf = l.buf[:0]
	return nil
}

// flush makes the group durable and shows it to readers.
func (l *Log) flush(g *group) error {
	if err := l.write(g); err != nil {
		return err
	}
	if err := l.opts.Observer.sync(l.active.Sync); err != nil {
		return fmt.Errorf("sync %s: %w", g.seg.file, err)
	}
	g.synced = g.tail.index
	st := l.state.Load()
	l.state.Store(&state{
		segs:   st.segs,
		active: frameIndex{mem: g.active, end: g.tail.pos},
		tail:   g.tail,
		size:   l.space,
		cuts:   st.cuts,
	})
	return nil
}

// roll seals the active segment and begins the next one. A segment is durable
// as a whole before the next one's name can appear, so that only the last one
// can have a torn tail.
func (l *Log) roll(g *group) error {
	if err := l.flush(g); err != nil {
		return err
	}
	p := g.next[0] // as many as layout said
	next := newSegment(l.dir, g.tail.header(l.id))
	if err := installSegment(l.fs, p.file, p.name, next); err != nil {
		return err
	}
	g.next = g.next[1:]

	st := l.state.Load()
	old := st.last()
	old.seal(&st.tail, l.space)
	sealedIndex := st.active
	// Before the state that makes it one of the sealed, whose readers need the
	// index here; readers of the present state do not look at it.
	l.handles.unpin(old, &sealedIndex)
	l.handles.pin(next, p.file)
	l.active, l.space = p.file, p.size
	g.seg = next
	g.active = nil
	g.tail = next.start()
	g.written = g.tail.pos
	segs := append(st.segs[:len(st.segs):len(st.segs)], next)
	l.state.Store(&state{segs: segs, active: frameIndex{end: g.tail.pos}, tail: g.tail, size: l.space, cuts: st.cuts})
	l.keeper.sealed(old)
	return nil
}

// installSegment makes a prepared file the segment s: header first, durable,
// then the name.
func installSegment(fs vfs.FS, f vfs.File, tempName string, s *segment) error {
	if _, err := f.WriteAt(s.encode(), 0); err != nil {
		return fmt.Errorf("write header of %s: %w", s.file, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync header of %s: %w", s.file, err)
	}
	if err := fs.Rename(tempName, s.file); err != nil {
		return err
	}
	return fs.SyncDir(filepath.Dir(s.file))
}
