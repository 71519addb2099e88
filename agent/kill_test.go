package agent

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
	"github.com/diurnalog/diurna/rpc/client"
)

// TestKill kills a node with SIGKILL, again and again, at random moments while
// records are being appended, and looks every time whether all that it said is
// true. DIURNA_KILLS says how often, DIURNA_SEED repeats a run's choices (but
// not the moments, which are the machine's).
func TestKill(t *testing.T) {
	for _, tc := range []struct {
		name  string
		kills int
		unary int // producers of single batches beside the stream

	}{
		{name: "stream", kills: vfstest.Env(t, "DIURNA_KILLS", 50)},
		{name: "stream and 8 unary", kills: max(vfstest.Env(t, "DIURNA_KILLS", 50)/4, 3), unary: 8},
	} {
		t.Run(tc.name, func(t *testing.T) {
			k := newKiller(t)
			for round := range tc.kills {
				k.round(t, round, tc.unary)
				switch round {
				case 1, tc.kills / 2:
					k.duringStart(t)
				}
			}
			k.finish(t)
			t.Logf("%d kills, %d of them during start-up; %d records sent, %d acknowledged, %d in the log; %d torn tails; slowest start %s",
				k.kills, k.startKills, k.sent(), len(k.acked), k.next, k.torn, k.slowest.Round(time.Millisecond))
		})
	}
}

// killer is a node that is killed, and all that is known of its log.
type killer struct {
	rng  *rand.Rand
	dir  string
	conf string

	producers map[string]*sender
	// acked is what was acknowledged: the offset of each record.
	acked map[string]uint64
	// next is where the log ended when it was last looked at; up to there,
	// every record has been compared.
	next uint64

	kills, startKills, torn int
	slowest                 time.Duration
}

// sender is one producer in one round. Its records are numbered.
type sender struct {
	sent atomic.Uint64 // at most so many were sent: the last may be half sent
	seen uint64        // so many stand in the log
}

func newKiller(t *testing.T) *killer {
	diurna(t) // not part of the slowest start
	k := &killer{rng: vfstest.Rand(t), dir: filepath.Join(t.TempDir(), "data"), producers: map[string]*sender{}, acked: map[string]uint64{}}
	// The smallest segments and frequent snapshots, for as many of the moments
	// between files as can be.
	k.conf = filepath.Join(t.TempDir(), "node.hcl")
	err := os.WriteFile(k.conf, []byte(`
log { segment_size = "1MiB" }
raft { snapshot_interval = "100ms" }
`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (k *killer) launch(t *testing.T, more ...string) *node {
	t.Helper()
	return launchNode(t, k.dir, append([]string{"-config-file", k.conf}, more...)...)
}

func (k *killer) start(t *testing.T) *node {
	t.Helper()
	begin := time.Now()
	n := k.launch(t)
	n.awaitReady(t)
	k.slowest = max(k.slowest, time.Since(begin))
	if find(n.log(t), "cut off a write that a crash interrupted; nothing in it was acknowledged") != nil {
		k.torn++
	}
	return n
}

// record is the text of a producer's record, which tells all about it.
func record(producer string, seq uint64) string {
	return fmt.Sprintf("%s-%d-%s", producer, seq, strings.Repeat("x", int(seq*7919%211)))
}

func (k *killer) sent() (n uint64) {
	for _, p := range k.producers {
		n += p.sent.Load()
	}
	return n
}

func (k *killer) sender(name string) *sender {
	s := &sender{}
	k.producers[name] = s
	return s
}

// round starts the node, checks it, has it appended to, and kills it.
func (k *killer) round(t *testing.T, round, unary int) {
	n := k.start(t)
	k.check(t, n)

	name := fmt.Sprintf("%d", round)
	stream := k.sender(name)
	p := startDiurna(t, "produce", "-addr", n.addr, "-print-offsets", "-batch-records", "100", "-max-in-flight", "128KiB")
	var feeding sync.WaitGroup
	feeding.Go(func() {
		w := bufio.NewWriter(p.stdin)
		for seq := uint64(0); ; seq++ {
			stream.sent.Store(seq + 1)
			if _, err := w.WriteString(record(name, seq) + "\n"); err != nil {
				return // it has ended
			}
		}
	})
	acks := make([]map[string]uint64, unary)
	for i := range acks {
		acks[i] = map[string]uint64{}
		name := fmt.Sprintf("%d.%d", round, i)
		s := k.sender(name)
		c := dial(t, n.addr)
		feeding.Go(func() { produceOneByOne(t, c, name, s, acks[i]) })
	}

	// Early, while the first batches are on their way, or after some segments.
	enough := 1 + k.rng.IntN(1+k.rng.IntN(30_000))
	p.stdout.await(t, func(text string) bool { return strings.Count(text, "\n") >= enough })
	n.signal(t, syscall.SIGKILL)
	k.kills++
	n.wait(t)
	if code := p.wait(t); code != 2 {
		t.Fatalf("produce: exit %d after its node was killed:\n%s", code, p.stderr.text())
	}
	feeding.Wait()

	// What it printed to the end is what was acknowledged.
	if got := p.stdout.lines(); got < enough {
		t.Fatalf("produce ended after %d of %d acknowledgements:\n%s", got, enough, p.stderr.text())
	}
	seq := uint64(0)
	for line := range strings.Lines(p.stdout.text()) {
		offset, err := strconv.ParseUint(strings.TrimSuffix(line, "\n"), 10, 64)
		if err != nil {
			t.Fatalf("offset %d: %v", seq, err)
		}
		k.acked[record(name, seq)] = offset
		seq++
	}
	for _, m := range acks {
		for text, offset := range m {
			k.acked[text] = offset
		}
	}
}

// produceOneByOne appends until the outcome of a record is not known.
func produceOneByOne(t *testing.T, c *client.Client, name string, s *sender, acked map[string]uint64) {
	for seq := uint64(0); ; {
		s.sent.Store(seq + 1)
		text := record(name, seq)
		ack, err := c.Produce(t.Context(), []*client.Record{{Value: []byte(text)}})
		var e *client.Error
		switch {
		case err == nil:
			acked[text] = ack.BaseOffset
			seq++
		case errors.As(err, &e) && e.Definite && e.Reason == client.ReasonOverloaded:
		case errors.As(err, &e):
			return
		default:
			t.Errorf("an error of no type: %v", err)
			return
		}
	}
}

// duringStart kills the node while it starts: at once, or after it has said a
// few things, or while it reads its files.
func (k *killer) duringStart(t *testing.T) {
	for range 4 {
		n := k.launch(t, "-log-level", "trace")
		said := k.rng.IntN(12)
		n.stderr.await(t, func(text string) bool { return strings.Count(text, "\n") >= said })
		n.kill(t)
		k.kills++
		k.startKills++
	}
	for range 4 {
		watch := watchFiles(t, filepath.Join(k.dir, logsDir, "default"))
		if watch == nil {
			return
		}
		n := k.launch(t)
		for range 1 + k.rng.IntN(12) {
			if !watch.next(n.ended) {
				t.Fatalf("the node ended by itself:\n%s", n.stderr.text())
			}
		}
		n.kill(t)
		watch.close(t)
		k.kills++
		k.startKills++
	}
}

// check reads what is new in the log.
func (k *killer) check(t *testing.T, n *node) {
	t.Helper()
	for _, text := range consume(t, dial(t, n.addr), k.next) {
		k.compare(t, k.next, text)
		k.next++
	}
	k.checkAcked(t)
}

// compare holds one record against what is known. That a producer's records
// stand in their order and without gaps says as well that none is there twice.
func (k *killer) compare(t *testing.T, offset uint64, text string) {
	t.Helper()
	name, rest, _ := strings.Cut(text, "-")
	number, _, _ := strings.Cut(rest, "-")
	seq, err := strconv.ParseUint(number, 10, 64)
	p := k.producers[name]
	switch {
	case err != nil || p == nil || seq >= p.sent.Load() || text != record(name, seq):
		t.Fatalf("offset %d holds %q, which nobody sent", offset, text)
	case seq != p.seen:
		t.Fatalf("offset %d holds record %d of producer %s, where its record %d belongs", offset, seq, name, p.seen)
	}
	p.seen++
	if want, ok := k.acked[text]; ok && want != offset {
		t.Fatalf("record %d of producer %s was acknowledged at offset %d and is at %d", seq, name, want, offset)
	}
}

// checkAcked sees that the log reaches as far as anybody was told.
func (k *killer) checkAcked(t *testing.T) {
	t.Helper()
	for text, offset := range k.acked {
		if offset >= k.next {
			t.Fatalf("%.20s… was acknowledged at offset %d, but the log ends at %d", text, offset, k.next)
		}
	}
}

// finish reads all of it once more, with the command.
func (k *killer) finish(t *testing.T) {
	n := k.start(t)
	k.check(t, n)
	end := k.next
	for _, p := range k.producers {
		p.seen = 0
	}
	code, stdout, stderr := runDiurna(t, "", "consume", "-addr", n.addr, "-from", "earliest")
	if code != 0 {
		t.Fatalf("consume: exit %d: %s", code, stderr)
	}
	k.next = 0
	for line := range strings.Lines(stdout) {
		k.compare(t, k.next, strings.TrimSuffix(line, "\n"))
		k.next++
	}
	k.checkAcked(t)
	if k.next != end {
		t.Errorf("consume printed %d records of %d", k.next, end)
	}
	n.terminate(t)

	// Whatever was done to it, a clean stop is a clean stop.
	n = k.start(t)
	if l := n.log(t); find(l, "cut off a write that a crash interrupted; nothing in it was acknowledged") != nil {
		t.Errorf("a torn tail after a clean stop: %v", l)
	}
	n.terminate(t)
}
