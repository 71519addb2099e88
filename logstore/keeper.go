package logstore

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// nextName is the file that the next segment is prepared in.
const nextName = "next" + tempSuffix

// keeper is the log's background work: preparing the next segment, writing the
// indexes of sealed ones, recording how far the log is durable. One goroutine,
// begun by Open and waited for by Close.
type keeper struct {
	l    *Log
	wake chan struct{} // one token
	quit chan struct{}
	done chan struct{}

	// nextMu guards the prepared segment. It is held while one is being made:
	// an append that needs it then waits rather than making a second.
	nextMu   sync.Mutex
	next     vfs.File
	wantNext atomic.Bool

	// mu is held over each piece of the work below, and by truncation and
	// deletion, so that no index or checkpoint is written of what they change.
	// Taken after Log.mu where both are.
	mu         sync.Mutex
	checkpoint checkpointWriter

	todoMu sync.Mutex
	todo   []*segment // sealed, without an index file
}

func (k *keeper) start(l *Log) {
	k.l = l
	k.wake = make(chan struct{}, 1)
	k.quit = make(chan struct{})
	k.done = make(chan struct{})
	go k.run()
}

// stop ends the goroutine. The work it left is done by finish.
func (k *keeper) stop() {
	close(k.quit)
	<-k.done
}

func (k *keeper) run() {
	defer close(k.done)
	var tick <-chan time.Time
	if d := k.l.opts.CheckpointInterval; d > 0 {
		ticker := time.NewTicker(d)
		defer ticker.Stop()
		tick = ticker.C
	}
	for {
		select {
		case <-k.quit:
			return
		case <-k.wake:
			k.prepareNext()
			k.writeIndexes()
		case <-tick:
			if err := k.recordDurable(false); err != nil {
				_ = k.l.fail(err)
			}
		}
	}
}

func (k *keeper) poke() {
	if k.l.opts.inline {
		k.prepareNext()
		k.writeIndexes()
		return
	}
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// appended asks for the next segment when the active one is half full: early
// enough to be there in time, late enough not to double an idle log's space.
func (k *keeper) appended(pos int64) {
	if pos > k.l.opts.SegmentSize/2 && k.wantNext.CompareAndSwap(false, true) {
		k.poke()
	}
}

func (k *keeper) sealed(s *segment) {
	k.todoMu.Lock()
	k.todo = append(k.todo, s)
	k.todoMu.Unlock()
	k.poke()
}

func (k *keeper) prepareNext() {
	k.nextMu.Lock()
	defer k.nextMu.Unlock()
	if k.next != nil || !k.wantNext.Load() || k.l.Err() != nil {
		return
	}
	// A failure here (a full disk, say) is not one of the log: the append that
	// needs the segment tries again and reports it.
	k.next, _ = k.makeNext()
}

// makeNext is called with nextMu held.
func (k *keeper) makeNext() (vfs.File, error) {
	f, err := vfs.CreateOver(k.l.fs, filepath.Join(k.l.dir, nextName))
	if err != nil {
		return nil, err
	}
	if err := f.Preallocate(k.l.opts.SegmentSize); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// takeNext hands the prepared segment over, making one if there is none.
func (k *keeper) takeNext() (vfs.File, error) {
	k.nextMu.Lock()
	defer k.nextMu.Unlock()
	k.wantNext.Store(false)
	if f := k.next; f != nil {
		k.next = nil
		return f, nil
	}
	return k.makeNext()
}

func (k *keeper) takeTodo() *segment {
	k.todoMu.Lock()
	defer k.todoMu.Unlock()
	if len(k.todo) == 0 {
		return nil
	}
	s := k.todo[0]
	k.todo = k.todo[1:]
	return s
}

// forget drops pending work on segments that are not sealed, or not there, any
// more. Called with mu held.
func (k *keeper) forget(gone func(*segment) bool) {
	k.todoMu.Lock()
	defer k.todoMu.Unlock()
	k.todo = slices.DeleteFunc(k.todo, gone)
}

func (k *keeper) writeIndexes() {
	for k.l.Err() == nil {
		if !k.writeOneIndex() {
			return
		}
	}
}

func (k *keeper) writeOneIndex() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.takeTodo()
	if s == nil {
		return false
	}
	// The reference keeps the index in memory until its file is there.
	o, err := k.l.handles.acquire(s)
	if err != nil {
		return true // closing, or damaged: then a read will say so
	}
	defer k.l.handles.release(s)
	if o.index != nil && o.damage == nil && o.mapping == nil {
		// An index that cannot be written is rebuilt when it is needed.
		if err := writeIndex(k.l.fs, s, s.lastCRC, o.index); err == nil {
			k.l.handles.useIndexFile(s)
		}
	}
	return true
}

// recordDurable writes a checkpoint if there is something new to record.
func (k *keeper) recordDurable(clean bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.l.Err(); err != nil {
		return err
	}
	return k.record(k.l.state.Load(), clean)
}

// record writes a checkpoint of st if that is news. Called with mu held.
func (k *keeper) record(st *state, clean bool) error {
	c := st.checkpoint(k.l.id)
	c.clean = clean
	return k.write(c)
}

func (k *keeper) write(c checkpoint) error {
	c.seq = k.checkpoint.last.seq
	if c == k.checkpoint.last {
		return nil
	}
	if err := k.checkpoint.record(c); err != nil {
		return fmt.Errorf("checkpoint %s: %w", filepath.Join(k.l.dir, checkpointName), err)
	}
	return nil
}

func (st *state) checkpoint(id logID) checkpoint {
	t := st.tail
	t.synced = t.index // all of a state is durable
	return checkpoint{id: id, first: st.segs[0].firstIndex, segment: st.last().firstIndex, tail: t}
}

// finish completes the work after stop, ending with the mark of a clean close.
func (k *keeper) finish() error {
	k.writeIndexes()
	st := k.l.state.Load()
	if len(st.active.mem) > 0 {
		if err := writeIndex(k.l.fs, st.last(), st.tail.crc, &st.active); err != nil {
			return err
		}
	}
	if err := k.recordDurable(true); err != nil {
		return k.l.fail(err)
	}
	return nil
}

// release closes the keeper's files.
func (k *keeper) release() error {
	var err error
	if k.next != nil {
		err = errors.Join(k.next.Close(), k.l.fs.Remove(filepath.Join(k.l.dir, nextName)))
		k.next = nil
	}
	return errors.Join(err, k.checkpoint.f.Close())
}
