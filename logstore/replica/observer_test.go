package replica

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

func TestObserver(t *testing.T) {
	var committed, appended, synced atomic.Int64
	cfg := memConfig("r", vfstest.New())
	cfg.Observer = Observer{
		Log: logstore.Observer{
			Appended: func(records, _ uint64, _ time.Duration) { appended.Add(int64(records)) },
			Synced:   func(time.Duration) { synced.Add(1) },
		},
		Committed: func(took time.Duration) {
			if took <= 0 || took > time.Minute {
				t.Errorf("an entry took %v", took)
			}
			committed.Add(1)
		},
	}
	r := mustOpen(t, cfg)
	defer mustClose(t, r)
	mustPropose(t, r, "abc", 3)
	mustPropose(t, r, "de", 2)
	if committed.Load() != 2 || appended.Load() != 5 || synced.Load() < 2 {
		t.Errorf("%d entries committed, %d records appended, %d syncs", committed.Load(), appended.Load(), synced.Load())
	}
	if st := r.Status(); st.Committed != st.Last || st.Committed != st.Applied {
		t.Errorf("%+v", st)
	}
}

// TestCommittedElsewhere: a server knows how far its leader is before it has any
// of it, and does not believe what no correct leader sends.
func TestCommittedElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := testTransports(t)
		defer closeTransports(t, a, b)
		seen := answer(b, &raft.AppendEntriesResponse{Term: 3})
		for _, tc := range []struct {
			req  raft.AppendEntriesRequest
			want uint64
		}{
			{raft.AppendEntriesRequest{Term: 3}, 0},
			{raft.AppendEntriesRequest{Term: 3, PrevLogEntry: 4, LeaderCommitIndex: 900}, 900},
			{raft.AppendEntriesRequest{Term: 3}, 900},
			{raft.AppendEntriesRequest{Term: 3, PrevLogEntry: 4, LeaderCommitIndex: 9000, Entries: []*raft.Log{{Index: 77}}}, 900},
			{raft.AppendEntriesRequest{Term: 4, PrevLogEntry: 4, LeaderCommitIndex: 800}, 900}, // a new leader, which does not know yet
		} {
			err := a.AppendEntries("b", "b:1", &tc.req, new(raft.AppendEntriesResponse))
			if refused := len(tc.req.Entries) > 0; refused != (err != nil) {
				t.Fatalf("%+v: %v", tc.req, err)
			} else if !refused {
				if got := (<-seen).Command.(*raft.AppendEntriesRequest).LeaderCommitIndex; got > tc.req.PrevLogEntry {
					t.Errorf("%+v commits %d", tc.req, got)
				}
			}
			if got := b.told.Load(); got != tc.want {
				t.Errorf("after %+v: %d, want %d", tc.req, got, tc.want)
			}
		}
	})
}
