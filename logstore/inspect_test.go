package logstore

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// readOnly is a filesystem on which every change fails the test.
func readOnly(t *testing.T, fsys *vfstest.Mem) {
	fsys.SetHook(func(op vfstest.Op) error {
		t.Errorf("inspecting did %v", op)
		return errors.New("read-only")
	})
}

// TestInspectSound compares every field of every frame with what was appended.
func TestInspectSound(t *testing.T) {
	for _, clean := range []bool{true, false} {
		fsys, m := fuzzLog(t, clean)
		readOnly(t, fsys)
		names := segments(fsys)
		at := 0
		for k, name := range names {
			pos := int64(segmentHeaderSize)
			var prev uint32
			first := m.entries[at]
			r, err := Inspect(fsys, name, func(f Frame) error {
				if want := m.entries[at]; !equalEntries(f.Entry, want) {
					return fmt.Errorf("frame is %+v, want %v", f, want)
				}
				if f.Position != pos || f.Size != frameSize(len(f.Payload)) || f.Synced >= f.Index || prev != 0 && f.PrevCRC != prev {
					return fmt.Errorf("frame %+v at %d after %08x", f, pos, prev)
				}
				pos, prev = f.Position+f.Size, f.CRC
				at++
				return nil
			})
			must(t, err)
			last := m.entries[at-1]
			if r.FirstIndex != first.Index || r.FirstOffset != first.BaseOffset || r.LastIndex != last.Index || r.LastTerm != last.Term ||
				r.LastTime != last.AppendTime || r.NextOffset != last.BaseOffset+uint64(last.Count) || r.LastCRC != prev || r.Position != pos ||
				r.Frames != int(last.Index-first.Index+1) || r.Records != r.NextOffset-r.FirstOffset || r.LogID == [16]byte{} || r.Size != MinSegmentSize {
				t.Errorf("%+v", r)
			}
			if r.Ending != EndClean || r.Damage != nil || r.Checkpoint != OK || r.Leftover || r.Sealed != (k < len(names)-1) {
				t.Errorf("%+v", r)
			}
			wantIndex := OK
			if !clean && !r.Sealed {
				wantIndex = Missing
			}
			if r.Index != wantIndex {
				t.Errorf("index is %v, want %v: %s", r.Index, wantIndex, r.IndexDetail)
			}
			if r.Sealed || clean {
				if r.Durable != r.LastIndex {
					t.Errorf("durable up to %d of %d", r.Durable, r.LastIndex)
				}
			} else if r.Durable >= r.LastIndex { // the last group nobody vouches for
				t.Errorf("durable up to %d of %d", r.Durable, r.LastIndex)
			}
		}
		if at != len(m.entries) {
			t.Errorf("visited %d of %d entries", at, len(m.entries))
		}
	}
}

// TestInspectFindings makes one thing wrong at a time.
func TestInspectFindings(t *testing.T) {
	at := func(pos int, change func(b []byte)) func([]byte) []byte {
		return func(b []byte) []byte { change(b[pos:]); return b }
	}
	flip := func(b []byte) { b[0] ^= 4 }
	end := func(b []byte) int {
		n := len(b)
		for n > 0 && b[n-1] == 0 {
			n--
		}
		return n
	}
	tests := map[string]struct {
		clean  bool
		file   int // of the segments; the one inspected
		other  string
		change func(b []byte) []byte
		ending Ending
		want   string // in Detail, IndexDetail or CheckpointDetail
		index  Beside
		check  Beside
	}{
		"last frame bad, nobody vouches":    {file: 2, change: func(b []byte) []byte { b[end(b)-1]++; return b }, ending: EndTorn, want: "checksum", check: OK},
		"last frame bad, checkpoint knows":  {clean: true, file: 2, change: func(b []byte) []byte { b[end(b)-1]++; return b }, ending: EndDamaged, want: "were durable", index: OK, check: OK},
		"first frame bad, a mark behind it": {file: 2, change: at(segmentHeaderSize+20, flip), ending: EndDamaged, want: "were durable", check: OK},
		"garbage behind the last frame":     {file: 2, change: at(4000, flip), ending: EndTorn, want: "frame version", check: OK},
		"sealed, last frame bad":            {file: 0, change: func(b []byte) []byte { b[end(b)-1]++; return b }, ending: EndDamaged, want: "were durable", index: OK, check: OK},
		"sealed, last frame zeroed": {file: 0, change: func(b []byte) []byte {
			clear(b[segmentHeaderSize:])
			return b
		}, ending: EndDamaged, want: "the next one, 0000", index: OK, check: OK},
		"sealed, garbage behind":     {file: 0, change: func(b []byte) []byte { b[len(b)-1] = 1; return b }, ending: EndTorn, want: "belong to no entry", index: OK, check: OK},
		"cut short":                  {file: 1, change: func(b []byte) []byte { return b[:segmentHeaderSize+70] }, ending: EndDamaged, want: "durable", index: OK, check: OK},
		"header flipped":             {file: 1, change: at(40, flip), ending: EndDamaged, want: "checksum of a segment header"},
		"header cut":                 {file: 1, change: func(b []byte) []byte { return b[:100] }, ending: EndDamaged, want: "the segment header has 100 bytes"},
		"header zeroed":              {file: 1, change: func(b []byte) []byte { clear(b[:128]); return b }, ending: EndDamaged, want: "not a segment header"},
		"header of another":          {file: 1, change: func(b []byte) []byte { b[32]++; resumHead(b, segmentHeaderSize); return b }, ending: EndDamaged, want: "the name says"},
		"index flipped":              {file: 1, other: ".idx", change: at(70, flip), index: Wrong, want: "checksum", check: OK},
		"index with a lie":           {file: 1, other: ".idx", change: func(b []byte) []byte { b[indexHeaderSize+16]++; return resum(b) }, index: Wrong, want: "its entry of index", check: OK},
		"index with another end":     {file: 1, other: ".idx", change: func(b []byte) []byte { b[48]++; return resum(b) }, index: Wrong, want: "the last frame ends", check: OK},
		"index cut":                  {file: 1, other: ".idx", change: func(b []byte) []byte { return b[:len(b)-1] }, index: Wrong, want: "bytes", check: OK},
		"index cut by an entry":      {file: 1, other: ".idx", change: func(b []byte) []byte { return b[:len(b)-16] }, index: Wrong, want: "checksum", check: OK},
		"index empty":                {file: 1, other: ".idx", change: func(b []byte) []byte { return nil }, index: Wrong, want: "has 0 bytes", check: OK},
		"index endless":              {file: 1, other: ".idx", change: func(b []byte) []byte { return make([]byte, 64<<20) }, index: Wrong, want: "no index of this segment", check: OK},
		"index with one more":        {file: 1, other: ".idx", change: func(b []byte) []byte { return append(b, make([]byte, 16)...) }, index: Wrong, want: "entries, the segment", check: OK},
		"one checkpoint slot bad":    {file: 1, other: "checkpoint", change: at(20, flip), index: OK, check: OK},
		"checkpoint bad":             {file: 1, other: "checkpoint", change: func(b []byte) []byte { clear(b); return b }, index: OK, check: Wrong, want: "not a checkpoint"},
		"checkpoint short":           {file: 1, other: "checkpoint", change: func(b []byte) []byte { return b[:99] }, index: OK, check: Wrong, want: "99 bytes"},
		"checkpoint of another log":  {file: 1, other: "checkpoint", change: otherLog, index: OK, check: Wrong, want: "another log"},
		"checkpoint of other frames": {clean: true, file: 2, other: "checkpoint", change: otherFrames, index: OK, check: OK, ending: EndDamaged, want: "the checkpoint knows it as"},
		"checkpoint from the future": {file: 1, other: "checkpoint", change: newerCheckpoint, index: OK, check: Wrong, want: "use a newer Diurna"},
		"next segment of other frames": {file: 1, other: "next", change: func(b []byte) []byte { b[64]++; resumHead(b, segmentHeaderSize); return b },
			index: OK, check: OK, ending: EndDamaged, want: "follows"},
		"next segment of another log": {clean: true, file: 1, other: "next", change: func(b []byte) []byte { b[20]++; b[64]++; resumHead(b, segmentHeaderSize); return b },
			index: OK, check: OK},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			fsys, _ := fuzzLog(t, tt.clean)
			names := segments(fsys)
			file := names[tt.file]
			change := file
			switch tt.other {
			case ".idx":
				change = strings.TrimSuffix(file, segmentSuffix) + indexSuffix
			case "next":
				change = names[tt.file+1]
			case "checkpoint":
				change = testDir + "/" + checkpointName
			}
			must(t, fsys.Mutate(change, tt.change))
			readOnly(t, fsys)
			r, err := Inspect(fsys, file, nil)
			must(t, err)
			if r.Ending != tt.ending || r.Index != tt.index || r.Checkpoint != tt.check {
				t.Errorf("ends %v, index %v, checkpoint %v; want %v, %v, %v: %+v", r.Ending, r.Index, r.Checkpoint, tt.ending, tt.index, tt.check, r)
			}
			if (r.Damage != nil) != (r.Ending == EndDamaged) || r.Damage != nil && (r.Damage.File != file || r.Damage.Detail != r.Detail) {
				t.Errorf("damage is %v", r.Damage)
			}
			if details := r.Detail + r.IndexDetail + r.CheckpointDetail; !strings.Contains(details, tt.want) || tt.want == "" && details != "" {
				t.Errorf("said %q, want %q", details, tt.want)
			}
		})
	}
}

func changeSlots(b []byte, change func(c *checkpoint)) []byte {
	for i := range checkpointSlots {
		slot := b[i*checkpointDistance:]
		if c, err := parseCheckpoint("", slot); err == nil {
			change(&c)
			copy(slot, c.encode())
		}
	}
	return b
}

func otherLog(b []byte) []byte    { return changeSlots(b, func(c *checkpoint) { c.id[0]++ }) }
func otherFrames(b []byte) []byte { return changeSlots(b, func(c *checkpoint) { c.tail.crc++ }) }

func newerCheckpoint(b []byte) []byte {
	for i := range checkpointSlots {
		slot := b[i*checkpointDistance:]
		slot[12] = 9
		resumHead(slot, checkpointSize)
	}
	return b
}

// TestInspectMarks: with no other file to ask, the marks in frames tell a write
// that was cut short from bytes that have been durable.
func TestInspectMarks(t *testing.T) {
	for _, group := range []bool{false, true} {
		fsys := vfstest.New()
		l := mustOpen(t, smallOptions(fsys))
		entries := []Entry{{Index: 1, Term: 1}, {Index: 2, Term: 1}, {Index: 3, Term: 1}}
		if group {
			must(t, l.Append(entries))
		} else {
			for i := range entries {
				must(t, l.Append(entries[i:i+1]))
			}
		}
		crashed := fsys.CrashClone(nil, vfstest.All)
		must(t, l.Close())
		name := segments(crashed)[0]
		must(t, crashed.Remove(testDir+"/"+checkpointName))

		want, durable := EndDamaged, uint64(2)
		if group {
			want, durable = EndTorn, 0
		}
		r, err := Inspect(crashed, name, nil)
		if err != nil || r.Ending != EndClean || r.LastIndex != 3 || r.Durable != durable || r.Checkpoint != Missing {
			t.Errorf("group %v: %+v, %v", group, r, err)
		}
		must(t, crashed.Mutate(name, func(b []byte) []byte { b[segmentHeaderSize+HeaderSize+20]++; return b }))
		r, err = Inspect(crashed, name, nil)
		if err != nil || r.Ending != want || r.LastIndex != 1 || r.Durable != durable {
			t.Errorf("group %v: %+v, %v", group, r, err)
		}
	}
}

// TestInspectLeftovers stops a truncation, and a deletion of a prefix, in the
// middle: what is yet to be removed is not called damaged.
func TestInspectLeftovers(t *testing.T) {
	stop := errors.New("stop")
	for _, tt := range []struct {
		kind   string // of operation that does not happen any more
		delete bool
		want   []string
	}{
		{"remove", false, []string{"torn", "clean leftover", "clean leftover"}},
		{"truncate", false, []string{"torn", "gone", "gone"}},
		{"remove", true, []string{"clean leftover", "clean leftover", "clean"}},
	} {
		fsys, _ := fuzzLog(t, true)
		names := segments(fsys)
		l := mustOpen(t, smallOptions(fsys))
		fsys.SetHook(func(op vfstest.Op) error {
			if op.Kind == tt.kind {
				return stop
			}
			return nil
		})
		from := l.FirstIndex() + 2
		var err error
		if tt.delete {
			_, err = l.DeletePrefix(l.LastIndex() + 1)
		} else {
			err = l.TruncateSuffix(from)
		}
		if !errors.Is(err, stop) {
			t.Fatal(err)
		}
		if err := l.Close(); !errors.Is(err, ErrFailed) {
			t.Fatal(err)
		}
		for i, name := range names {
			r, err := Inspect(fsys, name, nil)
			got := r.Ending.String()
			if r.Leftover {
				got += " leftover"
			}
			if err != nil {
				got = "gone"
			}
			if got != tt.want[i] {
				t.Errorf("%s, %v: %s is %s, want %s: %+v, %v", tt.kind, tt.delete, name, got, tt.want[i], r, err)
			}
			if got == "torn" && (r.LastIndex != from-1 || r.Durable != from-1 || r.Sealed || !strings.Contains(r.Detail, "truncation down to index 2")) {
				t.Errorf("ends at %d: %s", r.LastIndex, r.Detail)
			}
		}
	}
}

// TestInspectRefuses: what is no segment is no damage either.
func TestInspectRefuses(t *testing.T) {
	fsys, _ := fuzzLog(t, true)
	name := segments(fsys)[0]
	segment, err := fsys.ReadFile(name)
	must(t, err)
	put := func(to string, b []byte) string {
		create(t, fsys, to)
		must(t, fsys.Mutate(to, func([]byte) []byte { return b }))
		return to
	}
	for file, want := range map[string]string{
		testDir + "/checkpoint":                                   "not a segment file, but the checkpoint",
		strings.Replace(name, "log", "log", 1):                    "",
		strings.TrimSuffix(name, ".log") + ".idx":                 "not a segment file, but the index",
		put(testDir+"/photo.jpg", []byte("\xff\xd8\xff")):         "not a segment file",
		put(testDir+"/empty", nil):                                "not a segment file",
		put(testDir+"/copy.bak", segment):                         "",
		put(testDir+"/newer", encodeNewer(t, segment)):            "format version 7",
		testDir + "/none.log":                                     "file does not exist",
		put(testDir+"/"+segmentName(99), encodeNewer(t, segment)): "format version 7",
	} {
		_, err := Inspect(fsys, file, nil)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", file, err, want)
		}
		if strings.HasPrefix(want, "not a segment") && !errors.Is(err, ErrNotASegment) {
			t.Errorf("%s: %v", file, err)
		}
	}
	stop := errors.New("stop")
	if _, err := Inspect(fsys, name, func(Frame) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("visit's error became %v", err)
	}
}

func encodeNewer(t *testing.T, segment []byte) []byte {
	h, err := parseSegmentHeader("", segment)
	must(t, err)
	return encodeWithVersion(&h, 7)
}

// slowly hands out files that read and write in pieces and let others run in
// between, so that an inspection sees every state of a log that is written to.
type slowly struct{ *vfstest.Mem }

func (s slowly) Create(name string) (vfs.File, error)        { return slow(s.Mem.Create(name)) }
func (s slowly) Open(name string) (vfs.File, error)          { return slow(s.Mem.Open(name)) }
func (s slowly) OpenReadWrite(name string) (vfs.File, error) { return slow(s.Mem.OpenReadWrite(name)) }

func slow(f vfs.File, err error) (vfs.File, error) { return slowFile{f}, err }

type slowFile struct{ vfs.File }

func (f slowFile) ReadAt(b []byte, pos int64) (int, error)  { return inPieces(f.File.ReadAt, b, pos) }
func (f slowFile) WriteAt(b []byte, pos int64) (int, error) { return inPieces(f.File.WriteAt, b, pos) }

func inPieces(do func([]byte, int64) (int, error), b []byte, pos int64) (n int, err error) {
	for n < len(b) && err == nil {
		var got int
		got, err = do(b[n:min(len(b), n+200)], pos+int64(n))
		n += got
		runtime.Gosched()
	}
	return n, err
}

// TestInspectWhileOpen inspects the segments of a log that is appended to and
// truncated at the same time: nothing is ever called damaged.
func TestInspectWhileOpen(t *testing.T) {
	fsys := vfstest.New()
	opts := smallOptions(fsys)
	opts.FS = slowly{fsys}
	opts.SegmentSize = 16 << 10
	l := mustOpen(t, opts)
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(done)
		m := model{first: 1}
		rng := rand.New(rand.NewPCG(9, 10))
		for i := range 3000 {
			entries := m.generate(rng, 1+rng.IntN(4), 600)
			if err := l.Append(entries); err != nil {
				t.Error(err)
				return
			}
			m.append(entries)
			if i%16 == 15 {
				if err := l.keeper.recordDurable(false); err != nil {
					t.Error(err)
				}
			}
			if i%64 == 63 {
				from := m.last() - rng.Uint64N(40)
				if err := l.TruncateSuffix(from); err != nil {
					t.Error(err)
					return
				}
				m.truncate(from)
			}
		}
	})
	seen := map[string]int{}
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		names := segments(fsys)
		name := names[len(names)-1]
		if len(names) > 1 && len(seen)%2 == 0 {
			name = names[len(names)-2]
		}
		r, err := Inspect(slowly{fsys}, name, nil)
		switch {
		case errors.Is(err, ErrChanged):
			seen["changed"]++
		case err != nil && strings.Contains(err.Error(), "not exist"):
			seen["removed"]++
		case err != nil:
			t.Fatal(err)
		case r.Ending == EndDamaged || r.Index == Wrong || r.Checkpoint != OK:
			t.Fatalf("%+v", r)
		default:
			seen[r.Ending.String()]++
		}
	}
	wg.Wait()
	t.Logf("seen: %v", seen)
	must(t, l.Close())
}

// TestInspectSealedAlone: the next segment cannot say where this one ends, but
// the checkpoint says that there was one.
func TestInspectSealedAlone(t *testing.T) {
	fsys, _ := fuzzLog(t, true)
	names := segments(fsys)
	r, err := Inspect(fsys, names[1], nil)
	must(t, err)
	must(t, fsys.Mutate(names[1], func(b []byte) []byte { b[r.Position-20]++; return b }))
	must(t, fsys.Mutate(names[2], func(b []byte) []byte { clear(b); return b }))
	r, err = Inspect(fsys, names[1], nil)
	if err != nil || r.Ending != EndDamaged || !r.Sealed || !strings.Contains(r.Detail, "was sealed") {
		t.Errorf("%+v, %v", r, err)
	}
}
