package logstore

import (
	"hash/crc32"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// Benchmarks print "ratio": ours against a baseline that moves the same bytes
// the plainest way, both in turns within one run, so that a noisy machine
// bends both alike. Higher is better; 1 is as fast as the baseline.

// inTurns runs n operations of both in small alternating rounds and returns
// the time each took.
func inTurns(b *testing.B, n, round int, ours, baseline func(i int)) (o, base time.Duration) {
	b.Helper()
	for from := 0; from < n; from += round {
		to := min(from+round, n)
		for k, f := range []func(int){ours, baseline} {
			begin := time.Now()
			for i := from; i < to; i++ {
				f(i)
			}
			if k == 0 {
				o += time.Since(begin)
			} else {
				base += time.Since(begin)
			}
		}
	}
	return o, base
}

func report(b *testing.B, n int, bytesPerOp, recordsPerOp float64, o, base time.Duration) {
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(n)*bytesPerOp/1e6/o.Seconds(), "MB/s")
	b.ReportMetric(float64(n)*recordsPerOp/o.Seconds(), "records/s")
	b.ReportMetric(float64(n)*bytesPerOp/1e6/base.Seconds(), "base-MB/s")
	b.ReportMetric(base.Seconds()/o.Seconds(), "ratio")
}

// BenchmarkAppend appends 64 records of 1 KiB at a time, each time durable.
// Baseline: the same bytes to a preallocated file, with as many fdatasyncs.
func BenchmarkAppend(b *testing.B) {
	payload := make([]byte, 64<<10)
	for i := range payload {
		payload[i] = byte(i)
	}
	dir := b.TempDir()
	l, err := Open(filepath.Join(dir, "log"), Options{})
	must(b, err)
	base := newBareFile(b, dir)
	n := max(b.N, 2000)
	o, t := inTurns(b, n, 100, func(i int) {
		must(b, l.Append([]Entry{{Index: uint64(i + 1), Term: 1, Count: 64, BaseOffset: uint64(i) * 64, Payload: payload}}))
	}, func(i int) { base.append(b, payload) })
	report(b, n, float64(len(payload)), 64, o, t)
	must(b, l.Close())
}

// BenchmarkAppendSmall appends one record of 1 KiB at a time.
func BenchmarkAppendSmall(b *testing.B) {
	payload := make([]byte, 1<<10)
	dir := b.TempDir()
	l, err := Open(filepath.Join(dir, "log"), Options{})
	must(b, err)
	base := newBareFile(b, dir)
	n := max(b.N, 5000)
	o, t := inTurns(b, n, 200, func(i int) {
		must(b, l.Append([]Entry{{Index: uint64(i + 1), Term: 1, Count: 1, BaseOffset: uint64(i), Payload: payload}}))
	}, func(i int) { base.append(b, payload) })
	report(b, n, float64(len(payload)), 1, o, t)
	must(b, l.Close())
}

// bareFile is a row of preallocated files that are written and synced, and
// nothing else.
type bareFile struct {
	dir string
	f   vfs.File
	pos int64
	n   int
}

func newBareFile(b *testing.B, dir string) *bareFile {
	f := &bareFile{dir: dir}
	f.next(b)
	b.Cleanup(func() { must(b, f.f.Close()) })
	return f
}

func (f *bareFile) next(b *testing.B) {
	if f.f != nil {
		must(b, f.f.Close())
	}
	f.n++
	var err error
	f.f, err = vfs.OS.Create(filepath.Join(f.dir, "bare"+string(rune('a'+f.n%26))+time.Now().Format("150405.000000")))
	must(b, err)
	must(b, f.f.Preallocate(DefaultSegmentSize))
	must(b, f.f.Sync())
	f.pos = 0
}

func (f *bareFile) append(b *testing.B, p []byte) {
	if f.pos+int64(len(p)) > DefaultSegmentSize {
		f.next(b)
	}
	_, err := f.f.WriteAt(p, f.pos)
	must(b, err)
	must(b, f.f.Sync())
	f.pos += int64(len(p))
}

// benchmarkRead reads a log of 512 MiB in order. Baseline: pread of the same
// bytes in the same chunks with one CRC32C over each.
func benchmarkRead(b *testing.B, payloadSize, recordsPerEntry int) {
	const total = 512 << 20
	payload := make([]byte, payloadSize)
	dir := b.TempDir()
	l, err := Open(dir, Options{})
	must(b, err)
	var entries []Entry
	count := total / int(frameSize(payloadSize))
	for i := range count {
		entries = append(entries, Entry{Index: uint64(i + 1), Term: 1, Count: uint32(recordsPerEntry), BaseOffset: uint64(i * recordsPerEntry), Payload: payload})
		if len(entries)*payloadSize > 4<<20 || i == count-1 {
			must(b, l.Append(entries))
			entries = entries[:0]
		}
	}
	end := l.NextOffset()
	names, err := filepath.Glob(filepath.Join(dir, "*.log"))
	must(b, err)
	var files []*os.File
	for _, name := range names {
		f, err := os.Open(name)
		must(b, err)
		defer f.Close()
		files = append(files, f)
	}
	buf := make([]byte, 256<<10)
	var batches []Batch
	n := max(b.N, 3)
	var before, after runtime.MemStats
	var allocs uint64
	o, t := inTurns(b, n, 1, func(int) {
		runtime.ReadMemStats(&before)
		for offset := uint64(0); offset < end; {
			batches, err = l.ReadBatches(offset, end, buf, batches[:0])
			must(b, err)
			last := batches[len(batches)-1]
			offset = last.BaseOffset + uint64(last.Count)
		}
		runtime.ReadMemStats(&after)
		allocs += after.Mallocs - before.Mallocs
	}, func(int) {
		for _, f := range files {
			for pos := int64(0); ; {
				got, _ := f.ReadAt(buf, pos)
				if got == 0 {
					break
				}
				crcSink = crc32.Checksum(buf[:got], castagnoli)
				pos += int64(got)
			}
		}
	})
	report(b, n, total, float64(end), o, t)
	b.ReportMetric(float64(allocs)/float64(n)/float64(end), "allocs/record")
	must(b, l.Close())
}

var crcSink uint32

func BenchmarkRead64KiB(b *testing.B) { benchmarkRead(b, 64<<10, 64) }
func BenchmarkRead1KiB(b *testing.B)  { benchmarkRead(b, 1<<10, 1) }

// BenchmarkOpen opens a log of 4 GiB that was closed, and one that was not.
func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir()
	l, err := Open(dir, Options{})
	must(b, err)
	payload := make([]byte, 1<<20)
	for i := range 4 << 10 {
		must(b, l.Append([]Entry{{Index: uint64(i + 1), Term: 1, Count: 1024, BaseOffset: uint64(i) * 1024, Payload: payload}}))
	}
	must(b, l.Close())
	var clean, crashed time.Duration
	var read int64
	n := max(min(b.N, 10), 3)
	for range n {
		fs := &countingFS{FS: vfs.OS}
		begin := time.Now()
		l, err := Open(dir, Options{FS: fs})
		must(b, err)
		clean += time.Since(begin)
		if !l.Recovery().Clean {
			b.Fatal("not clean")
		}
		read = fs.read.Load()
		must(b, l.Close())
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(clean.Seconds()*1000/float64(n), "ms-clean")
	b.ReportMetric(float64(read), "bytes-read-clean")
	for range n {
		l, err := Open(dir, Options{})
		must(b, err)
		// Without the mark of a clean close, as after kill -9.
		l.keeper.stop()
		must(b, l.keeper.release())
		must(b, l.handles.close(l.state.Load().segs))
		fs := &countingFS{FS: vfs.OS}
		begin := time.Now()
		l, err = Open(dir, Options{FS: fs})
		must(b, err)
		crashed += time.Since(begin)
		if l.Recovery().Clean {
			b.Fatal("clean")
		}
		read = fs.read.Load()
		must(b, l.Close())
	}
	b.ReportMetric(crashed.Seconds()*1000/float64(n), "ms-crashed")
	b.ReportMetric(float64(read), "bytes-read-crashed")
}
