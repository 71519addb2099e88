package logstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// TestStreamsSurvive exports, imports and verifies from many goroutines while
// one appends, rolls, truncates and deletes under them. Whatever is exported is
// a whole log of what was there when it was asked for, and a verification finds
// no damage where there is none.
func TestStreamsSurvive(t *testing.T) {
	rng := vfstest.Rand(t)
	l, err := Open(t.TempDir(), Options{FS: vfs.OS, SegmentSize: 16 << 10, MaxOpenSegments: 3, CheckpointInterval: 1e6})
	must(t, err)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var others sync.WaitGroup
	var exported, verified atomic.Int64
	for i := range 3 {
		r := rand.New(rand.NewPCG(rng.Uint64(), uint64(i)))
		others.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				if err := exportOnce(l, r); err != nil {
					t.Errorf("export %d: %v", n, err)
					return
				}
				exported.Add(1)
			}
		})
	}
	others.Go(func() {
		for ctx.Err() == nil {
			if _, err := l.Verify(ctx, 0, nil); err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("verify: %v", err)
				return
			}
			verified.Add(1)
			segs := l.Segments()
			for i := 1; i < len(segs); i++ {
				if segs[i].FirstIndex != segs[i-1].LastIndex+1 || segs[i].FirstOffset != segs[i-1].NextOffset {
					t.Errorf("segments %+v", segs)
					return
				}
			}
		}
	})

	term := uint64(1)
	for range vfstest.Env(t, "DIURNA_ROUNDS", 300) {
		last, offset := l.LastIndex(), l.NextOffset()
		entries := make([]Entry, 1+rng.IntN(8))
		for i := range entries {
			index := last + 1 + uint64(i)
			entries[i] = Entry{Index: index, Term: term, Count: 1, BaseOffset: offset + uint64(i), AppendTime: max(int64(index), l.LastAppendTime()), Payload: namedPayload(index, term, 16+rng.IntN(3000))}
		}
		must(t, l.Append(entries))
		switch rng.IntN(8) {
		case 0:
			term++
			must(t, l.TruncateSuffix(l.LastIndex()-min(l.LastIndex()-l.FirstIndex(), uint64(rng.IntN(12)))))
		case 1:
			_, err := l.DeletePrefix(l.FirstIndex() + rng.Uint64N((l.LastIndex()-l.FirstIndex())/2+1))
			must(t, err)
		}
	}
	stop()
	others.Wait()
	t.Logf("%d exports, %d verifications", exported.Load(), verified.Load())
	if len(l.exports.open) > 0 {
		t.Errorf("%d exports are held", len(l.exports.open))
	}
	must(t, l.Close())
}

func exportOnce(l *Log, r *rand.Rand) error {
	st := l.Stats()
	x, err := l.Export(st.LastIndex - min(uint64(r.IntN(10)), st.LastIndex+1-st.FirstIndex))
	if errors.Is(err, ErrNotFound) {
		return nil // it was cut, or deleted, since
	}
	if err != nil {
		return err
	}
	to := vfstest.New()
	_, err = Import(testDir, smallOptions(to), io.Reader(x))
	if err := errors.Join(err, x.Close()); err != nil {
		return err
	}
	got, err := Open(testDir, smallOptions(to))
	if err != nil {
		return err
	}
	var buf []byte
	for index := x.FirstIndex(); index <= x.LastIndex(); index++ {
		var e Entry
		if e, buf, err = got.Entry(index, buf); err == nil {
			err = checkNamed(e.Payload, index)
		}
		if err == nil && binary.LittleEndian.Uint64(e.Payload[8:]) != e.Term {
			err = fmt.Errorf("entry %d has term %d", index, e.Term)
		}
		if err != nil {
			return errors.Join(err, got.Close())
		}
	}
	return got.Close()
}

// TestExportClosed: Close ends a stream that somebody else reads.
func TestExportClosed(t *testing.T) {
	fsys, m := fuzzLog(t, true)
	l := mustOpen(t, smallOptions(fsys))
	for range 20 {
		x, err := l.Export(m.last())
		must(t, err)
		started, done := make(chan struct{}), make(chan error, 1)
		go func() {
			b := make([]byte, 100)
			_, err := x.Read(b)
			close(started)
			for err == nil {
				_, err = x.Read(b)
			}
			done <- err
		}()
		<-started
		must(t, x.Close())
		// It may have been at the end.
		if err := <-done; !errors.Is(err, ErrClosed) && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	// An export outlives its log.
	x, err := l.Export(m.last())
	must(t, err)
	must(t, l.Close())
	n, err := io.Copy(io.Discard, x)
	if err != nil || n != x.Size() {
		t.Errorf("%d of %d bytes: %v", n, x.Size(), err)
	}
	must(t, x.Close())
}

// TestExportDamage: what is damaged is not sent.
func TestExportDamage(t *testing.T) {
	base, m := fuzzLog(t, true)
	for _, k := range []int{0, 1, 2} {
		fsys := base.CrashClone(nil, vfstest.All)
		l := mustOpen(t, smallOptions(fsys))
		name := segments(fsys)[k]
		must(t, fsys.Mutate(name, func(b []byte) []byte { b[segmentHeaderSize+HeaderSize+3] ^= 4; return b }))
		x, err := l.Export(m.last())
		must(t, err)
		to := vfstest.New()
		_, err = Import(testDir, smallOptions(to), x)
		var damage *CorruptError
		if !errors.As(err, &damage) || damage.File != name || len(to.Names()) > 0 {
			t.Errorf("segment %d: %v, %v", k, err, to.Names())
		}
		if _, again := x.Read(make([]byte, 9)); !errors.As(again, &damage) {
			t.Errorf("segment %d, again: %v", k, again)
		}
		must(t, x.Close())
		must(t, l.Close())
	}
}
