package agent

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/diurnalog/diurna/discovery/consul/consultest"
)

// nomad is a real Nomad: a server, which is a client as well, in its development
// mode, and further clients. Its methods are for the test's goroutine.
type nomad struct {
	// addr is where it answers, host:port; url is the same as a URL.
	addr, url string

	binary, rpc string
	agents      []*process
	// containers has them run containers: then others have to see what they mount.
	containers bool
}

// findTool finds a program that a script of ours builds where there is none.
func findTool(t testing.TB, name string) string {
	t.Helper()
	variable := "DIURNA_" + strings.ToUpper(name)
	if named := os.Getenv(variable); named != "" {
		return named
	}
	if found, err := exec.LookPath(name); err == nil {
		return found
	}
	built := filepath.Join(program.home, "..", ".tools", "bin", name)
	if _, err := os.Stat(built); err != nil {
		t.Fatalf(`%v, and there is no %s on the PATH: run "make %s", or set %s to the path of one`, err, name, name, variable)
	}
	return built
}

// startNomad starts a Nomad that knows a Consul, with more configuration, and
// waits until jobs can be run. It ends with the test, and its jobs with it.
func startNomad(t testing.TB, consul *consultest.Server, more string) *nomad {
	t.Helper()
	n := &nomad{binary: findTool(t, "nomad")}
	n.start(t, consul, more)
	return n
}

// startNomadForContainers is startNomad for jobs whose tasks are containers.
func startNomadForContainers(t testing.TB, consul *consultest.Server) *nomad {
	t.Helper()
	n := &nomad{binary: findTool(t, "nomad"), containers: true}
	n.start(t, consul, "")
	return n
}

func (n *nomad) start(t testing.TB, consul *consultest.Server, more string) {
	t.Helper()
	for try := 1; ; try++ {
		ports := nomadPorts(t)
		n.addr, n.rpc = fmt.Sprintf("127.0.0.1:%d", ports[0]), fmt.Sprintf("127.0.0.1:%d", ports[1])
		n.url = "http://" + n.addr
		agent := n.agent(t, consul, "server", ports, more, "-dev")
		if err := n.awaitClients(t, agent, 1); err == nil {
			return
		} else if text := agent.stdout.text() + agent.stderr.text(); try == 5 || !strings.Contains(text, "address already in use") {
			t.Fatalf("start %s: %v\n%s", n.binary, err, text)
		}
	}
}

// addClient starts one more client, on this machine as all are.
func (n *nomad) addClient(t testing.TB, consul *consultest.Server, name, more string) {
	t.Helper()
	agent := n.agent(t, consul, name, nomadPorts(t), fmt.Sprintf("data_dir = %q\n%s", t.TempDir(), more))
	if err := n.awaitClients(t, agent, len(n.agents)); err != nil {
		t.Fatalf("start the client %s: %v\n%s", name, err, agent.stdout.text())
	}
}

// portRanges makes those of clients differ, which do not know of each other, nor
// of those of other test processes.
var portRanges atomic.Int64

func init() { portRanges.Store(rand.Int64N(110)) }

// agent launches a Nomad agent.
//
// What it runs is in processes of its own, which stay behind when it is killed.
// So, where that is allowed, it is the first process of a PID namespace: the
// kernel kills the others with it. unshare --kill-child has it die with unshare,
// which dies with this process. Elsewhere, and where there are containers, which
// are none of its processes, the jobs have to be stopped, as they are at the end
// of a test that is not killed.
func (n *nomad) agent(t testing.TB, consul *consultest.Server, name string, ports [3]int, more string, args ...string) *process {
	t.Helper()
	dir := t.TempDir()
	from := 20000 + 100*(portRanges.Add(1)%110)
	text := fmt.Sprintf(`
		name                 = %q
		bind_addr            = "127.0.0.1"
		disable_update_check = true
		leave_on_interrupt   = false
		advertise {
			http = "127.0.0.1"
			rpc  = "127.0.0.1"
			serf = "127.0.0.1"
		}
		ports {
			http = %d
			rpc  = %d
			serf = %d
		}
		consul {
			address          = %q
			token            = %q
			auto_advertise   = false
			server_auto_join = false
			client_auto_join = false
		}
		client {
			enabled           = true
			servers           = [%q]
			network_interface = "lo"
			min_dynamic_port  = %d
			max_dynamic_port  = %d
			options = {
				"fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean"
			}
		}
		plugin "raw_exec" {
			config {
				enabled = true
			}
		}
		%s
	`, name, ports[0], ports[1], ports[2], consul.HTTP, consul.Token, n.rpc, from, from+99, more)
	file := filepath.Join(dir, "nomad.hcl")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	// Not the caller's environment: NOMAD_ADDR and the like are about another one.
	command := []string{"env", "-i", "PATH=" + os.Getenv("PATH"), "HOME=" + dir, "TMPDIR=" + dir}
	if !n.containers {
		command = append(command, ownPIDs()...)
	}
	command = append(command, n.binary, "agent", "-config", file)
	p := startProcess(t, append(command, args...)...)
	n.agents = append(n.agents, p)
	t.Cleanup(func() {
		// The whole group: unshare does not pass it on.
		if err := syscall.Kill(-p.Process.Pid, syscall.SIGINT); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Error(err)
		}
		select {
		case <-p.ended:
		case <-time.After(20 * time.Second): // startProcess kills it
		}
		if t.Failed() {
			out := p.stdout.text()
			t.Logf("nomad %s:\n%s%s", name, out[max(0, len(out)-16<<10):], p.stderr.text())
		}
	})
	return p
}

// ownPIDs is the start of a command line that runs the rest of it as the first
// process of a PID namespace; nil where that is not allowed.
func ownPIDs() []string {
	args := []string{"unshare", "--pid", "--fork", "--kill-child", "--mount-proc"}
	if os.Geteuid() != 0 || exec.Command(args[0], append(args[1:], "true")...).Run() != nil {
		return nil
	}
	return args
}

// nomadPorts are three ports that are free, for TCP and UDP.
func nomadPorts(t testing.TB) (ports [3]int) {
	t.Helper()
	var held []io.Closer // all at once, so that no port is given out twice
	for i := range ports {
		for ports[i] == 0 {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, l)
			if p, err := net.ListenPacket("udp", l.Addr().String()); err == nil {
				held = append(held, p)
				ports[i] = l.Addr().(*net.TCPAddr).Port
			}
		}
	}
	for _, c := range held {
		_ = c.Close() // nothing was sent
	}
	return ports
}

type nomadNode struct {
	ID, Name, Status string
	Drivers          map[string]struct{ Healthy bool }
}

// awaitClients waits until so many clients can run tasks.
func (n *nomad) awaitClients(t testing.TB, agent *process, want int) error {
	t.Helper()
	deadline := time.After(2 * patience)
	for {
		var nodes []nomadNode
		err := n.ask("/v1/nodes", &nodes)
		ready := 0
		for _, node := range nodes {
			if node.Status == "ready" && node.Drivers["raw_exec"].Healthy {
				ready++
			}
		}
		if ready >= want {
			return nil
		}
		select {
		case <-agent.ended:
			return errors.New("it ended")
		case <-deadline:
			return fmt.Errorf("it is not ready: %+v, %v", nodes, err)
		case <-time.After(50 * time.Millisecond): // another process's state: nothing to wait for
		}
	}
}

// ask reads an answer of Nomad's API.
func (n *nomad) ask(path string, v any) error {
	hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := hc.Get(n.url + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, body)
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(body, v)
}

// try runs the nomad command, at the root of the repository as a user does, and
// returns its exit code and all it prints. The command's name goes first: flags
// come between it and its arguments.
func (n *nomad) try(t testing.TB, command string, args ...string) (code int, out string) {
	t.Helper()
	all := append([]string{"sh", "-c", `cd "$0" && exec "$@"`, filepath.Join(program.home, ".."), n.binary}, strings.Fields(command)...)
	p := startProcess(t, append(append(all, "-address="+n.url), args...)...)
	select {
	case <-p.ended:
		return p.ProcessState.ExitCode(), p.stdout.text() + p.stderr.text()
	case <-time.After(5 * patience): // a rolling update takes its time
		t.Fatalf("%v does not end:\n%s%s", p.Args, p.stdout.text(), p.stderr.text())
		return 0, ""
	}
}

// run is try for what has to work.
func (n *nomad) run(t testing.TB, command string, args ...string) string {
	t.Helper()
	code, out := n.try(t, command, args...)
	if code != 0 {
		t.Fatalf("nomad %s %v: exit %d\n%s", command, args, code, out)
	}
	return out
}

// runJob submits a job and waits, as the command does, until it is deployed. The
// job is stopped when the test ends. job is its name, file that of its file.
func (n *nomad) runJob(t testing.TB, job, file string, args ...string) {
	t.Helper()
	t.Cleanup(func() {
		if code, out := n.try(t, "job stop", job); code != 0 && !strings.Contains(out, "No job") {
			t.Errorf("stop %s: %s", job, out)
		}
		n.awaitAllocs(t, job, "the job has stopped", allStopped)
		if t.Failed() {
			n.showTasks(t, job)
		}
	})
	out := n.run(t, "job run", append(args, filepath.Join("jobs", file))...)
	t.Logf("%s", out[max(0, len(out)-2<<10):])
}

// showTasks logs what the tasks of a job have written last, and what became of
// them.
func (n *nomad) showTasks(t testing.TB, job string) {
	t.Helper()
	var allocs []allocation
	if err := n.ask("/v1/job/"+job+"/allocations", &allocs); err != nil {
		t.Log(err)
	}
	for _, a := range allocs {
		t.Logf("%s: %+v", a.Name, a)
		for task := range a.TaskStates {
			_, out := n.try(t, "alloc logs", "-stderr", "-task", task, a.ID)
			t.Logf("%s, %s:\n%s", a.Name, task, out[max(0, len(out)-4<<10):])
		}
	}
}

// allocation is one run of a job's group on a client.
type allocation struct {
	ID, Name, NodeID, NodeName  string
	DesiredStatus, ClientStatus string
	JobVersion                  int
	TaskStates                  map[string]taskState
	DeploymentStatus            *deploymentStatus
	ClientDescription           string
	CreateTime, ModifyTime      int64
}

type deploymentStatus struct {
	Healthy   *bool
	Timestamp time.Time // when that was decided
}

type taskState struct {
	State    string
	Failed   bool
	Restarts int
	Events   []struct {
		Type, DisplayMessage string
		ExitCode             int
	}
}

// awaitAllocs waits until the allocations of a job are as they should be.
func (n *nomad) awaitAllocs(t testing.TB, job, what string, ok func([]allocation) bool) []allocation {
	t.Helper()
	deadline := time.After(2 * patience)
	for {
		var allocs []allocation
		err := n.ask("/v1/job/"+job+"/allocations?all=true", &allocs)
		if err == nil && ok(allocs) {
			return allocs
		}
		select {
		case <-deadline:
			t.Errorf("waited in vain until %s: %+v, %v", what, allocs, err)
			return nil
		case <-time.After(100 * time.Millisecond): // another process's state: nothing to wait for
		}
	}
}

func allStopped(allocs []allocation) bool {
	for _, a := range allocs {
		if a.ClientStatus == "running" || a.ClientStatus == "pending" {
			return false
		}
	}
	return true
}

// oneByOne checks that each allocation of a version of a job was begun only when
// the one before was healthy.
func oneByOne(t testing.TB, allocs []allocation, version int) {
	t.Helper()
	of := slices.DeleteFunc(slices.Clone(allocs), func(a allocation) bool { return a.JobVersion != version })
	slices.SortFunc(of, func(a, b allocation) int { return cmp.Compare(a.CreateTime, b.CreateTime) })
	for i, a := range of {
		switch {
		case a.DeploymentStatus == nil || a.DeploymentStatus.Healthy == nil || !*a.DeploymentStatus.Healthy:
			t.Errorf("%s of version %d was never healthy: %+v", a.Name, version, a)
		case i+1 < len(of) && of[i+1].CreateTime < a.DeploymentStatus.Timestamp.UnixNano():
			t.Errorf("%s of version %d was begun before %s was healthy", of[i+1].Name, version, a.Name)
		}
	}
	if len(of) != 3 {
		t.Errorf("%d of version %d: %+v", len(of), version, of)
	}
}

// exitedCleanly checks that every task of stopped allocations ended by itself, with
// 0.
func (n *nomad) exitedCleanly(t testing.TB, allocs []allocation) {
	t.Helper()
	for _, a := range allocs {
		for task, state := range a.TaskStates {
			ends := 0
			for _, e := range state.Events {
				if e.Type != "Terminated" {
					continue
				}
				ends++
				switch {
				case e.ExitCode == 0:
				case strings.Contains(e.DisplayMessage, "error waiting on process"):
					// Nomad missed how it ended: its executor was gone before
					// it could be asked.
					if out := n.run(t, "alloc logs", "-stderr", "-task", task, a.ID); !strings.Contains(out[max(0, len(out)-200):], "stopped: after=") {
						t.Errorf("%s, %s, of version %d, ended while it did: %s", a.Name, task, a.JobVersion, out[max(0, len(out)-2<<10):])
					}
				default:
					t.Errorf("%s, %s, of version %d: %s", a.Name, task, a.JobVersion, e.DisplayMessage)
				}
			}
			if ends == 0 {
				t.Errorf("%s, %s, of version %d has not ended: %+v", a.Name, task, a.JobVersion, state)
			}
		}
	}
}
