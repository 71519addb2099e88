package logstore

import (
	"bufio"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// streamLog makes a log of 512 MiB.
func streamLog(b *testing.B, dir string, payloadSize int) *Log {
	b.Helper()
	const total = 512 << 20
	l, err := Open(dir, Options{})
	must(b, err)
	payload := make([]byte, payloadSize)
	for i := range payload {
		payload[i] = byte(i * 31)
	}
	var entries []Entry
	count := total / int(frameSize(payloadSize))
	for i := range count {
		entries = append(entries, Entry{Index: uint64(i + 1), Term: 1, Count: 1, BaseOffset: uint64(i), Payload: payload})
		if len(entries)*payloadSize > 4<<20 || i == count-1 {
			must(b, l.Append(entries))
			entries = entries[:0]
		}
	}
	return l
}

func segmentFiles(b *testing.B, dir string) []string {
	b.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.log"))
	must(b, err)
	return names
}

// benchmarkExport streams a log to nowhere. Baseline: the same files read in
// the same chunks with one CRC32C over each.
func benchmarkExport(b *testing.B, payloadSize int) {
	dir := b.TempDir()
	l := streamLog(b, dir, payloadSize)
	var size int64
	var grown uint64
	buf := make([]byte, streamChunk)
	n := max(b.N, 3)
	o, base := inTurns(b, n, 1, func(int) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		x, err := l.Export(l.LastIndex())
		must(b, err)
		size, err = io.Copy(io.Discard, x)
		must(b, err)
		must(b, x.Close())
		runtime.ReadMemStats(&after)
		grown = after.TotalAlloc - before.TotalAlloc
	}, func(int) {
		for _, name := range segmentFiles(b, dir) {
			f, err := os.Open(name)
			must(b, err)
			for pos := int64(0); ; {
				got, _ := f.ReadAt(buf, pos)
				if got == 0 {
					break
				}
				crcSink = crc32.Checksum(buf[:got], castagnoli)
				pos += int64(got)
			}
			must(b, f.Close())
		}
	})
	report(b, n, float64(size), float64(l.LastIndex()), o, base)
	b.ReportMetric(float64(grown)/(1<<20), "MiB-allocated")
	must(b, l.Close())
}

func BenchmarkExport64KiB(b *testing.B) { benchmarkExport(b, 64<<10) }
func BenchmarkExport1KiB(b *testing.B)  { benchmarkExport(b, 1<<10) }

// benchmarkImport makes logs of a stream from memory-cached files. Baseline: the
// same bytes with one CRC32C over each chunk, to preallocated files, synced as
// often.
func benchmarkImport(b *testing.B, payloadSize int) {
	dir := b.TempDir()
	l := streamLog(b, filepath.Join(dir, "log"), payloadSize)
	name := filepath.Join(dir, "stream")
	f, err := os.Create(name)
	must(b, err)
	x, err := l.Export(l.LastIndex())
	must(b, err)
	_, err = x.WriteTo(f)
	must(b, err)
	size := x.Size()
	last := l.LastIndex()
	must(b, x.Close())
	must(b, l.Close())
	must(b, os.RemoveAll(filepath.Join(dir, "log")))
	buf := make([]byte, importChunk)
	var grown uint64
	n := max(b.N, 3)
	o, base := inTurns(b, n, 1, func(i int) {
		_, err := f.Seek(0, io.SeekStart)
		must(b, err)
		to := filepath.Join(dir, fmt.Sprint("import", i))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err = Import(to, Options{}, bufio.NewReaderSize(f, 256<<10))
		must(b, err)
		runtime.ReadMemStats(&after)
		grown = after.TotalAlloc - before.TotalAlloc
	}, func(i int) {
		_, err := f.Seek(0, io.SeekStart)
		must(b, err)
		var out vfs.File
		var pos int64
		for k := 0; ; k++ {
			got, _ := io.ReadFull(f, buf)
			if got == 0 {
				break
			}
			crcSink = crc32.Checksum(buf[:got], castagnoli)
			if out == nil || pos+int64(got) > DefaultSegmentSize {
				if out != nil {
					must(b, out.Close())
				}
				out, err = vfs.OS.Create(filepath.Join(dir, fmt.Sprint("bare", i, ".", k)))
				must(b, err)
				must(b, out.Preallocate(DefaultSegmentSize))
				pos = 0
			}
			_, err = out.WriteAt(buf[:got], pos)
			must(b, err)
			must(b, out.Sync())
			pos += int64(got)
		}
		must(b, out.Close())
	})
	report(b, n, float64(size), float64(last), o, base)
	b.ReportMetric(float64(grown)/(1<<20), "MiB-allocated")
	must(b, f.Close())
}

func BenchmarkImport64KiB(b *testing.B) { benchmarkImport(b, 64<<10) }
func BenchmarkImport1KiB(b *testing.B)  { benchmarkImport(b, 1<<10) }
