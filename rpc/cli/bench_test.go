package cli

import (
	"bytes"
	"io"
	"testing"

	"github.com/diurnalog/diurna/rpc/client/clienttest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// A text file of short lines, into and out of a server that does nothing: what
// is measured is the client, and gRPC on both sides.

const benchLine = "2026-01-31T12:00:00Z INFO request served path=/v1/kv/some/key status=200 us=417"

func BenchmarkProduce(b *testing.B) {
	const lines = 100_000
	text := bytes.Repeat([]byte(benchLine+"\n"), lines)
	addr := clienttest.StartRaw(b, nil, 0)
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		m := &Meta{Stdin: bytes.NewReader(text), Stdout: io.Discard, Stderr: io.Discard}
		if code := m.Run([]string{"produce", "-addr", addr}, nil); code != 0 {
			b.Fatalf("exit %d", code)
		}
	}
	b.ReportMetric(float64(b.N*lines)/b.Elapsed().Seconds(), "records/s")
}

func BenchmarkConsume(b *testing.B) {
	const perBatch, batches = 3000, 33
	records := make([]*v1.Record, perBatch)
	for i := range records {
		records[i] = &v1.Record{Value: []byte(benchLine)}
	}
	addr := clienttest.StartRaw(b, records, batches)
	b.SetBytes(perBatch * batches * int64(len(benchLine)+1))
	b.ReportAllocs()
	for _, format := range []string{"-raw=false", "-json"} {
		b.Run(format, func(b *testing.B) {
			b.SetBytes(perBatch * batches * int64(len(benchLine)+1))
			b.ReportAllocs()
			for b.Loop() {
				m := &Meta{Stdout: io.Discard, Stderr: io.Discard}
				if code := m.Run([]string{"consume", "-addr", addr, format}, nil); code != 0 {
					b.Fatalf("exit %d", code)
				}
			}
			b.ReportMetric(float64(b.N*perBatch*batches)/b.Elapsed().Seconds(), "records/s")
		})
	}
}
