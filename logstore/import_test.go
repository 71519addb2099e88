package logstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// smallStream is the export of a small log, and what is in it.
func smallStream(t testing.TB) ([]byte, model) {
	t.Helper()
	fsys, m := fuzzLog(t, true)
	l := mustOpen(t, smallOptions(fsys))
	defer func() { must(t, l.Close()) }()
	first, err := l.DeletePrefix(l.state.Load().segs[1].firstIndex)
	must(t, err)
	m.deletePrefix(first)
	return exportBytes(t, l, m.last()), m
}

// refusedStream imports a stream that must be refused: with a typed error, and
// with nothing left behind.
func refusedStream(t testing.TB, stream []byte) error {
	t.Helper()
	fsys := vfstest.New()
	_, err := Import(testDir, smallOptions(fsys), bytes.NewReader(stream))
	var damage *StreamError
	var version *VersionError
	if !errors.As(err, &damage) && !errors.As(err, &version) {
		t.Fatalf("got %v", err)
	}
	if damage != nil && (damage.Position < 0 || damage.Position > int64(len(stream))) {
		t.Fatalf("%v, of %d bytes", err, len(stream))
	}
	if names := fsys.Names(); len(names) > 0 {
		t.Fatalf("%v, and left %v", err, names)
	}
	return err
}

// TestImportFlips flips every bit of a stream.
func TestImportFlips(t *testing.T) {
	stream, _ := smallStream(t)
	for bit := range 8 * len(stream) {
		stream[bit/8] ^= 1 << (bit % 8)
		err := refusedStream(t, stream)
		var damage *StreamError
		if errors.As(err, &damage) && damage.Position > int64(bit/8)+1 {
			t.Fatalf("bit %d of byte %d: %v", bit%8, bit/8, err)
		}
		stream[bit/8] ^= 1 << (bit % 8)
	}
	t.Logf("%d flips", 8*len(stream))
}

// sections returns where a stream's sections begin, and its length.
func sections(t testing.TB, stream []byte) []int {
	t.Helper()
	at := []int{exportHeaderSize}
	for p := exportHeaderSize; p < len(stream); at = append(at, p) {
		p += sectionHeaderSize + int(binary.LittleEndian.Uint64(stream[p+48:]))
	}
	return at
}

func TestImportRefuses(t *testing.T) {
	stream, m := smallStream(t)
	at := sections(t, stream)
	if len(at) != 3 {
		t.Fatalf("%d sections", len(at)-1)
	}
	head, one, two := stream[:at[0]], stream[at[0]:at[1]], stream[at[1]:]
	frame := frameSize(len(m.entries[0].Payload))
	frames := one[sectionHeaderSize:]
	set := func(b []byte, at int, v uint64) []byte {
		b = bytes.Clone(b)
		binary.LittleEndian.PutUint64(b[at:], v)
		return resum(b)
	}
	get := func(b []byte, at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	section := func(h []byte) []byte { return h[:sectionHeaderSize] }
	newer := bytes.Clone(head)
	newer[12] = 2
	resum(newer)

	other := vfstest.New()
	l := mustOpen(t, smallOptions(other))
	om := model{first: 1}
	rng := rand.New(rand.NewPCG(3, 1))
	for l.Stats().Segments < 3 {
		entries := om.generate(rng, 3, 700)
		must(t, l.Append(entries))
		om.append(entries)
	}
	foreign := exportBytes(t, l, l.LastIndex())
	must(t, l.Close())

	tests := map[string]struct {
		stream []byte
		want   string
	}{
		"empty":                    {nil, "ends early"},
		"not a stream":             {bytes.Repeat([]byte("photo"), 100), "not an export"},
		"newer":                    {join(newer, one, two), "version 2"},
		"header only":              {head, "ends early"},
		"header only, claims so":   {set(head, 104, exportHeaderSize), "goes on"},
		"nothing, claims nothing":  {set(set(head, 104, exportHeaderSize), 72, get(head, 32)-1), "frames end at"},
		"without first section":    {join(head, two), "begins at index"},
		"without last section":     {join(head, one), "ends early"},
		"sections swapped":         {join(head, two, one), "begins at index"},
		"section twice":            {join(head, one, one, two), "begins at index"},
		"over-long":                {join(stream, []byte{0}), "goes on behind its end"},
		"twice":                    {join(stream, stream), "goes on behind its end"},
		"claims less":              {set(stream[:at[0]], 104, uint64(len(stream)-1)), "ends early"},
		"claims less, all":         {join(set(head, 104, uint64(len(stream)-8)), one, two), "claims"},
		"claims more":              {join(set(head, 104, uint64(len(stream)+8)), one, two), "ends here"},
		"claims another last":      {join(set(head, 72, get(head, 72)+1), one, two), "goes on"},
		"claims an earlier last":   {join(set(head, 72, get(head, 72)-1), one, two), "the section ends at"},
		"claims another offset":    {join(set(head, 80, get(head, 80)+1), one, two), "frames end at"},
		"claims another term":      {join(set(head, 88, get(head, 88)+1), one, two), "frames end at"},
		"claims another time":      {join(set(head, 96, get(head, 96)+1), one, two), "frames end at"},
		"claims another checksum":  {join(set(head, 68, get(head, 68)+1), one, two), "frames end at"},
		"claims a later first":     {join(set(head, 32, get(head, 32)+1), one, two), "begins at index"},
		"claims index 0":           {join(set(head, 32, 0), one, two), "claims entries"},
		"claims a size below 0":    {join(set(head, 104, 1<<63), one, two), "claims entries"},
		"claims to end at the top": {join(set(head, 72, 1<<64-1), one, two), "claims entries"},
		"starts at other offset":   {join(set(head, 40, get(head, 40)+1), one, two), "base offset"},
		"starts at a later term":   {join(set(head, 48, 1<<40), one, two), "term"},
		"starts at a later time":   {join(set(head, 56, 1<<60), one, two), "append time"},
		"follows another frame":    {join(set(head, 64, get(head, 64)+1), one, two), "follows checksum"},
		"other log":                {join(set(head, 16, 1), one, two), "another log"},
		"other log's section":      {join(head, one, foreign[at[0]:]), "another log"},
		"section's index":          {join(head, set(section(one), 32, get(one, 32)+1), frames, two), "begins at index"},
		"section's last":           {join(head, set(section(one), 40, get(one, 40)-1), frames, two), "frames end at"},
		"section's last, too low":  {join(head, set(section(one), 40, 0), frames, two), "section ends at"},
		"section's last, too high": {join(head, set(section(one), 40, 1<<60), frames, two), "section ends at"},
		"section's bytes":          {join(head, set(section(one), 48, get(one, 48)-8), frames, two), "past the section's end"},
		"section's bytes, none":    {join(head, set(section(one), 48, 0), frames, two), "claims 0 bytes"},
		"section's bytes, many":    {join(head, set(section(one), 48, 1<<62), frames, two), "claims"},
		"section's bytes, -1":      {join(head, set(section(one), 48, 1<<64-1), frames, two), "claims"},
		"frame left out":           {join(head, set(section(one), 48, get(one, 48)-uint64(frame)), frames[frame:], two), ""},
		"frame twice":              {join(head, set(section(one), 48, get(one, 48)+uint64(frame)), frames[:frame], frames, two), "follows checksum"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if err := refusedStream(t, tt.stream); !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	for n := range len(stream) {
		if err := refusedStream(t, stream[:n]); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut after %d bytes: %v", n, err)
		}
	}
	boom := errors.New("connection reset")
	for _, n := range []int{0, 5, 128, 150, 192, 1000, len(stream)} {
		fsys := vfstest.New()
		_, err := Import(testDir, smallOptions(fsys), io.MultiReader(bytes.NewReader(stream[:n]), failingReader{boom}))
		if !errors.Is(err, boom) || len(fsys.Names()) > 0 {
			t.Errorf("after %d bytes: %v, %v", n, err, fsys.Names())
		}
	}
}

type failingReader struct{ err error }

func (r failingReader) Read([]byte) (int, error) { return 0, r.err }

// TestImportWhere: only into nothing.
func TestImportWhere(t *testing.T) {
	stream, m := smallStream(t)
	rng := rand.New(rand.NewPCG(1, 2))
	fsys := vfstest.New()
	opts := smallOptions(fsys)
	must(t, fsys.MkdirAll(testDir))
	_, err := Import(testDir, opts, bytes.NewReader(stream))
	must(t, err)
	before := fsys.Snapshot()
	if _, err := Import(testDir, opts, bytes.NewReader(stream)); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("over a log: %v", err)
	}
	mustEqualFiles(t, before, fsys.Snapshot())
	checkImported(t, opts, m, rng)

	must(t, Remove(fsys, testDir))
	must(t, Remove(fsys, testDir))
	must(t, Remove(fsys, "nowhere"))
	create(t, fsys, testDir+"/"+importName)
	create(t, fsys, testDir+"/"+nextName)
	if _, err := Import(testDir, opts, bytes.NewReader(stream)); !errors.Is(err, ErrUnfinished) {
		t.Errorf("over an unfinished one: %v", err)
	}
	if _, err := Open(testDir, opts); !errors.Is(err, ErrUnfinished) {
		t.Errorf("open of an unfinished one: %v", err)
	}
	if names := fsys.Names(); len(names) != 2 {
		t.Errorf("left %v", names)
	}
	must(t, Remove(fsys, testDir))

	create(t, fsys, testDir+"/photos.zip")
	create(t, fsys, testDir+"/"+segmentName(3))
	if err := Remove(fsys, testDir); !errors.Is(err, ErrNotALog) || len(fsys.Names()) != 2 {
		t.Errorf("removed: %v, %v", err, fsys.Names())
	}
	if _, err := Import(testDir, opts, bytes.NewReader(stream)); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("beside something: %v", err)
	}
	opts.SegmentSize = 1
	if _, err := Import("other", opts, bytes.NewReader(stream)); err == nil {
		t.Error("imported with options that no log has")
	}
}

// TestImportCrash crashes an import at each of its operations, and the removal
// of what that leaves at each of its own. What is found then is not a log, or
// the whole one if nothing but the end was missing.
func TestImportCrash(t *testing.T) {
	rng := vfstest.Rand(t)
	stream, m := smallStream(t)
	finished, refused := 0, 0
	for k := 1; ; k++ {
		fsys := vfstest.New()
		n := 0
		fsys.SetHook(func(vfstest.Op) error {
			if n++; n >= k {
				return errCrashed
			}
			return nil
		})
		_, err := Import(testDir, smallOptions(fsys), bytes.NewReader(stream))
		if err == nil {
			clone := fsys.CrashClone(rng, vfstest.None)
			checkImported(t, smallOptions(clone), m, rng)
			t.Logf("%d crash points; found whole %d times, refused %d", k-1, finished, refused)
			if k < 40 || refused < 40 {
				t.Error("too few to mean anything")
			}
			return
		}
		if !errors.Is(err, errCrashed) {
			t.Fatalf("operation %d: %v", k, err)
		}
		for _, survive := range []vfstest.Survival{vfstest.None, vfstest.Some, vfstest.Some, vfstest.All} {
			clone := fsys.CrashClone(rng, survive)
			if len(clone.Names()) == 0 {
				continue // nothing was begun
			}
			l, err := Open(testDir, smallOptions(clone.CrashClone(rng, vfstest.All)))
			switch {
			case err == nil:
				must(t, checkEntriesEqual(l, &m))
				must(t, l.Close())
				finished++
			case errors.Is(err, ErrUnfinished):
				refused++
			default:
				t.Fatalf("crash at operation %d, %v surviving: %v\n%v", k, survive, err, clone)
			}
			if err := crashRemove(clone, rng); err != nil {
				t.Fatalf("crash at operation %d, %v surviving: %v", k, survive, err)
			}
			_, err = Import(testDir, smallOptions(clone), bytes.NewReader(stream))
			must(t, err)
			checkImported(t, smallOptions(clone), m, rng)
		}
	}
}

// crashRemove removes a log, crashing at each operation.
func crashRemove(fsys *vfstest.Mem, rng *rand.Rand) error {
	for k := 1; ; k++ {
		again := fsys.CrashClone(rng, vfstest.All)
		n := 0
		again.SetHook(func(vfstest.Op) error {
			if n++; n >= k {
				return errCrashed
			}
			return nil
		})
		err := Remove(again, testDir)
		if err == nil {
			break
		}
		if !errors.Is(err, errCrashed) {
			return err
		}
		clone := again.CrashClone(rng, vfstest.Survival(rng.IntN(3)))
		before := clone.Snapshot()
		l, err := Open(testDir, smallOptions(clone))
		if err == nil {
			// Nothing was removed yet, or everything was.
			full := fsys.Snapshot()
			if len(before) > 0 && len(before) < len(full) {
				return errors.Join(fmt.Errorf("%v opens as a log of %+v", clone, l.Stats()), l.Close())
			}
			if err := l.Close(); err != nil {
				return err
			}
		}
		if err := Remove(clone, testDir); err != nil {
			return err
		}
		if names := clone.Names(); len(names) > 0 {
			return fmt.Errorf("removal left %v", names)
		}
	}
	return Remove(fsys, testDir)
}

// TestRemoveCrash removes an ordinary log, crashing at each operation.
func TestRemoveCrash(t *testing.T) {
	for _, clean := range []bool{false, true} {
		fsys, _ := fuzzLog(t, clean)
		must(t, crashRemove(fsys, vfstest.Rand(t)))
		if names := fsys.Names(); len(names) > 0 {
			t.Errorf("left %v", names)
		}
	}
}
