package agent

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
	"github.com/diurnalog/diurna/rpc/client"
)

// fingerprint stands for all of a record: time, key, value, headers.
type fingerprint [sha256.Size]byte

func fingerprintOf(r *client.ConsumedRecord) fingerprint {
	h := sha256.New()
	part := func(b []byte) {
		h.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(b))))
		h.Write(b)
	}
	part(binary.LittleEndian.AppendUint64(nil, uint64(r.Time.UnixNano())))
	part(r.Key)
	part(r.Value)
	for _, header := range r.Headers {
		part([]byte(header.Name))
		part(header.Value)
	}
	return fingerprint(h.Sum(nil))
}

// fingerprints reads a node's log from an offset on. With follow it goes on until
// ctx ends.
func fingerprints(ctx context.Context, c *client.Client, from client.Start, follow bool, add func(offset uint64, f fingerprint)) error {
	r, err := c.Consume(ctx, client.ConsumeOptions{Start: from, Follow: follow, Linearizable: !follow})
	if err != nil {
		return err
	}
	defer r.Close()
	for r.Next() {
		add(r.Record().Offset, fingerprintOf(r.Record()))
	}
	if err := r.Err(); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

// witness notes every record that a cluster has, as it comes to be.
type witness struct {
	mu     sync.Mutex
	all    map[uint64]fingerprint
	added  chan struct{} // one token
	cancel context.CancelFunc
	done   chan error
}

func startWitness(t testing.TB, addr string) *witness {
	ctx, cancel := context.WithCancel(t.Context())
	w := &witness{all: map[uint64]fingerprint{}, added: make(chan struct{}, 1), cancel: cancel, done: make(chan error, 1)}
	c := patient(t, addr)
	go func() {
		w.done <- fingerprints(ctx, c, client.AtOffset(0), true, func(offset uint64, f fingerprint) {
			w.mu.Lock()
			w.all[offset] = f
			w.mu.Unlock()
			select {
			case w.added <- struct{}{}:
			default:
			}
		})
	}()
	return w
}

func (w *witness) saw(offset uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, ok := w.all[offset]
	return ok
}

// stop returns what was seen once that goes up to an offset.
func (w *witness) stop(t testing.TB, next uint64) map[uint64]fingerprint {
	t.Helper()
	for late := time.After(patience); !w.saw(next - 1); {
		select {
		case <-w.added:
		case <-late:
			t.Fatalf("record %d was not seen", next-1)
		}
	}
	w.cancel()
	if err := <-w.done; err != nil {
		t.Fatal(err)
	}
	return w.all
}

// appendMixed appends records with and without key, value and headers.
func appendMixed(t testing.TB, addr string, n int) {
	t.Helper()
	c := patient(t, addr)
	for i := range n {
		records := []*client.Record{
			{Key: fmt.Appendf(nil, "k%d", i), Value: fmt.Appendf(nil, "value %d", i), Headers: []*client.Header{{Name: "h", Value: []byte{0, 1}}, {Name: "h"}, {Name: "ü"}}},
			{},
			{Key: []byte{0xff, 0}},
		}
		if _, err := c.Produce(t.Context(), records[:1+i%3]); err != nil {
			t.Fatal(err)
		}
	}
}

func runJSON(t testing.TB, v any, args ...string) {
	t.Helper()
	code, stdout, stderr := runDiurna(t, "", args...)
	if code != exitOK {
		t.Fatalf("%v: exit %d\n%s", args, code, stderr)
	}
	if err := json.Unmarshal([]byte(stdout), v); err != nil {
		t.Fatalf("%v printed %q: %v", args, stdout, err)
	}
}

// TestClusterBackup: a snapshot is saved from a cluster under load, and restored
// into a new one of three nodes, of which every one then has every record up to
// the snapshot's offset as it was: offset, time, key, value, headers.
func TestClusterBackup(t *testing.T) {
	for _, tc := range []struct {
		name, settings string
		cut            bool // retention has moved the first offset
		sameConsul     bool // in which the old cluster is still registered, and its record
	}{
		{name: "all", settings: `log { segment_size = "1MiB" }`, sameConsul: true},
		{name: "retention", settings: "log {\n segment_size = \"1MiB\"\n retention_bytes = \"4MiB\"\n}\nraft { snapshot_interval = \"200ms\" }", cut: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c := startNodes(t, 3, tc.settings)
			c.servers(t, "three nodes vote", healthy(3))
			w := startWitness(t, c.nodes[1].listen)
			l := startLoad(t, 2, c.addresses())
			appendMixed(t, c.nodes[0].listen, 100)
			appendBulk(t, c.nodes[0].listen, 8<<20)
			appendMixed(t, c.nodes[0].listen, 20)
			if tc.cut {
				c.servers(t, "the log has a later start", func(servers []client.Server) bool {
					return len(servers) == 3 && servers[0].FirstOffset > 0 && servers[1].FirstOffset > 0 && servers[2].FirstOffset > 0
				})
			}
			acked := produce(t, patient(t, c.nodes[0].listen), "before the snapshot")

			file := filepath.Join(t.TempDir(), "test.snapshot")
			var saved, inspected snapshotJSON
			runJSON(t, &saved, "operator", "snapshot", "save", "-json", "-addr", c.nodes[2].listen, file)
			after := produce(t, patient(t, c.nodes[0].listen), "after the snapshot")
			if saved.NextOffset < acked.NextOffset || saved.NextOffset > after.BaseOffset || tc.cut != (saved.FirstOffset > 0) || saved.Cluster != "test" {
				t.Errorf("acknowledged before were %d, after %d; saved %+v", acked.NextOffset, after.BaseOffset, saved)
			}
			runJSON(t, &inspected, "operator", "snapshot", "inspect", "-json", file)
			inspected.Version = saved.Version
			inspected.LastAppendTime = ""
			if inspected != saved {
				t.Errorf("inspected %+v\nsaved %+v", inspected, saved)
			}
			if code, _, stderr := runDiurna(t, "", "operator", "snapshot", "save", "-addr", c.nodes[0].listen, file); code != exitUsage || !strings.Contains(stderr, "-force") {
				t.Errorf("saved over a file: exit %d, %s", code, stderr)
			}
			l.end(t)
			seen := w.stop(t, after.NextOffset)
			refuseDamaged(t, file, tc.cut)

			for _, m := range c.nodes {
				m.kill(t)
			}
			// As the guide says, with a retention that keeps what is restored.
			const settings = "log {\n segment_size = \"1MiB\"\n retention_bytes = \"16MiB\"\n}"
			restored := &processCluster{consul: c.consul, dir: t.TempDir()}
			if !tc.sameConsul {
				restored = prepareNodes(t, 3, settings)
			} else {
				restored.configure(t, 3, fmt.Sprintf("consul { address = %q }\n%s", c.consul.HTTP, settings))
			}
			var made snapshotJSON
			runJSON(t, &made, "operator", "snapshot", "restore", "-json", "-data-dir", restored.dataDir("n1"), file)
			if made.NewClusterID == saved.ClusterID || made.NewClusterID == "" || made.NextOffset != saved.NextOffset || made.SHA256 != saved.SHA256 {
				t.Errorf("restored %+v", made)
			}
			if code, _, stderr := runDiurna(t, "", "operator", "snapshot", "restore", "-data-dir", restored.dataDir("n1"), file); code != exitUsage || !strings.Contains(stderr, "holds a node's data already") {
				t.Errorf("restored twice: exit %d, %s", code, stderr)
			}
			restored.add(t).awaitReady(t)
			restored.start(t, 2)
			servers := restored.servers(t, "three nodes vote", healthy(3))
			for _, s := range servers {
				if strings.Contains(s.Address, "invalid") {
					t.Errorf("a node is still nowhere: %+v", s)
				}
			}
			for _, m := range restored.nodes {
				if id := identityOf(t, m); id.cluster != made.NewClusterID {
					t.Errorf("%s is in cluster %s, not %s", m.name, id.cluster, made.NewClusterID)
				}
				next := saved.FirstOffset
				err := fingerprints(t.Context(), patient(t, m.listen), client.Earliest(), false, func(offset uint64, f fingerprint) {
					if offset != next {
						t.Errorf("%s: offset %d where %d belongs", m.name, offset, next)
					}
					if f != seen[offset] {
						t.Errorf("%s: record %d is another one", m.name, offset)
					}
					next = offset + 1
				})
				if err != nil || next != saved.NextOffset {
					t.Errorf("%s has records up to %d, the snapshot up to %d: %v", m.name, next, saved.NextOffset, err)
				}
			}
			if ack := produce(t, patient(t, restored.nodes[2].listen), "new"); ack.BaseOffset != saved.NextOffset {
				t.Errorf("the first new record has offset %d, not %d", ack.BaseOffset, saved.NextOffset)
			}
			t.Logf("%d records, %d bytes", saved.Records, saved.Bytes)
		})
	}
}

// refuseDamaged tries parts of a snapshot, and altered ones.
func refuseDamaged(t *testing.T, file string, few bool) {
	t.Helper()
	rng := vfstest.Rand(t)
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	size := len(good)
	dir := t.TempDir()
	refuse := func(what string, b []byte) {
		t.Helper()
		bad, data := filepath.Join(dir, "bad.snapshot"), filepath.Join(dir, "data")
		if err := os.WriteFile(bad, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if code, stdout, stderr := runDiurna(t, "", "operator", "snapshot", "inspect", bad); code != exitServer || stdout != "" || !strings.Contains(stderr, bad) {
			t.Errorf("%s: inspect: exit %d\n%s%s", what, code, stdout, stderr)
		}
		if code, stdout, stderr := runDiurna(t, "", "operator", "snapshot", "restore", "-data-dir", data, bad); code != exitServer || stdout != "" {
			t.Errorf("%s: restore: exit %d\n%s%s", what, code, stdout, stderr)
		}
		if names, err := os.ReadDir(data); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: left %v, %v", what, names, err)
		}
	}
	n := 12
	if few {
		n = 4
	}
	cuts := []int{0, 10, 500, size / 2, size - 1}
	for range n {
		cuts = append(cuts, rng.IntN(size))
	}
	for _, at := range cuts {
		refuse(fmt.Sprintf("%d of %d bytes", at, size), good[:at])
	}
	for range n {
		at, bit := rng.IntN(size), rng.IntN(8)
		good[at] ^= 1 << bit
		refuse(fmt.Sprintf("bit %d of byte %d", bit, at), good)
		good[at] ^= 1 << bit
	}
	refuse("one byte more", append(good, 0))
}

// TestSnapshotSaveInterrupted: a save that does not come to its end leaves nothing,
// and one that was killed is in nobody's way.
func TestSnapshotSaveInterrupted(t *testing.T) {
	n := startNode(t, t.TempDir())
	produce(t, dial(t, n.addr), numbered("r", 100)...)
	dir := t.TempDir()
	file := filepath.Join(dir, "x.snapshot")
	if err := os.WriteFile(file+".partial", []byte("of one that was killed"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := runDiurna(t, "", "operator", "snapshot", "save", "-addr", n.addr, file)
	if code != exitOK {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	if code, _, stderr := runDiurna(t, "", "operator", "snapshot", "inspect", file); code != exitOK {
		t.Errorf("exit %d: %s", code, stderr)
	}
	// To standard output, the same.
	code, stdout, stderr := runDiurna(t, "", "operator", "snapshot", "save", "-addr", n.addr, "-")
	if code != exitOK || !strings.Contains(stderr, "100 records, offsets 0–99") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	second := filepath.Join(dir, "y.snapshot")
	if err := os.WriteFile(second, []byte(stdout), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, stdout, stderr := runDiurna(t, "", "operator", "snapshot", "inspect", second); code != exitOK || !strings.Contains(stdout, "100, offsets 0–99") {
		t.Errorf("exit %d: %s%s", code, stdout, stderr)
	}
	n.terminate(t)
	code, _, stderr = runDiurna(t, "", "operator", "snapshot", "save", "-addr", n.addr, filepath.Join(dir, "z.snapshot"))
	if code != exitServer || !strings.Contains(stderr, "Nothing was saved") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(names) != 2 {
		t.Errorf("there are %v, %v", names, err)
	}
}

// TestBackupGuide runs what docs/operations.md says of backing up and restoring, in
// its order.
func TestBackupGuide(t *testing.T) {
	steps := guide(t, "Backing up and restoring")
	n := startNode(t, t.TempDir())
	values := numbered("r", 100)
	produce(t, dial(t, n.addr), values...)
	file, restored := filepath.Join(t.TempDir(), "orders.snapshot"), filepath.Join(t.TempDir(), "restored")
	ran := map[string]bool{}
	for _, step := range steps {
		words := strings.Fields(strings.NewReplacer("orders.snapshot", file, "/var/lib/diurna", restored).Replace(step[1]))
		if words[0] != "diurna" {
			t.Fatalf("this test cannot run %q", step[1])
		}
		verb, args := words[len(words)-1], words[1:]
		if len(words) > 3 {
			verb = words[3]
		}
		switch verb {
		case "save":
			args = append([]string{"operator", "snapshot", "save", "-addr", n.addr}, words[4:]...)
		case "status":
			// The guide has started the restored node by now.
			n.terminate(t)
			n = startNode(t, restored)
			args = append(args, "-addr", n.addr)
		}
		if code, stdout, stderr := runDiurna(t, "", args...); code != exitOK {
			t.Fatalf("%q: exit %d\n%s%s", step[1], code, stdout, stderr)
		}
		ran[verb] = true
	}
	if !ran["save"] || !ran["inspect"] || !ran["restore"] || !ran["status"] {
		t.Errorf("the guide has %q", steps)
	}
	if got := consume(t, dial(t, n.addr), 0); !slices.Equal(got, values) {
		t.Errorf("there are %d records", len(got))
	}
}
