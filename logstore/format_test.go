package logstore_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// The reader below is made from docs/FORMAT.md alone: every number in it stands
// there, and nothing in it comes from the package. That it reads what the package
// writes shows that the document is right and complete.

var le = binary.LittleEndian

func checksum(parts ...[]byte) uint32 {
	return crc32.Checksum(bytes.Join(parts, nil), crc32.MakeTable(crc32.Castagnoli))
}

// docEntry is an entry as the document describes it.
type docEntry struct {
	index, term, base, mark uint64
	time                    int64
	typ                     byte
	count                   uint32
	payload                 []byte
	at, end                 int
}

type docHeader struct {
	id                  []byte
	index, offset, term uint64
	time                int64
	previous            uint32
}

type docCheckpoint struct {
	id                                        []byte
	sequence                                  uint64
	clean, cut                                bool
	active, last, term, offset, end, logStart uint64
	time                                      int64
	checksum                                  uint32
}

var errDocDamaged = errors.New("damaged")

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errDocDamaged, fmt.Sprintf(format, args...))
}

// docHead reads what a segment's header and a checkpoint's slot have in common.
func docHead(b []byte, magic string) error {
	switch {
	case len(b) < 128 || string(b[:8]) != magic:
		return damaged("no %s", magic)
	case le.Uint32(b[8:]) != checksum(b[12:128]):
		return damaged("checksum of %s", magic)
	case le.Uint32(b[12:]) != 1:
		return fmt.Errorf("version %d of %s", le.Uint32(b[12:]), magic)
	}
	return nil
}

func docSegmentHeader(b []byte) (docHeader, error) {
	if err := docHead(b, "DIURNSEG"); err != nil {
		return docHeader{}, err
	}
	return docHeader{
		id:       b[16:32],
		index:    le.Uint64(b[32:]),
		offset:   le.Uint64(b[40:]),
		term:     le.Uint64(b[48:]),
		time:     int64(le.Uint64(b[56:])),
		previous: le.Uint32(b[64:]),
	}, nil
}

func docReadCheckpoint(b []byte) (c docCheckpoint, err error) {
	if len(b) != 8192 {
		return c, damaged("checkpoint has %d bytes", len(b))
	}
	found := false
	for _, slot := range [][]byte{b[:128], b[4096 : 4096+128]} {
		if err := docHead(slot, "DIURNCHK"); errors.Is(err, errDocDamaged) {
			continue
		} else if err != nil {
			return c, err
		}
		if found && le.Uint64(slot[32:]) <= c.sequence {
			continue
		}
		found = true
		c = docCheckpoint{
			id:       slot[16:32],
			sequence: le.Uint64(slot[32:]),
			clean:    slot[40] == 1,
			cut:      slot[41] == 1,
			active:   le.Uint64(slot[48:]),
			last:     le.Uint64(slot[56:]),
			term:     le.Uint64(slot[64:]),
			offset:   le.Uint64(slot[72:]),
			time:     int64(le.Uint64(slot[80:])),
			end:      le.Uint64(slot[88:]),
			checksum: le.Uint32(slot[96:]),
			logStart: le.Uint64(slot[104:]),
		}
	}
	if !found {
		return c, damaged("no good slot")
	}
	return c, nil
}

// docWhole reads the frame at a position, without looking at what it continues.
func docWhole(h docHeader, b []byte, at int) (e docEntry, sum, previous uint32, ok bool) {
	if at+64 > len(b) || b[at+12] != 1 || le.Uint32(b[at+8:]) > 16777216 {
		return e, 0, 0, false
	}
	f := b[at:]
	n := int(le.Uint32(f[8:]))
	size := (64 + n + 7) / 8 * 8
	if size > len(f) {
		return e, 0, 0, false
	}
	sum = le.Uint32(f)
	seed := le.AppendUint64(slices.Clone(h.id), h.index)
	if le.Uint32(f[60:]) != checksum(seed, f[4:60]) || sum != checksum(seed, f[4:60], f[64:size]) {
		return e, 0, 0, false
	}
	return docEntry{
		index: le.Uint64(f[16:]), term: le.Uint64(f[24:]), base: le.Uint64(f[32:]), time: int64(le.Uint64(f[40:])),
		mark: le.Uint64(f[48:]), typ: f[13], count: le.Uint32(f[56:]), payload: f[64 : 64+n], at: at, end: at + size,
	}, sum, le.Uint32(f[4:]), true
}

// docMark is the synced mark of a frame's header, 0 if there is none.
func docMark(h docHeader, f []byte) uint64 {
	if len(f) < 64 || f[12] != 1 || le.Uint32(f[60:]) != checksum(h.id, le.AppendUint64(nil, h.index), f[4:60]) {
		return 0
	}
	if mark := le.Uint64(f[48:]); mark < le.Uint64(f[16:]) {
		return mark
	}
	return 0
}

// docFrames reads good frames up to the index stop. checks is the checksum of
// each; checks[0] is that of the frame before the first.
func docFrames(h docHeader, b []byte, stop uint64) (entries []docEntry, checks []uint32) {
	checks = []uint32{h.previous}
	index, term, next, time, at := h.index, h.term, h.offset, h.time, 128
	for index <= stop {
		e, sum, previous, ok := docWhole(h, b, at)
		if !ok || previous != checks[len(checks)-1] || e.index != index || e.term < term || e.base != next || e.time < time || e.mark >= e.index {
			break
		}
		entries, checks = append(entries, e), append(checks, sum)
		index, term, next, time, at = index+1, e.term, next+uint64(e.count), e.time, e.end
	}
	return entries, checks
}

// docRead is the section on recovery.
func docRead(files map[string][]byte) (entries []docEntry, torn bool, err error) {
	c, err := docReadCheckpoint(files["checkpoint"])
	if err != nil {
		return nil, false, err
	}
	var headers []docHeader
	var names []string
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if len(name) != 24 || path.Ext(name) != ".log" {
			continue
		}
		h, err := docSegmentHeader(files[name])
		if err != nil {
			return nil, false, fmt.Errorf("%s: %w", name, err)
		}
		if first, err := strconv.ParseUint(name[:20], 10, 64); err != nil || first != h.index || !bytes.Equal(h.id, c.id) {
			return nil, false, damaged("%s is not of this log", name)
		}
		if c.cut && h.index > c.active {
			continue
		}
		headers, names = append(headers, h), append(names, name)
	}
	for len(headers) > 1 && headers[1].index <= c.logStart {
		headers, names = headers[1:], names[1:]
	}
	if len(headers) == 0 && c.sequence == 0 {
		return nil, false, nil
	}
	if len(headers) == 0 || headers[0].index != c.logStart || headers[len(headers)-1].index < c.active {
		return nil, false, damaged("a file is missing")
	}
	for i, h := range headers[:len(headers)-1] {
		next := headers[i+1]
		got, checks := docFrames(h, files[names[i]], next.index-1)
		if h.index+uint64(len(got)) != next.index || checks[len(got)] != next.previous {
			return nil, false, damaged("%s ends early", names[i])
		}
		entries = append(entries, got...)
	}

	h, b := headers[len(headers)-1], files[names[len(names)-1]]
	stop := uint64(1<<64 - 1)
	if c.cut {
		stop = c.last
	}
	got, checks := docFrames(h, b, stop)
	entries = append(entries, got...)
	last, p := h.index+uint64(len(got))-1, 128
	durable := c.last
	if len(got) > 0 {
		p = got[len(got)-1].end
	}
	if c.active == h.index && c.last <= last && checks[c.last+1-h.index] != c.checksum {
		return nil, false, damaged("another frame than the checkpoint's")
	}
	for _, e := range got {
		durable = max(durable, e.mark)
	}
	if !c.cut {
		for at := p; at < len(b); at += 8 {
			durable = max(durable, docMark(h, b[at:]))
		}
	}
	if durable > last {
		return nil, false, damaged("%s at %d: %d was durable, %d is the last", names[len(names)-1], p, durable, last)
	}
	return entries, len(bytes.Trim(b[p:], "\x00")) > 0, nil
}

// docIndex compares an index with the entries of its segment.
func docIndex(h docHeader, b []byte, entries []docEntry, last uint32) error {
	k := len(entries)
	if len(b) != 64+16*k || string(b[:8]) != "DIURNIDX" || le.Uint32(b[8:]) != checksum(b[12:]) || le.Uint32(b[12:]) != 1 {
		return fmt.Errorf("no index of %d entries", k)
	}
	if !bytes.Equal(b[16:32], h.id) || le.Uint64(b[32:]) != h.index || le.Uint64(b[40:]) != uint64(k) || le.Uint32(b[56:]) != last ||
		k > 0 && le.Uint64(b[48:]) != uint64(entries[k-1].end) {
		return fmt.Errorf("header %x", b[:64])
	}
	for i, e := range entries {
		x := b[64+16*i:]
		if le.Uint32(x) != uint32(e.at) || le.Uint32(x[4:]) != uint32(e.base-h.offset) || le.Uint64(x[8:]) != uint64(e.time-h.time) {
			return fmt.Errorf("entry %d is %x, the frame %+v", i, x[:16], e)
		}
	}
	return nil
}

func filesOf(fsys *vfstest.Mem) map[string][]byte {
	files := map[string][]byte{}
	for name, b := range fsys.Snapshot() {
		files[path.Base(name)] = b
	}
	return files
}

// TestFormatReader: the reader made from the document finds what the package
// wrote and finds when it opens the log itself, after any history and any crash.
func TestFormatReader(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed: %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	seen := map[string]int{}
	for range 150 {
		fsys := vfstest.New()
		opts := logstore.Options{FS: fsys, SegmentSize: logstore.MinSegmentSize, CheckpointInterval: -1}
		l, err := logstore.Open("log", opts)
		if err != nil {
			t.Fatal(err)
		}
		// The log's own goroutine does operations, too.
		var mu sync.Mutex
		countdown, kind, dice := 1+rng.IntN(200), vfstest.Survival(rng.IntN(3)), rand.New(rand.NewPCG(rng.Uint64(), 0))
		var crashed *vfstest.Mem
		fsys.SetHook(func(vfstest.Op) error {
			mu.Lock()
			defer mu.Unlock()
			if countdown--; countdown == 0 {
				crashed = fsys.CrashClone(dice, kind)
			}
			return nil
		})
		term := uint64(1)
		for range 30 {
			switch rng.IntN(8) {
			case 0:
				term++
				from := l.FirstIndex() + rng.Uint64N(l.LastIndex()-l.FirstIndex()+2)
				if err := l.TruncateSuffix(from); err != nil {
					t.Fatal(err)
				}
			case 1:
				if _, err := l.DeletePrefix(l.FirstIndex() + rng.Uint64N(30)); err != nil {
					t.Fatal(err)
				}
			default:
				var entries []logstore.Entry
				next := l.NextOffset()
				for i := range 1 + rng.Uint64N(4) {
					e := logstore.Entry{Index: l.LastIndex() + 1 + i, Term: term, Type: uint8(rng.IntN(2)), BaseOffset: next,
						AppendTime: l.LastAppendTime() + rng.Int64N(9), Payload: make([]byte, rng.IntN(900))}
					if i > 0 {
						e.AppendTime = max(e.AppendTime, entries[i-1].AppendTime)
					}
					if e.Type == 0 {
						e.Count = 1 + rng.Uint32N(3)
						next += uint64(e.Count)
					}
					for i := range e.Payload {
						e.Payload[i] = byte(rng.Uint32())
					}
					entries = append(entries, e)
				}
				if err := l.Append(entries); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if crashed == nil {
			crashed = fsys
			seen["closed"]++
		}
		compareReaders(t, crashed, seen)
	}
	t.Logf("seen: %v", seen)
	if seen["closed"] == 0 || seen["torn"] == 0 || seen["sound"] == 0 {
		t.Errorf("not all kinds of logs were read: %v", seen)
	}
}

func compareReaders(t *testing.T, fsys *vfstest.Mem, seen map[string]int) {
	t.Helper()
	entries, torn, err := docRead(filesOf(fsys))
	if err != nil {
		t.Fatal(err)
	}
	if torn {
		seen["torn"]++
	} else {
		seen["sound"]++
	}
	l, err := logstore.Open("log", logstore.Options{FS: fsys, SegmentSize: logstore.MinSegmentSize})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if n := l.LastIndex() - l.FirstIndex() + 1; uint64(len(entries)) != n {
		t.Fatalf("the document's reader finds %d entries, the package %d: %+v", len(entries), n, l.Stats())
	}
	for i, got := range entries {
		want, _, err := l.Entry(l.FirstIndex()+uint64(i), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got.index != want.Index || got.term != want.Term || got.typ != want.Type || got.count != want.Count ||
			got.base != want.BaseOffset || got.time != want.AppendTime || !bytes.Equal(got.payload, want.Payload) {
			t.Fatalf("the document's reader finds %+v, the package %+v", got, want)
		}
	}
}

// TestFormatDamage: the document's reader refuses what the package refuses.
func TestFormatDamage(t *testing.T) {
	for bit := range 8 * 344 {
		files := docExample(t)
		files["00000000000000000001.log"][bit/8] ^= 1 << (bit % 8)
		if entries, _, err := docRead(files); !errors.Is(err, errDocDamaged) {
			t.Fatalf("bit %d: %d entries, %v", bit, len(entries), err)
		}
	}
}

// docExample reads the files out of the document's example.
func docExample(t *testing.T) map[string][]byte {
	t.Helper()
	text, err := os.ReadFile("../docs/FORMAT.md")
	if err != nil {
		t.Fatal(err)
	}
	_, example, ok := strings.Cut(string(text), "\n## An example\n")
	if !ok {
		t.Fatal("docs/FORMAT.md has no example")
	}
	blocks := strings.Split(example, "```")
	files := map[string][]byte{}
	for i, name := range []string{"00000000000000000001.log", "00000000000000000001.idx", "checkpoint"} {
		if 2*i+1 >= len(blocks) || !strings.Contains(blocks[2*i], "`"+name+"`") {
			t.Fatalf("the example has no %s", name)
		}
		files[name] = undump(t, blocks[2*i+1])
	}
	return files
}

// undump reads a dump as hexdump -C makes it.
func undump(t *testing.T, text string) []byte {
	t.Helper()
	var b []byte
	for line := range strings.Lines(strings.TrimSpace(text)) {
		line, _, _ = strings.Cut(strings.TrimSpace(line), "|")
		fields := strings.Fields(line)
		if fields[0] == "*" {
			continue
		}
		at, err := strconv.ParseUint(fields[0], 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, make([]byte, int(at)-len(b))...)
		row, err := hex.DecodeString(strings.Join(fields[1:], ""))
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, row...)
	}
	return b
}

// TestFormatExample: the example holds what the document says of it, and is a
// log to the package.
func TestFormatExample(t *testing.T) {
	files := docExample(t)
	entries, torn, err := docRead(files)
	if err != nil || torn {
		t.Fatal(torn, err)
	}
	const noon = 1767225600000000000
	want := []docEntry{
		{index: 1, term: 1, typ: 1, payload: []byte{}, at: 128, end: 192},
		{index: 2, term: 1, count: 2, time: noon, mark: 1, payload: []byte("z\x05\n\x01k\x12\x00z\x07\x12\x05hello"), at: 192, end: 272},
		{index: 3, term: 2, base: 2, count: 1, time: noon + 1500000, mark: 2, payload: []byte("z\x06\x12\x04acta"), at: 272, end: 344},
	}
	if fmt.Sprint(entries) != fmt.Sprint(want) {
		t.Errorf("it holds\n%v, not\n%v", entries, want)
	}
	h, err := docSegmentHeader(files["00000000000000000001.log"])
	if err != nil {
		t.Fatal(err)
	}
	if err := docIndex(h, files["00000000000000000001.idx"], entries, 0xe68f4021); err != nil {
		t.Error(err)
	}
	c, err := docReadCheckpoint(files["checkpoint"])
	if err != nil {
		t.Fatal(err)
	}
	c.id = nil
	if want := (docCheckpoint{sequence: 1, clean: true, active: 1, last: 3, term: 2, offset: 3, end: 344, logStart: 1, time: noon + 1500000, checksum: 0xe68f4021}); fmt.Sprint(c) != fmt.Sprint(want) {
		t.Errorf("the checkpoint is %+v, not %+v", c, want)
	}

	fsys := vfstest.New()
	if err := fsys.MkdirAll("log"); err != nil {
		t.Fatal(err)
	}
	for name, b := range files {
		f, err := fsys.Create("log/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	r, err := logstore.Inspect(fsys, "log/00000000000000000001.log", nil)
	if err != nil || r.Ending != logstore.EndClean || r.Index != logstore.OK || r.Checkpoint != logstore.OK || r.Durable != 3 {
		t.Errorf("inspecting it: %+v, %v", r, err)
	}
	compareReaders(t, fsys, map[string]int{})
}

func TestFormatIndexes(t *testing.T) {
	fsys := vfstest.New()
	l, err := logstore.Open("log", logstore.Options{FS: fsys, SegmentSize: logstore.MinSegmentSize, FirstOffset: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for l.Stats().Segments < 4 {
		e := logstore.Entry{Index: l.LastIndex() + 1, Term: 1, Count: 7, BaseOffset: l.NextOffset(), AppendTime: l.LastAppendTime() + 1e9, Payload: make([]byte, 333)}
		if err := l.Append([]logstore.Entry{e}); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	n := 0
	for name, b := range filesOf(fsys) {
		stem, ok := strings.CutSuffix(name, ".idx")
		if !ok {
			continue
		}
		n++
		segment := filesOf(fsys)[stem+".log"]
		h, err := docSegmentHeader(segment)
		if err != nil {
			t.Fatal(err)
		}
		entries, checks := docFrames(h, segment, 1<<64-1)
		if err := docIndex(h, b, entries, checks[len(entries)]); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n < 3 {
		t.Errorf("found %d indexes", n)
	}
}

func TestFormatChecksum(t *testing.T) {
	if got := checksum([]byte("123456789")); got != 0xE3069283 {
		t.Errorf("checksum is %08x", got)
	}
}
