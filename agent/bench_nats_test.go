package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// NATS JetStream, which BenchmarkCluster compares with: nats-server, and its
// own load generator, `nats bench`.

const natsStream = "bench"

// startNATS returns a contender: nodes whose stream is kept on all of them and
// written to disk as sync_interval says.
func startNATS(tools, syncInterval string) func(testing.TB, int) (runner, func()) {
	return func(b testing.TB, n int) (runner, func()) {
		nodes, addresses := natsNodes(b, filepath.Join(tools, "nats-server"), syncInterval, n)
		cli := natsCLI{path: filepath.Join(tools, "nats"), url: "nats://" + strings.Join(addresses, ",nats://")}
		// Its clients talk to the leader, as ours do.
		cli.url = "nats://" + addresses[cli.makeStream(b, n)]
		run := func(b testing.TB, row, records int) figure {
			before := processorTime(b, nodes...)
			var f figure
			var own time.Duration
			switch row {
			case rowUnary64, rowSeparate64:
				f, own = cli.bench(b, records, "pub", "sync", natsStream, "--clients=64")
			case rowUnary256, rowSeparate256:
				f, own = cli.bench(b, records, "pub", "sync", natsStream, "--clients=256")
			case rowStream:
				f, own = cli.bench(b, records, "pub", "async", natsStream, "--clients=4", "--batch=500")
			case rowConsume:
				// Never more than there are, or it waits for the rest.
				records = min(records, cli.messages(b))
				f, own = cli.bench(b, records, "ordered", "--clients=1")
			}
			f.CPU = float64((processorTime(b, nodes...) + own - before).Microseconds()) / float64(records)
			return f
		}
		return run, func() {
			for _, node := range nodes {
				node.signal(b, syscall.SIGTERM)
			}
			for _, node := range nodes {
				node.wait(b)
			}
		}
	}
}

// natsNodes starts servers that know each other's addresses.
func natsNodes(b testing.TB, program, syncInterval string, n int) (nodes []*node, addresses []string) {
	b.Helper()
	dir := b.TempDir()
	routes, addresses := freePorts(b, n), freePorts(b, n)
	for i := range n {
		conf := fmt.Sprintf("server_name: n%d\nlisten: %q\nmax_payload: 8MB\njetstream {\n  store_dir: %q\n  sync_interval: %s\n}\n",
			i, addresses[i], filepath.Join(dir, fmt.Sprintf("n%d", i)), syncInterval)
		if n > 1 {
			conf += fmt.Sprintf("cluster {\n  name: bench\n  listen: %q\n  routes: [nats://%s]\n}\n", routes[i], strings.Join(routes, ", nats://"))
		}
		file := filepath.Join(dir, fmt.Sprintf("n%d.conf", i))
		if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
			b.Fatal(err)
		}
		nodes = append(nodes, &node{process: startProcess(b, program, "-c", file), addr: addresses[i]})
	}
	for _, node := range nodes {
		node.stderr.mustAwait(b, "Server is ready")
	}
	return nodes, addresses
}

// natsCLI runs the nats program.
type natsCLI struct{ path, url string }

// patiently runs a verb until it succeeds: a cluster that has just started has
// no leader yet.
func (c natsCLI) patiently(b testing.TB, args ...string) []byte {
	b.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		cmd := exec.CommandContext(b.Context(), c.path, append([]string{"--server=" + c.url, "--no-context"}, args...)...)
		out, err := cmd.Output()
		if err == nil {
			return out
		}
		if time.Now().After(deadline) {
			b.Fatalf("nats %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// makeStream makes the stream and returns which node leads it.
func (c natsCLI) makeStream(b testing.TB, n int) (leader int) {
	b.Helper()
	c.patiently(b, "stream", "add", natsStream, "--subjects="+natsStream, "--storage=file", "--replicas="+strconv.Itoa(n), "--defaults")
	if n == 1 {
		return 0
	}
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		var info struct {
			Cluster struct {
				Leader   string `json:"leader"`
				Replicas []struct {
					Current bool `json:"current"`
				} `json:"replicas"`
			} `json:"cluster"`
		}
		if err := json.Unmarshal(c.patiently(b, "stream", "info", natsStream, "--json"), &info); err != nil {
			b.Fatal(err)
		}
		current := 0
		for _, r := range info.Cluster.Replicas {
			if r.Current {
				current++
			}
		}
		if leader, err := strconv.Atoi(strings.TrimPrefix(info.Cluster.Leader, "n")); err == nil && current == n-1 {
			return leader
		}
		time.Sleep(100 * time.Millisecond)
	}
	b.Fatal("the stream has no leader")
	return 0
}

func (c natsCLI) messages(b testing.TB) int {
	b.Helper()
	var info struct {
		State struct {
			Messages int `json:"messages"`
		} `json:"state"`
	}
	if err := json.Unmarshal(c.patiently(b, "stream", "info", natsStream, "--json"), &info); err != nil {
		b.Fatal(err)
	}
	return info.State.Messages
}

// bench runs `nats bench js` and returns what it printed, and the time that it
// kept processors busy.
func (c natsCLI) bench(b testing.TB, messages int, args ...string) (figure, time.Duration) {
	b.Helper()
	args = append([]string{c.path, "--server=" + c.url, "--no-context", "bench", "js"}, args...)
	p := startProcess(b, append(args, "--stream="+natsStream, "--size=1024", "--msgs="+strconv.Itoa(messages), "--no-progress")...)
	if code := p.wait(b); code != 0 {
		b.Fatalf("%v: exit %d\n%s%s", p.Args, code, p.stdout.text(), p.stderr.text())
	}
	f, err := parseNATSBench(p.stdout.text())
	if err != nil {
		b.Fatalf("%v: %v\n%s%s", p.Args, err, p.stdout.text(), p.stderr.text())
	}
	return f, p.ProcessState.UserTime() + p.ProcessState.SystemTime()
}

var (
	natsRate    = regexp.MustCompile(`NATS .* stats: ([0-9,]+) msgs/sec`)
	natsLatency = regexp.MustCompile(`latencies per operation .* P50 ([0-9,.]+)us .* P99 ([0-9,.]+)us`)
)

// parseNATSBench finds the summary in what `nats bench` prints.
func parseNATSBench(out string) (figure, error) {
	number := func(s string) float64 {
		v, _ := strconv.ParseFloat(strings.ReplaceAll(s, ",", ""), 64)
		return v
	}
	var f figure
	m := natsRate.FindStringSubmatch(out)
	if m == nil {
		return f, fmt.Errorf("no rate in the output")
	}
	f.Rate = number(m[1])
	if m := natsLatency.FindStringSubmatch(out); m != nil {
		f.P50, f.P99 = number(m[1])/1e3, number(m[2])/1e3
	}
	if f.Rate <= 0 {
		return f, fmt.Errorf("the rate is %v", f.Rate)
	}
	return f, nil
}

// The figures that the comparison rests on are taken out of text.
func TestParseNATSBench(t *testing.T) {
	f, err := parseNATSBench(`07:58:39 [4] Starting JetStream asynchronous publisher, publishing 50,000 messages

  [1] 5,341 msgs/sec ~ 5.2 MiB/sec ~ min: 44,407.36us ~ avg: 93,511.55us ~ P50: 90,266.23us ~ P99: 141,907.04us ~ P99.9: 153,613.39us (50,000 msgs)

 NATS JetStream asynchronous publisher aggregated stats: 20,724 msgs/sec ~ 20 MiB/sec
 message rates min 5,181 | avg 5,241 | max 5,341 | stddev 65 msgs
 latencies per operation min 41,258.6us | avg 95,288.11us | max 159,706.78us | stddev 97,813.73us | P50 93,650.40us | P90 123,839.55us | P99 152,212.09us | P99.9: 159,706.78us
`)
	if want := (figure{Rate: 20724, P50: 93.65, P99: 152.21}).String(); err != nil || f.String() != want {
		t.Errorf("got %s, %v; want %s", f, err, want)
	}
	f, err = parseNATSBench("\nNATS JetStream ordered ephemeral consumer stats: 88,360 msgs/sec ~ 86 MiB/sec\n")
	if want := (figure{Rate: 88360}); err != nil || f != want {
		t.Errorf("got %+v, %v", f, err)
	}
	if _, err := parseNATSBench("nats: error: no servers available"); err == nil {
		t.Error("no error")
	}
}
