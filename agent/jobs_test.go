package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/agent/identity/identitytest"
	"github.com/diurnalog/diurna/discovery/consul/consultest"
	"github.com/diurnalog/diurna/rpc/client"
)

// TestJobs: the files in jobs are formatted, and Nomad takes those that are jobs;
// the volume can be made; and where it has been, on three clients, the production
// job finds a place.
func TestJobs(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(program.home, "..", "jobs")
	consul := consultest.Start(t, consultest.Options{})
	n := startNomad(t, consul, "")
	n.addClient(t, consul, "second", "")
	n.addClient(t, consul, "third", "")

	if out, err := exec.CommandContext(t.Context(), n.binary, "fmt", "-check", "-recursive", dir).CombinedOutput(); err != nil {
		t.Errorf("these files are not formatted, run \"nomad fmt jobs\": %v\n%s", err, out)
	}
	jobs, err := filepath.Glob(filepath.Join(dir, "*.nomad.hcl"))
	if err != nil {
		t.Fatal(err)
	}
	if len(jobs) < 3 {
		t.Errorf("only %v: are they elsewhere now?", jobs)
	}
	for _, job := range jobs {
		job = filepath.Join("jobs", filepath.Base(job))
		if code, out := n.try(t, "job validate", job); code != 0 || strings.Contains(out, "Warning") {
			t.Errorf("%s: exit %d\n%s", filepath.Base(job), code, out)
		}
	}
	if code, _, stderr := runDiurna(t, "", "acl", "lint", "-policy-file", filepath.Join(dir, "policy.csv")); code != exitOK {
		t.Errorf("policy.csv: %s", stderr)
	}
	nodeConfiguration(t, n, "jobs/diurna.nomad.hcl")

	// Nomad has to be root to make a folder that belongs to somebody else.
	root := os.Geteuid() == 0
	for range 3 {
		if code, out := n.try(t, "volume create", "jobs/volume.hcl"); code != 0 && root {
			t.Errorf("volume.hcl: exit %d\n%s", code, out)
		}
	}
	// 1: the job would be made.
	code, out := n.try(t, "job plan", "jobs/diurna.nomad.hcl")
	t.Logf("%s", out)
	if code != 1 || !strings.Contains(out, "Task Group: \"node\" (3 create)") {
		t.Errorf("plan: exit %d", code)
	}
	if placed := strings.Contains(out, "All tasks successfully allocated"); !placed && root && hasDocker(t) {
		t.Error("there is no place for the nodes")
	} else if !placed {
		t.Log("without Docker, or not being root, only the plan, not the placement, could be looked at")
	}
}

// hasDocker tells whether containers can be run here.
func hasDocker(t testing.TB) bool {
	t.Helper()
	return exec.CommandContext(t.Context(), "docker", "info").Run() == nil
}

// nodeConfiguration checks that a node takes the configuration that a job gives
// it, once Nomad has filled in what it knows.
func nodeConfiguration(t testing.TB, n *nomad, job string) {
	t.Helper()
	var parsed struct {
		Job struct {
			TaskGroups []struct {
				Tasks []struct {
					Templates []struct{ DestPath, EmbeddedTmpl string }
				}
			}
		}
	}
	out := n.run(t, "job run", "-output", job)
	if err := json.Unmarshal([]byte(out), &parsed); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, tmpl := range parsed.Job.TaskGroups[0].Tasks[0].Templates {
		if !strings.HasSuffix(tmpl.DestPath, ".hcl") {
			continue
		}
		text := regexp.MustCompile(`\{\{ env "NOMAD_ADDR_\w+" \}\}`).ReplaceAllString(tmpl.EmbeddedTmpl, "127.0.0.1:8400")
		text = regexp.MustCompile(`\{\{ env "[a-z.]+" \}\}`).ReplaceAllString(text, "name")
		text = strings.ReplaceAll(text, `env("CONSUL_HTTP_TOKEN")`, `"token"`)
		file := filepath.Join(t.TempDir(), "diurna.hcl")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, err := config.Load(config.Sources{Files: []string{file}})
		if err != nil {
			t.Errorf("%s: %v\n%s", job, err, text)
		} else if cfg.Cluster.BootstrapExpect != 3 || cfg.TLS.Source != config.TLSVault {
			t.Errorf("%+v", cfg)
		}
		return
	}
	t.Errorf("%s has no template for a configuration", job)
}

// TestNomadProduction runs jobs/diurna.nomad.hcl: a container, its volume, a
// token of Consul and a certificate of Vault, both for Nomad's workload identity,
// and permissions. One node of it, since it wants a machine for each.
func TestNomadProduction(t *testing.T) {
	switch {
	case !hasDocker(t):
		t.Skip("there is no Docker engine to run the job with")
	case os.Geteuid() != 0:
		t.Skip("Nomad has to be root to make a volume for the image's user")
	}
	t.Parallel()
	image := importImage(t)
	c := &trustedCluster{processCluster: &processCluster{consul: consultest.Start(t, consultest.Options{ACL: true}), dir: t.TempDir()}, vault: identitytest.StartVault(t)}
	n := startNomadForContainers(t, c.consul)
	for _, chapter := range []string{"Vault", "Consul", "Volumes"} {
		c.follow(t, n, chapter)
	}

	free := nomadPorts(t)
	args := []string{"-var=image=" + image, "-var=nodes=1", fmt.Sprint("-var=rpc_port=", free[0]), fmt.Sprint("-var=http_port=", free[1]),
		"-var=consul=" + c.consul.HTTP, "-var=vault=" + c.vault.URL}
	n.runJob(t, "diurna", "diurna.nomad.hcl", args...)
	addr := fmt.Sprintf("127.0.0.1:%d", free[0])
	c.nodes = []*member{{name: addr, listen: addr}}
	c.awaitDNS(t, "diurna", ports(c.nodes...))
	// By name, which is also what the certificate is checked for.
	byName := func() *client.Client {
		dialer := net.Dialer{Resolver: c.dns()}
		return dialWith(t, fmt.Sprintf("%s:%d", serviceName, free[0]), client.WithTLS(*c.issue(t, "diurna", "example")),
			client.WithDialer(func(ctx context.Context, addr string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", addr) }))
	}
	values := numbered("x", 100)
	produce(t, byName(), values...)
	if got := consume(t, byName(), 0); !slices.Equal(got, values) {
		t.Errorf("%d records", len(got))
	}
	if _, err := dialWith(t, addr, client.WithTLS(*c.issue(t, "diurna", "nobody"))).Produce(t.Context(), []*client.Record{{}}); err == nil || !strings.Contains(err.Error(), "DENIED") {
		t.Errorf("who has no permission gets %v", err)
	}

	n.run(t, "job stop", "diurna")
	n.exitedCleanly(t, n.awaitAllocs(t, "diurna", "the job has stopped", allStopped))
	c.awaitDNS(t, "diurna", nil)
	n.run(t, "job run", append(args, "jobs/diurna.nomad.hcl")...)
	if got := consume(t, byName(), 0); !slices.Equal(got, values) {
		t.Errorf("in the volume there are %d records", len(got))
	}
}

// follow does what a chapter of docs/nomad.md says.
func (c *trustedCluster) follow(t testing.TB, n *nomad, chapter string) {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(program.home, "..", "docs", "nomad.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(page), "\n### "+chapter+"\n")
	text, _, _ = strings.Cut(text, "\n### ")
	blocks := regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindAllStringSubmatch(text, -1)
	if len(blocks) == 0 {
		t.Fatalf("docs/nomad.md has no commands in %q: are they elsewhere now?", chapter)
	}
	path := t.TempDir() // a PATH with the tools that are used here
	for _, name := range []string{"consul", "nomad", "vault"} {
		if err := os.Symlink(findTool(t, name), filepath.Join(path, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, block := range blocks {
		cmd := exec.CommandContext(t.Context(), "sh", "-euxc", block[1])
		cmd.Dir = filepath.Join(program.home, "..")
		cmd.Env = []string{"PATH=" + path + ":" + os.Getenv("PATH"), "HOME=" + c.dir, "NOMAD_ADDR=" + n.url,
			"CONSUL_HTTP_ADDR=" + c.consul.HTTP, "CONSUL_HTTP_TOKEN=" + c.consul.Token,
			"VAULT_ADDR=" + c.vault.URL, "VAULT_TOKEN=" + identitytest.RootToken}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("docs/nomad.md, %s: %v\n%s", chapter, err, out)
		}
	}
}

// importImage makes an image of the program, and nothing else.
func importImage(t testing.TB) string {
	t.Helper()
	name := "diurna-test:" + uuid.NewString()
	cmd := exec.CommandContext(t.Context(), "sh", "-ec", `tar -C "$1" -c diurna | docker import -c 'ENTRYPOINT ["/diurna"]' - "$2"`, "sh", filepath.Dir(diurna(t)), name)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("docker import: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("docker", "image", "rm", "-f", name).CombinedOutput(); err != nil {
			t.Errorf("docker image rm: %v\n%s", err, out)
		}
	})
	return name
}
