package agent

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/diurnalog/diurna/rpc/client"
)

// TestClusterDiskFull: the leader's disk fills up. Another node leads and
// acknowledges; the full one goes on following and answering readers, takes
// records again when there is space, without a restart, and can lead.
func TestClusterDiskFull(t *testing.T) {
	t.Parallel()
	c := prepareNodes(t, 3, `log { segment_size = "1MiB" }`)
	for _, name := range []string{"n1", "n2", "n3"} {
		dir := c.dataDir(name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		mountTmpfs(t, dir, "64M")
	}
	c.start(t, 3)
	c.servers(t, "three nodes vote", healthy(3))
	full := c.leader(t)
	values := numbered("before", 10)
	produce(t, patient(t, full.listen), values...)
	l := startLoad(t, 2, c.addresses())

	ballast := filepath.Join(full.dir, "ballast")
	begin := time.Now()
	fill(t, ballast)
	c.servers(t, "another node leads", func(servers []client.Server) bool {
		return slices.ContainsFunc(servers, func(s client.Server) bool { return s.Leader && s.Address != full.listen })
	})
	led := time.Since(begin)
	untilAck(t, c, full)
	t.Logf("another node led after %v, and the next record was acknowledged after %v", led.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond))
	if got := consume(t, patient(t, full.listen), 0); len(got) < len(values) || !slices.Equal(got[:len(values)], values) {
		t.Errorf("the full node has %d records", len(got))
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	begin = time.Now()
	for transferred := false; !transferred; {
		code, _, stderr := runDiurna(t, "", "operator", "raft", "transfer-leadership", "-addr", full.listen, "-peer-address", full.listen)
		if transferred = code == exitOK && c.leader(t) == full; time.Since(begin) > patience {
			t.Fatalf("it does not lead again: %s", stderr)
		}
	}
	s := newSteady(t, "after", []string{full.listen})
	if err := s.one(t.Context(), "after"); err != nil || len(s.acked) != 1 {
		t.Errorf("it takes no records: %v, %v", s.acked, err)
	}
	t.Logf("it led again, and took records, %v after there was space", time.Since(begin).Round(time.Millisecond))
	if !full.running() {
		t.Error("the process ended")
	}
	c.servers(t, "three nodes vote", healthy(3))
	l.stop(t, c)
}

// fill writes a file until the disk is full.
func fill(t *testing.T, name string) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 64<<10)
	for err == nil {
		_, err = f.Write(block)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestClusterWiped: a node comes back at its address without its data. It is a
// new one, and the old one is removed.
func TestClusterWiped(t *testing.T) {
	t.Parallel()
	c := startNodes(t, 3, "")
	c.servers(t, "three nodes vote", healthy(3))
	values := numbered("before", 100)
	produce(t, patient(t, c.nodes[0].listen), values...)
	l := startLoad(t, 1, c.addresses())
	for _, m := range c.nodes[:2] {
		was := nodeID(t, m)
		m.kill(t)
		if err := os.RemoveAll(m.dir); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		c.launch(t, m)
		m.awaitReady(t)
		c.servers(t, "the node votes as a new one", func(servers []client.Server) bool {
			return healthy(3)(servers) && !slices.ContainsFunc(servers, func(s client.Server) bool { return s.ID == was })
		})
		t.Logf("a voter again after %v", time.Since(begin).Round(time.Millisecond))
		if now := nodeID(t, m); now == was {
			t.Errorf("it is %s, as before", now)
		}
	}
	l.stop(t, c)
	if got := consume(t, patient(t, c.nodes[0].listen), 0); !slices.Equal(got[:min(len(got), 100)], values) {
		t.Errorf("there are %d records", len(got))
	}
}

// TestClusterForeign: a node with the data of another cluster, of the same name
// and at an address where one of ours was, is left alone, and that is said once.
func TestClusterForeign(t *testing.T) {
	t.Parallel()
	c := startNodes(t, 3, "")
	c.servers(t, "three nodes vote", healthy(3))
	produce(t, patient(t, c.nodes[0].listen), "ours")

	other := filepath.Join(c.dir, "other")
	alone := startNode(t, other)
	produce(t, dial(t, alone.addr), "theirs")
	alone.terminate(t)

	victim := c.nodes[2]
	was, own := nodeID(t, victim), victim.dir
	victim.terminate(t)
	victim.dir = other
	c.launch(t, victim)
	const said = "a node belongs to another cluster; leaving it alone"
	rest := c.nodes[:2]
	for _, m := range rest {
		m.stderr.mustAwait(t, said)
	}
	produce(t, patient(t, rest[0].listen), "ours too")
	<-time.After(12 * time.Second) // in which it would be said again, twice
	for _, m := range rest {
		if n := strings.Count(m.stderr.text(), said); n != 1 {
			t.Errorf("%s said it %d times", m.name, n)
		}
		if got := consume(t, patient(t, m.listen), 0); !slices.Equal(got, []string{"ours", "ours too"}) {
			t.Errorf("%s has %q", m.name, got)
		}
	}
	c.servers(t, "the cluster is as it was", func(servers []client.Server) bool {
		return len(servers) == 3 && slices.ContainsFunc(servers, func(s client.Server) bool { return s.ID == was })
	})
	victim.terminate(t)
	victim.dir = own
	c.launch(t, victim)
	victim.awaitReady(t)
	c.servers(t, "three nodes vote", healthy(3))
	if got := consume(t, patient(t, victim.listen), 0); !slices.Equal(got, []string{"ours", "ours too"}) {
		t.Errorf("it has %q", got)
	}
}
