package agent

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
	"github.com/diurnalog/diurna/rpc/client"
)

// What processes use of the machine, as Linux tells it.

// tick is in what /proc counts processor time: a hundredth of a second on
// every Linux that Go runs on.
const tick = 10 * time.Millisecond

// processorTime is what processes have used so far.
func processorTime(b testing.TB, nodes ...*node) (sum time.Duration) {
	b.Helper()
	for _, n := range nodes {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.Process.Pid))
		if err != nil {
			b.Fatal(err)
		}
		// After the name, which may hold anything: state is the first field,
		// user and system time the twelfth and thirteenth.
		_, rest, _ := strings.Cut(string(stat), ") ")
		fields := strings.Fields(rest)
		for _, f := range fields[11:13] {
			v, err := strconv.ParseInt(f, 10, 64)
			if err != nil {
				b.Fatal(err)
			}
			sum += time.Duration(v) * tick
		}
	}
	return sum
}

// ownTime is what this process has used.
func ownTime(b testing.TB) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// memory is one field of a process's status, such as VmRSS, in bytes.
func memory(b testing.TB, n *node, field string) int64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(status), field+":")
	if !ok {
		b.Fatalf("no %s in the status of process %d", field, n.Process.Pid)
	}
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return kib << 10
}

// BenchmarkIdle says what nodes use that nobody asks for anything: as they
// started, and some time after they took 200 MiB. DIURNA_BENCH_NODES and
// DIURNA_BENCH_SECONDS change how many and how long.
func BenchmarkIdle(b *testing.B) {
	nodes := startCluster(b, vfstest.Env(b, "DIURNA_BENCH_NODES", 3), false)
	seconds := vfstest.Env(b, "DIURNA_BENCH_SECONDS", 5)
	idle := func(when string) {
		var before []time.Duration
		for _, n := range nodes {
			before = append(before, processorTime(b, n))
		}
		begin := time.Now()
		// There is nothing to wait for: that nothing happens is the point.
		time.Sleep(time.Duration(seconds) * time.Second)
		elapsed := time.Since(begin)
		var busiest, largest float64
		for i, n := range nodes {
			share := 100 * (processorTime(b, n) - before[i]).Seconds() / elapsed.Seconds()
			rss := float64(memory(b, n, "VmRSS")) / (1 << 20)
			b.Logf("%s, node %d: %.2f %% of a processor, %.1f MiB resident, of which %.1f MiB heap and stacks",
				when, i+1, share, rss, float64(memory(b, n, "RssAnon"))/(1<<20))
			busiest, largest = max(busiest, share), max(largest, rss)
		}
		b.ReportMetric(busiest, when+"-cpu-%")
		b.ReportMetric(largest, when+"-MiB")
	}
	idle("started")
	c, err := client.Dial(nodes[0].addr)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	appendStream(b, c, 200<<10)
	// Its own connection counts as idle, too.
	if _, err := c.Produce(context.Background(), []*client.Record{{}}); err != nil {
		b.Fatal(err)
	}
	idle("used")
	b.ReportMetric(0, "ns/op")
	for _, n := range nodes {
		n.terminate(b)
	}
}
