package cli

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	hcli "github.com/hashicorp/cli"
	"go.uber.org/goleak"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/diurnalog/diurna/rpc/cli/flags"
	"github.com/diurnalog/diurna/rpc/client"
	"github.com/diurnalog/diurna/rpc/client/clienttest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// runVerb, in the environment, makes the test binary the program itself.
const runVerb = "DIURNA_TEST_RUN_VERB"

func TestMain(m *testing.M) {
	if os.Getenv(runVerb) != "" {
		os.Exit(Run(os.Args[1:], nil))
	}
	goleak.VerifyTestMain(m)
}

// buffer may be written by one goroutine and read by another.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// shell is one run of the program.
type shell struct {
	*Meta
	out, err buffer
	env      map[string]string
	signals  chan os.Signal
}

func newShell(s *clienttest.Server, stdin io.Reader) *shell {
	sh := &shell{env: map[string]string{}, signals: make(chan os.Signal)}
	sh.Meta = &Meta{
		Stdin: stdin, Stdout: &sh.out, Stderr: &sh.err,
		LookupEnv:  func(name string) (string, bool) { v, ok := sh.env[name]; return v, ok },
		Interrupts: func() (<-chan os.Signal, func()) { return sh.signals, func() {} },
	}
	if s != nil && s.Dialer() != nil {
		sh.DialOptions = []client.Option{client.WithDialer(s.Dialer())}
	}
	return sh
}

func (sh *shell) run(args ...string) int { return sh.Run(args, nil) }

// start runs in the background.
func (sh *shell) start(args ...string) <-chan int {
	code := make(chan int, 1)
	go func() { code <- sh.run(args...) }()
	return code
}

func await[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Fatal("waited too long")
		panic("unreachable")
	}
}

func (sh *shell) interrupt(t *testing.T) {
	t.Helper()
	select {
	case sh.signals <- os.Interrupt:
	case <-time.After(20 * time.Second):
		t.Fatal("nobody takes the interrupt")
	}
}

func contains(t *testing.T, what, s string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !strings.Contains(s, want) {
			t.Errorf("%s lacks %q:\n%s", what, want, s)
		}
	}
}

func TestUsage(t *testing.T) {
	more := map[string]hcli.CommandFactory{
		"debug segment": func() (hcli.Command, error) { return &hcli.MockCommand{SynopsisText: "Look into a segment"}, nil },
	}
	for _, tc := range []struct {
		args   string
		code   int
		stdout []string // nil: must be empty
		stderr []string
	}{
		{"", 1, nil, []string{"Usage: diurna", "produce", "debug segment                      Look into a segment"}},
		{"-help", 0, []string{"Usage: diurna", "consume"}, nil},
		{"-version", 0, []string{"diurna " + Version}, nil},
		{"produce -help", 0, []string{"Usage: diurna produce", "-expected-offset=<offset>", "DIURNA_ADDR", "Examples:", "Default 5ms"}, nil},
		{"consume -h", 0, []string{"Usage: diurna consume", "-from=<start>", "Examples:"}, nil},
		{"status -help", 0, []string{"Usage: diurna status", "2 when something is not"}, nil},
		{"servers -help", 0, []string{"Usage: diurna servers"}, nil},
		{"prodcue", 1, nil, []string{`unknown command "prodcue"`, "Did you mean produce?"}},
		{"xyzzy", 1, nil, []string{`unknown command "xyzzy". Run`}},
		{"debug", 1, nil, []string{"segment"}},
		{"debug segment", 0, nil, nil},
		{"-addr x produce", 1, nil, []string{"unknown option -addr", "come after it"}},
		{"produce -quite", 1, nil, []string{"unknown option -quite. Did you mean -quiet?", "diurna produce -help"}},
		{"produce -batch-record 4", 1, nil, []string{"Did you mean -batch-records?"}},
		{"produce -linger 1s --bogus=1", 1, nil, []string{"unknown option -bogus."}},
		{"produce file.txt", 1, nil, []string{`unexpected argument "file.txt"`}},
		{"consume follow", 1, nil, []string{`unexpected argument "follow". Did you mean -follow?`}},
		{"produce -linger soon", 1, nil, []string{`invalid value "soon" for flag -linger`, "want a duration"}},
		{"produce -batch-bytes many", 1, nil, []string{"-batch-bytes", "want a size"}},
		{"produce -expected-offset -1", 1, nil, []string{"-expected-offset", "want an offset"}},
		{"produce -header x", 1, nil, []string{"want name=value"}},
		{"produce -key", 1, nil, []string{"flag needs an argument: -key"}},
		{"produce -json -0", 1, nil, []string{"-0 and -json cannot be used together"}},
		{"produce -json -key a", 1, nil, []string{"-json and -key"}},
		{"produce -key a -key-separator :", 1, nil, []string{"-key and -key-separator"}},
		{"produce -addr http://x", 1, nil, []string{`"http://x" is not host:port`}},
		{"consume -raw -json", 1, nil, []string{"-raw and -json"}},
		{"consume -from soon", 1, nil, []string{"-from soon: want earliest"}},
		{"consume -from earlist", 1, nil, []string{"Did you mean earliest?"}},
		{"consume -from -10", 1, nil, []string{"say last:10"}},
		{"leave -help", 0, []string{"Usage: diurna leave", "SIGTERM", "Examples:"}, nil},
		{"operator", 1, nil, []string{"raft"}},
		{"operator raft list-peers -help", 0, []string{"Usage: diurna operator raft list-peers", "-stale", "Examples:"}, nil},
		{"operator raft add-peer -help", 0, []string{"Usage: diurna operator raft add-peer", "Examples:"}, nil},
		{"operator raft remove-peer -help", 0, []string{"Usage: diurna operator raft remove-peer", "Examples:"}, nil},
		{"operator raft transfer-leadership -help", 0, []string{"Usage: diurna operator raft transfer-leadership", "Examples:"}, nil},
		{"operator raft add-peer -peer-id a", 1, nil, []string{"both -peer-id and -peer-address are needed"}},
		{"operator raft remove-peer", 1, nil, []string{"say which node: -peer-id or -peer-address"}},
		{"operator raft remove-peer -peer-id a -peer-address b:1", 1, nil, []string{"-peer-id and -peer-address cannot be used together"}},
		{"leave -addr a,b", 1, nil, []string{"it must be clear which node is to leave"}},
		{"leave -addr a -addr b", 1, nil, []string{"it must be clear which node is to leave"}},
		{"version -json x", 1, nil, []string{`unexpected argument "x"`}},
		{"status -timeout -1s", 1, nil, []string{"want a duration"}},
	} {
		t.Run(tc.args, func(t *testing.T) {
			sh := newShell(nil, strings.NewReader(""))
			code := sh.Run(strings.Fields(tc.args), more)
			if code != tc.code {
				t.Errorf("exit %d, want %d", code, tc.code)
			}
			contains(t, "stdout", sh.out.String(), tc.stdout...)
			contains(t, "stderr", sh.err.String(), tc.stderr...)
			if tc.stdout == nil && sh.out.String() != "" {
				t.Errorf("stdout: %s", sh.out.String())
			}
			if tc.stderr == nil && sh.err.String() != "" {
				t.Errorf("stderr: %s", sh.err.String())
			}
		})
	}
}

func TestDidYouMean(t *testing.T) {
	for in, want := range map[string]string{
		"form": "from", "folow": "follow", "f": "", "log": "log", "zzzzz": "", "lin": "linearizable",
	} {
		got := flags.DidYouMean(in, []string{"from", "follow", "log", "linearizable"}, "")
		if want != "" {
			want = " Did you mean " + want + "?"
		}
		if got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// unusedAddr is a loopback address that nothing listens on.
func unusedAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return l.Addr().String()
}

func TestUnreachable(t *testing.T) {
	addr := unusedAddr(t)
	for _, verb := range []string{"produce", "consume", "servers", "status", "leave", "operator raft list-peers", "operator raft remove-peer -peer-id a", "operator raft transfer-leadership"} {
		sh := newShell(nil, strings.NewReader("a\n"))
		sh.env["DIURNA_ADDR"] = addr
		if code := sh.run(strings.Fields(verb)...); code != ExitServer {
			t.Errorf("%s: exit %d", verb, code)
		}
		contains(t, verb, sh.err.String(), "cannot reach a node at "+addr+": connection refused. Is one running? Start one with `diurna agent -dev`, or name another with -addr or DIURNA_ADDR.")
		if sh.out.String() != "" {
			t.Errorf("%s: stdout: %s", verb, sh.out.String())
		}
	}
}

// Flags come before the environment, and that before the default.
func TestAddressPrecedence(t *testing.T) {
	s := clienttest.New().StartTCP(t)
	sh := newShell(nil, nil)
	sh.env["DIURNA_ADDR"] = s.Addr()
	if code := sh.run("status"); code != 0 {
		t.Errorf("environment: exit %d: %s", code, sh.err.String())
	}
	sh = newShell(nil, nil)
	sh.env["DIURNA_ADDR"] = unusedAddr(t)
	if code := sh.run("status", "-addr", s.Addr()); code != 0 {
		t.Errorf("flag: exit %d: %s", code, sh.err.String())
	}
	var p serversCommand
	p.Meta = newShell(nil, nil).Meta
	if err := p.options().Parse(nil); err != nil || p.addr != "127.0.0.1:8400" {
		t.Errorf("default %q, %v", p.addr, err)
	}
}

func nodes() *v1.GetServersResponse {
	return &v1.GetServersResponse{AnsweredBy: "id-b", Servers: []*v1.Server{
		{Id: "id-a", Name: "first", Address: "10.0.0.1:8400", Role: v1.Server_ROLE_VOTER, Leader: true, Term: 7, Version: "1.0"},
		{Id: "id-b", Name: "second", Address: "10.0.0.2:8400", Role: v1.Server_ROLE_VOTER, Term: 7, LastContact: durationpb.New(12 * time.Millisecond), AppliedIndex: 99, FirstOffset: 5, HighWatermark: 42},
		{Id: "id-c", Address: "10.0.0.3:8400", Role: v1.Server_ROLE_NONVOTER},
	}}
}

func TestServers(t *testing.T) {
	s := clienttest.New()
	s.Nodes = nodes()
	s.Start(t)
	sh := newShell(s, nil)
	if code := sh.run("servers"); code != 0 {
		t.Fatalf("exit %d: %s", code, sh.err.String())
	}
	want := "" +
		"NAME    ID      ADDRESS        ROLE      LEADER  HEALTH  TERM  LAST CONTACT  APPLIED  FIRST  NEXT  VERSION\n" +
		"first   id-a    10.0.0.1:8400  voter     yes     -       7     -             -        -      -     1.0\n" +
		"second  id-b *  10.0.0.2:8400  voter     no      -       7     12ms          99       5      42    -\n" +
		"-       id-c    10.0.0.3:8400  nonvoter  no      -       -     -             -        -      -     -\n"
	if got := sh.out.String(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}

	sh = newShell(s, nil)
	if code := sh.run("servers", "-json"); code != 0 {
		t.Fatalf("exit %d: %s", code, sh.err.String())
	}
	var out client.ServersJSON
	if err := json.Unmarshal([]byte(sh.out.String()), &out); err != nil {
		t.Fatal(err)
	}
	if out.AnsweredBy != "id-b" || len(out.Servers) != 3 || *out.Servers[1].HighWatermark != 42 || out.Servers[0].HighWatermark != nil {
		t.Errorf("got %s", sh.out.String())
	}
}

func TestStatus(t *testing.T) {
	for _, tc := range []struct {
		name   string
		spoil  func(*clienttest.Server)
		code   int
		stdout []string
		stderr string
	}{
		{"healthy", func(*clienttest.Server) {}, 0, []string{"Health   SERVING", "Node     second (id-b)", "Role     voter", "Leader   first (id-a) at 10.0.0.1:8400", "3, 2 of them voters", "offsets 5–41"}, ""},
		{"not serving", func(s *clienttest.Server) {
			s.Health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
		}, 2, []string{"NOT_SERVING"}, "says NOT_SERVING"},
		{"no leader", func(s *clienttest.Server) { s.Nodes.Servers[0].Leader = false }, 2, []string{"Leader   none known"}, "knows no leader"},
		{"removed", func(s *clienttest.Server) { s.Nodes.AnsweredBy = "id-x" }, 2, []string{"Leader   first"}, "is not in the cluster's configuration"},
		{"fresh", func(s *clienttest.Server) { s.Nodes.Servers = nil }, 2, nil, "belongs to no cluster yet"},
		{"voter unhealthy", func(s *clienttest.Server) { s.Nodes.Servers[0].Healthy = new(bool) }, 2, []string{"SERVING"}, "the voter first (id-a) is unhealthy"},
		{"voters unhealthy", func(s *clienttest.Server) {
			s.Nodes.Servers[0].Healthy, s.Nodes.Servers[1].Healthy = new(bool), new(bool)
		}, 2, []string{"SERVING"}, "2 of 2 voters are unhealthy: first (id-a), second (id-b)"},
		{"nonvoter unhealthy", func(s *clienttest.Server) { s.Nodes.Servers[2].Healthy = new(bool) }, 0, []string{"SERVING"}, ""},
		{"empty log", func(s *clienttest.Server) { s.Nodes.Servers[1].FirstOffset = 42 }, 0, []string{"empty, the next offset is 42"}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := clienttest.New()
			s.Nodes = nodes()
			tc.spoil(s)
			s.Start(t)
			sh := newShell(s, nil)
			if code := sh.run("status"); code != tc.code {
				t.Errorf("exit %d: %s", code, sh.err.String())
			}
			contains(t, "stdout", sh.out.String(), tc.stdout...)
			contains(t, "stderr", sh.err.String(), tc.stderr)

			sh = newShell(s, nil)
			if code := sh.run("status", "-json"); code != tc.code {
				t.Errorf("-json: exit %d", code)
			}
			var out nodeStatus
			if err := json.Unmarshal([]byte(sh.out.String()), &out); err != nil || out.Healthy != (tc.code == 0) || (out.Problem == "") != out.Healthy {
				t.Errorf("-json: %v %s", err, sh.out.String())
			}

			want := tc.code
			if strings.HasPrefix(tc.name, "voter") { // the others' fault
				want = 0
			}
			sh = newShell(s, nil)
			if code := sh.run("status", "-self"); code != want {
				t.Errorf("-self: exit %d, want %d: %s", code, want, sh.err.String())
			}
		})
	}
}

func TestVersion(t *testing.T) {
	sh := newShell(nil, nil)
	if code := sh.run("version"); code != 0 || !strings.HasPrefix(sh.out.String(), "diurna "+Version) {
		t.Errorf("exit %d: %s", code, sh.out.String())
	}
	sh = newShell(nil, nil)
	if code := sh.run("version", "-json"); code != 0 {
		t.Errorf("exit %d", code)
	}
	var out map[string]string
	if err := json.Unmarshal([]byte(sh.out.String()), &out); err != nil || out["version"] != Version || !strings.HasPrefix(out["go"], "go") {
		t.Errorf("%v: %s", err, sh.out.String())
	}
}
