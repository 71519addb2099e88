package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/rpc/client"
)

// TestClusterHeals flips one bit of one node's data, in every kind of file, and
// has the node find it. Nobody is served a wrong byte; the others go on; the
// node gets what it needs from them, under a new id where it may have lost what
// it acknowledged; and no log gets shorter.
func TestClusterHeals(t *testing.T) {
	t.Parallel()
	c := startNodes(t, 3, `
		log {
			segment_size   = "1MiB"
			scrub_interval = "2s"
		}
		raft { snapshot_interval = "200ms" }
	`)
	// Several segments, whose first records nobody will read but the scrub.
	appendBulk(t, c.nodes[0].listen, 5<<20)
	l := startLoad(t, 2, c.addresses())
	h := &healing{cluster: c, seen: make(map[uint64]string)}

	for i, tc := range []struct {
		name string
		// running: the bit flips while the node runs. Else it is stopped for it;
		// crash: without having closed its log.
		running, crash bool
		// reader reads all of the node's log, again and again; else only its end
		// is followed.
		reader bool
		flip   func(*testing.T, replicaDir)
		heals  bool
		said   string // is logged where nothing has to be healed
	}{
		{name: "a sealed segment, that is read", running: true, reader: true, flip: flipSealed, heals: true},
		{name: "a sealed segment, that nobody reads", running: true, flip: flipSealed, heals: true},
		{name: "a sealed segment of a stopped node", reader: true, flip: flipSealed, heals: true},
		{name: "the active segment, below what is durable", crash: true, flip: flipActive, heals: true},
		{name: "an index", reader: true, flip: flipIndex},
		{name: "term and vote, one copy", flip: flipVote(0)},
		{name: "term and vote, both copies", flip: flipVote(0, 1), heals: true},
		{name: "CURRENT", flip: flipFile("CURRENT"), heals: true},
		{name: "the newest snapshot", flip: flipSnapshots(1), said: "a snapshot is damaged; going on from an older one"},
		{name: "all snapshots", flip: flipSnapshots(10), heals: true},
	} {
		// Each node in turn; whether it leads is chance.
		m := c.nodes[i%len(c.nodes)]
		before := identityOf(t, m)
		stopReading := h.read(m.listen, tc.reader)
		begin := time.Now()
		switch {
		case tc.running:
			tc.flip(t, dirOf(m))
		case tc.crash:
			m.kill(t)
		default:
			m.terminate(t)
		}
		if !tc.running {
			tc.flip(t, dirOf(m))
			c.launch(t, m)
		}
		if tc.heals {
			m.stderr.mustAwait(t, "this node begins anew and gets the log from the leader")
			found := time.Since(begin)
			c.servers(t, "the node votes under a new id only", func(servers []client.Server) bool {
				return healthy(3)(servers) && !slices.ContainsFunc(servers, func(s client.Server) bool { return s.ID == before.node })
			})
			m.stderr.mustAwait(t, "removed damaged data that has been replaced")
			after := identityOf(t, m)
			if after.node == before.node || after.former[0] != before.node || after.cluster != before.cluster || after.lives != before.lives+1 {
				t.Errorf("%s: the node was %+v, is %+v", tc.name, before, after)
			}
			if entries, err := filepath.Glob(filepath.Join(m.dir, logsDir+"*")); err != nil || len(entries) != 1 {
				t.Errorf("%s: the damaged data is still there: %q, %v", tc.name, entries, err)
			}
			t.Logf("%s: found after %v, a voter again after %v", tc.name, found.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond))
		} else {
			m.awaitReady(t)
			c.servers(t, "three nodes vote", healthy(3))
			if tc.said != "" {
				m.stderr.mustAwait(t, tc.said)
			}
			consume(t, patient(t, m.listen), 0)
			if after := identityOf(t, m); after.node != before.node {
				t.Errorf("%s: the node began anew:\n%s", tc.name, m.stderr.text())
			}
			t.Logf("%s: nothing to heal, well again after %v", tc.name, time.Since(begin).Round(time.Millisecond))
		}
		if !m.running() {
			t.Fatalf("%s: the process ended:\n%s", tc.name, m.stderr.text())
		}
		for _, err := range stopReading() {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	withoutLeader(t, c)
	if l.stop(t, c) == 0 {
		t.Error("nothing was acknowledged")
	}
	h.check(t, consume(t, patient(t, c.nodes[0].listen), 0))
}

// withoutLeader damages a node while there is no quorum without it: then it keeps
// all that it has, until there is one.
func withoutLeader(t *testing.T, c *processCluster) {
	t.Helper()
	m, others := c.nodes[0], c.nodes[1:]
	before := identityOf(t, m)
	for _, m := range c.nodes {
		m.kill(t)
	}
	flipVote(0, 1)(t, dirOf(m))
	files := usage(m.dir)
	c.launch(t, m)
	m.stderr.mustAwait(t, "no leader answers; waiting for one, and keeping the damaged data")
	if after := identityOf(t, m); after.node != before.node || usage(m.dir) < files {
		t.Errorf("without a leader, the node was %+v, is %+v; %d and %d bytes", before, after, files, usage(m.dir))
	}
	for _, o := range others {
		c.launch(t, o)
	}
	m.stderr.mustAwait(t, "removed damaged data that has been replaced")
	c.servers(t, "three nodes vote", healthy(3))
	if after := identityOf(t, m); after.node == before.node {
		t.Errorf("it is %s, as before", after.node)
	}
}

// replicaDir is where a node's replica keeps its files, and the generation of
// them that counts.
type replicaDir struct{ dir, gen string }

func dirOf(m *member) replicaDir {
	id, err := readNodeFile(vfs.OS, m.dir)
	if err != nil {
		return replicaDir{}
	}
	dir := filepath.Join(m.dir, id.logs(), "default")
	// There may be leftovers of the one before, never of the next one.
	gens, _ := filepath.Glob(filepath.Join(dir, "gen-*"))
	slices.Sort(gens)
	return replicaDir{dir, gens[len(gens)-1]}
}

func identityOf(t *testing.T, m *member) identity {
	t.Helper()
	id, err := readNodeFile(vfs.OS, m.dir)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// flip flips a bit.
func flip(t *testing.T, file string, at int64) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	_, err = f.ReadAt(b, at)
	b[0] ^= 0x10
	if err == nil {
		_, err = f.WriteAt(b, at)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

func filesOf(t *testing.T, pattern ...string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(pattern...))
	if err != nil || len(names) == 0 {
		t.Fatalf("no file is called %q, %v", pattern, err)
	}
	slices.Sort(names)
	return names
}

func flipMiddle(t *testing.T, file string) {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, file, info.Size()/2)
}

// flipSealed flips a bit in the middle of the first segment's frames.
func flipSealed(t *testing.T, d replicaDir) {
	t.Helper()
	file := filesOf(t, d.gen, "log", "*.log")[0]
	end := int64(0)
	if _, err := logstore.Inspect(vfs.OS, file, func(f logstore.Frame) error { end = f.Position + f.Size; return nil }); err != nil {
		t.Fatal(err)
	}
	flip(t, file, end/2)
}

func flipIndex(t *testing.T, d replicaDir) { flipMiddle(t, filesOf(t, d.gen, "log", "*.idx")[0]) }

// flipActive flips a bit of a frame behind which there is another one, which
// says that it was durable.
func flipActive(t *testing.T, d replicaDir) {
	t.Helper()
	names := filesOf(t, d.gen, "log", "*.log")
	for _, file := range slices.Backward(names) {
		var frames []logstore.Frame
		if _, err := logstore.Inspect(vfs.OS, file, func(f logstore.Frame) error { frames = append(frames, f); return nil }); err != nil {
			continue // the next one, that is only prepared
		}
		if n := len(frames); n > 1 && frames[n-1].Synced >= frames[0].Index {
			flip(t, file, frames[0].Position+frames[0].Size-9)
			return
		}
	}
	t.Fatal("the active segment has too little in it")
}

func flipVote(slots ...int64) func(*testing.T, replicaDir) {
	return func(t *testing.T, d replicaDir) {
		t.Helper()
		for _, s := range slots {
			flip(t, filepath.Join(d.dir, "vote"), s*4096+70)
		}
	}
}

func flipFile(name string) func(*testing.T, replicaDir) {
	return func(t *testing.T, d replicaDir) { t.Helper(); flipMiddle(t, filepath.Join(d.dir, name)) }
}

// flipSnapshots flips a bit in each of the n newest ones.
func flipSnapshots(n int) func(*testing.T, replicaDir) {
	return func(t *testing.T, d replicaDir) {
		t.Helper()
		names := filesOf(t, d.gen, "snapshots", "*.snap")
		if len(names) < 2 {
			t.Fatalf("there is one snapshot only: %q", names)
		}
		for _, file := range names[max(0, len(names)-n):] {
			flipMiddle(t, file)
		}
	}
}

// healing reads from a node whatever happens to it, and remembers what it was
// told.
type healing struct {
	cluster *processCluster
	mu      sync.Mutex
	seen    map[uint64]string // by offset
}

// read reads from a node until the function that it returns is called, which
// returns what was wrong. That the node is down or reports damage is not.
func (h *healing) read(addr string, all bool) (stop func() []error) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	var errs []error
	read := uint64(0)
	running.Go(func() {
		for ctx.Err() == nil {
			if err := h.pass(ctx, addr, all, &read); err != nil {
				errs = append(errs, err)
				return
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	return func() []error {
		cancel()
		running.Wait()
		if read == 0 {
			errs = append(errs, errors.New("the reader has read nothing"))
		}
		return errs
	}
}

func (h *healing) pass(ctx context.Context, addr string, all bool, read *uint64) error {
	c, err := client.Dial(addr, client.WithRetry(0))
	if err != nil {
		return err
	}
	defer c.Close()
	options := client.ConsumeOptions{Start: client.Latest(), Follow: true}
	if all {
		options = client.ConsumeOptions{Start: client.AtOffset(0)}
	}
	r, err := c.Consume(ctx, options)
	if err != nil {
		return nil
	}
	defer r.Close()
	for r.Next() {
		record := r.Record()
		value := string(record.Value)
		h.mu.Lock()
		was, ok := h.seen[record.Offset]
		h.seen[record.Offset] = value
		h.mu.Unlock()
		if ok && was != value {
			return fmt.Errorf("offset %d held one thing and then another: %.40q, %.40q", record.Offset, was, value)
		}
		*read++
	}
	return nil
}

// check compares what was ever read with the log as it is.
func (h *healing) check(t *testing.T, log []string) {
	t.Helper()
	for offset, value := range h.seen {
		if at(log, offset) != value {
			t.Errorf("offset %d: a reader got %.40q, it is %.40q", offset, value, at(log, offset))
		}
	}
	t.Logf("readers got %d records", len(h.seen))
}
