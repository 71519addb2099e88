package agent

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/diurnalog/diurna/logstore/vfs"
	_ "github.com/diurnalog/diurna/rpc/cli" // so that a cached result is one of the verbs as they are
)

// holdEnv makes this binary a process that holds a file's lock until its
// standard input ends.
const holdEnv = "DIURNA_TEST_HOLD_LOCK"

func TestMain(m *testing.M) {
	if name := os.Getenv(holdEnv); name != "" {
		os.Exit(holdLock(name))
	}
	if bytes := os.Getenv(pushEnv); bytes != "" {
		if err := push(bytes); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	// Now, because tests change the environment and the working directory.
	program.home, program.err = os.Getwd()
	if program.err == nil {
		program.dir, program.err = os.MkdirTemp("", "diurna-agent-test-")
	}
	code := m.Run()
	if err := os.RemoveAll(program.dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	if code == 0 {
		if err := goleak.Find(goleak.IgnoreAnyFunction("github.com/diurnalog/diurna/" + simOrphan)); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left behind:", err)
			code = 1
		}
	}
	os.Exit(code)
}

func holdLock(name string) int {
	lock, err := vfs.OS.Lock(name)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("locked")
	_, _ = os.Stdin.Read(make([]byte, 1)) // until it ends
	if err := lock.Close(); err != nil {
		return 1
	}
	return 0
}

// program is the real thing, built once for all tests that run it. Without the
// race detector, whatever the tests have: it is to be killed at full speed.
var program struct {
	once sync.Once
	home string // where the source is
	dir  string
	path string
	err  error
}

func diurna(t testing.TB) string {
	t.Helper()
	program.once.Do(func() {
		if program.err != nil {
			return
		}
		program.path = filepath.Join(program.dir, "diurna")
		build := exec.Command("go", "build", "-race=false", "-buildvcs=false", "-o", program.path, "github.com/diurnalog/diurna")
		build.Dir = program.home
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			program.err = fmt.Errorf("%w\n%s", err, out)
		}
	})
	if program.err != nil {
		t.Fatalf("build diurna: %v", program.err)
	}
	return program.path
}
