package agent

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What processes use of the machine, as Linux tells it.

// ticks is in what /proc counts processor time: a hundredth of a second on
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
