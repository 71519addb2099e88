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
	nextMu   vfs.Mutex
	next     *prepared
	wantNext atomic.Bool

	// mu is held over each piece of the work below, and by truncation and
	// deletion, so that no index or checkpoint is written of what they change.
	// Taken after Log.mu where both are.
	mu         vfs.Mutex
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
	if p, err := k.makeNext(nextName, k.l.opts.SegmentSize); err == nil {
		k.next = &p
	}
}

// prepared is a file of zeros that has its space.
type prepared struct {
	file vfs.File
	name string // with its directory
	size int64
}

// makeNext is called with nextMu held.
func (k *keeper) makeNext(name string, size int64) (prepared, error) {
	p := prepared{name: filepath.Join(k.l.dir, name), size: size}
	var err error
	if p.file, err = vfs.CreateOver(k.l.fs, p.name); err != nil {
		return p, err
	}
	if err := p.file.Preallocate(size); err != nil {
		// Not to hold on to the part that there was space for.
		return p, errors.Join(err, p.file.Close(), k.l.fs.Remove(p.name))
	}
	return p, nil
}

// takeNext hands a segment over for each of the sizes that are needed, the
// first of them prepared if all went well; or none and the error. Until the next
// call of appended no other is prepared.
func (k *keeper) takeNext(need []int64) (out []prepared, err error) {
	k.nextMu.Lock()
	defer k.nextMu.Unlock()
	k.wantNext.Store(false)
	defer func() {
		if err != nil {
			err = errors.Join(err, k.giveBack(out))
			out = nil
		}
	}()
	for i, size := range need {
		size = max(size, k.l.opts.SegmentSize)
		if i == 0 && k.next != nil {
			out = append(out, *k.next)
			k.next = nil
			if p := &out[0]; p.size < size {
				if err := p.file.Preallocate(size); err != nil {
					return out, err
				}
				p.size = size
			}
			continue
		}
		name := nextName
		if i > 0 {
			name = fmt.Sprintf("next.%d%s", i+1, tempSuffix)
		}
		p, err := k.makeNext(name, size)
		if err != nil {
			return out, err
		}
		out = append(out, p)
	}
	return out, nil
}

// giveBack keeps the first of the files for later and frees the others' space.
// Called with nextMu held.
func (k *keeper) giveBack(ps []prepared) error {
	if len(ps) == 0 {
		return nil
	}
	k.next = &ps[0]
	err := closePrepared(ps[1:])
	for _, p := range ps[1:] {
		err = errors.Join(err, k.l.fs.Remove(p.name))
	}
	return err
}

func closePrepared(ps []prepared) error {
	var err error
	for _, p := range ps {
		err = errors.Join(err, p.file.Close())
	}
	return err
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
	// First, for the space that the others may need.
	dropped := k.dropNext()
	k.writeIndexes()
	st := k.l.state.Load()
	if len(st.active.mem) > 0 {
		// Without an index the next opening reads the segment, as after a crash.
		if err := writeIndex(k.l.fs, st.last(), st.tail.crc, &st.active); err != nil && !vfs.IsFull(err) {
			return errors.Join(err, dropped)
		}
	}
	if err := k.recordDurable(true); err != nil {
		return errors.Join(k.l.fail(err), dropped)
	}
	return dropped
}

// dropNext removes the segment to come.
func (k *keeper) dropNext() error {
	p := k.next
	if p == nil {
		return nil
	}
	k.next = nil
	return errors.Join(p.file.Close(), k.l.fs.Remove(p.name))
}

// release closes the keeper's files.
func (k *keeper) release() error { return errors.Join(k.dropNext(), k.checkpoint.f.Close()) }
