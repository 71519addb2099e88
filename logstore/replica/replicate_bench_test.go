package replica

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// tcpNetwork connects the servers of one process over loopback TCP.
type tcpNetwork struct {
	net.Listener
	addresses *sync.Map // by id
}

func (n tcpNetwork) Dial(ctx context.Context, id, _ string) (net.Conn, error) {
	a, ok := n.addresses.Load(id)
	if !ok {
		return nil, fmt.Errorf("no server %s", id)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", a.(string))
}

// BenchmarkReplicate is three replicas in one process, on one disk, over TCP:
// callers that each have one batch on its way. "cpu-us" is the processor time of
// all three and the callers per record, which says more than the time on a
// machine that does other things too.
func BenchmarkReplicate(b *testing.B) {
	for _, tc := range []struct{ callers, records int }{{1, 1}, {64, 1}, {256, 1}, {64, 64}, {256, 64}} {
		b.Run(fmt.Sprintf("callers=%d/records=%d", tc.callers, tc.records), func(b *testing.B) {
			leader := benchGroup(b)
			batch := Proposal{Records: make([]byte, tc.records<<10), Count: uint32(tc.records)}
			b.SetBytes(int64(len(batch.Records)))
			before, first := cpuTime(b), leader.Status().Applied
			b.ResetTimer()
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			for range tc.callers {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						p, err := leader.Propose(context.Background(), batch, true)
						if err == nil {
							_, err = result(p)
						}
						if err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/float64(b.N*tc.records), "cpu-us")
			b.ReportMetric(float64(b.N*tc.records)/float64(max(leader.Status().Applied-first, 1)), "records/entry")
			b.ReportMetric(float64(b.N*tc.records)/b.Elapsed().Seconds(), "records/s")
		})
	}
}

func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func benchGroup(b *testing.B) *Replica {
	var addresses sync.Map
	var first raft.Configuration
	var nodes []*Replica
	for _, id := range []string{"a", "b", "c"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		addresses.Store(id, l.Addr().String())
		cfg := Config{Dir: b.TempDir(), FS: vfs.OS, ID: id, Address: id + ":1", Network: tcpNetwork{l, &addresses}}
		r, err := Open(cfg)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = r.Close(context.Background()) })
		nodes = append(nodes, r)
		first.Servers = append(first.Servers, raft.Server{ID: raft.ServerID(id), Address: raft.ServerAddress(cfg.Address)})
	}
	if err := nodes[0].raft.BootstrapCluster(first).Error(); err != nil {
		b.Fatal(err)
	}
	g := &testGroup{t: b, ids: []string{"a", "b", "c"}, nodes: map[string]*Replica{"a": nodes[0], "b": nodes[1], "c": nodes[2]}}
	return g.leader(testContext(b))
}
