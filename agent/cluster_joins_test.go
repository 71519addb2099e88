package agent

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
	"github.com/diurnalog/diurna/rpc/client"
)

// TestClusterJoins: nodes join a cluster that has deleted the start of its log,
// while records are appended. They get a snapshot as a stream, also where they
// or their leader die in the middle of it, and have then, byte for byte, what
// the others have.
func TestClusterJoins(t *testing.T) {
	mib := vfstest.Env(t, "DIURNA_JOIN_MIB", 256)
	segment := 8 << 20
	c := startNodes(t, 3, fmt.Sprintf(`log {
		segment_size    = "%dMiB"
		retention_bytes = "%dMiB"
	}`, segment>>20, mib))
	appendBulk(t, c.nodes[0].listen, (mib+mib/8)<<20)
	c.servers(t, "the log has a later start on all nodes", func(servers []client.Server) bool {
		return len(servers) == 3 && !slices.ContainsFunc(servers, func(s client.Server) bool { return s.FirstOffset == 0 })
	})
	l := startLoad(t, 2, c.addresses())
	total := int64(mib) << 20

	for _, tc := range []struct {
		name      string
		interrupt func(joining, leader *member) *member // returns who is killed
	}{
		{name: "undisturbed"},
		{"the joining node dies", func(joining, _ *member) *member { return joining }},
		{"the leader dies", func(_, leader *member) *member { return leader }},
	} {
		leader := c.leader(t)
		watched := watchUsage(leader.dir)
		begin := time.Now()
		joining := c.add(t, "-bootstrap-expect", "0")
		if tc.interrupt != nil {
			received := awaitReceiving(t, joining, total/4)
			victim := tc.interrupt(joining, leader)
			victim.kill(t)
			if strings.Contains(joining.stderr.text(), "Installed remote snapshot") {
				t.Errorf("%s: %s was killed too late", tc.name, victim.name)
			}
			t.Logf("%s: killed %s when %d MiB had been received", tc.name, victim.name, received>>20)
			c.launch(t, victim)
			victim.awaitReady(t)
		}
		joining.awaitReady(t)
		took := time.Since(begin)
		before, most := watched.stop(t)
		if _, ok := joining.stderr.await(t, func(text string) bool { return strings.Contains(text, "Installed remote snapshot") }); !ok {
			t.Errorf("%s: no snapshot was installed", tc.name)
		}
		c.servers(t, "all nodes vote", healthy(len(c.nodes)))
		// The load is some hundred bytes a record, which is nothing beside this.
		if limit := before + before*3/10 + 2*int64(segment); most > limit {
			t.Errorf("%s: the leader's data grew from %d to %d MiB", tc.name, before>>20, most>>20)
		}
		t.Logf("%s: joined after %v; the leader's data took %d MiB before, %d at most", tc.name, took.Round(10*time.Millisecond), before>>20, most>>20)
	}
	l.end(t)
	l.compareKept(t, c)
}

// appendBulk appends that many bytes, in records that do not compress.
func appendBulk(t testing.TB, addr string, bytes int) {
	t.Helper()
	rng := vfstest.Rand(t)
	p, err := patient(t, addr).NewProducer(t.Context(), client.ProducerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	value := make([]byte, 16<<10)
	for range bytes / len(value) {
		for i := 0; i < len(value); i += 8 {
			binary.LittleEndian.PutUint64(value[i:], rng.Uint64())
		}
		if err := p.Append(t.Context(), &client.Record{Value: slices.Clone(value)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// awaitReceiving returns when a node has received that much of a snapshot.
func awaitReceiving(t testing.TB, m *member, bytes int64) int64 {
	t.Helper()
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) {
		if size := usage(filepath.Join(m.dir, logsDir, "default", "gen-2")); size >= bytes {
			return size
		}
		time.Sleep(time.Millisecond) // another process's files
	}
	t.Fatalf("%s received no snapshot:\n%s", m.name, m.stderr.text())
	return 0
}

// usage is how much of the disk the files in a folder take. What vanishes
// meanwhile does not count.
func usage(dir string) (bytes int64) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil
		}
		if info, err := d.Info(); err == nil {
			bytes += info.Size()
		}
		return nil
	})
	return bytes
}

// usageWatch samples what a folder takes.
type usageWatch struct {
	cancel       context.CancelFunc
	done         sync.WaitGroup
	before, most int64
}

func watchUsage(dir string) *usageWatch {
	ctx, cancel := context.WithCancel(context.Background())
	w := &usageWatch{cancel: cancel, before: usage(dir)}
	w.most = w.before
	w.done.Go(func() {
		for ctx.Err() == nil {
			w.most = max(w.most, usage(dir))
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	return w
}

func (w *usageWatch) stop(t testing.TB) (before, most int64) {
	t.Helper()
	w.cancel()
	w.done.Wait()
	return w.before, w.most
}

// kept is what a node has of a log whose start is deleted.
type kept struct {
	first, next uint64
	sum         [sha256.Size]byte // of offsets, times and values
	small       map[uint64]string // the short records, by offset
}

func (k kept) String() string {
	return fmt.Sprintf("offsets %d to %d, sha256 %x", k.first, k.next, k.sum)
}

// readKept reads all that a node has. Consuming checks the checksums on the way
// from the disk.
func readKept(t testing.TB, addr string) (k kept) {
	t.Helper()
	r, err := patient(t, addr).Consume(t.Context(), client.ConsumeOptions{Start: client.Earliest(), Linearizable: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	k.small = make(map[uint64]string)
	sum := sha256.New()
	for began := false; r.Next(); {
		record := r.Record()
		if !began {
			began, k.first, k.next = true, record.Offset, record.Offset
		}
		if record.Offset != k.next {
			t.Fatalf("%s: offset %d where %d belongs", addr, record.Offset, k.next)
		}
		k.next++
		var head [16]byte
		binary.LittleEndian.PutUint64(head[:], record.Offset)
		binary.LittleEndian.PutUint64(head[8:], uint64(record.Time.UnixNano()))
		sum.Write(head[:])
		sum.Write(record.Value)
		if len(record.Value) < 100 {
			k.small[record.Offset] = string(record.Value)
		}
	}
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	sum.Sum(k.sum[:0])
	return k
}

// compareKept checks that all nodes have the same, and in it everything that was
// acknowledged and not deleted since. Nobody appends any more.
func (l *load) compareKept(t testing.TB, c *processCluster) {
	t.Helper()
	first := make(map[uint64]bool)
	c.servers(t, "all nodes have the same first offset", func(servers []client.Server) bool {
		clear(first)
		for _, s := range servers {
			first[s.FirstOffset] = true
		}
		return len(servers) == len(c.nodes) && len(first) == 1
	})
	var want kept
	for i, m := range c.nodes {
		got := readKept(t, m.listen)
		if i == 0 {
			want = got
			t.Logf("every node has %v", got)
		} else if got.first != want.first || got.next != want.next || got.sum != want.sum {
			t.Errorf("%s has %v, %s has %v", c.nodes[0].name, want, m.name, got)
		}
	}
	if !first[want.first] {
		t.Errorf("the nodes say that the log starts at %v, it starts at %d", first, want.first)
	}
	if want.first == 0 {
		t.Error("the log's start has not moved")
	}
	checked, doubtful := 0, 0
	for _, s := range l.producers {
		doubtful += len(s.unknown)
		for offset, value := range s.acked {
			if offset < want.first {
				continue
			}
			checked++
			if got := want.small[offset]; got != value {
				t.Errorf("%q was acknowledged at offset %d, where %q is", value, offset, got)
			}
		}
	}
	t.Logf("%d records that were acknowledged during the joins are there, %d were in doubt", checked, doubtful)
}

// end ends the load.
func (l *load) end(t testing.TB) {
	t.Helper()
	l.cancel()
	l.running.Wait()
	if err := errors.Join(l.errs...); err != nil {
		t.Error(err)
	}
}
