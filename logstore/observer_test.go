package logstore

import (
	"testing"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

func TestObserver(t *testing.T) {
	var now time.Time
	var records, bytes uint64
	var appends, syncs int
	l := mustOpen(t, Options{FS: vfstest.New(), SegmentSize: MinSegmentSize, Observer: Observer{
		Now: func() time.Time { now = now.Add(time.Second); return now },
		Appended: func(r, b uint64, took time.Duration) {
			if took < 3*time.Second {
				t.Errorf("an append took %v, with a sync in it", took)
			}
			records, bytes, appends = records+r, bytes+b, appends+1
		},
		Synced: func(took time.Duration) {
			if took != time.Second {
				t.Errorf("a sync took %v", took)
			}
			syncs++
		},
	}})
	defer l.Close()
	entry := func(i, count int) Entry {
		return Entry{Index: uint64(i), Term: 1, Count: uint32(count), BaseOffset: l.NextOffset(), Payload: make([]byte, 3000)}
	}
	if err := l.Append([]Entry{entry(1, 5), {Index: 2, Term: 1}}); err != nil {
		t.Fatal(err)
	}
	if err := l.Append([]Entry{entry(7, 5)}); err == nil {
		t.Fatal("took an entry that does not follow")
	}
	if appends != 1 || records != 5 || bytes != 3000+2*HeaderSize || syncs != 1 {
		t.Errorf("%d appends of %d records in %d bytes, %d syncs", appends, records, bytes, syncs)
	}
	if err := l.Append([]Entry{entry(3, 1)}); err != nil {
		t.Fatal(err)
	}
	if appends != 2 || records != 6 || syncs != 3 { // the segment before was synced again
		t.Errorf("%d appends of %d records, %d syncs", appends, records, syncs)
	}
	var size int64
	for _, s := range l.Segments() {
		size += s.Bytes
	}
	if st := l.Stats(); st.Segments != 2 || st.Bytes != size || size < 2*MinSegmentSize {
		t.Errorf("%+v, in segments of %d bytes", st, size)
	}
}
