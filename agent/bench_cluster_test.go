package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
	"github.com/diurnalog/diurna/rpc/client"
)

// The rows of BenchmarkCluster.
const (
	rowUnary64 = iota
	rowUnary256
	rowSeparate64
	rowSeparate256
	rowStream
	rowConsume
	rowCount
)

var rowNames = [rowCount]string{
	"append one at a time, 64 callers",
	"append one at a time, 256 callers",
	"same, 64 callers, a gRPC call each",
	"same, 256 callers, a gRPC call each",
	"append pipelined, in batches",
	"read from the start, one reader",
}

// figure is one measurement.
type figure struct {
	// Rate is records of 1 KiB per second.
	Rate float64 `json:"records_per_second"`
	// P50 and P99 are of the time from a record's sending to its
	// acknowledgement, in milliseconds; 0 where that is not measured.
	P50 float64 `json:"p50_ms,omitempty"`
	P99 float64 `json:"p99_ms,omitempty"`
	// CPU is the processor time of all nodes and the client, in microseconds
	// per record: what a machine that others use too disturbs least.
	CPU float64 `json:"cpu_us_per_record"`
}

// contender is a system that keeps records on several nodes.
type contender struct {
	name string
	// start runs it with nothing in it. What it starts ends with the test, or
	// with stop.
	start func(b testing.TB, nodes int) (run runner, stop func())
	// variant of the first one, of which its figures are a part.
	variant bool
}

// runner measures one row with about so many records.
type runner func(b testing.TB, row, records int) figure

// BenchmarkCluster compares three nodes and a client on this machine with the
// same of NATS JetStream, all synced on a quorum before it is acknowledged, and
// with what JetStream does by default, which is to sync every two minutes; and
// with mutual TLS between all of ours, which is the price of that.
// `make bench-cluster` builds the rival and runs it.
//
// Our 64 and 256 callers share a client, which has those that wait travel
// together, as the library does for everybody; two more rows show the same with
// a gRPC call for each record, as a program in another language would make them.
// JetStream's publishers have a connection each.
//
// The contenders run one after the other, each alone, and that several times
// over; the table shows each figure's median. DIURNA_BENCH_ROUNDS,
// DIURNA_BENCH_SECONDS (of one measurement) and DIURNA_BENCH_NODES change it,
// DIURNA_BENCH_OURS=1 leaves the rival out, DIURNA_BENCH_JSON names a file for
// the figures.
func BenchmarkCluster(b *testing.B) {
	tools := os.Getenv("DIURNA_NATS")
	if tools == "" {
		b.Skip("DIURNA_NATS does not name the folder of nats-server and nats: run make bench-cluster")
	}
	rounds := vfstest.Env(b, "DIURNA_BENCH_ROUNDS", 3)
	seconds := vfstest.Env(b, "DIURNA_BENCH_SECONDS", 4)
	nodes := vfstest.Env(b, "DIURNA_BENCH_NODES", 3)
	contenders := []contender{
		{"Diurna", startOurs(false), false},
		{"Diurna, mutual TLS", startOurs(true), true},
		{"NATS, synced", startNATS(tools, "always"), false},
		{"NATS, default", startNATS(tools, "2m"), false},
	}
	if vfstest.Env(b, "DIURNA_BENCH_OURS", 0) != 0 {
		contenders = contenders[:2]
	}
	figures := make([][rowCount][]figure, len(contenders))
	for round := range rounds {
		for i, c := range contenders {
			run, stop := c.start(b, nodes)
			for row := range rowCount {
				few := 5_000
				if row >= rowStream {
					few = 50_000
				}
				// Warms up, and tells how much fills the time.
				guess := run(b, row, few)
				f := run(b, row, int(guess.Rate*float64(seconds)))
				figures[i][row] = append(figures[i][row], f)
				b.Logf("round %d, %s: %s: %s", round+1, c.name, rowNames[row], f)
			}
			stop()
		}
	}
	report(b, contenders, figures, rounds)
	b.ReportMetric(0, "ns/op")
}

func (f figure) String() string {
	s := fmt.Sprintf("%.0f/s", f.Rate)
	if f.P99 > 0 {
		s += fmt.Sprintf(" (p50 %.1f, p99 %.1f ms)", f.P50, f.P99)
	}
	return s + fmt.Sprintf(" %.2f µs", f.CPU)
}

func median(all []figure) figure {
	by := func(value func(figure) float64) float64 {
		var values []float64
		for _, f := range all {
			values = append(values, value(f))
		}
		slices.Sort(values)
		return values[len(values)/2]
	}
	return figure{
		Rate: by(func(f figure) float64 { return f.Rate }),
		P50:  by(func(f figure) float64 { return f.P50 }),
		P99:  by(func(f figure) float64 { return f.P99 }),
		CPU:  by(func(f figure) float64 { return f.CPU }),
	}
}

func report(b *testing.B, contenders []contender, figures [][rowCount][]figure, rounds int) {
	type row struct {
		What    string              `json:"what"`
		Figures map[string]figure   `json:"figures"`
		All     map[string][]figure `json:"all"`
		Ratios  map[string]float64  `json:"ratios"`
	}
	var out strings.Builder
	fmt.Fprintf(&out, "\nRecords of 1 KiB on %d processors, median of %d rounds: records/s (latency of an append), processor time of all per record\n\n", runtime.NumCPU(), rounds)
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	for _, c := range contenders {
		_, _ = fmt.Fprintf(w, "\t%s", c.name)
	}
	for _, c := range contenders[1:] {
		if c.variant {
			_, _ = fmt.Fprintf(w, "\t%s, ratio to %s", c.name, contenders[0].name)
			continue
		}
		_, _ = fmt.Fprintf(w, "\tratio to %s", c.name)
	}
	_, _ = fmt.Fprintln(w)
	var rows []row
	for i, name := range rowNames {
		r := row{What: name, Figures: map[string]figure{}, All: map[string][]figure{}, Ratios: map[string]float64{}}
		_, _ = fmt.Fprint(w, name)
		for j, c := range contenders {
			f := median(figures[j][i])
			r.Figures[c.name], r.All[c.name] = f, figures[j][i]
			_, _ = fmt.Fprintf(w, "\t%s", f)
		}
		for _, c := range contenders[1:] {
			ratio := r.Figures[contenders[0].name].Rate / r.Figures[c.name].Rate
			if c.variant {
				ratio = 1 / ratio
			}
			r.Ratios[c.name] = ratio
			_, _ = fmt.Fprintf(w, "\t%.2f", ratio)
		}
		_, _ = fmt.Fprintln(w)
		rows = append(rows, r)
	}
	if err := w.Flush(); err != nil {
		b.Fatal(err)
	}
	fmt.Println(out.String())
	if name := os.Getenv("DIURNA_BENCH_JSON"); name != "" {
		data, err := json.MarshalIndent(map[string]any{"processors": runtime.NumCPU(), "rounds": rounds, "rows": rows}, "", "  ")
		if err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(name, append(data, '\n'), 0o644); err != nil {
			b.Fatal(err)
		}
	}
}

// freePorts returns addresses that nobody listened at a moment ago, for nodes
// that have to know each other's beforehand.
func freePorts(t testing.TB, n int) (addresses []string) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		addresses = append(addresses, l.Addr().String())
	}
	return addresses
}

// startCluster runs nodes that find each other by a list of addresses, and
// returns the leader first. If they are secure they share a throw-away CA.
func startCluster(t testing.TB, n int, secure bool) []*node {
	t.Helper()
	addresses := freePorts(t, n)
	quoted := make([]string, n)
	for i, a := range addresses {
		quoted[i] = fmt.Sprintf("%q", a)
	}
	dir := t.TempDir()
	security := "source = \"none\""
	if secure {
		security = fmt.Sprintf("source = \"dev\"\n  dev_dir = %q", filepath.Join(dir, "tls"))
	}
	nodes := make([]*node, n)
	for i, a := range addresses {
		file := filepath.Join(dir, fmt.Sprintf("node%d.hcl", i+1))
		conf := fmt.Sprintf("data_dir = %q\nlog_json = true\nlistener {\n  rpc = %q\n  http = \"127.0.0.1:0\"\n}\ntls {\n  %s\n}\ncluster {\n  bootstrap_expect = %d\n}\ndiscovery {\n  peers = [%s]\n}\n",
			filepath.Join(dir, fmt.Sprintf("node%d", i+1)), a, security, n, strings.Join(quoted, ", "))
		if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
			t.Fatal(err)
		}
		nodes[i] = &node{process: startDiurna(t, "agent", "-config-file", file), addr: a}
	}
	for _, n := range nodes {
		n.stderr.mustAwait(t, "node started")
		if secure {
			file := func(name string) string { return filepath.Join(dir, "tls", name) }
			trusts.Store(n.addr, client.TLSFiles{CAFile: file("ca.pem"), CertFile: file("client.pem"), KeyFile: file("client-key.pem")})
		}
	}
	c := dial(t, addresses[0])
	var list client.ServerList
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		var err error
		list, err = c.Servers(t.Context())
		voters := 0
		for _, s := range list.Servers {
			if s.Voter {
				voters++
			}
		}
		if _, ok := list.Leader(); err == nil && ok && voters == n {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no cluster of %d: %+v, %v\n%s", n, list, err, nodes[0].stderr.text())
		}
	}
	leader, _ := list.Leader()
	for i, node := range nodes {
		if node.addr == leader.Address {
			nodes[0], nodes[i] = nodes[i], nodes[0]
		}
	}
	if _, err := dial(t, nodes[0].addr).Produce(t.Context(), []*client.Record{{}}); err != nil {
		t.Fatal(err)
	}
	return nodes
}

// startOurs appends at the leader and reads from a follower.
func startOurs(secure bool) func(testing.TB, int) (runner, func()) {
	return func(b testing.TB, n int) (runner, func()) { return runOurs(b, startCluster(b, n, secure)) }
}

func runOurs(b testing.TB, nodes []*node) (runner, func()) {
	leader, follower := dial(b, nodes[0].addr), dial(b, nodes[len(nodes)-1].addr)
	separate, err := dialNode(nodes[0].addr, client.WithSeparateCalls())
	if err != nil {
		b.Fatal(err)
	}
	run := func(b testing.TB, row, records int) figure {
		before := processorTime(b, nodes...) + ownTime(b)
		var f figure
		switch row {
		case rowUnary64:
			f = appendUnary(b, leader, 64, records)
		case rowUnary256:
			f = appendUnary(b, leader, 256, records)
		case rowSeparate64:
			f = appendUnary(b, separate, 64, records)
		case rowSeparate256:
			f = appendUnary(b, separate, 256, records)
		case rowStream:
			f = appendStream(b, leader, records)
		case rowConsume:
			f = readAll(b, follower, &records)
		}
		f.CPU = float64((processorTime(b, nodes...) + ownTime(b) - before).Microseconds()) / float64(records)
		return f
	}
	return run, func() {
		if err := separate.Close(); err != nil {
			b.Error(err)
		}
		for _, node := range nodes {
			node.signal(b, syscall.SIGTERM)
		}
		for _, node := range nodes {
			node.wait(b)
		}
	}
}

func newFigure(records int, elapsed time.Duration, latencies []time.Duration) figure {
	slices.Sort(latencies)
	f := figure{Rate: float64(records) / elapsed.Seconds()}
	if n := len(latencies); n > 0 {
		f.P50, f.P99 = latencies[n/2].Seconds()*1e3, latencies[n*99/100].Seconds()*1e3
	}
	return f
}

// appendUnary has callers append one record at a time, each waiting for its
// acknowledgement.
func appendUnary(b testing.TB, c *client.Client, callers, records int) figure {
	b.Helper()
	batch := []*client.Record{{Value: make([]byte, 1<<10)}}
	latencies := make([][]time.Duration, callers)
	var left atomic.Int64
	left.Store(int64(records))
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range callers {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				sent := time.Now()
				if _, err := c.Produce(context.Background(), batch); err != nil {
					b.Error(err)
					return
				}
				latencies[i] = append(latencies[i], time.Since(sent))
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(begin)
	if b.Failed() {
		b.FailNow()
	}
	return newFigure(records, elapsed, slices.Concat(latencies...))
}

// appendStream appends batches of 64 records over one stream, as fast as they
// are acknowledged.
func appendStream(b testing.TB, c *client.Client, records int) figure {
	b.Helper()
	const batch = 64
	records -= records % batch
	var (
		sent      = make(chan time.Time, records/batch+1)
		latencies []time.Duration
		first     uint64
		begun     bool
	)
	begin := time.Now()
	p, err := c.NewProducer(context.Background(), client.ProducerOptions{
		BatchRecords: batch,
		OnAck: func(ack client.Ack) {
			if !begun {
				first, begun = ack.BaseOffset, true
			}
			// A batch leaves early when the window is full, so by records.
			for uint64(len(latencies)+1)*batch <= ack.NextOffset-first {
				latencies = append(latencies, time.Since(<-sent))
			}
		},
	})
	if err != nil {
		b.Fatal(err)
	}
	record := &client.Record{Value: make([]byte, 1<<10)}
	for i := range records {
		if i%batch == batch-1 {
			sent <- time.Now()
		}
		if err := p.Append(context.Background(), record); err != nil {
			b.Fatal(err)
		}
	}
	outcome, err := p.Close(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	elapsed := time.Since(begin)
	if outcome.Acknowledged != uint64(records) {
		b.Fatalf("%+v", outcome)
	}
	return newFigure(records, elapsed, latencies)
}

// readAll reads the log once from its beginning, record by record, and again
// until so many were read; it sets how many these are.
func readAll(b testing.TB, c *client.Client, records *int) figure {
	b.Helper()
	read := 0
	begin := time.Now()
	for read < *records {
		before := read
		r, err := c.Consume(b.Context(), client.ConsumeOptions{MaxRecords: uint64(*records - read)})
		if err != nil {
			b.Fatal(err)
		}
		for r.Next() {
			read++
		}
		r.Close()
		if r.Err() != nil || read == before {
			b.Fatalf("read %d records: %v", read, r.Err())
		}
	}
	*records = read
	return newFigure(read, time.Since(begin), nil)
}
