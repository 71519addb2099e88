package replica

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs"
)

// Raft leaves requests without an answer that it has taken when it shuts down,
// and whoever waits for one, see sequencer.await, waits for ever.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/hashicorp/raft.(*deferError).Error"))
}

// testConfig is of a group of one that leads after a few milliseconds.
func testConfig(_ testing.TB, dir string) Config {
	const tick = 5 * time.Millisecond
	return Config{
		Dir: dir, ID: "a", Address: "a:1", Bootstrap: []Server{{ID: "a", Address: "a:1"}},
		HeartbeatTimeout: tick, ElectionTimeout: tick, LeaderLeaseTimeout: tick,
	}
}

// memConfig keeps everything in fsys, in small segments.
func memConfig(dir string, fsys vfs.FS) Config {
	cfg := testConfig(nil, dir)
	cfg.FS = fsys
	cfg.SegmentSize = logstore.MinSegmentSize
	cfg.EntryBytes = 1 << 10
	return cfg
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func mustOpen(t testing.TB, cfg Config) *Replica {
	t.Helper()
	r, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.WaitReady(testContext(t)); err != nil {
		t.Fatal(errors.Join(err, r.Close(context.Background())))
	}
	return r
}

func mustClose(t testing.TB, r *Replica) {
	t.Helper()
	if err := r.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func mustPropose(t testing.TB, r *Replica, records string, count uint32) Ack {
	t.Helper()
	p, err := r.Propose(context.Background(), Proposal{Records: []byte(records), Count: count}, true)
	if err != nil {
		t.Fatal(err)
	}
	ack, err := result(p)
	if err != nil {
		t.Fatal(err)
	}
	return ack
}

func result(p *Pending) (Ack, error) {
	<-p.Done()
	return p.Result()
}

// A test record is 16 bytes: the batch it belongs to and its place in it.
const recordSize = 16

type record struct{ batch, place uint64 }

func batchOf(id uint64, count int) Proposal {
	b := make([]byte, 0, count*recordSize)
	for i := range count {
		b = binary.LittleEndian.AppendUint64(b, id)
		b = binary.LittleEndian.AppendUint64(b, uint64(i))
	}
	return Proposal{Records: b, Count: uint32(count)}
}

// readAll returns all committed records by their offset, from the first.
func readAll(r *Replica) (first uint64, records []record, err error) {
	first, watermark, _ := r.Bounds()
	buf := make([]byte, 64<<10)
	for next := first; next < watermark; {
		batches, err := r.Read(next, buf, nil)
		var short *logstore.ShortBufferError
		if errors.As(err, &short) {
			buf = make([]byte, short.Need)
			continue
		}
		if err != nil {
			return first, nil, fmt.Errorf("read at %d of %d: %w", next, watermark, err)
		}
		for _, b := range batches {
			if b.BaseOffset != next {
				return first, nil, fmt.Errorf("batch at %d where %d belongs", b.BaseOffset, next)
			}
			data := buf[b.Start:b.End]
			if len(data) != int(b.Count)*recordSize {
				return first, nil, fmt.Errorf("batch at %d: %d records in %d bytes", next, b.Count, len(data))
			}
			for ; len(data) > 0; data = data[recordSize:] {
				records = append(records, record{binary.LittleEndian.Uint64(data), binary.LittleEndian.Uint64(data[8:])})
			}
			next += uint64(b.Count)
		}
	}
	return first, records, nil
}

// acked is an acknowledged batch.
type acked struct {
	id    uint64
	count int
	ack   Ack
}

// checkAcked checks that all acknowledged batches are where they were said to
// be, and that no batch, acknowledged or not, is there twice or in part.
func checkAcked(r *Replica, all []acked) error {
	first, records, err := readAll(r)
	if err != nil {
		return err
	}
	for _, a := range all {
		if a.ack.NextOffset != a.ack.BaseOffset+uint64(a.count) {
			return fmt.Errorf("batch %d of %d records: %+v", a.id, a.count, a.ack)
		}
		for i := range a.count {
			at := a.ack.BaseOffset + uint64(i) - first
			if at >= uint64(len(records)) {
				return fmt.Errorf("batch %d was acknowledged at %d; readable are %d–%d", a.id, a.ack.BaseOffset, first, first+uint64(len(records)))
			}
			if want := (record{a.id, uint64(i)}); records[at] != want {
				return fmt.Errorf("offset %d has record %v, acknowledged was %v", at+first, records[at], want)
			}
		}
	}
	seen := map[uint64]bool{}
	for i, rec := range records {
		switch {
		case rec.place == 0 && seen[rec.batch]:
			return fmt.Errorf("batch %d is there twice, again at %d", rec.batch, first+uint64(i))
		case rec.place > 0 && (i == 0 || records[i-1] != record{rec.batch, rec.place - 1}):
			return fmt.Errorf("offset %d: record %v without the one before", first+uint64(i), rec)
		}
		seen[rec.batch] = true
	}
	return nil
}
