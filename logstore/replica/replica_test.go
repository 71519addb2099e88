package replica

import (
	"context"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testConfig(t testing.TB, dir string) Config {
	addr, transport := raft.NewInmemTransport("")
	_ = addr
	return Config{
		Dir: dir, ID: "a", Address: "a:1", Transport: transport, Bootstrap: true,
		HeartbeatTimeout: 50 * time.Millisecond, ElectionTimeout: 50 * time.Millisecond, LeaderLeaseTimeout: 50 * time.Millisecond,
	}
}

func mustOpen(t testing.TB, cfg Config) *Replica {
	t.Helper()
	r, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := r.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return r
}

func mustClose(t testing.TB, r *Replica) {
	t.Helper()
	if err := r.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func mustPropose(t testing.TB, r *Replica, records string, count uint32) Ack {
	t.Helper()
	p, err := r.Propose(context.Background(), Proposal{Records: []byte(records), Count: count}, true)
	if err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	ack, err := p.Result()
	if err != nil {
		t.Fatal(err)
	}
	return ack
}

func TestRestart(t *testing.T) {
	dir := t.TempDir()
	var next uint64
	for i := range 3 {
		r := mustOpen(t, testConfig(t, dir))
		for range 10 {
			if ack := mustPropose(t, r, "xyz", 2); ack.BaseOffset != next || ack.NextOffset != next+2 {
				t.Fatalf("round %d: %+v, want base %d", i, ack, next)
			}
			next += 2
		}
		if _, watermark, _ := r.Bounds(); watermark != next {
			t.Fatalf("watermark is %d, want %d", watermark, next)
		}
		mustClose(t, r)
	}
}

// BenchmarkPropose: 64 proposers of 1 KiB, and one that keeps 64 KiB batches
// in flight.
func BenchmarkPropose(b *testing.B) {
	b.Run("64x1KiB", func(b *testing.B) { benchPropose(b, 64, 1<<10, 1) })
	b.Run("256x1KiB", func(b *testing.B) { benchPropose(b, 256, 1<<10, 1) })
	b.Run("stream64KiB", func(b *testing.B) { benchPropose(b, 64, 64<<10, 64) })
}

func benchPropose(b *testing.B, inFlight, size int, records uint32) {
	r := mustOpen(b, testConfig(b, b.TempDir()))
	defer mustClose(b, r)
	payload := make([]byte, size)
	window := make(chan *Pending, inFlight)
	done := make(chan struct{})
	b.ResetTimer()
	go func() {
		defer close(done)
		for p := range window {
			<-p.Done()
			if _, err := p.Result(); err != nil {
				b.Error(err)
			}
		}
	}()
	for range b.N {
		p, err := r.Propose(context.Background(), Proposal{Records: payload, Count: records}, true)
		if err != nil {
			b.Fatal(err)
		}
		window <- p
	}
	close(window)
	<-done
	b.ReportMetric(float64(b.N)*float64(records)/b.Elapsed().Seconds(), "records/s")
	b.ReportMetric(float64(b.N)*float64(size)/1e6/b.Elapsed().Seconds(), "MB/s")
}
