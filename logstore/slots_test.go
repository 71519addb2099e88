package logstore

import (
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// TestOneRottenSlot: either slot of the checkpoint may rot, at any time. What
// the other one says must not cost what was appended since.
func TestOneRottenSlot(t *testing.T) {
	stories := map[string]func(t *testing.T, fsys *vfstest.Mem, l *Log) *Log{
		"reopened": func(t *testing.T, fsys *vfstest.Mem, l *Log) *Log {
			must(t, l.Close())
			return mustOpen(t, smallOptions(fsys))
		},
		"truncated": func(t *testing.T, _ *vfstest.Mem, l *Log) *Log {
			must(t, l.TruncateSuffix(2))
			must(t, l.Append([]Entry{{Index: 2, Term: 2}}))
			return l
		},
		"appended": func(t *testing.T, _ *vfstest.Mem, l *Log) *Log {
			must(t, l.keeper.recordDurable(false))
			return l
		},
		"deleted": func(t *testing.T, _ *vfstest.Mem, l *Log) *Log {
			must(t, l.TruncateSuffix(2))
			must(t, l.Append([]Entry{{Index: 2, Term: 2, Payload: make([]byte, 2*MinSegmentSize)}}))
			first, err := l.DeletePrefix(2)
			if err != nil || first != 2 {
				t.Fatal(first, err)
			}
			return l
		},
	}
	for name, story := range stories {
		for slot := range checkpointSlots {
			t.Run(name, func(t *testing.T) {
				fsys := vfstest.New()
				l := mustOpen(t, smallOptions(fsys))
				must(t, l.Append([]Entry{{Index: 1, Term: 1, Count: 1}, {Index: 2, Term: 1}}))
				l = story(t, fsys, l)
				must(t, l.Append([]Entry{{Index: 3, Term: 2, Count: 1, BaseOffset: 1}}))
				crashed := fsys.CrashClone(nil, vfstest.None)
				must(t, l.Close())
				must(t, crashed.Mutate(testDir+"/"+checkpointName, func(b []byte) []byte {
					b[slot*checkpointDistance+60] ^= 1
					return b
				}))
				l = mustOpen(t, smallOptions(crashed))
				if l.LastIndex() != 3 {
					t.Errorf("ends at %d: %+v", l.LastIndex(), l.Recovery())
				}
				must(t, l.Close())
			})
		}
	}
}

// TestImitatedFrames: a record full of what looks like frame headers, behind a
// torn frame, neither fools recovery nor holds it up.
func TestImitatedFrames(t *testing.T) {
	fsys := vfstest.New()
	opts := smallOptions(fsys)
	opts.SegmentSize = 1 << 20
	l := mustOpen(t, opts)
	must(t, l.Append([]Entry{{Index: 1, Term: 1}}))
	end := l.state.Load().tail.pos
	var foreign []byte
	for len(foreign) < 512<<10 {
		// As a client would make them, who does not know the log's id.
		h := segmentHeader{firstIndex: 1}
		foreign, _ = appendFrame(foreign, h.seed(), 0, 1<<40, &Entry{Index: 1 << 50, Term: 1 << 50})
	}
	must(t, l.Append([]Entry{{Index: 2, Term: 1, Payload: foreign}}))
	crashed := fsys.CrashClone(nil, vfstest.None)
	must(t, l.Close())
	must(t, crashed.Mutate(segments(crashed)[0], func(b []byte) []byte {
		clear(b[end : end+512]) // a sector that did not get there
		return b
	}))
	counting := &countingFS{FS: crashed}
	opts.FS = counting
	l = mustOpen(t, opts)
	if l.LastIndex() != 1 || l.Recovery().Torn == "" {
		t.Errorf("%+v, %+v", l.Stats(), l.Recovery())
	}
	if read := counting.read.Load(); read > 8<<20 {
		t.Errorf("recovery of 1 MiB read %d bytes", read)
	}
	must(t, l.Close())
}
