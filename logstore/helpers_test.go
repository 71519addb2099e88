package logstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

const testDir = "log"

// smallOptions make segments roll every few entries.
func smallOptions(fs *vfstest.Mem) Options {
	return Options{FS: fs, SegmentSize: MinSegmentSize, CheckpointInterval: -1, inline: true}
}

func mustOpen(t testing.TB, opts Options) *Log {
	t.Helper()
	l, err := Open(testDir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// model is what a log must hold.
type model struct {
	first   uint64 // lowest index
	prev    Entry  // the one before it
	entries []Entry
}

func (m *model) last() uint64 { return m.first + uint64(len(m.entries)) - 1 }

func (m *model) clone() model { return model{m.first, m.prev, slices.Clone(m.entries)} }

func (m *model) next() (index, term, offset uint64, time int64) {
	e := m.prev
	if len(m.entries) > 0 {
		e = m.entries[len(m.entries)-1]
	}
	return m.last() + 1, e.Term, e.BaseOffset + uint64(e.Count), e.AppendTime
}

// generate makes entries that continue the model.
func (m *model) generate(rng *rand.Rand, n, maxPayload int) []Entry {
	index, term, offset, time := m.next()
	entries := make([]Entry, n)
	for i := range entries {
		if rng.IntN(10) == 0 {
			term++
		}
		payload := make([]byte, rng.IntN(maxPayload+1))
		for i := range payload {
			payload[i] = byte(rng.Uint32())
		}
		if rng.IntN(4) == 0 {
			clear(payload) // zeros are what a torn write leaves, too
		}
		time += rng.Int64N(1000)
		e := Entry{Index: index, Term: term, BaseOffset: offset, AppendTime: time, Payload: payload}
		if rng.IntN(4) > 0 {
			e.Count = 1 + rng.Uint32N(5)
		} else {
			e.Type = 1 + uint8(rng.IntN(4))
		}
		entries[i] = e
		index++
		offset += uint64(e.Count)
	}
	return entries
}

func (m *model) append(entries []Entry) { m.entries = append(m.entries, entries...) }

func (m *model) truncate(from uint64) { m.entries = m.entries[:from-m.first] }

func (m *model) deletePrefix(first uint64) {
	if n := first - m.first; n > 0 {
		m.prev = m.entries[n-1]
		m.entries = m.entries[n:]
	}
	m.first = first
}

func equalEntries(a, b Entry) bool {
	return a.Index == b.Index && a.Term == b.Term && a.Type == b.Type && a.Count == b.Count &&
		a.BaseOffset == b.BaseOffset && a.AppendTime == b.AppendTime && bytes.Equal(a.Payload, b.Payload)
}

// checkEntriesEqual reads every entry of the log and compares it.
func checkEntriesEqual(l *Log, m *model) error {
	if l.FirstIndex() != m.first || l.LastIndex() != m.last() {
		return fmt.Errorf("log holds %d–%d, want %d–%d", l.FirstIndex(), l.LastIndex(), m.first, m.last())
	}
	var buf []byte
	for _, want := range m.entries {
		var got Entry
		var err error
		got, buf, err = l.Entry(want.Index, buf)
		if err != nil {
			return fmt.Errorf("entry %d: %w", want.Index, err)
		}
		if !equalEntries(got, want) {
			return fmt.Errorf("entry %d is %v, want %v", want.Index, got, want)
		}
	}
	return nil
}

// checkReads compares everything else that can be asked of a log.
func checkReads(l *Log, m *model, rng *rand.Rand) error {
	if err := checkEntriesEqual(l, m); err != nil {
		return err
	}
	for _, index := range []uint64{0, m.first - 1, m.last() + 1} {
		if _, _, err := l.Entry(index, nil); !errors.Is(err, ErrNotFound) {
			return fmt.Errorf("entry %d of %d–%d: %v", index, m.first, m.last(), err)
		}
	}
	var records []Entry
	for _, e := range m.entries {
		if e.Count > 0 {
			records = append(records, e)
		}
	}
	_, _, next, _ := m.next()
	if l.NextOffset() != next {
		return fmt.Errorf("next offset is %d, want %d", l.NextOffset(), next)
	}
	for i, e := range records {
		offset := e.BaseOffset + uint64(rng.Uint32N(e.Count))
		if index, err := l.IndexOfOffset(offset); err != nil || index != e.Index {
			return fmt.Errorf("offset %d is in entry %d (%v), want %d", offset, index, err, e.Index)
		}
		// The lower bound of its time is the first record with that time.
		first := i
		for first > 0 && records[first-1].AppendTime == e.AppendTime {
			first--
		}
		if got, err := l.OffsetAtTime(e.AppendTime); err != nil || got > records[first].BaseOffset {
			return fmt.Errorf("offset at time %d is %d (%v), want %d", e.AppendTime, got, err, records[first].BaseOffset)
		}
		want := next
		for _, r := range records[i:] {
			if r.AppendTime > e.AppendTime {
				want = r.BaseOffset
				break
			}
		}
		if got, err := l.OffsetAtTime(e.AppendTime + 1); err != nil || got != want {
			return fmt.Errorf("offset at time %d is %d (%v), want %d", e.AppendTime+1, got, err, want)
		}
	}
	return checkBatches(l, records, next, rng)
}

// checkBatches reads all records through ReadBatches with buffers of any size.
func checkBatches(l *Log, records []Entry, next uint64, rng *rand.Rand) error {
	buf := make([]byte, 16<<10)
	var dst []Batch
	for i := 0; i < len(records); {
		e := records[i]
		from := e.BaseOffset + uint64(rng.Uint32N(e.Count))
		limit := next
		if rng.IntN(3) == 0 {
			limit = from + 1 + rng.Uint64N(next-from)
		}
		need := int(frameSize(len(e.Payload)))
		var short *ShortBufferError
		if _, err := l.ReadBatches(from, limit, buf[:need-1], nil); !errors.As(err, &short) || short.Need != need {
			return fmt.Errorf("read of offset %d into %d bytes: %v", from, need-1, err)
		}
		var err error
		dst, err = l.ReadBatches(from, limit, buf[:need+rng.IntN(len(buf)-need)], dst[:0])
		if err != nil || len(dst) == 0 {
			return fmt.Errorf("read of offset %d: %d batches, %v", from, len(dst), err)
		}
		for _, b := range dst {
			if i == len(records) || b.BaseOffset >= limit {
				return fmt.Errorf("batch at %d, over limit %d", b.BaseOffset, limit)
			}
			e := records[i]
			if b.BaseOffset != e.BaseOffset || b.Count != e.Count || b.AppendTime != e.AppendTime || !bytes.Equal(buf[b.Start:b.End], e.Payload) {
				return fmt.Errorf("batch %+v, want entry %v", b, e)
			}
			if b.Start < HeaderSize {
				return fmt.Errorf("batch %+v has no headroom", b)
			}
			i++
		}
	}
	for _, at := range [][2]uint64{{next, next + 1}, {next, next}, {0, 0}} {
		if b, err := l.ReadBatches(at[0], at[1], buf, nil); !errors.Is(err, ErrNotFound) {
			return fmt.Errorf("read of %d below %d: %v, %v", at[0], at[1], b, err)
		}
	}
	return nil
}

// resum gives a changed segment header, checkpoint slot or index its checksum.
func resum(b []byte) []byte {
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b[12:], castagnoli))
	return b
}
