package cli

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/diurnalog/diurna/rpc/client/clienttest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func TestConsumeOutput(t *testing.T) {
	s := clienttest.New().Start(t)
	for i := range 10 {
		s.Append(&v1.Record{Key: fmt.Append(nil, "k", i), Value: fmt.Append(nil, "v", i)})
	}
	for _, tc := range []struct {
		args string
		want string
	}{
		{"-until 3", "v0\nv1\nv2\n"},
		{"-from 8", "v8\nv9\n"},
		{"-from offset:8", "v8\nv9\n"},
		{"-from last:1", "v9\n"},
		{"-from latest", ""},
		{"-from 1h -count 1", "v0\n"},
		{"-from 2001-01-01T00:00:00Z -count 2", "v0\nv1\n"},
		{"-count 2 -raw", "v0v1"},
		{"-count 2 -separator=", "v0v1"},
		{"-count 2 -separator ;", "v0;v1;"},
		{"-count 2 -0", "v0\x00v1\x00"},
		{"-count 2 -key-separator :", "k0:v0\nk1:v1\n"},
		{"-from 4 -until 6 -follow -linearizable", "v4\nv5\n"},
	} {
		sh := newShell(s, nil)
		if code := sh.run(append([]string{"consume"}, strings.Fields(tc.args)...)...); code != 0 {
			t.Errorf("%s: exit %d: %s", tc.args, code, sh.err.String())
		}
		if got := sh.out.String(); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.args, got, tc.want)
		}
		if sh.err.String() != "" {
			t.Errorf("%s: stderr: %s", tc.args, sh.err.String())
		}
	}
}

func TestConsumeRequest(t *testing.T) {
	s := clienttest.New()
	var got *v1.ConsumeRequest
	s.OnConsume = func(req *v1.ConsumeRequest) error {
		got = req
		return clienttest.Failure(codes.OutOfRange, "OFFSET_OUT_OF_RANGE", "offset 3 is out of range", "", "first", "5", "next", "9")
	}
	s.Start(t)
	sh := newShell(s, nil)
	if code := sh.run("consume", "-from", "3", "-until", "7", "-count", "2", "-follow", "-linearizable", "-log", "audit"); code != ExitServer {
		t.Errorf("exit %d", code)
	}
	contains(t, "stderr", sh.err.String(), "offset 3 is out of range (OFFSET_OUT_OF_RANGE). The log holds offsets 5 up to, not including, 9: try -from 5,")
	end := uint64(7)
	want := &v1.ConsumeRequest{Log: "audit", Start: &v1.ConsumeRequest_Offset{Offset: 3}, EndOffset: &end, MaxRecords: 2, Follow: true, Linearizable: true}
	if !proto.Equal(got, want) {
		t.Errorf("asked for %v", got)
	}
}

// What follows is written as it comes, without a full buffer to wait for, and
// an interrupt ends it well.
func TestConsumeFollow(t *testing.T) {
	s := clienttest.New().Start(t)
	s.Append(&v1.Record{Value: []byte("old")})
	sh := newShell(s, nil)
	sh.IsTerminal = func(io.Writer) bool { return true }
	reader, out := io.Pipe()
	sh.Stdout = out
	code := sh.start("consume", "-follow")
	lines := bufio.NewReader(reader)
	for i := range 3 {
		if i > 0 {
			s.Append(&v1.Record{Value: fmt.Append(nil, "new ", i)})
		}
		line, err := lines.ReadString('\n')
		want := "old\n"
		if i > 0 {
			want = fmt.Sprintf("new %d\n", i)
		}
		if err != nil || line != want {
			t.Fatalf("read %q, %v", line, err)
		}
	}
	sh.interrupt(t)
	if c := await(t, code); c != 0 {
		t.Errorf("exit %d", c)
	}
	if got := sh.err.String(); got != "3 records, up to offset 2\n" {
		t.Errorf("stderr: %q", got)
	}
}

func TestConsumeInterruptQuietInPipe(t *testing.T) {
	s := clienttest.New().Start(t)
	sh := newShell(s, nil)
	code := sh.start("consume", "-follow")
	s.AwaitConsume(t, 1)
	sh.interrupt(t)
	if c := await(t, code); c != 0 || sh.err.String() != "" {
		t.Errorf("exit %d: %s", c, sh.err.String())
	}
}

func TestConsumeInterruptTwice(t *testing.T) {
	s := clienttest.New().Start(t)
	s.Append(&v1.Record{Value: []byte("a")})
	sh := newShell(s, nil)
	reader, out := io.Pipe() // nobody reads
	entered := make(chan struct{}, 10)
	sh.Stdout = writerFunc(func(p []byte) (int, error) {
		entered <- struct{}{}
		return out.Write(p)
	})
	code := sh.start("consume", "-follow")
	await(t, entered)
	sh.interrupt(t)
	sh.interrupt(t)
	if c := await(t, code); c != ExitUsage {
		t.Errorf("exit %d", c)
	}
	if err := reader.Close(); err != nil { // lets the write end
		t.Fatal(err)
	}
}

func TestConsumeClosedPipe(t *testing.T) {
	for _, args := range [][]string{{"consume"}, {"consume", "-follow"}} {
		s := clienttest.New().Start(t)
		for range 100 {
			s.Append(&v1.Record{Value: bytes.Repeat([]byte("x"), 10000)})
		}
		sh := newShell(s, nil)
		reader, out := io.Pipe()
		sh.Stdout = out
		code := sh.start(args...)
		if _, err := io.ReadFull(reader, make([]byte, 10)); err != nil {
			t.Fatal(err)
		}
		if err := reader.Close(); err != nil {
			t.Fatal(err)
		}
		if c := await(t, code); c != 0 || sh.err.String() != "" {
			t.Errorf("%v: exit %d: %s", args, c, sh.err.String())
		}
	}
}

func TestConsumeWriteFails(t *testing.T) {
	s := clienttest.New().Start(t)
	s.Append(&v1.Record{Value: []byte("a")})
	for _, args := range [][]string{{"consume"}, {"consume", "-follow"}} {
		sh := newShell(s, nil)
		sh.Stdout = writerFunc(func([]byte) (int, error) { return 0, errors.New("no space left") })
		if code := sh.run(args...); code != ExitUsage {
			t.Errorf("exit %d", code)
		}
		contains(t, "stderr", sh.err.String(), "write to standard output: no space left")
	}
}

func TestConsumeServerDies(t *testing.T) {
	s := clienttest.New().Start(t)
	s.Append(&v1.Record{Value: []byte("a")}, &v1.Record{Value: []byte("b")})
	sh := newShell(s, nil)
	reader, out := io.Pipe()
	sh.Stdout = out
	code := sh.start("consume", "-follow", "-retry", "0")
	if _, err := io.ReadFull(reader, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	s.Stop()
	if c := await(t, code); c != ExitServer {
		t.Errorf("exit %d", c)
	}
	contains(t, "stderr", sh.err.String(), "lost the connection", "2 records written; go on with -from 2.")
}

// The promise of the two verbs to each other.
func TestRoundTrip(t *testing.T) {
	const seed = 20
	rng := rand.New(rand.NewPCG(seed, seed))
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		return b
	}
	run := func(s *clienttest.Server, stdin io.Reader, args ...string) string {
		t.Helper()
		sh := newShell(s, stdin)
		if code := sh.run(args...); code != 0 {
			t.Fatalf("%v: exit %d: %s", args, code, sh.err.String())
		}
		return sh.out.String()
	}

	t.Run("lines", func(t *testing.T) {
		s := clienttest.New().Start(t)
		var text []byte
		for range 300 {
			text = append(append(text, bytes.ReplaceAll(random(rng.IntN(200)), []byte("\n"), nil)...), '\n')
		}
		run(s, bytes.NewReader(text), "produce", "-batch-records", "7")
		if got := run(s, nil, "consume"); got != string(text) {
			t.Errorf("the text came back changed (seed %d)", seed)
		}
	})
	t.Run("NUL", func(t *testing.T) {
		s := clienttest.New().Start(t)
		text := append(random(5000), 0)
		run(s, bytes.NewReader(text), "produce", "-0")
		if got := run(s, nil, "consume", "-0"); got != string(text) {
			t.Errorf("the text came back changed (seed %d)", seed)
		}
	})
	t.Run("file", func(t *testing.T) {
		s := clienttest.New().Start(t)
		content := random(900 << 10)
		name := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
		run(s, nil, "produce", "-file", name)
		if got := run(s, nil, "consume", "-raw"); got != string(content) {
			t.Errorf("the file came back changed (seed %d)", seed)
		}
	})
	t.Run("JSON", func(t *testing.T) {
		from, to := clienttest.New().Start(t), clienttest.New().Start(t)
		for i := range 300 {
			r := &v1.Record{Key: random(rng.IntN(4)), Value: random(rng.IntN(60))}
			if i%2 == 0 {
				r.Value = []byte(`text with "quotes", \ and ` + "\x00\x1f\x7f\u2028\n\t\r � ✓")
			}
			for range rng.IntN(3) {
				r.Headers = append(r.Headers, &v1.Header{Name: "näme", Value: random(rng.IntN(5))})
			}
			from.Append(r)
		}
		lines := run(from, nil, "consume", "-json")
		for line := range strings.Lines(lines) {
			var v map[string]any
			if err := json.Unmarshal([]byte(line), &v); err != nil || v["time"] == nil || v["offset"] == nil {
				t.Fatalf("%v: %s", err, line)
			}
		}
		run(to, strings.NewReader(lines), "produce", "-json")
		a, b := from.Records(), to.Records()
		if len(a) != len(b) {
			t.Fatalf("%d records became %d", len(a), len(b))
		}
		for i := range a {
			if !proto.Equal(a[i], b[i]) {
				t.Fatalf("record %d: %v became %v (seed %d)", i, a[i], b[i], seed)
			}
		}
	})
}
