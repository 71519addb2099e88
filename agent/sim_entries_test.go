package agent

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"regexp"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// compareEntries opens the logs that nodes left on their disks and compares
// them, entry by entry, up to where they are committed: not only what readers
// see is to be the same everywhere.
func (c *simCluster) compareEntries(nodes []*simNode, committed uint64) {
	type origin struct {
		node  string
		entry logstore.Entry
	}
	first := map[uint64]origin{}
	for _, n := range nodes {
		log, err := openSimLog(n.mem.CrashClone(c.rng, vfstest.All))
		if err != nil {
			c.t.Errorf("(h) the log of %s, after a clean stop: %v", n.name, err)
			continue
		}
		if log.NextOffset() <= committed {
			c.t.Errorf("(h) the log that %s left ends at %d, and was committed up to %d", n.name, log.NextOffset(), committed+1)
		}
		for index := log.FirstIndex(); index <= log.LastIndex(); index++ {
			e, _, err := log.Entry(index, nil)
			var damage *logstore.CorruptError
			if n.rotten && errors.As(err, &damage) {
				continue // nobody has read it since
			}
			if err != nil {
				c.t.Errorf("(h) entry %d at %s: %v", index, n.name, err)
				break
			}
			if e.Count > 0 && e.BaseOffset > committed {
				break
			}
			have, ok := first[index]
			if !ok {
				first[index] = origin{n.name, e}
				continue
			}
			if h := have.entry; h.Term != e.Term || h.Type != e.Type || h.Count != e.Count || h.BaseOffset != e.BaseOffset || h.AppendTime != e.AppendTime || !bytes.Equal(h.Payload, e.Payload) {
				c.t.Errorf("(h) entry %d is %v at %s and %v at %s", index, describe(h), have.node, describe(e), n.name)
				break
			}
		}
		if err := log.Close(); err != nil {
			c.t.Error(err)
		}
	}
}

func describe(e logstore.Entry) string {
	return fmt.Sprintf("[term %d type %d base %d count %d time %d, %d bytes]", e.Term, e.Type, e.BaseOffset, e.Count, e.AppendTime, len(e.Payload))
}

var simGeneration = regexp.MustCompile(`"generation":(\d+)`)

// openSimLog opens the log that counts on a disk: that of the last life, in its
// current generation.
func openSimLog(mem *vfstest.Mem) (*logstore.Log, error) {
	id, err := readNodeFile(mem, "/data")
	if err != nil {
		return nil, err
	}
	dir := path.Join("/data", id.logs(), "default")
	current, err := mem.ReadFile(path.Join(dir, "CURRENT"))
	if err != nil {
		return nil, err
	}
	m := simGeneration.FindSubmatch(current)
	if m == nil {
		return nil, fmt.Errorf("CURRENT is %q", current)
	}
	return logstore.Open(path.Join(dir, "gen-"+string(m[1]), "log"), logstore.Options{FS: mem, SegmentSize: simSegment})
}
