package agent

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/agent/peer/peertest"
	"github.com/diurnalog/diurna/discovery/discoverytest"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// simCluster is a cluster of real agents on machines that are simulated, and
// the clients that use it: all of it in one bubble of testing/synctest, where
// time passes as soon as everybody waits.
//
// It is not deterministic: goroutines run in any order. A seed repeats what is
// done to the cluster, not what comes of it; so a failure leaves the whole
// history behind.
type simCluster struct {
	t        *testing.T
	rng      *rand.Rand // for the goroutine that runs the schedule
	h        *history
	net      *peertest.Net
	registry *discoverytest.Registry // nil: a static list of peers
	founders int
	clients  []*simClient
	extras   int
	level    hclog.Level
	log      simLog

	// nodes are changed, under mu, and otherwise used by the goroutine that runs
	// the schedule; all is for everybody.
	mu    sync.Mutex
	nodes []*simNode

	processes, working sync.WaitGroup

	// What the audit found, if there was one: who has everything, up to where.
	audited   []*simNode
	committed uint64
	// forgets: the log does not hold everything any more, so that it cannot tell
	// what became of an append of unknown outcome.
	forgets bool
}

// simOptions say what kind of cluster. The zero value is three nodes that know
// each other from a list.
type simOptions struct {
	nodes    int
	registry bool
	clients  int
	tune     func(n *simNode, cfg *config.Config)
	level    hclog.Level
}

// simLog is what all nodes log.
type simLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

const simLogLimit = 16 << 20

func (l *simLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.b.Len() < simLogLimit {
		l.b.Write(p)
	}
	return len(p), nil
}

// simulate runs a cluster through a story, and checks what its clients saw. It
// must not be called in a bubble.
func simulate(t *testing.T, seed uint64, opts simOptions, story func(c *simCluster)) *history {
	t.Helper()
	c := &simCluster{t: t, rng: rand.New(rand.NewPCG(seed, 1)), level: opts.level}
	if c.level == hclog.NoLevel {
		c.level = hclog.Info
	}
	defer func() {
		if t.Failed() || testing.Verbose() && os.Getenv("DIURNA_SIM_KEEP") != "" {
			c.keep(seed)
		}
	}()
	simBubble(t, func(t *testing.T) {
		c.t = t
		c.begin(opts)
		defer c.end()
		story(c)
	})
	c.t = t
	if c.h == nil {
		return nil
	}
	for _, v := range violations(c.h) {
		t.Error(v)
	}
	if ops := simOps(c.h); len(ops) <= simOpsLimit && !c.forgets {
		result, info := linearizable(c.h)
		if result != porcupine.Ok {
			t.Errorf("the history is not known to be linearizable: %v", result)
			c.draw(info)
		}
	}
	return c.h
}

// simBubble is synctest.Test, but says who is left behind instead of ending the
// process, and lets those go that package replica says it leaves behind: who
// waits for an answer that Raft never gives, because it shut down before.
func simBubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	failed, bubble := false, ""
	defer func() {
		left := recover()
		if left == nil {
			return
		}
		if !strings.HasPrefix(fmt.Sprint(left), "deadlock: ") {
			panic(left)
		}
		buf := make([]byte, 4<<20)
		stacks := strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n")
		stacks = slices.DeleteFunc(stacks, func(s string) bool {
			head, _, _ := strings.Cut(s, "\n")
			return !strings.Contains(head, bubble) || strings.Contains(s, simOrphan)
		})
		if len(stacks) > 0 {
			t.Errorf("%v:\n%s", left, strings.Join(stacks, "\n\n"))
		}
		if failed {
			t.Fail()
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		// The first line of a stack is "goroutine 7 [running, synctest bubble 3]:".
		buf := make([]byte, 256)
		head, _, _ := strings.Cut(string(buf[:runtime.Stack(buf, false)]), "\n")
		_, bubble, _ = strings.Cut(head, ", ")
		defer func() { failed = t.Failed() }()
		f(t)
	})
}

const simOrphan = "logstore/replica.(*sequencer).await.func1"

// simOpsLimit is how long a history may be to be searched for an order.
const simOpsLimit = 3000

func (c *simCluster) begin(opts simOptions) {
	c.h = newHistory()
	c.net = peertest.New(rand.New(rand.NewPCG(c.rng.Uint64(), 2)))
	c.calm()
	if opts.registry {
		c.registry = discoverytest.NewRegistry()
	}
	c.founders = max(opts.nodes, 3)
	if opts.nodes == 1 {
		c.founders = 1
	}
	for range c.founders {
		c.addNode(opts.tune)
	}
	for i := range opts.clients {
		c.clients = append(c.clients, newSimClient(c, i+1))
	}
	for _, n := range c.nodes {
		n.start()
	}
}

// addNode makes a machine, on which nothing runs yet.
func (c *simCluster) addNode(tune func(n *simNode, cfg *config.Config)) *simNode {
	n := &simNode{c: c, name: fmt.Sprintf("n%d", len(c.nodes)+1), port: 8400, mem: vfstest.New()}
	if tune != nil {
		n.tune = func(cfg *config.Config) { tune(n, cfg) }
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodes = append(c.nodes, n)
	return n
}

// forget takes a machine away, which must not run.
func (c *simCluster) forget(gone *simNode) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodes = slices.DeleteFunc(slices.Clone(c.nodes), func(n *simNode) bool { return n == gone })
}

func (c *simCluster) all() []*simNode {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.nodes)
}

// end stops everything there is: a bubble must be empty at its end.
func (c *simCluster) end() {
	for _, n := range c.nodes {
		n.mu.Lock()
		p := n.process
		n.mu.Unlock()
		if p != nil {
			p.disk.set(nil, nil)
			p.ask()
		}
	}
	for _, n := range c.nodes {
		n.end()
	}
	for _, cl := range c.clients {
		cl.close()
	}
	c.processes.Wait()
	c.net.Close()
	if c.audited != nil {
		c.compareEntries(c.audited, c.committed)
	}
}

// simPatience is how long the cluster may take, of its own time, to be whole
// again when nothing is wrong with it any more.
const simPatience = 2 * time.Minute

// await waits until ok, looking again and again. Time that passes while
// everybody waits takes none.
func (c *simCluster) await(what string, ok func() bool) bool {
	for begin := time.Now(); time.Since(begin) < simPatience; time.Sleep(50 * time.Millisecond) {
		if ok() {
			return true
		}
	}
	c.h.note("waited in vain until %s", what)
	c.t.Errorf("%v: waited in vain until %s", time.Since(c.h.began), what)
	return false
}

// awaitReady waits until nodes serve.
func (c *simCluster) awaitReady(nodes ...*simNode) bool {
	return c.await(fmt.Sprintf("%v are ready", names(nodes)), func() bool {
		for _, n := range nodes {
			_, a := n.running()
			if a == nil {
				return false
			}
			if serving, _, _ := a.part.health(); !serving {
				return false
			}
		}
		return true
	})
}

func names(nodes []*simNode) (all []string) {
	for _, n := range nodes {
		all = append(all, n.name)
	}
	return all
}

// awaitLeader waits until somebody but some leads, and returns it. The test ends
// where that does not happen.
func (c *simCluster) awaitLeader(but ...*simNode) (leader *simNode) {
	if !c.await("somebody leads", func() bool {
		leader = c.leader()
		return leader != nil && !slices.Contains(but, leader)
	}) {
		c.t.FailNow()
	}
	return leader
}

// work lets all clients work until the function ends.
func (c *simCluster) work(while func()) {
	ctx, cancel := context.WithCancel(context.Background())
	for _, cl := range c.clients {
		c.working.Go(func() { cl.run(ctx) })
	}
	// Also when while ends the test.
	defer c.working.Wait()
	defer cancel()
	while()
}

// mend takes back everything that is wrong, and starts what does not run.
func (c *simCluster) mend() {
	c.h.note("mended")
	c.net.Heal()
	c.calm()
	if c.registry != nil {
		c.registry.SetDown(false)
	}
	for _, n := range c.nodes {
		c.net.Resume(n.name)
		n.repair()
	}
}

// repair mends the node's disk, and starts the node if it does not run.
func (n *simNode) repair() {
	n.mem.SetCapacity(-1)
	n.mu.Lock()
	p := n.process
	n.mu.Unlock()
	switch {
	case p == nil:
		n.start()
	case p.dead():
		n.end()
		n.start()
	default:
		p.disk.set(nil, nil)
	}
}

// calm makes the network as good as it gets: quick, but not so quick that
// nothing ever happens at the same time.
func (c *simCluster) calm() {
	c.net.SetLinks(peertest.Link{Delay: 200 * time.Microsecond, Jitter: 2 * time.Millisecond})
}

// audit checks, once nothing is wrong any more, that the cluster comes back and
// that all of its nodes have the same.
func (c *simCluster) audit(nodes ...*simNode) {
	if len(nodes) == 0 {
		nodes = c.nodes
	}
	begin := time.Now()
	c.awaitLeader()
	auditor := c.extra()
	defer auditor.close()
	last := auditor.insist(nodes)
	c.h.note("the first record was acknowledged %v after the mending", time.Since(begin))
	if !c.awaitReady(nodes...) || last == nil {
		return
	}
	c.h.note("all nodes were ready %v after the mending", time.Since(begin))
	c.audited, c.committed = nodes, last.base
	for _, n := range nodes {
		c.await(n.name+" has everything and can be read", func() bool {
			r := auditor.readAll(n, func(r *simRead) { r.final = true })
			if r.complete && r.end >= last.base+1 {
				return true
			}
			c.h.endRead(r, func(r *simRead) { r.complete = false })
			return false
		})
	}
}

// insist appends one record, however often it has to try; nil if it cannot in
// time.
func (cl *simClient) insist(nodes []*simNode) *simAppend {
	for begin := time.Now(); time.Since(begin) < simPatience; time.Sleep(50 * time.Millisecond) {
		for _, n := range nodes {
			if a := cl.append(n, 1, nil, 2*time.Second); a.outcome == simAcked {
				return a
			}
		}
	}
	cl.c.t.Errorf("%v: nothing was acknowledged for %v after everything had been mended", time.Since(cl.c.h.began), simPatience)
	return nil
}

// keep writes down everything about a failure where it stays.
func (c *simCluster) keep(seed uint64) {
	dir, err := c.dir()
	if err != nil {
		c.t.Logf("the history is lost: %v", err)
		return
	}
	var story bytes.Buffer
	if c.h != nil {
		if err := c.h.write(&story); err != nil {
			c.t.Log(err)
		}
	}
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	for name, content := range map[string][]byte{"history.txt": story.Bytes(), "nodes.log": c.log.b.Bytes()} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			c.t.Log(err)
		}
	}
	c.t.Logf("history and logs: %s", dir)
	c.t.Logf("the same schedule again: %s", c.again(seed))
	var schedule []string
	if c.h != nil {
		for _, n := range c.h.notes {
			schedule = append(schedule, fmt.Sprintf("%v %s", n.at, n.text))
		}
	}
	c.t.Logf("what was done:\n%s", strings.Join(schedule, "\n"))
}

// again is how to have the same done once more.
func (c *simCluster) again(seed uint64) string {
	name := c.t.Name()
	for top := name; ; {
		if first, ok := simSeeds.Load(top); ok {
			return fmt.Sprintf("DIURNA_SEED=%d go test ./agent -run '^%s$'", first, strings.ReplaceAll(name, "/", "$/^"))
		}
		at := strings.LastIndexByte(top, '/')
		if at < 0 {
			return fmt.Sprintf("DIURNA_SEED=%d DIURNA_HISTORIES=1 go test ./agent -run '^%s$'", seed, top)
		}
		top = top[:at]
	}
}

// dir is a new directory, which is kept.
func (c *simCluster) dir() (string, error) {
	return os.MkdirTemp("", "diurna-"+strings.ReplaceAll(c.t.Name(), "/", "-")+"-")
}

// draw leaves porcupine's picture.
func (c *simCluster) draw(info porcupine.LinearizationInfo) {
	dir, err := c.dir()
	if err == nil {
		name := filepath.Join(dir, "linearizability.html")
		if err = porcupine.VisualizePath(simModel, info, name); err == nil {
			c.t.Logf("how far an order was found: %s", name)
			return
		}
	}
	c.t.Log(err)
}
