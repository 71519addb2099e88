package replica

import (
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// What is kept in memory is what is in the log now, and nothing else.
func TestRecentEntries(t *testing.T) {
	s := newTestStore(t)
	const n = recentEntries + 3
	for i := range uint64(n) {
		if err := s.StoreLogs([]*raft.Log{command(i+1, 1, i, 1, 7, string(rune('a'+i)))}); err != nil {
			t.Fatal(err)
		}
	}
	check := func(index, term uint64, data string) {
		t.Helper()
		slots := s.recent.slots
		defer func() { s.recent.slots = slots }()
		var got, stored raft.Log
		if err := s.GetLog(index, &got); err != nil {
			t.Fatalf("entry %d: %v", index, err)
		}
		s.recent.clear()
		if err := s.GetLog(index, &stored); err != nil {
			t.Fatalf("entry %d: %v", index, err)
		}
		if string(got.Data) != data || got.Term != term || string(got.Extensions) != string(stored.Extensions) || !got.AppendedAt.Equal(stored.AppendedAt) || string(stored.Data) != data {
			t.Errorf("entry %d: %v in memory, %v in the log, want %q of term %d", index, got, stored, data, term)
		}
	}
	kept := 0
	for i := range uint64(n) {
		if s.recent.get(s.gens.now.Load(), i+1, &raft.Log{}) {
			kept++
		}
	}
	if kept != recentEntries {
		t.Errorf("%d entries are in memory, want %d", kept, recentEntries)
	}

	// A suffix that lost an election is gone, and replaced.
	if err := s.DeleteRange(n-1, n); err != nil {
		t.Fatal(err)
	}
	var out raft.Log
	if err := s.GetLog(n, &out); err != raft.ErrLogNotFound {
		t.Errorf("a deleted entry: %v, %v", out, err)
	}
	if err := s.StoreLogs([]*raft.Log{command(n-1, 2, n-2, 1, 8, "new")}); err != nil {
		t.Fatal(err)
	}
	check(n-1, 2, "new")

	// Entries that were refused are not there.
	if err := s.StoreLogs([]*raft.Log{command(n, 2, 99, 1, 8, "gap")}); err == nil {
		t.Fatal("a gap was stored")
	}
	if err := s.GetLog(n, &out); err != raft.ErrLogNotFound {
		t.Errorf("a refused entry: %v, %v", out, err)
	}

	// Another log, which a snapshot has put in the place of this one.
	if err := s.StoreLogs([]*raft.Log{command(n, 2, n-1, 1, 8, "last")}); err != nil {
		t.Fatal(err)
	}
	if s.recent.get(&generation{}, n, &out) {
		t.Error("an entry of another log was found")
	}
	check(n, 2, "last")

	// Entries without records come between, with the time of those before.
	if err := s.StoreLogs([]*raft.Log{
		{Index: n + 1, Term: 2, Type: raft.LogNoop, AppendedAt: time.Unix(99, 0)},
		command(n+2, 2, n, 1, 9, "more"),
		{Index: n + 3, Term: 2, Type: raft.LogNoop},
	}); err != nil {
		t.Fatal(err)
	}
	check(n+1, 2, "")
	check(n+2, 2, "more")
	check(n+3, 2, "")
}
