package replica

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// recentEntries is how many entries are kept in memory, each of at most
// Config.EntryBytes.
const recentEntries = 8

// recent holds the last entries that were stored. Raft asks for each of them
// again within moments: the leader once for every follower, a follower when it
// is committed. From the file that takes a system call, a checksum and garbage
// of the entry's size. It does not stand in for the log: what is not here is
// read there. Safe for concurrent use.
type recent struct {
	mu    sync.Mutex
	slots [recentEntries]stored // entry i at i modulo the length
}

// stored is an entry and the log that it was stored in.
type stored struct {
	gen *generation
	log raft.Log
}

// put keeps entries that were stored in gen, whose last append time was before
// until then. They come back as they would from the log.
func (r *recent) put(gen *generation, logs []*raft.Log, before int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range logs {
		kept := raft.Log{Index: l.Index, Term: l.Term, Type: l.Type, Data: l.Data}
		if _, count, appended, err := decodeExtensions(l.Extensions); err == nil && count > 0 {
			kept.Extensions, before = l.Extensions, appended
		}
		if before > 0 {
			kept.AppendedAt = time.Unix(0, before)
		}
		r.slots[l.Index%recentEntries] = stored{gen, kept}
	}
}

// get returns whether an entry of gen is here.
func (r *recent) get(gen *generation, index uint64, out *raft.Log) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &r.slots[index%recentEntries]
	if s.gen != gen || s.log.Index != index {
		return false
	}
	*out = s.log
	return true
}

// clear forgets everything.
func (r *recent) clear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.slots[:])
}
