//go:build !race

// Nothing of this runs in the test's own process, so the race detector has nothing to
// look at.

package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// TestCompose runs the stack in compose/ on this machine's Docker engine: a
// project of its own, on a network of its own, with no fixed port. Records are
// produced in one container and consumed in another that know only Consul's DNS,
// while nodes stop and are cut off, and Consul and Vault forget everything.
// DIURNA_SEED repeats the choices.
func TestCompose(t *testing.T) {
	s := newStack(t)
	s.up()
	s.awaitVoters()

	s.refuses("CERTIFICATE_REQUIRED", nil, "consume")
	s.refuses("DENIED", s.as("producer"), "consume")
	s.refuses("DENIED", s.as("consumer"), "produce")

	s.produce(100_000)
	s.compare("to begin with")

	down, cut := s.pick(), s.pick()
	s.note("stopping %s", down)
	s.compose(nil, "stop", down)
	s.produce(1000)
	s.compare("with " + down + " stopped")
	s.compose(nil, "start", down)
	s.awaitVoters()

	s.note("cutting %s off", cut)
	reconnect := s.cut(cut)
	s.produce(1000)
	s.compare("with " + cut + " cut off")
	reconnect()
	s.awaitVoters()

	s.note("restarting Consul and Vault, which forget everything")
	before, err := s.certificates()
	if err != nil {
		t.Fatal(err)
	}
	s.compose(nil, "restart", "consul", "vault")
	s.compare("while Consul and Vault come back")
	s.awaitRegistered()
	for _, n := range stackNodes {
		s.compose(nil, "kill", "-s", "HUP", n) // has a node ask for a certificate
	}
	s.until("every node has a certificate of the new Vault", func() error {
		now, err := s.certificates()
		if err != nil {
			return err
		}
		for _, n := range stackNodes {
			if !now[n].After(before[n]) {
				return fmt.Errorf("%s has not", n)
			}
		}
		return nil
	})
	s.produce(1000)
	s.compare("after Consul and Vault were restarted")

	s.note("taking all of it down, and up again")
	s.compose(nil, "down")
	s.up()
	s.awaitVoters()
	s.produce(1000)
	s.compare("after all was down")

	s.followPage()
}

// TestComposeImages: the images of the stack are those of the versions that
// scripts/ builds, so that stand-ins are what their names say.
func TestComposeImages(t *testing.T) {
	file, err := os.ReadFile("../compose/compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"consul", "vault"} {
		mod, err := os.ReadFile(filepath.Join("..", "scripts", name, "go.mod"))
		if err != nil {
			t.Fatal(err)
		}
		_, version, ok := strings.Cut(string(mod), "require github.com/hashicorp/"+name+" v")
		version, _, _ = strings.Cut(version, "\n")
		image := "image: hashicorp/" + name + ":"
		if n := strings.Count(string(file), image); !ok || n == 0 || strings.Count(string(file), image+version) != n {
			t.Errorf("scripts/%s/go.mod says %q; compose/compose.yaml should have it wherever it says %q", name, version, image)
		}
	}
}

// TestComposeConfiguration: the nodes of the stack take their configuration and their
// policy, which is looked at without an engine.
func TestComposeConfiguration(t *testing.T) {
	dir := filepath.Join("..", "compose", "diurna.d")
	over := []config.Override{
		{Flag: "-advertise", Key: "listener.advertise", Value: "10.0.0.1:8400"},
		{Flag: "-policy-file", Key: "acl.policy_file", Value: filepath.Join(dir, "policy.csv")},
	}
	if _, err := config.Load(config.Sources{Dirs: []string{dir}, Overrides: over}); err != nil {
		t.Error(err)
	}
	code, stdout, stderr := runDiurna(t, "", "acl", "check", "spiffe://diurna.diurna/client/producer", "default", "produce", "-policy-file", filepath.Join(dir, "policy.csv"))
	if code != exitOK {
		t.Errorf("acl check: exit %d\n%s%s", code, stdout, stderr)
	}
}

var stackNodes = []string{"n1", "n2", "n3"}

// stack is a running project of Compose.
type stack struct {
	t       *testing.T
	ctx     context.Context // ends in time to clean up
	top     string          // of the repository
	rng     *rand.Rand
	project string
	env     []string
	picked  []string
	ids     map[string]string // of services' containers, since the last up
	// What was produced so far: how many records, and the sum of their lines.
	records int
	sum     interface {
		io.Writer
		Sum([]byte) []byte
	}
	started time.Time
}

// newStack builds what the stack needs, and skips the test where there is no
// engine to run it.
func newStack(t *testing.T) *stack {
	if out, err := exec.CommandContext(t.Context(), "docker", "info").CombinedOutput(); err != nil {
		t.Skipf("no Docker engine answers, so the Compose stack is not tried here: docker info: %v\n%s", err, bytes.TrimSpace(out))
	}
	seed := uint64(vfstest.Env(t, "DIURNA_SEED", int(rand.Uint64()>>2)))
	top, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	// A test that runs out of time cleans nothing up, and engines keep what they run.
	ctx := t.Context()
	if end, ok := t.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadlineCause(ctx, end.Add(-2*patience), errors.New("little is left of the test's time (-timeout)"))
		t.Cleanup(cancel)
	}
	s := &stack{t: t, ctx: ctx, top: top, rng: rand.New(rand.NewPCG(seed, 0)), sum: sha256.New(), started: time.Now()}
	s.project = fmt.Sprintf("diurna-test-%d", os.Getpid())
	rootfs := filepath.Join(t.TempDir(), "rootfs")
	image := "diurna:" + s.project
	s.env = append(os.Environ(), "COMPOSE_PROJECT_NAME="+s.project, "DIURNA_IMAGE="+image, "DIURNA_ROOTFS="+rootfs, "ROOTFS="+rootfs)
	for _, port := range []string{"CONSUL", "DNS", "VAULT", "N1", "N1_HTTP", "N2", "N2_HTTP", "N3", "N3_HTTP"} {
		s.env = append(s.env, "DIURNA_"+port+"_PORT=") // any
	}
	t.Cleanup(func() {
		if t.Failed() {
			s.report()
		}
		s.clean("scripts/compose.sh", "--profile", "tools", "--profile", "example", "down", "-v", "--remove-orphans", "-t", "1")
		s.clean("docker", "image", "rm", "-f", image)
	})
	s.note("building the images; DIURNA_SEED=%d", seed)
	s.run(10*time.Minute, nil, "scripts/images.sh")
	s.run(time.Minute, nil, "scripts/image.sh", diurna(t), image)
	return s
}

func (s *stack) note(format string, args ...any) {
	s.t.Helper()
	s.t.Logf("%5.1f s: %s", time.Since(s.started).Seconds(), fmt.Sprintf(format, args...))
}

// try runs a program from the top of the repository, to its end.
func (s *stack) try(ctx context.Context, limit time.Duration, stdin io.Reader, args ...string) (stdout []byte, stderr string, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	program := args[0]
	if strings.HasPrefix(program, "scripts/") {
		program = filepath.Join(s.top, program)
	}
	cmd := exec.CommandContext(ctx, program, args[1:]...)
	cmd.Dir, cmd.Env, cmd.Stdin = s.top, s.env, stdin
	cmd.WaitDelay = 10 * time.Second // for what it has started itself
	var out, text bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &text
	err = cmd.Run()
	if ctx.Err() != nil {
		err = fmt.Errorf("it did not end in time: %w: %w", context.Cause(ctx), err)
	}
	return out.Bytes(), text.String(), err
}

func (s *stack) run(limit time.Duration, stdin io.Reader, args ...string) []byte {
	s.t.Helper()
	out, text, err := s.try(s.ctx, limit, stdin, args...)
	if err != nil {
		s.t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, text, out)
	}
	return out
}

func (s *stack) compose(stdin io.Reader, args ...string) []byte {
	s.t.Helper()
	return s.run(3*time.Minute, stdin, append([]string{"scripts/compose.sh"}, args...)...)
}

// clean undoes something at the end, also after a failure.
func (s *stack) clean(args ...string) {
	if out, text, err := s.try(context.WithoutCancel(s.ctx), time.Minute, nil, args...); err != nil {
		s.t.Errorf("clean up: %s: %v\n%s%s", strings.Join(args, " "), err, text, out)
	}
}

func (s *stack) report() {
	for _, args := range [][]string{{"ps"}, {"logs", "--tail=60"}} {
		out, text, err := s.try(context.WithoutCancel(s.ctx), time.Minute, nil, append([]string{"scripts/compose.sh"}, args...)...)
		s.t.Logf("%v: %v\n%s%s", args, err, text, out)
	}
}

// up starts everything, on a network that nobody has.
func (s *stack) up() {
	s.t.Helper()
	s.note("bringing the stack up")
	var text string
	var err error
	for range 10 {
		env := s.env
		if !slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, "DIURNA_NETWORK=") }) {
			s.env = append(slices.Clone(env), fmt.Sprintf("DIURNA_NETWORK=172.31.%d", 1+s.rng.IntN(250)))
		}
		_, text, err = s.try(s.ctx, 5*time.Minute, nil, "scripts/compose.sh", "up", "-d")
		if err == nil {
			s.ids = make(map[string]string)
			for _, service := range append([]string{"consul"}, stackNodes...) {
				s.ids[service] = strings.TrimSpace(string(s.compose(nil, "ps", "-q", service)))
			}
			return
		}
		if !strings.Contains(text, "overlap") {
			break
		}
		s.env = env
	}
	s.t.Fatalf("up: %v\n%s", err, text)
}

// pick chooses a node that was not chosen before.
func (s *stack) pick() string {
	for {
		n := stackNodes[s.rng.IntN(len(stackNodes))]
		if !slices.Contains(s.picked, n) {
			s.picked = append(s.picked, n)
			return n
		}
	}
}

// until waits for something to be so. What it is about is in containers, so there
// is nothing to be told by.
func (s *stack) until(what string, ok func() error) {
	s.t.Helper()
	deadline := time.Now().Add(3 * patience)
	why := ""
	for {
		err := ok()
		if err == nil {
			s.note("%s", what)
			return
		}
		if err.Error() != why {
			why = err.Error()
			s.note("not yet: %s", why)
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("given up waiting until %s: %v", what, err)
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-s.ctx.Done():
			s.t.Fatal(context.Cause(s.ctx))
		}
	}
}

// nodeSays is what `diurna status -json` prints, as far as it matters here.
type nodeSays struct {
	Healthy bool   `json:"healthy"`
	Problem string `json:"problem"`
	Voters  int    `json:"voters"`
	Self    struct {
		Expires time.Time `json:"certificate_expires"`
	} `json:"self"`
}

// status asks a node, in its own container.
func (s *stack) status(node string) (says nodeSays, err error) {
	// A node that is unwell says so, and in an exit code.
	out, text, err := s.try(s.ctx, time.Minute, nil, "docker", "exec", s.ids[node], "/bin/diurna", "status", "-json")
	if jerr := json.Unmarshal(out, &says); jerr != nil {
		return says, fmt.Errorf("%s: %w: %v: %s%s", node, jerr, err, text, out)
	}
	return says, nil
}

func (s *stack) awaitVoters() {
	s.t.Helper()
	s.until("there are three healthy voters", func() error {
		for _, n := range stackNodes {
			if says, err := s.status(n); err != nil {
				return err
			} else if !says.Healthy || says.Voters != 3 {
				return fmt.Errorf("%s: %d voters, %s", n, says.Voters, says.Problem)
			}
		}
		return nil
	})
	s.awaitRegistered()
}

// awaitRegistered waits until Consul lists all three again.
func (s *stack) awaitRegistered() {
	s.t.Helper()
	s.until("Consul lists three nodes", func() error {
		out, text, err := s.try(s.ctx, time.Minute, nil, "docker", "exec", s.ids["consul"],
			"wget", "-q", "-O", "-", "http://127.0.0.1:8500/v1/health/service/diurna?passing")
		if err != nil {
			return fmt.Errorf("%w: %s", err, text)
		}
		var list []json.RawMessage
		if err := json.Unmarshal(out, &list); err != nil {
			return err
		}
		if len(list) != 3 {
			return fmt.Errorf("it lists %d", len(list))
		}
		return nil
	})
}

// certificates tells until when that of each node is good.
func (s *stack) certificates() (map[string]time.Time, error) {
	list := make(map[string]time.Time)
	for _, n := range stackNodes {
		says, err := s.status(n)
		if err != nil {
			return nil, err
		}
		list[n] = says.Self.Expires
	}
	return list, nil
}

// as has a client's container use a certificate.
func (s *stack) as(client string) []string {
	return []string{"-e", "DIURNA_CLIENT_CERT=/certs/" + client + ".pem", "-e", "DIURNA_CLIENT_KEY=/certs/" + client + ".pem"}
}

// verb is how a verb is run in a container of its own.
func (s *stack) verb(options []string, verb ...string) []string {
	return slices.Concat([]string{"scripts/compose.sh", "run", "--rm", "-T"}, options, []string{"cli"}, verb)
}

func (s *stack) refuses(reason string, options []string, verb string) {
	s.t.Helper()
	if options == nil {
		options = []string{"-e", "DIURNA_CLIENT_CERT=", "-e", "DIURNA_CLIENT_KEY="}
	}
	out, text, err := s.try(s.ctx, time.Minute, strings.NewReader("x\n"), s.verb(options, verb)...)
	if err == nil || !strings.Contains(text, reason) {
		s.t.Errorf("%s with %v: %v, want %s\n%s%s", verb, options, err, reason, text, out)
	}
}

// produce sends so many more records, from a new container. It may be left not
// knowing what became of them, when the leader goes meanwhile; then it does what
// producers are told to: looks into the log, and sends what is not there.
func (s *stack) produce(n int) {
	s.t.Helper()
	var lines []byte
	for i := range n {
		lines = fmt.Appendf(lines, "%d %016x\n", s.records+i, s.rng.Uint64())
	}
	rest, look := lines, false
	s.until(fmt.Sprintf("%d records are produced", n), func() error {
		if look {
			there, text, err := s.try(s.ctx, 2*time.Minute, nil, s.verb(s.as("consumer"), "consume", "-linearizable", "-from", strconv.Itoa(s.records))...)
			if err != nil {
				return fmt.Errorf("look into the log: %w\n%s", err, text)
			}
			if !bytes.HasPrefix(lines, there) {
				s.t.Fatalf("from offset %d on, there is something else than what was sent:\n%.1000s", s.records, there)
			}
			rest, look = lines[len(there):], false
		}
		_, text, err := s.try(s.ctx, 2*time.Minute, bytes.NewReader(rest), s.verb(s.as("producer"), "produce")...)
		if err != nil {
			look = true
			return fmt.Errorf("%w\n%s", err, text)
		}
		return nil
	})
	if _, err := s.sum.Write(lines); err != nil {
		s.t.Fatal(err)
	}
	s.records += n
}

// compare consumes everything in a new container. That one is told nothing of
// what was acknowledged, so it asks for all of it (-linearizable). It may come when
// nodes have to learn first whose certificates Vault gives out now.
func (s *stack) compare(when string) {
	s.t.Helper()
	want := s.sum.Sum(nil)
	s.until(fmt.Sprintf("all %d records are read back %s", s.records, when), func() error {
		out, text, err := s.try(s.ctx, 2*time.Minute, nil, s.verb(s.as("consumer"), "consume", "-linearizable")...)
		if err != nil {
			return fmt.Errorf("%w\n%s", err, text)
		}
		if got := sha256.Sum256(out); !bytes.Equal(got[:], want) {
			s.t.Fatalf("%s: read %d lines with sum %x, produced %d with %x", when, bytes.Count(out, []byte("\n")), got, s.records, want)
		}
		return nil
	})
}

// followPage does what docs/compose.md proposes to try, with this stack's project and
// ports. Shortly after something was taken away, some of it may take another attempt.
func (s *stack) followPage() {
	s.t.Helper()
	page, err := os.ReadFile("../docs/compose.md")
	if err != nil {
		s.t.Fatal(err)
	}
	_, try, _ := strings.Cut(string(page), "## Things to try")
	try, _, _ = strings.Cut(try, "\n## ")
	blocks := fenced(try, "sh")
	if len(blocks) < 6 {
		s.t.Fatalf("docs/compose.md has %d blocks of things to try", len(blocks))
	}
	dir := s.t.TempDir()
	var fetch []string // what gets files; Vault's CA may be a new one since
	for _, block := range blocks {
		for command := range strings.Lines(strings.ReplaceAll(block, "\\\n", "")) {
			command = strings.TrimSpace(command)
			if strings.HasPrefix(command, "dig ") {
				s.resolve() // without dig, which need not be here
				continue
			}
			if _, err := exec.LookPath("curl"); err != nil && strings.HasPrefix(command, "curl ") {
				s.note("there is no curl here, so this is not tried: %s", command)
				continue
			}
			here := []string{"scripts/compose.sh", filepath.Join(s.top, "scripts", "compose.sh"), "bin/linux/diurna", diurna(s.t), "logs -f ", "logs "}
			if strings.Contains(command, "localhost:") { // at another port after each start
				here = append(here, "localhost:8400", s.port("n1", "8400/tcp"), "localhost:8402", s.port("n1", "8402/tcp"))
			}
			script := strings.NewReplacer(here...).Replace(command)
			if strings.Contains(command, ">ca.pem") || strings.Contains(command, ">me.pem") {
				fetch = append(fetch, script)
			} else if strings.Contains(command, "ca.pem") {
				script = strings.Join(append(slices.Clone(fetch), script), "; ")
			}
			s.until("this works: "+command, func() error {
				out, text, err := s.try(s.ctx, 2*time.Minute, nil, "bash", "-c", "set -euo pipefail; cd "+dir+"; "+script)
				switch {
				case strings.Contains(command, "producer.pem") && !strings.Contains(text, "DENIED"):
					return fmt.Errorf("not DENIED, but %v\n%s%s", err, text, out)
				case strings.Contains(command, "producer.pem"):
					return nil
				case strings.Contains(command, "logs -f consumer") && strings.Count(string(out), " UTC "+strconv.Itoa(time.Now().UTC().Year())) < 3:
					return fmt.Errorf("it shows nothing of the example: %s", out)
				case strings.Contains(command, "tail -n 1") && string(out) != "100000\n":
					return fmt.Errorf("it prints %q: %v\n%s", out, err, text)
				}
				if err != nil {
					return fmt.Errorf("%w\n%s%s", err, text, out)
				}
				return nil
			})
		}
	}
}

// port is where a port of a service is reached from this machine.
func (s *stack) port(service, port string) string {
	s.t.Helper()
	out := s.run(time.Minute, nil, "docker", "inspect", "-f", fmt.Sprintf("{{ (index .NetworkSettings.Ports %q 0).HostPort }}", port), s.ids[service])
	return "127.0.0.1:" + strings.TrimSpace(string(out))
}

// resolve asks Consul's DNS from this machine.
func (s *stack) resolve() {
	s.t.Helper()
	server := s.port("consul", "53/udp")
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", server)
	}}
	s.until("Consul's DNS tells this machine where all nodes are", func() error {
		addresses, err := resolver.LookupHost(s.ctx, "diurna.service.consul")
		if err == nil && len(addresses) != 3 {
			err = fmt.Errorf("it says %v", addresses)
		}
		return err
	})
}

// cut takes a node's container off the network, and returns how to put it back,
// at the address that it had.
func (s *stack) cut(node string) (reconnect func()) {
	s.t.Helper()
	container, network := s.ids[node], s.project+"_default"
	address := strings.TrimSpace(string(s.run(time.Minute, nil, "docker", "inspect", "-f",
		fmt.Sprintf("{{ (index .NetworkSettings.Networks %q).IPAddress }}", network), container)))
	s.run(time.Minute, nil, "docker", "network", "disconnect", network, container)
	return func() {
		s.t.Helper()
		s.run(time.Minute, nil, "docker", "network", "connect", "--ip", address, "--alias", node, network, container)
	}
}
