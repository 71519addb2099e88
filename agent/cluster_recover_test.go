package agent

import (
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/diurnalog/diurna/rpc/client"
)

// guide returns the commands of a section of docs/operations.md, each with the
// machine that the comment above it names.
func guide(t testing.TB, section string) (steps [][2]string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(b), "\n## "+section+"\n")
	if !ok {
		t.Fatalf("docs/operations.md has no section %q", section)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	for _, block := range fenced(text, "sh") {
		machine := ""
		for line := range strings.Lines(block) {
			line = strings.TrimSpace(line)
			if name, ok := strings.CutPrefix(line, "# "); ok {
				machine = name
				continue
			}
			steps = append(steps, [2]string{machine, line})
		}
	}
	return steps
}

// follow does what a guide says on each of the machines that it names.
func (c *processCluster) follow(t *testing.T, steps [][2]string, machines map[string]*member) {
	t.Helper()
	id := regexp.MustCompile(`<the id of (\w+)>`)
	ids := map[string]string{} // as long as there are files to read them from
	for name, m := range machines {
		if _, err := os.Stat(m.dir); err == nil {
			ids[name] = identityOf(t, m).node
		}
	}
	for _, step := range steps {
		m, command := machines[step[0]], step[1]
		if m == nil {
			t.Fatalf("%q: on which machine?", step)
		}
		command = strings.ReplaceAll(command, "/var/lib/diurna", m.dir)
		command = id.ReplaceAllStringFunc(command, func(s string) string { return ids[id.FindStringSubmatch(s)[1]] })
		words := strings.Fields(command)
		switch {
		case command == "systemctl stop diurna":
			if m.running() {
				m.terminate(t)
			}
		case command == "systemctl start diurna":
			c.launch(t, m)
			m.awaitReady(t) // where the guide looks, a person would look again
		case command == "systemctl restart diurna":
			m.terminate(t)
			c.launch(t, m)
			m.awaitReady(t)
		case strings.HasPrefix(command, "install "): // a newer binary: TestNomadLife has one
		case command == "until curl -fsS http://127.0.0.1:8402/v1/health/ready; do sleep 1; done":
			m.awaitCounted(t)
		case slices.Equal(words, []string{"rm", "-rf", m.dir}):
			if err := os.RemoveAll(m.dir); err != nil {
				t.Fatal(err)
			}
		case words[0] == "diurna":
			words = words[1:]
			if !slices.Contains(words, "-data-dir") {
				words = append(words, "-addr", m.listen)
			}
			code, stdout, stderr := runDiurna(t, "", words...)
			if code != exitOK {
				t.Fatalf("%q: exit %d\n%s%s", step, code, stdout, stderr)
			}
			t.Logf("%s$ %s\n%s", step[0], command, stdout)
		default:
			t.Fatalf("this test cannot run %q", command)
		}
	}
}

// awaitCounted waits until a node says by HTTP that it can be counted on.
func (m *member) awaitCounted(t testing.TB) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) { // another process's state
		resp, err := http.Get("http://" + m.httpAddr(t) + "/v1/health/ready")
		if err == nil {
			err = resp.Body.Close()
		}
		if err == nil && resp.StatusCode == http.StatusOK {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s is not ready: %v", m.name, err)
		}
	}
}

// TestUpgradeGuide: a rolling upgrade, and the replacement of a node, as the guide
// has them, under producers that notice neither.
func TestUpgradeGuide(t *testing.T) {
	t.Parallel()
	upgrade, replace := guide(t, "Upgrading"), guide(t, "Replacing a node")
	if len(upgrade) < 9 || len(replace) < 4 {
		t.Fatalf("the guide has %q and %q", upgrade, replace)
	}
	c := startNodes(t, 3, "")
	c.servers(t, "three nodes vote", healthy(3))
	machines := map[string]*member{"db1": c.nodes[0], "db2": c.nodes[1], "db3": c.nodes[2]}
	l := startLoad(t, 2, c.addresses())
	c.follow(t, upgrade, machines)

	lost := c.nodes[2]
	lost.kill(t)
	added := &member{name: "n4", dir: c.dataDir("n4"), listen: freeAddress(t)}
	c.nodes = append(c.nodes, added)
	machines["db4"] = added
	c.follow(t, replace, machines)
	c.nodes = slices.Delete(c.nodes, 2, 3)
	c.servers(t, "three nodes vote", healthy(3))
	l.stop(t, c)
}

// TestClusterQuorumLost: two of three nodes are gone with their data. Somebody who
// has nothing but the guide gets three voters again, with all that the third one
// had, and records can be produced.
func TestClusterQuorumLost(t *testing.T) {
	t.Parallel()
	steps := guide(t, "When a quorum is lost")
	if len(steps) < 10 {
		t.Fatalf("the guide has %d commands: %q", len(steps), steps)
	}
	c := startNodes(t, 3, `log { segment_size = "1MiB" }`)
	c.servers(t, "three nodes vote", healthy(3))
	values := numbered("before", 500)
	ack := produce(t, patient(t, c.nodes[0].listen), values...)
	follower := patient(t, c.nodes[0].listen)
	if got := consume(t, follower, 0); !slices.Equal(got, values) {
		t.Fatalf("%d records", len(got))
	}
	machines := map[string]*member{"db1": c.nodes[0], "db2": c.nodes[1], "db3": c.nodes[2]}
	before := identityOf(t, c.nodes[0])
	for _, lost := range c.nodes[1:] {
		lost.kill(t)
		if err := os.RemoveAll(lost.dir); err != nil {
			t.Fatal(err)
		}
	}
	// Without a quorum there is no snapshot of which it is known that it is up to
	// date.
	file := filepath.Join(t.TempDir(), "left.snapshot")
	if code, _, stderr := runDiurna(t, "", "operator", "snapshot", "save", "-addr", c.nodes[0].listen, file); code != exitServer || !strings.Contains(stderr, client.ReasonNoLeader) {
		t.Errorf("saved without a quorum: exit %d, %s", code, stderr)
	}
	var left snapshotJSON
	runJSON(t, &left, "operator", "snapshot", "save", "-json", "-stale", "-addr", c.nodes[0].listen, file)
	if left.Records == 0 || left.NextOffset > ack.NextOffset {
		t.Errorf("what is left: %+v", left)
	}
	c.follow(t, steps, machines)
	servers := c.servers(t, "three nodes vote", healthy(3))
	for _, m := range c.nodes {
		if !slices.ContainsFunc(servers, func(s client.Server) bool { return s.Address == m.listen }) {
			t.Errorf("%s is no voter: %+v", m.name, servers)
		}
		id := identityOf(t, m)
		if id.cluster == before.cluster || id.cluster != identityOf(t, c.nodes[0]).cluster {
			t.Errorf("%s is in cluster %s; it was %s", m.name, id.cluster, before.cluster)
		}
		if got := consume(t, patient(t, m.listen), 0); !slices.Equal(got, values) {
			t.Errorf("%s has %d records, there were %d", m.name, len(got), len(values))
		}
	}
	if again := produce(t, patient(t, c.nodes[2].listen), "after"); again.BaseOffset != ack.NextOffset {
		t.Errorf("the first record afterwards has offset %d", again.BaseOffset)
	}
	// It outlives what any cluster has to.
	for _, m := range c.nodes {
		m.terminate(t)
	}
	for _, m := range c.nodes {
		c.launch(t, m)
	}
	for _, m := range c.nodes {
		m.awaitReady(t)
	}
	c.servers(t, "three nodes vote", healthy(3))
	if got := consume(t, patient(t, c.nodes[1].listen), 0); !slices.Equal(got, append(values, "after")) {
		t.Errorf("%d records after a restart", len(got))
	}
}

// TestClusterSuperseded: nodes that come back with their old data after the quorum
// was recovered without them, a majority of the old cluster, do not become one.
func TestClusterSuperseded(t *testing.T) {
	t.Parallel()
	c := startNodes(t, 3, "")
	c.servers(t, "three nodes vote", healthy(3))
	values := numbered("before", 50)
	produce(t, patient(t, c.nodes[0].listen), values...)
	consume(t, patient(t, c.nodes[0].listen), 0)
	dry := func(m *member) (code int, stderr string) {
		code, _, stderr = runDiurna(t, "", "operator", "raft", "recover", "-data-dir", m.dir)
		return code, stderr
	}
	if code, stderr := dry(c.nodes[0]); code != exitUsage || !strings.Contains(stderr, "in use by another process") {
		t.Errorf("looked at a node that runs: exit %d, %s", code, stderr)
	}
	for _, m := range c.nodes {
		m.kill(t)
	}
	var files []string
	for _, m := range c.nodes {
		code, stdout, stderr := runDiurna(t, "", "operator", "raft", "recover", "-json", "-data-dir", m.dir)
		if code != exitOK {
			t.Fatalf("exit %d: %s", code, stderr)
		}
		file := filepath.Join(t.TempDir(), m.name+".json")
		if err := os.WriteFile(file, []byte(stdout), 0o600); err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	var best survivor
	runJSON(t, &best, append([]string{"operator", "raft", "recover", "-json", "-compare"}, files...)...)
	kept := slices.IndexFunc(c.nodes, func(m *member) bool { return identityOf(t, m).node == best.NodeID })
	survivorNode := c.nodes[kept]
	old := slices.Delete(slices.Clone(c.nodes), kept, kept+1)

	var done survivor
	runJSON(t, &done, "operator", "raft", "recover", "-json", "-confirm", "-data-dir", survivorNode.dir)
	if id := identityOf(t, survivorNode); id.cluster != done.NewClusterID || done.NewClusterID == done.ClusterID {
		t.Errorf("the node is in cluster %s; the command said %+v", id.cluster, done)
	}
	if names, err := filepath.Glob(filepath.Join(done.Kept, "*")); err != nil || len(names) < 3 {
		t.Errorf("kept %v, %v", names, err)
	}
	c.launch(t, survivorNode)
	survivorNode.awaitReady(t)
	for _, m := range old {
		c.launch(t, m)
	}
	for _, m := range old {
		if code := m.wait(t); code != exitServer || !strings.Contains(m.stderr.text(), ErrSuperseded.Error()) {
			t.Errorf("%s ended with %d:\n%s", m.name, code, m.stderr.text())
		}
		if strings.Contains(m.stderr.text(), "entering leader state") {
			t.Errorf("%s led what is left of the old cluster", m.name)
		}
	}
	for _, m := range old {
		if err := os.RemoveAll(m.dir); err != nil {
			t.Fatal(err)
		}
		c.launch(t, m)
		m.awaitReady(t)
	}
	c.servers(t, "three nodes vote", healthy(3))
	for _, m := range c.nodes {
		if got := consume(t, patient(t, m.listen), 0); !slices.Equal(got, values) {
			t.Errorf("%s has %d records, there were %d", m.name, len(got), len(values))
		}
	}
}
