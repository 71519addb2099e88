package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/diurnalog/diurna/logstore"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// segmentLog makes a closed log of two segments and returns their names.
func segmentLog(t *testing.T) (first, last string) {
	t.Helper()
	dir := t.TempDir()
	l, err := logstore.Open(dir, logstore.Options{SegmentSize: logstore.MinSegmentSize, CheckpointInterval: -1})
	if err != nil {
		t.Fatal(err)
	}
	records := func(values ...string) []byte {
		var b v1.RecordBatch
		for _, v := range values {
			b.Records = append(b.Records, &v1.Record{Key: []byte("key"), Value: []byte(v)})
		}
		out, err := proto.Marshal(&b)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	at := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC).UnixNano()
	for _, e := range []logstore.Entry{
		{Index: 1, Term: 1, Type: 1},
		{Index: 2, Term: 1, Count: 2, AppendTime: at, Payload: records("hello", "")},
		{Index: 3, Term: 2, Type: 5, Payload: []byte("peers")},
		{Index: 4, Term: 2, Count: 1, BaseOffset: 2, AppendTime: at + 1e9, Payload: records(strings.Repeat("x", 4000))},
		{Index: 5, Term: 2, Count: 3, BaseOffset: 3, AppendTime: at + 2e9, Payload: []byte("not records")},
	} {
		if err := l.Append([]logstore.Entry{e}); err != nil {
			t.Fatal(err)
		}
	}
	if got := l.Stats(); got.Segments != 3 {
		t.Fatalf("%+v", got)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "00000000000000000001.log"), filepath.Join(dir, "00000000000000000005.log")
}

func runSegment(args ...string) (code int, stdout, stderr string) {
	var out, err bytes.Buffer
	code = newSegmentCommand(&out, &err).Run(args)
	return code, out.String(), err.String()
}

func change(t *testing.T, file string, change func(b []byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, change(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestSegmentTable(t *testing.T) {
	first, last := segmentLog(t)
	code, out, errs := runSegment("-records", first)
	if code != exitOK || errs != "" {
		t.Fatalf("exit %d: %s", code, errs)
	}
	head, rest, _ := strings.Cut(out, first)
	if want := `
 POSITION    INDEX  TERM TYPE       OFFSET RECORDS    BYTES APPENDED (UTC)
      128        1     1 no-op           -       0        0 -
      192        2     1 command         0       2       21 2026-01-31 12:00:00
          offset 0: key 3 bytes, value 5 bytes, 0 headers
          offset 1: key 3 bytes, value 0 bytes, 0 headers
      280        3     2 config          -       0        5 2026-01-31 12:00:00
`; head != want[1:] {
		t.Errorf("the table is\n%s, not%s", head, want)
	}
	for line := range strings.Lines(head) {
		if len(line) > 80 {
			t.Errorf("%d columns: %s", len(line), line)
		}
	}
	for _, want := range []string{
		": sound\n", "sealed, of log ", "3, index 1–3, the last one of term 2", "2, offset 0–1", "used        352 of 4096 bytes",
		"durable     up to index 3", "index       ok\n", "checkpoint  ok\n",
	} {
		if !strings.Contains(rest, want) {
			t.Errorf("the summary lacks %q:\n%s", want, rest)
		}
	}

	code, out, errs = runSegment("-quiet", first, last)
	if code != exitOK || errs != "" || strings.Contains(out, "POSITION") || strings.Count(out, ": sound\n") != 2 || !strings.Contains(out, "active, of log") {
		t.Errorf("quiet: exit %d, %s\n%s", code, errs, out)
	}
	code, out, _ = runSegment("-records", last)
	if code != exitOK || !strings.Contains(out, "not made of records") {
		t.Errorf("no records: exit %d\n%s", code, out)
	}
}

func TestSegmentJSON(t *testing.T) {
	first, _ := segmentLog(t)
	code, out, errs := runSegment("-json", "-records", first)
	if code != exitOK || errs != "" {
		t.Fatalf("exit %d: %s", code, errs)
	}
	var kinds []string
	var previous string
	for line := range strings.Lines(out) {
		var v map[string]any
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		kind, _ := v["kind"].(string)
		kinds = append(kinds, kind)
		if v["file"] != first {
			t.Errorf("%s", line)
		}
		if kind == "frame" {
			if previous != "" && v["previous_crc"] != previous {
				t.Errorf("%s follows %s", line, previous)
			}
			previous, _ = v["crc"].(string)
			continue
		}
		for name, want := range map[string]any{
			"ending": "clean", "position": 352.0, "first_index": 1.0, "last_index": 3.0, "records": 2.0, "next_offset": 2.0,
			"sealed": true, "index": "ok", "checkpoint": "ok", "last_crc": previous, "durable": 3.0, "last_append_time": "2026-01-31T12:00:00Z",
		} {
			if v[name] != want {
				t.Errorf("%s is %v, want %v", name, v[name], want)
			}
		}
	}
	if got := strings.Join(kinds, " "); got != "frame frame frame segment" {
		t.Errorf("printed %s", got)
	}
	if !strings.Contains(out, `"decoded":[{"offset":0,"key_bytes":3,"value_bytes":5,"headers":0},`) {
		t.Errorf("records are missing:\n%s", out)
	}
}

func TestSegmentFindings(t *testing.T) {
	tests := map[string]struct {
		change func(t *testing.T, first, last string)
		code   int
		stdout string
		stderr string
	}{
		"torn tail": {func(t *testing.T, _, last string) {
			change(t, last, func(b []byte) []byte { b[1000] = 1; return b })
		}, exitOK, "sound, with a torn tail at byte 208", ""},
		"damaged": {func(t *testing.T, first, _ string) {
			change(t, first, func(b []byte) []byte { b[260]++; return b })
		}, exitServer, "damaged at byte 192: checksum", "00000000000000000001.log is damaged at byte 192: "},
		"header": {func(t *testing.T, first, _ string) {
			change(t, first, func(b []byte) []byte { b[20]++; return b })
		}, exitServer, "damaged at byte 8: ", "restore it from a copy"},
		"index missing": {func(t *testing.T, first, _ string) {
			if err := os.Remove(strings.TrimSuffix(first, ".log") + ".idx"); err != nil {
				t.Fatal(err)
			}
		}, exitOK, "index       missing", ""},
		"index wrong": {func(t *testing.T, first, _ string) {
			change(t, strings.TrimSuffix(first, ".log")+".idx", func(b []byte) []byte { b[70]++; return b })
		}, exitOK, "index       wrong: the checksum", ""},
		"gone": {func(t *testing.T, first, _ string) {
			if err := os.Remove(first); err != nil {
				t.Fatal(err)
			}
		}, exitUsage, "", "00000000000000000001.log: no such file or directory."},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			first, last := segmentLog(t)
			tt.change(t, first, last)
			code, out, errs := runSegment("-quiet", first, last)
			if code != tt.code || !strings.Contains(out, tt.stdout) || !strings.Contains(errs, tt.stderr) || tt.stderr == "" && errs != "" {
				t.Errorf("exit %d\n%s%s", code, out, errs)
			}
			if !strings.Contains(out, last+": sound") {
				t.Errorf("the second file is missing:\n%s", out)
			}
		})
	}
}

func TestSegmentUsage(t *testing.T) {
	first, _ := segmentLog(t)
	newer := filepath.Join(t.TempDir(), "photo.jpg")
	if err := os.WriteFile(newer, []byte("\xff\xd8\xff\xe0"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{nil, "name at least one segment file. Run `diurna debug segment -help`"},
		{[]string{"-jason", first}, "unknown option -jason. Did you mean -json?"},
		{[]string{filepath.Dir(first)}, "is a directory. Name the segments in it: "},
		{[]string{newer}, "photo.jpg: not a segment file. Segments are the files named"},
		{[]string{filepath.Join(filepath.Dir(first), "checkpoint")}, "but the checkpoint of a log"},
	} {
		code, out, errs := runSegment(tt.args...)
		if code != exitUsage || out != "" || !strings.Contains(errs, tt.want) {
			t.Errorf("%q: exit %d\n%s%s", tt.args, code, out, errs)
		}
	}
}

type brokenWriter struct{ err error }

func (w brokenWriter) Write([]byte) (int, error) { return 0, w.err }

func TestSegmentBrokenOutput(t *testing.T) {
	first, _ := segmentLog(t)
	for err, want := range map[error]int{syscall.EPIPE: exitOK, io.ErrClosedPipe: exitOK, errors.New("disk full"): exitUsage} {
		var errs bytes.Buffer
		if code := newSegmentCommand(brokenWriter{err}, &errs).Run([]string{first}); code != want || (errs.Len() > 0) != (want != exitOK) {
			t.Errorf("%v: exit %d, %s", err, code, &errs)
		}
	}
}

func TestSegmentHelp(t *testing.T) {
	c := newSegmentCommand(nil, nil)
	for _, want := range []string{"Usage: diurna debug segment [options] <file> ...", "-json", "-records", "-quiet", "Exits 0", "Examples:"} {
		if !strings.Contains(c.Help(), want) {
			t.Errorf("the help lacks %q:\n%s", want, c.Help())
		}
	}
	for line := range strings.Lines(c.Help()) {
		if len(line) > 81 {
			t.Errorf("%d columns: %s", len(line), line)
		}
	}
}
