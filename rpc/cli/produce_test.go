package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/diurnalog/diurna/rpc/client/clienttest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func TestProduceInput(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	long := strings.Repeat("x", 300<<10) // more than the reader's buffer
	for _, tc := range []struct {
		name   string
		args   []string
		stdin  string
		want   []*v1.Record
		code   int
		stderr string
	}{
		{"empty", nil, "", nil, 0, "0 records (0 B) acknowledged, in "},
		{"lines", nil, "a\n\nb\r\n", []*v1.Record{{Value: []byte("a")}, {}, {Value: []byte("b\r")}}, 0, "3 records (3 B) acknowledged, offsets 0–2, in "},
		{"last line without newline", nil, "a\nb", []*v1.Record{{Value: []byte("a")}, {Value: []byte("b")}}, 0, ""},
		{"one", nil, "a\n", []*v1.Record{{Value: []byte("a")}}, 0, "1 record (1 B) acknowledged, offset 0, in "},
		{"long line", nil, long + "\nb\n", []*v1.Record{{Value: []byte(long)}, {Value: []byte("b")}}, 0, ""},
		{"too long", []string{"-max-record-bytes", "10B"}, "short\n0123456789ab\nnot sent\n", []*v1.Record{{Value: []byte("short")}}, 1, "line 2 is longer than the record limit of 10 B"},
		{"too long with its frame", []string{"-max-record-bytes", "10B"}, "short\n012345678\n", []*v1.Record{{Value: []byte("short")}}, 1, "line 2 is longer"},
		{"far too long", []string{"-max-record-bytes", "1KiB"}, "short\n" + long + long, []*v1.Record{{Value: []byte("short")}}, 1, "line 2 is longer than the record limit of 1.0 KiB"},
		{"NUL", []string{"-0"}, "a\nb\x00c", []*v1.Record{{Value: []byte("a\nb")}, {Value: []byte("c")}}, 0, ""},
		{"key and header", []string{"-key", "k", "-header", "a=b=c", "-header", "a="}, "v\n", []*v1.Record{{
			Key: []byte("k"), Value: []byte("v"), Headers: []*v1.Header{{Name: "a", Value: []byte("b=c")}, {Name: "a"}},
		}}, 0, ""},
		{"key separator", []string{"-key-separator", "::"}, "k::v::w\n::\n", []*v1.Record{{Key: []byte("k"), Value: []byte("v::w")}, {}}, 0, ""},
		{"key separator missing", []string{"-key-separator", ":"}, "k:v\nw\n", []*v1.Record{{Key: []byte("k"), Value: []byte("v")}}, 1, `line 2 has no key: ":" is not in it`},
		{"files", []string{"-file", file("one", "a\nb\n"), "-file", file("two", "\x00\xff"), "-key", "k"}, "ignored", []*v1.Record{
			{Key: []byte("k"), Value: []byte("a\nb\n")}, {Key: []byte("k"), Value: []byte("\x00\xff")},
		}, 0, ""},
		{"file missing", []string{"-file", filepath.Join(dir, "none")}, "", nil, 1, "none: no such file"},
		{"file too large", []string{"-file", file("large", "0123456789ab"), "-max-record-bytes", "10B"}, "", nil, 1, "large is larger than the record limit"},
		{"JSON", []string{"-json"}, `{"key":"k","value":"v","offset":7,"time":"x"}` + "\n \n" + `{"value_base64":"AP8="}`, []*v1.Record{
			{Key: []byte("k"), Value: []byte("v")}, {Value: []byte("\x00\xff")},
		}, 0, ""},
		{"JSON unknown field", []string{"-json"}, "{}\n\n" + `{"vlaue":"v"}`, []*v1.Record{{}}, 1, `line 3: unknown field "vlaue"`},
		{"JSON too long", []string{"-json", "-max-record-bytes", "10B"}, `{"value":"0123456789ab"}`, nil, 1, "line 1 is longer"},
		{"expected offset", []string{"-expected-offset", "0", "-batch-records", "1"}, "a\nb\n", []*v1.Record{{Value: []byte("a")}, {Value: []byte("b")}}, 0, ""},
		{"quiet", []string{"-quiet"}, "a\n", []*v1.Record{{Value: []byte("a")}}, 0, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := clienttest.New().Start(t)
			sh := newShell(s, strings.NewReader(tc.stdin))
			if code := sh.run(append([]string{"produce"}, tc.args...)...); code != tc.code {
				t.Errorf("exit %d, want %d: %s", code, tc.code, sh.err.String())
			}
			contains(t, "stderr", sh.err.String(), tc.stderr)
			if tc.name == "quiet" && sh.err.String() != "" {
				t.Errorf("stderr: %s", sh.err.String())
			}
			if sh.out.String() != "" {
				t.Errorf("stdout: %s", sh.out.String())
			}
			if !slices.EqualFunc(s.Records(), tc.want, func(a, b *v1.Record) bool { return proto.Equal(a, b) }) {
				t.Errorf("got  %.300v\nwant %.300v", s.Records(), tc.want)
			}
		})
	}
}

// A line that was typed is sent before the next one, and its offset printed.
func TestProducePrompt(t *testing.T) {
	s := clienttest.New().Start(t)
	in, typist := io.Pipe()
	sh := newShell(s, in)
	reader, out := io.Pipe()
	sh.Stdout = out
	code := sh.start("produce", "-print-offsets")
	for i := range 3 {
		if _, err := fmt.Fprintf(typist, "line %d\n", i); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 10)
		n, err := reader.Read(buf)
		if err != nil || string(buf[:n]) != fmt.Sprintf("%d\n", i) {
			t.Fatalf("printed %q, %v", buf[:n], err)
		}
		if got := len(s.Values()); got != i+1 {
			t.Fatalf("an offset was printed and the log holds %d records", got)
		}
	}
	if err := typist.Close(); err != nil {
		t.Fatal(err)
	}
	if c := await(t, code); c != 0 {
		t.Errorf("exit %d: %s", c, sh.err.String())
	}
}

func TestProduceOffsetsInOrder(t *testing.T) {
	s := clienttest.New().Start(t)
	s.Append(&v1.Record{}, &v1.Record{})
	sh := newShell(s, strings.NewReader(strings.Repeat("x\n", 5000)))
	if code := sh.run("produce", "-print-offsets", "-batch-records", "7"); code != 0 {
		t.Fatalf("exit %d: %s", code, sh.err.String())
	}
	var want strings.Builder
	for i := range 5000 {
		fmt.Fprintln(&want, i+2)
	}
	if sh.out.String() != want.String() {
		t.Error("offsets are not 2 to 5001")
	}
	contains(t, "stderr", sh.err.String(), "offsets 2–5001,")
}

// stuck is an OnBatch that lets n batches through, tells of the next and then
// blocks until the call ends.
func stuck(n int, reached chan<- struct{}) func(context.Context, int, *v1.ProduceRequest) error {
	return func(ctx context.Context, position int, _ *v1.ProduceRequest) error {
		if position < n {
			return nil
		}
		close(reached)
		<-ctx.Done()
		return ctx.Err()
	}
}

// awaitOutput returns a channel that is closed when all of want was written to
// standard output.
func (sh *shell) awaitOutput(want string) <-chan struct{} {
	written := make(chan struct{})
	sh.Stdout = writerFunc(func(p []byte) (int, error) {
		n, err := sh.out.Write(p)
		if sh.out.String() == want {
			close(written)
		}
		return n, err
	})
	return written
}

func TestProduceServerDies(t *testing.T) {
	s := clienttest.New()
	reached := make(chan struct{})
	s.OnBatch = stuck(2, reached)
	s.Start(t)
	in, typist := io.Pipe()
	sh := newShell(s, in)
	acked := sh.awaitOutput("0\n1\n2\n3\n")
	code := sh.start("produce", "-print-offsets", "-batch-records", "2", "-linger", "1h")
	for i := range 7 { // three batches and one record that is never sent
		if _, err := fmt.Fprintln(typist, i); err != nil {
			t.Fatal(err)
		}
	}
	await(t, reached)
	await(t, acked)
	s.Stop()
	if c := await(t, code); c != ExitServer {
		t.Errorf("exit %d", c)
	}
	// The reader may have been about to take the last line or not.
	contains(t, "stderr", sh.err.String(), "Error: lost the connection to", "4 records acknowledged, offsets 0–3,", "2 unknown", "consume -from 4`")
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestProduceServerDiesWhileIdle(t *testing.T) {
	s := clienttest.New().Start(t)
	in, typist := io.Pipe()
	sh := newShell(s, in)
	reader, out := io.Pipe()
	sh.Stdout = out
	code := sh.start("produce", "-print-offsets", "-retry", "0")
	if _, err := io.WriteString(typist, "a\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := reader.Read(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	s.Stop()
	if c := await(t, code); c != ExitServer {
		t.Errorf("exit %d: more input was to come", c)
	}
	contains(t, "stderr", sh.err.String(), "lost the connection", "1 record (1 B) acknowledged")
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestProduceRefused(t *testing.T) {
	s := clienttest.New()
	s.OnBatch = func(_ context.Context, position int, _ *v1.ProduceRequest) error {
		if position == 1 {
			return clienttest.Failure(codes.Unavailable, "NO_LEADER", "no leader", "Try again.", "request", "1")
		}
		return nil
	}
	s.Start(t)
	sh := newShell(s, strings.NewReader("a\nb\nc\n"))
	if code := sh.run("produce", "-batch-records", "1", "-retry", "0"); code != ExitServer {
		t.Errorf("exit %d", code)
	}
	contains(t, "stderr", sh.err.String(), "Error: no leader (NO_LEADER). Try again.", "1 record acknowledged, offset 0,", "0 unknown")
	if strings.Contains(sh.err.String(), " 0 not appended") {
		t.Errorf("stderr: %s", sh.err.String())
	}

	sh = newShell(s, strings.NewReader("a\nb\n"))
	if code := sh.run("produce", "-expected-offset", "9"); code != ExitServer {
		t.Errorf("exit %d", code)
	}
	contains(t, "stderr", sh.err.String(), "(OFFSET_MISMATCH)", "0 records acknowledged, 2 not appended, 0 unknown")
}

func TestProduceInterrupt(t *testing.T) {
	t.Run("while waiting for input", func(t *testing.T) {
		s := clienttest.New().Start(t)
		in, typist := io.Pipe()
		sh := newShell(s, in)
		code := sh.start("produce", "-linger", "1h")
		// The second write ends when the first line has been taken in.
		for _, text := range []string{"a\nb\n", "half a li"} {
			if _, err := io.WriteString(typist, text); err != nil {
				t.Fatal(err)
			}
		}
		sh.interrupt(t)
		if c := await(t, code); c != 0 {
			t.Errorf("exit %d: %s", c, sh.err.String())
		}
		contains(t, "stderr", sh.err.String(), "2 records (2 B) acknowledged, offsets 0–1", "; interrupted")
		if err := in.Close(); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("twice, with a server that hangs", func(t *testing.T) {
		s := clienttest.New()
		reached := make(chan struct{})
		s.OnBatch = stuck(1, reached)
		s.Start(t)
		sh := newShell(s, strings.NewReader("a\nb\n"))
		acked := sh.awaitOutput("0\n")
		code := sh.start("produce", "-print-offsets", "-batch-records", "1", "-timeout", "0")
		await(t, reached)
		await(t, acked)
		sh.interrupt(t)
		sh.interrupt(t)
		if c := await(t, code); c != ExitServer {
			t.Errorf("exit %d", c)
		}
		contains(t, "stderr", sh.err.String(), "1 record acknowledged, offset 0, 0 not appended, 1 unknown", "; interrupted", "consume -from 1`")
	})

	t.Run("once, with a server that hangs", func(t *testing.T) {
		s := clienttest.New()
		reached := make(chan struct{})
		s.OnBatch = stuck(0, reached)
		s.Start(t)
		sh := newShell(s, strings.NewReader("a\nb\n"))
		// The second record waits for room, which is what sends the first.
		code := sh.start("produce", "-timeout", "200ms", "-linger", "1h", "-max-in-flight", "1B")
		await(t, reached)
		sh.interrupt(t)
		if c := await(t, code); c != ExitServer {
			t.Errorf("exit %d", c)
		}
		contains(t, "stderr", sh.err.String(), "(TIMEOUT)", "0 records acknowledged, 1 not appended, 1 unknown")
	})

	t.Run("while full", func(t *testing.T) {
		s := clienttest.New()
		reached, release := make(chan struct{}), make(chan struct{})
		s.OnBatch = func(_ context.Context, position int, _ *v1.ProduceRequest) error {
			if position == 0 {
				close(reached)
				<-release
			}
			return nil
		}
		s.Start(t)
		sh := newShell(s, strings.NewReader(strings.Repeat("0123456789\n", 100000)))
		code := sh.start("produce", "-max-in-flight", "100B", "-batch-records", "1")
		await(t, reached)
		sh.interrupt(t)
		close(release)
		if c := await(t, code); c != 0 {
			t.Errorf("exit %d: %s", c, sh.err.String())
		}
		// The record in hand is still taken in, and everything acknowledged.
		contains(t, "stderr", sh.err.String(), "; interrupted")
		if n := len(s.Values()); n == 0 || n > 1000 {
			t.Errorf("%d records", n)
		}
	})
}

func TestProduceTimeout(t *testing.T) {
	s := clienttest.New()
	s.OnBatch = stuck(0, make(chan struct{}))
	s.Start(t)
	sh := newShell(s, strings.NewReader("a\n"))
	if code := sh.run("produce", "-timeout", "50ms"); code != ExitServer {
		t.Errorf("exit %d", code)
	}
	contains(t, "stderr", sh.err.String(), "the server acknowledged nothing for 50ms (TIMEOUT)", "1 unknown")
}

func TestProduceOffsetsPipeClosed(t *testing.T) {
	s := clienttest.New().Start(t)
	in, typist := io.Pipe()
	sh := newShell(s, in)
	reader, out := io.Pipe()
	sh.Stdout = out
	if err := reader.Close(); err != nil {
		t.Fatal(err)
	}
	code := sh.start("produce", "-print-offsets")
	if _, err := io.WriteString(typist, "a\n"); err != nil {
		t.Fatal(err)
	}
	if c := await(t, code); c != ExitUsage {
		t.Errorf("exit %d", c)
	}
	contains(t, "stderr", sh.err.String(), "standard output was closed", "1 record (1 B) acknowledged")
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestProduceProgressOnlyOnTerminal(t *testing.T) {
	for _, terminal := range []bool{false, true} {
		s := clienttest.New().Start(t)
		in, typist := io.Pipe()
		sh := newShell(s, in)
		sh.IsTerminal = func(io.Writer) bool { return terminal }
		drawn := make(chan struct{})
		sh.Stderr = writerFunc(func(p []byte) (int, error) {
			if strings.Contains(string(p), "\r") {
				select {
				case <-drawn:
				default:
					close(drawn)
				}
			}
			return sh.err.Write(p)
		})
		code := sh.start("produce")
		if _, err := io.WriteString(typist, "a\n"); err != nil {
			t.Fatal(err)
		}
		if terminal {
			await(t, drawn)
		}
		if err := typist.Close(); err != nil {
			t.Fatal(err)
		}
		if c := await(t, code); c != 0 {
			t.Errorf("exit %d", c)
		}
		if strings.Contains(sh.err.String(), "\r") != terminal {
			t.Errorf("terminal %v: %q", terminal, sh.err.String())
		}
		contains(t, "stderr", sh.err.String(), "1 record (1 B) acknowledged")
	}
}

// TestProduceTyped: between the lines that somebody types, nothing is drawn,
// and how fast they are is no news to them.
func TestProduceTyped(t *testing.T) {
	in, typist, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	sh := newShell(clienttest.New().Start(t), in)
	sh.IsTerminal = func(io.Writer) bool { return true }
	g := (&produceCommand{node: node{Meta: sh.Meta}}).showProgress(nil)
	select {
	case <-g.done:
	default:
		t.Error("it draws")
	}
	g.stop()
	code := sh.start("produce")
	if _, err := io.WriteString(typist, "a\nb\n"); err != nil {
		t.Fatal(err)
	}
	if err := typist.Close(); err != nil {
		t.Fatal(err)
	}
	if c := await(t, code); c != 0 || strings.Contains(sh.err.String(), "/s)") {
		t.Errorf("exit %d: %s", c, sh.err.String())
	}
	contains(t, "stderr", sh.err.String(), "2 records (2 B) acknowledged, offsets 0–1, in ")
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
