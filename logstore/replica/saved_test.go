package replica

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"testing"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// saveAll saves what a replica has.
func saveAll(t testing.TB, r *Replica) ([]byte, SavedInfo) {
	t.Helper()
	s, err := r.Save(t.Context(), SavedInfo{NodeID: r.cfg.ID, ClusterName: "test", Version: "1"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(s)
	if err := errors.Join(err, s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if int64(len(b)) != s.Info.Size || s.Info.SHA256 == "" {
		t.Fatalf("%d bytes, announced were %d, SHA-256 %q", len(b), s.Info.Size, s.Info.SHA256)
	}
	return b, s.Info
}

// TestSaveRestore: what was saved is the log of a new group of one, which others
// join that have nothing; all of it, whichever of them leads, and nothing of the
// old group but the records.
func TestSaveRestore(t *testing.T) {
	for _, cut := range []bool{false, true} {
		t.Run(fmt.Sprintf("cut=%v", cut), func(t *testing.T) {
			c := newCluster(t, "a", "b", "c", "d", "e", "f")
			clusters := map[string]string{"a": "old", "b": "old", "c": "old"}
			c.tweak = func(id string, cfg *Config) { cfg.ClusterID = clusters[id] }
			c.bootstrap("a", "b", "c")
			all := c.append(1, 60, 20)
			if cut {
				c.cutFront()
			}
			c.caughtUp("b")
			saved, info := saveAll(t, c.nodes["b"])
			first, records, err := readAll(c.nodes["b"])
			if err != nil {
				t.Fatal(err)
			}
			if info.FirstOffset != first || info.Records() != uint64(len(records)) || cut != (first > 0) || info.ClusterID != "old" {
				t.Fatalf("there are %d records from %d on; saved: %+v", len(records), first, info)
			}
			checked, err := CheckSaved(bytes.NewReader(saved))
			if err != nil || checked != info {
				t.Fatalf("read %+v, %v\nsaved %+v", checked, err, info)
			}
			for _, id := range []string{"a", "b", "c"} {
				c.stop(id)
			}

			clusters = map[string]string{"d": "new", "e": "new", "f": "new"}
			cfg := c.config("d")
			if restored, err := Restore(cfg, bytes.NewReader(saved)); err != nil || restored != info {
				t.Fatalf("restored %+v, %v", restored, err)
			}
			if _, err := Restore(cfg, bytes.NewReader(saved)); !errors.Is(err, logstore.ErrNotEmpty) {
				t.Errorf("restored over a log: %v", err)
			}
			kept := slices.DeleteFunc(slices.Clone(all), func(a acked) bool { return a.ack.BaseOffset < first })
			check := func(id string) {
				t.Helper()
				c.caughtUp(id)
				gotFirst, got, err := readAll(c.nodes[id])
				if err != nil || gotFirst != first || !slices.Equal(got[:min(len(got), len(records))], records) {
					t.Fatalf("%s has %d records from %d on, %v; saved were %d from %d on", id, len(got), gotFirst, err, len(records), first)
				}
				if err := checkAcked(c.nodes[id], kept); err != nil {
					t.Errorf("%s: %v", id, err)
				}
				if r := c.nodes[id]; r.ClusterID() != "new" {
					t.Errorf("%s is in cluster %q", id, r.ClusterID())
				}
			}
			c.start("d")
			kept = append(kept, c.append(1000, 5, 3)...)
			check("d")
			join := func(id string) {
				t.Helper()
				c.start(id)
				c.led(func(l *Replica) error {
					return l.raft.AddVoter(raft.ServerID(id), raft.ServerAddress(id+":1"), 0, 0).Error()
				})
				kept = append(kept, c.append(2000+10*uint64(id[0]), 3, 3)...)
				check(id)
			}
			join("e")
			// The seam is known to who has not seen it made.
			c.led(func(l *Replica) error {
				if l.cfg.ID == "e" {
					return nil
				}
				return l.raft.LeadershipTransferToServer("e", "e:1").Error()
			})
			eventually(t, "e leads", func() bool { return c.leader().cfg.ID == "e" })
			join("f")
			for _, id := range []string{"d", "e", "f"} {
				c.stop(id)
			}
			for _, id := range []string{"d", "e", "f"} {
				c.start(id)
			}
			kept = append(kept, c.append(3000, 3, 3)...)
			for _, id := range []string{"d", "e", "f"} {
				check(id)
			}
		})
	}
}

// TestSaveWhileItChanges: what was committed when Save returned is what is saved,
// whatever is appended and deleted while it is read.
func TestSaveWhileItChanges(t *testing.T) {
	c := newCluster(t, "a")
	c.bootstrap("a")
	c.append(1, 60, 20)
	r := c.nodes["a"]
	first, records, err := readAll(r)
	if err != nil {
		t.Fatal(err)
	}
	s, err := r.Save(t.Context(), SavedInfo{NodeID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	c.append(1000, 60, 20)
	c.cutFront()
	b, err := io.ReadAll(s)
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	fs := vfstest.New()
	cfg := memConfig("data", fs)
	cfg.ID, cfg.ClusterID, cfg.Bootstrap = "b", "new", nil
	if _, err := Restore(cfg, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	restored := mustOpen(t, cfg)
	defer mustClose(t, restored)
	if gotFirst, got, err := readAll(restored); err != nil || gotFirst != first || !slices.Equal(got, records) {
		t.Errorf("%d records from %d on, %v; there were %d from %d on", len(got), gotFirst, err, len(records), first)
	}
}

// smallSaved is a snapshot of a few KiB.
func smallSaved(t testing.TB) []byte {
	t.Helper()
	r := mustOpen(t, memConfig("data", vfstest.New()))
	defer mustClose(t, r)
	for id := range uint64(20) {
		p := batchOf(id, 3)
		mustPropose(t, r, string(p.Records), p.Count)
	}
	b, _ := saveAll(t, r)
	return b
}

// refusedSaved has a snapshot refused, by checking and by restoring it.
func refusedSaved(t *testing.T, what string, b []byte) {
	t.Helper()
	refusal := func(err error) bool {
		var corrupt *CorruptError
		var stream *logstore.StreamError
		var version *VersionError
		var logVersion *logstore.VersionError
		return errors.As(err, &corrupt) || errors.As(err, &stream) || errors.As(err, &version) || errors.As(err, &logVersion)
	}
	if _, err := CheckSaved(bytes.NewReader(b)); !refusal(err) {
		t.Errorf("%s: checked, %v", what, err)
	}
	fs := vfstest.New()
	cfg := memConfig("data", fs)
	cfg.ClusterID = "new"
	if _, err := Restore(cfg, bytes.NewReader(b)); !refusal(err) {
		t.Errorf("%s: restored, %v", what, err)
	}
	if names := fs.Names(); len(names) > 0 {
		t.Errorf("%s: left %v", what, names)
	}
}

// TestSavedDamaged: a snapshot that was cut off anywhere, or in which a bit is
// another one, is refused, and leaves nothing.
func TestSavedDamaged(t *testing.T) {
	b := smallSaved(t)
	rng := vfstest.Rand(t)
	for n := range len(b) {
		if n < 300 || n > len(b)-100 || rng.IntN(8) == 0 {
			refusedSaved(t, fmt.Sprintf("%d of %d bytes", n, len(b)), b[:n])
		}
	}
	for at := range b {
		if at < 600 || at > len(b)-100 || rng.IntN(8) == 0 {
			flipped := bytes.Clone(b)
			bit := rng.IntN(8)
			flipped[at] ^= 1 << bit
			refusedSaved(t, fmt.Sprintf("bit %d of byte %d", bit, at), flipped)
		}
	}
	refusedSaved(t, "a byte more", append(bytes.Clone(b), 0))
	refusedSaved(t, "twice", append(bytes.Clone(b), b...))
}

// FuzzSaved writes arbitrary bytes into a snapshot, or ends it behind them, with
// or without the checksums they need. It is refused with a typed error, and
// leaves nothing; or it is one whose log opens.
func FuzzSaved(f *testing.F) {
	valid := smallSaved(f)
	for _, forge := range []bool{false, true} {
		for _, cut := range []bool{false, true} {
			f.Add(uint16(0), bytes.Clone(valid[:savedHeader]), cut, forge)
			f.Add(uint16(12), []byte{2}, cut, forge)
			f.Add(uint16(16), bytes.Repeat([]byte{0xff}, 16), cut, forge)
			f.Add(uint16(savedHeader), []byte(`{"index":0}`), cut, forge)
			for at := 300; at < len(valid); at += 200 {
				f.Add(uint16(at), []byte{0xff, 0}, cut, forge)
			}
			f.Add(uint16(len(valid)-savedTrailer), []byte{0}, cut, forge)
			f.Add(uint16(len(valid)), []byte{0}, cut, forge)
		}
	}
	f.Fuzz(func(t *testing.T, at uint16, patch []byte, cut, forge bool) {
		if len(patch) > 8192 {
			return
		}
		from := min(int(at), len(valid))
		b := append(bytes.Clone(valid[:from]), patch...)
		if !cut && len(b) < len(valid) {
			b = append(b, valid[len(b):]...)
		}
		if bytes.Equal(b, valid) {
			return
		}
		if forge {
			forgeSaved(b)
		}
		if _, err := CheckSaved(bytes.NewReader(b)); err != nil || !forge {
			refusedSaved(t, "fuzzed", b)
			return
		}
		cfg := memConfig("data", vfstest.New())
		cfg.ClusterID, cfg.Bootstrap = "new", nil
		info, err := Restore(cfg, bytes.NewReader(b))
		if err != nil {
			t.Fatalf("checked, and not restored: %v", err)
		}
		if h, err := Survey(cfg); err != nil || h.NextOffset != info.NextOffset || h.ClusterID != "new" || h.FirstOffset != info.FirstOffset {
			t.Fatalf("restored %+v; it is %+v, %v", info, h, err)
		}
	})
}

// forgeSaved gives a snapshot the checksums it needs.
func forgeSaved(b []byte) {
	le := binary.LittleEndian
	if len(b) < savedHeader+savedTrailer {
		return
	}
	copy(b, savedMagic)
	le.PutUint32(b[12:], savedVersion)
	le.PutUint64(b[24:], uint64(len(b)))
	if n := le.Uint64(b[16:]); n <= uint64(len(b)-savedHeader) {
		le.PutUint32(b[8:], crc32.Checksum(b[12:savedHeader+n], castagnoli))
	}
	sum := sha256.New()
	body := b[:len(b)-savedTrailer]
	sum.Write(body)
	copy(b[len(body):], encodeSavedTrailer(int64(len(b)), sum.Sum(nil)))
}

// TestRecover: what is left of a group goes on alone with all that it has, under
// another id, and others that have nothing join it; whatever interrupts it.
func TestRecover(t *testing.T) {
	c := newCluster(t, "a", "b", "c", "d", "e")
	clusters := map[string]string{"a": "old", "b": "old", "c": "old"}
	c.tweak = func(id string, cfg *Config) { cfg.ClusterID = clusters[id] }
	c.bootstrap("a", "b", "c")
	all := c.append(1, 60, 20)
	c.caughtUp("a")
	_, records, err := readAll(c.nodes["a"])
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "b", "c"} {
		c.stop(id)
	}
	cfg := c.config("a")
	before, err := Survey(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if before.ClusterID != "old" || len(before.Servers) != 3 || before.NextOffset != uint64(len(records)) || before.Committed > before.LastIndex || before.Term == 0 {
		t.Fatalf("before: %+v", before)
	}
	cfg.ClusterID = "new"
	if _, err := Recover(cfg, before.LastIndex-1); err == nil {
		t.Error("recovered another log than was looked at")
	}
	if again, err := Survey(cfg); err != nil || again.LastIndex != before.LastIndex || again.ClusterID != "old" {
		t.Fatalf("looking changed it: %+v, %v", again, err)
	}

	// Interrupted at every point, and repeated.
	rng := vfstest.Rand(t)
	var crashes []crashPoint
	c.disks["a"].SetHook(func(op vfstest.Op) error {
		for _, survive := range []vfstest.Survival{vfstest.None, vfstest.Some, vfstest.All} {
			crashes = append(crashes, crashPoint{when: fmt.Sprintf("crash before %v, %v survives", op, survive), disk: c.disks["a"].CrashClone(rng, survive)})
		}
		return nil
	})
	if _, err := Recover(cfg, before.LastIndex); err != nil {
		t.Fatal(err)
	}
	c.disks["a"].SetHook(nil)
	if len(crashes) < 30 {
		t.Errorf("recovering took %d steps", len(crashes)/3)
	}
	for _, crash := range crashes {
		cfg := cfg
		cfg.FS = crash.disk
		if _, err := Recover(cfg, before.LastIndex); err != nil {
			t.Fatalf("%s: %v", crash.when, err)
		}
		h, err := Survey(cfg)
		if err != nil || h.ClusterID != "new" || h.Supersedes != "old" || len(h.Servers) != 1 || h.NextOffset != before.NextOffset || h.LastIndex != before.LastIndex+1 {
			t.Fatalf("%s: %+v, %v", crash.when, h, err)
		}
	}
	if _, err := Recover(cfg, before.LastIndex); err != nil {
		t.Fatalf("again: %v", err)
	}
	after, err := Survey(cfg)
	if err != nil || after.ClusterID != "new" || after.Supersedes != "old" || len(after.Servers) != 1 || after.NextOffset != before.NextOffset || after.Term <= before.Term {
		t.Fatalf("after: %+v, %v", after, err)
	}
	clusters = map[string]string{"a": "new", "d": "new", "e": "new"}
	c.start("a")
	for _, id := range []string{"d", "e"} {
		c.start(id)
		c.led(func(l *Replica) error {
			return l.raft.AddVoter(raft.ServerID(id), raft.ServerAddress(id+":1"), 0, 0).Error()
		})
		all = append(all, c.append(1000+10*uint64(id[0]), 3, 3)...)
		c.caughtUp(id)
		c.same("a", id)
		if err := checkAcked(c.nodes[id], all); err != nil {
			t.Errorf("%s: %v", id, err)
		}
		if r := c.nodes[id]; r.ClusterID() != "new" || r.Supersedes() != "old" {
			t.Errorf("%s is in cluster %q after %q", id, r.ClusterID(), r.Supersedes())
		}
	}
}

// TestSavedFormat reads a snapshot's frame as docs/FORMAT.md has it, with its own
// numbers.
func TestSavedFormat(t *testing.T) {
	b := smallSaved(t)
	le := binary.LittleEndian
	s := len(b)
	n := int(le.Uint64(b[16:]))
	if string(b[:8]) != "DIURNSAV" || le.Uint32(b[12:]) != 1 || le.Uint64(b[24:]) != uint64(s) || le.Uint32(b[8:]) != crc32.Checksum(b[12:32+n], castagnoli) {
		t.Errorf("header % x", b[:32])
	}
	var about map[string]any
	if err := json.Unmarshal(b[32:32+n], &about); err != nil || about["next_offset"] != 60.0 || about["node_id"] != "a" || about["cluster"] != "test" {
		t.Errorf("description %s, %v", b[32:32+n], err)
	}
	if string(b[32+n:40+n]) != "DIURNSNP" {
		t.Errorf("content begins with %q", b[32+n:40+n])
	}
	end := b[s-64:]
	sum := sha256.Sum256(b[:s-64])
	if string(end[:8]) != "DIURNEND" || le.Uint32(end[12:]) != 1 || le.Uint64(end[16:]) != uint64(s) || le.Uint64(end[24:]) != 0 ||
		!bytes.Equal(end[32:], sum[:]) || le.Uint32(end[8:]) != crc32.Checksum(end[12:], castagnoli) {
		t.Errorf("trailer % x", end)
	}
}

// TestSaveDuringTransfer: a leader that is handing over still saves.
func TestSaveDuringTransfer(t *testing.T) {
	c := newCluster(t, "a", "b", "c")
	c.bootstrap("a", "b", "c")
	all := c.append(1, 5, 3)
	for _, id := range c.ids {
		c.caughtUp(id)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 12 {
			to := raft.ServerID(c.ids[i%3])
			for _, from := range c.ids {
				// Whoever leads, if somebody does.
				_ = c.nodes[from].raft.LeadershipTransferToServer(to, raft.ServerAddress(to+":1")).Error()
			}
		}
	}()
	defer func() { <-done }()
	for saved := 0; ; saved++ {
		select {
		case <-done:
			return
		default:
		}
		if _, info := saveAll(t, c.nodes[c.ids[saved%3]]); info.NextOffset != all[4].ack.NextOffset {
			t.Fatalf("saved %+v", info)
		}
	}
}

// diskUsed is what retention takes a log for, in bytes.
func diskUsed(r *Replica) (bytes int64) {
	for _, s := range r.gens.log().Segments() {
		bytes += s.Bytes
	}
	return bytes
}

// TestRestoreKeepsItsSize: a log that was restored, or recovered, is no larger than
// it was, whatever the size of segments: or retention would delete records of it
// that it should keep. And nothing of it is in a larger segment than before.
func TestRestoreKeepsItsSize(t *testing.T) {
	const large = 1 << 20
	disk := vfstest.New()
	cfg := memConfig("data", disk)
	cfg.SegmentSize, cfg.ClusterID = large, "old"
	r := mustOpen(t, cfg)
	p := batchOf(1, 20)
	for range 4 * logstore.MinSegmentSize / len(p.Records) {
		mustPropose(t, r, string(p.Records), p.Count)
	}
	saved, info := saveAll(t, r)
	if info.SegmentSize != large {
		t.Errorf("saved %+v", info)
	}
	mustClose(t, r)

	into := memConfig("data", vfstest.New())
	into.SegmentSize, into.ClusterID, into.Bootstrap = large, "new", nil
	if _, err := Restore(into, bytes.NewReader(saved)); err != nil {
		t.Fatal(err)
	}
	into.SegmentSize = logstore.MinSegmentSize // as the node has it configured
	restored := mustOpen(t, into)
	mustPropose(t, restored, string(p.Records), p.Count)
	if used := diskUsed(restored); used > info.Size+16<<10 {
		t.Errorf("a log of %d bytes takes %d", info.Size, used)
	}
	mustClose(t, restored)

	before := disk.Snapshot()
	held, err := Survey(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range disk.Snapshot() {
		if len(content) != len(before[name]) {
			t.Errorf("looking changed %s from %d to %d bytes", name, len(before[name]), len(content))
		}
	}
	cfg.ClusterID = "new"
	if _, err := Recover(cfg, held.LastIndex); err != nil {
		t.Fatal(err)
	}
	recovered := mustOpen(t, cfg)
	defer mustClose(t, recovered)
	if segments := recovered.gens.log().Segments(); len(segments) != 1 || diskUsed(recovered) != large {
		t.Errorf("a recovery ended the segment: %+v", segments)
	}
}
