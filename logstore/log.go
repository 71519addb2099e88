package logstore

import (
	"errors"
	"fmt"
	"sort"
	"sync/atomic"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// Log is an open segment log. Any number of goroutines may read while one at a
// time appends, truncates or deletes; writers exclude each other.
type Log struct {
	dir      string
	opts     Options
	fs       vfs.FS
	id       logID
	recovery Recovery

	// What readers see. A new state is published by every change and never
	// altered afterwards, so that readers take no lock and no writer waits for
	// them. Everything in it is durable.
	state   atomic.Pointer[state]
	handles handles

	// mu is held by writers: Append, TruncateSuffix, DeletePrefix, Close.
	mu     vfs.Mutex
	active vfs.File // the last segment's file
	space  int64    // how much of it, from its start, has its place on the disk
	buf    []byte   // frames on their way to it
	closed bool

	// failure is set once, by the first failed write, and ends all writing.
	failure atomic.Pointer[error]
	failed  chan struct{}

	keeper  keeper
	exports exports
}

// state is the log at one moment. Reading it needs no lock.
type state struct {
	segs   []*segment // by first index; the last one is active
	active frameIndex // of the active segment
	tail   tail       // end of the log
	size   int64      // of the active segment's file, in bytes
	// cuts counts truncations and deletions. A reader whose state has another
	// count than the current one may have looked for frames that are gone.
	cuts uint64
}

func (st *state) last() *segment { return st.segs[len(st.segs)-1] }

// segmentOf returns the segment that holds an index within the log's bounds.
func (st *state) segmentOf(index uint64) int {
	return sort.Search(len(st.segs), func(i int) bool { return st.segs[i].firstIndex > index }) - 1
}

// Recovery says what opening a log found and did.
type Recovery struct {
	// Clean: the log had been closed; nothing had to be read.
	Clean bool
	// Torn is the file whose torn tail was cut off, if any: Bytes bytes that
	// were never acknowledged, at Position.
	Torn     string
	Position int64
	Bytes    int64
}

// ID is in all files of this copy of the log, and of no other: random, made with
// it.
func (l *Log) ID() [16]byte { return l.id }

// Recovery returns what Open found and did.
func (l *Log) Recovery() Recovery { return l.recovery }

// Failed is closed when a write, sync or truncation has failed. Err tells why.
// The process should stop: what the disk holds is only certain again after the
// log is opened anew.
func (l *Log) Failed() <-chan struct{} { return l.failed }

// Err returns the failure that ended writing, wrapped in ErrFailed, or nil.
func (l *Log) Err() error {
	if p := l.failure.Load(); p != nil {
		return fmt.Errorf("%w: %w", ErrFailed, *p)
	}
	return nil
}

// fail ends all writing and returns the error callers see.
func (l *Log) fail(err error) error {
	if l.failure.CompareAndSwap(nil, &err) {
		close(l.failed)
	}
	return l.Err()
}

// writable is called with mu held.
func (l *Log) writable() error {
	if l.closed {
		return ErrClosed
	}
	return l.Err()
}

// FirstIndex returns the index of the first entry that is kept; one more than
// LastIndex when there is none.
func (l *Log) FirstIndex() uint64 { return l.state.Load().segs[0].firstIndex }

// LastIndex returns the index of the last entry; one less than FirstIndex when
// there is none.
func (l *Log) LastIndex() uint64 { return l.state.Load().tail.index }

// LastTerm returns the term of the last entry, also when that is not kept any
// more; 0 before the first.
func (l *Log) LastTerm() uint64 { return l.state.Load().tail.term }

// FirstOffset returns the offset of the first record that is kept; NextOffset
// when there is none.
func (l *Log) FirstOffset() uint64 { return l.state.Load().segs[0].firstOffset }

// NextOffset returns the offset that the next record will get.
func (l *Log) NextOffset() uint64 { return l.state.Load().tail.offset }

// LastAppendTime returns the greatest append time so far, in nanoseconds since
// 1970 UTC.
func (l *Log) LastAppendTime() int64 { return l.state.Load().tail.time }

// Stats of a log.
type Stats struct {
	Segments                int
	FirstIndex, LastIndex   uint64
	FirstOffset, NextOffset uint64
	// Bytes is what the segments take of the disk, with the space that is
	// reserved in the last one.
	Bytes int64
}

// Stats returns one consistent look at the log.
func (l *Log) Stats() Stats {
	st := l.state.Load()
	bytes := st.size
	for _, s := range st.segs[:len(st.segs)-1] {
		bytes += s.size
	}
	return Stats{
		Bytes:       bytes,
		Segments:    len(st.segs),
		FirstIndex:  st.segs[0].firstIndex,
		LastIndex:   st.tail.index,
		FirstOffset: st.segs[0].firstOffset,
		NextOffset:  st.tail.offset,
	}
}

// Close records where the log ends, so that opening it again reads nothing,
// and releases its files. Reads that are under way finish; later ones fail
// with ErrClosed. Further calls do nothing.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	l.keeper.stop()
	err := l.Err()
	if err == nil {
		err = l.keeper.finish()
	}
	return errors.Join(err, l.keeper.release(), l.handles.close(l.state.Load().segs))
}
