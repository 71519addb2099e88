package replica

import (
	"context"
	"testing"
)

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
