package cli

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/diurnalog/diurna/rpc/client/clienttest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// What only a process of its own has: a standard output that can be a closed
// pipe, and signals.

type process struct {
	*exec.Cmd
	stdin  io.WriteCloser
	stdout *os.File
	stderr bytes.Buffer
}

func startProcess(t *testing.T, s *clienttest.Server, args ...string) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{Cmd: exec.Command(self, args...)}
	p.Env = append(os.Environ(), runVerb+"=1", "DIURNA_ADDR="+s.Addr(),
		"GORACE=atexit_sleep_ms=0") // else a process with the race detector sleeps a second at its end
	p.Stderr = &p.stderr
	if p.stdin, err = p.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdout, p.Stdout = reader, writer
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	if err := writer.Close(); err != nil { // the child has it
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = reader.Close() // most tests have closed it
		_ = p.Process.Kill()
	})
	return p
}

func (p *process) wait(t *testing.T) int {
	t.Helper()
	result := make(chan error, 1)
	go func() { result <- p.Wait() }()
	err := await(t, result)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return p.ProcessState.ExitCode() // -1 for one that a signal ended
}

func TestProcessClosedPipe(t *testing.T) {
	s := clienttest.New().StartTCP(t)
	for range 100 {
		s.Append(&v1.Record{Value: bytes.Repeat([]byte("x"), 10000)})
	}
	p := startProcess(t, s, "consume")
	if _, err := io.ReadFull(p.stdout, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	if err := p.stdout.Close(); err != nil {
		t.Fatal(err)
	}
	if code := p.wait(t); code != 0 || p.stderr.Len() > 0 {
		t.Errorf("exit %d: %s", code, p.stderr.String())
	}
}

func TestProcessSignals(t *testing.T) {
	for _, signal := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		s := clienttest.New().StartTCP(t)
		produce := startProcess(t, s, "produce", "-print-offsets")
		offsets := bufio.NewReader(produce.stdout)
		if _, err := fmt.Fprintln(produce.stdin, "a"); err != nil {
			t.Fatal(err)
		}
		if line, err := offsets.ReadString('\n'); line != "0\n" || err != nil {
			t.Fatalf("printed %q, %v", line, err)
		}
		consume := startProcess(t, s, "consume", "-follow")
		if line, err := bufio.NewReader(consume.stdout).ReadString('\n'); line != "a\n" || err != nil {
			t.Fatalf("consumed %q, %v", line, err)
		}
		for _, p := range []*process{produce, consume} {
			if err := p.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			if code := p.wait(t); code != 0 {
				t.Errorf("%v after %v: exit %d: %s", p.Args[1:], signal, code, p.stderr.String())
			}
		}
		contains(t, "stderr", produce.stderr.String(), "1 record (1 B) acknowledged, offset 0, in ", "; interrupted")
	}
}
