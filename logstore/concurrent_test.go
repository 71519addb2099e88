package logstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// Payloads of this test name the entry they belong to: index, term, then a
// filler made of both.
func namedPayload(index, term uint64, size int) []byte {
	b := binary.LittleEndian.AppendUint64(nil, index)
	b = binary.LittleEndian.AppendUint64(b, term)
	for len(b) < size {
		b = append(b, byte(index*31+term*7))
	}
	return b
}

func checkNamed(b []byte, index uint64) error {
	if len(b) < 16 {
		return fmt.Errorf("payload of %d bytes", len(b))
	}
	gotIndex, term := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
	if index != 0 && gotIndex != index {
		return fmt.Errorf("entry %d where %d was asked for", gotIndex, index)
	}
	for _, c := range b[16:] {
		if c != byte(gotIndex*31+term*7) {
			return fmt.Errorf("entry %d of term %d has other content", gotIndex, term)
		}
	}
	return nil
}

// TestReadersSurvive reads from many goroutines, every way there is, while one
// appends, rolls, truncates and deletes under them. A read returns what was
// written at that place, at some time, or says that it is not there; it never
// fails otherwise and never sees half a change. Below what is not touched by
// truncation, nothing is ever missing.
func TestReadersSurvive(t *testing.T) {
	rng := vfstest.Rand(t)
	l, err := Open(t.TempDir(), Options{FS: vfs.OS, SegmentSize: 16 << 10, MaxOpenSegments: 3, CheckpointInterval: 1e6})
	must(t, err)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()

	// The writer keeps entries below floor..stable untouched: never truncated
	// below stable, never deleted at floor or above.
	var floor, stable atomic.Uint64
	floor.Store(1)
	var readers sync.WaitGroup
	reads := new(atomic.Uint64)
	for i := range 6 {
		r := rand.New(rand.NewPCG(rng.Uint64(), uint64(i)))
		readers.Go(func() {
			var buf []byte
			chunk := make([]byte, 8<<10)
			for ctx.Err() == nil {
				reads.Add(1)
				from, to := floor.Load(), stable.Load()
				if from > to {
					continue
				}
				index := from + r.Uint64N(to-from+1)
				var e Entry
				var err error
				e, buf, err = l.Entry(index, buf)
				if err == nil {
					err = checkNamed(e.Payload, index)
				} else if errors.Is(err, ErrNotFound) && index < floor.Load() {
					continue // deleted since
				}
				if err != nil {
					t.Errorf("entry %d: %v", index, err)
					return
				}
				batches, err := l.ReadBatches(e.BaseOffset, l.NextOffset(), chunk, nil)
				if errors.Is(err, ErrNotFound) && index < floor.Load() {
					continue
				}
				if err != nil || batches[0].BaseOffset != e.BaseOffset {
					t.Errorf("batches at %d: %v, %v", e.BaseOffset, batches, err)
					return
				}
				for _, b := range batches {
					if err := checkNamed(chunk[b.Start:b.End], 0); err != nil {
						t.Errorf("batch at %d: %v", b.BaseOffset, err)
						return
					}
				}
				// Anywhere, also where things vanish.
				index = l.FirstIndex() + r.Uint64N(l.LastIndex()-min(l.LastIndex(), l.FirstIndex())+2)
				if e, buf, err = l.Entry(index, buf); err == nil {
					err = checkNamed(e.Payload, index)
				}
				if err != nil && !errors.Is(err, ErrNotFound) {
					t.Errorf("entry %d: %v", index, err)
					return
				}
			}
		})
	}

	term := uint64(1)
	for range vfstest.Env(t, "DIURNA_ROUNDS", 400) {
		last, offset := l.LastIndex(), l.NextOffset()
		entries := make([]Entry, 1+rng.IntN(8))
		for i := range entries {
			index := last + 1 + uint64(i)
			entries[i] = Entry{Index: index, Term: term, Count: 1, BaseOffset: offset + uint64(i), AppendTime: int64(index), Payload: namedPayload(index, term, 16+rng.IntN(3000))}
		}
		if t := l.LastAppendTime(); entries[0].AppendTime < t {
			for i := range entries {
				entries[i].AppendTime = t
			}
		}
		must(t, l.Append(entries))
		stable.CompareAndSwap(0, 1)
		switch rng.IntN(6) {
		case 0:
			term++
			s := stable.Load()
			must(t, l.TruncateSuffix(s+1+rng.Uint64N(l.LastIndex()-s+1)))
		case 1:
			below := floor.Load() + rng.Uint64N(stable.Load()-floor.Load()+1)
			floor.Store(below)
			_, err := l.DeletePrefix(below)
			must(t, err)
		default:
			stable.Store(l.LastIndex() - min(uint64(rng.IntN(20)), l.LastIndex()-stable.Load()))
		}
	}
	stop()
	readers.Wait()
	t.Logf("%d reads, %+v", reads.Load(), l.Stats())
	must(t, l.Close())
}
