package config

import (
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// testHost is a machine called box with two variables set and one private
// address. Files are real.
func testHost() host {
	h := thisHost
	h.env = func(name string) (string, bool) {
		v, ok := map[string]string{"NAME": "from-env", "EMPTY": ""}[name]
		return v, ok
	}
	h.hostname = func() (string, error) { return "box", nil }
	h.privateIP = func() (string, error) { return "10.1.2.3", nil }
	return h
}

// write puts files into a new folder and returns it. Names and texts alternate.
func write(t *testing.T, namesAndTexts ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i := 0; i < len(namesAndTexts); i += 2 {
		path := filepath.Join(dir, namesAndTexts[i])
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(namesAndTexts[i+1]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// loadText loads one file called node.hcl beside a data_dir.
func loadText(t *testing.T, text string) (*Config, error) {
	t.Helper()
	dir := write(t, "node.hcl", text, "a.hcl", plaintext)
	return load(Sources{
		Files:     []string{filepath.Join(dir, "a.hcl"), filepath.Join(dir, "node.hcl")},
		Overrides: []Override{{Flag: "-data-dir", Key: "data_dir", Value: "/data"}},
	}, testHost())
}

// plaintext is what every node but a -dev one has to say one way or the other.
const plaintext = "tls {\n  source = \"none\"\n}\n"

func mustLoad(t *testing.T, src Sources) *Config {
	t.Helper()
	c, err := load(src, testHost())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The reference file shows every key, and says the truth about defaults.
func TestReferenceFile(t *testing.T) {
	const path = "../../config.hcl"
	got, err := Load(Sources{Files: []string{path}})
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.DataDir, want.TLS.Source = got.DataDir, got.TLS.Source // these have no default
	if !reflect.DeepEqual(got, want) {
		t.Errorf("config.hcl says\n%+v, the defaults are\n%+v", got, want)
	}

	src, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block, said := "", make(map[string]bool)
	documented := false
	for i, line := range strings.Split(string(src), "\n") {
		name, _, isAttr := strings.Cut(strings.TrimSpace(line), " = ")
		switch {
		case strings.HasPrefix(strings.TrimSpace(line), "#"):
			documented = true
			continue
		case strings.HasSuffix(line, " {"):
			block = strings.TrimSuffix(line, " {") + "."
		case line == "}":
			block = ""
		case isAttr:
			said[block+name] = true
			if !documented {
				t.Errorf("config.hcl:%d: %s has no comment", i+1, block+name)
			}
		}
		documented = false
	}
	for _, k := range keys {
		if !said[k.name] {
			t.Errorf("config.hcl does not show %s", k.name)
		}
	}
}

// Every field of Config can be configured, by exactly one key, but for Dev,
// which is a flag.
func TestEveryFieldHasAKey(t *testing.T) {
	var c Config
	pointers := map[any]string{}
	for _, k := range keys {
		p := k.field(&c)
		if other := pointers[p]; other != "" {
			t.Errorf("%s and %s are the same field", k.name, other)
		}
		pointers[p] = k.name
	}
	var walk func(v reflect.Value, path string)
	walk = func(v reflect.Value, path string) {
		for i := range v.NumField() {
			f, name := v.Field(i), path+v.Type().Field(i).Name
			if f.Kind() == reflect.Struct {
				walk(f, name+".")
			} else if pointers[f.Addr().Interface()] == "" && name != "Dev" {
				t.Errorf("no key sets Config.%s", name)
			}
		}
	}
	walk(reflect.ValueOf(&c).Elem(), "")
}

func TestDefaults(t *testing.T) {
	if _, err := load(Sources{}, testHost()); err == nil || !strings.Contains(err.Error(), "-data-dir") {
		t.Errorf("no data_dir: %v", err)
	}
	dev, err := load(Sources{Dev: true}, testHost())
	if err != nil {
		t.Fatal(err)
	}
	want := defaults(testHost())
	want.forDev()
	if !reflect.DeepEqual(dev, want) || dev.Node.Name != "box" {
		t.Errorf("got %+v, want %+v", dev, want)
	}
	if d := Dev(); !d.Dev || d.DataDir != "" {
		t.Errorf("Dev() = %+v", d)
	}

	nameless := testHost()
	nameless.hostname = func() (string, error) { return "", errors.New("no name") }
	if c, err := load(Sources{Dev: true}, nameless); err != nil || c.Node.Name != "localhost" {
		t.Errorf("host without a name: %+v, %v", c, err)
	}
}

func TestEveryKeyIsRead(t *testing.T) {
	c, err := loadText(t, `
log_level = "WARN"
log_json = true
shutdown_timeout = "1m30s"
node { name = "n1" }
cluster {
  name = "orders"
  bootstrap_expect = 3
  zone = "eu-1"
}
discovery {
  type = "static"
  peers = ["10.0.0.1:8400", "10.0.0.2:8400"]
}
consul {
  address = "https://127.0.0.1:8501"
  token = "t"
  token_file = "/t"
  ca_file = "/ca"
  cert_file = "/cert"
  key_file = "/key"
  service = "log"
  tags = ["blue"]
}
membership {
  stabilization = "1s"
  last_contact = "2s"
  left_after = "3m"
  dead_after = "4h"
  cleanup_dead = false
}
disk {
  min_free = "0B"
  stall_limit = "3s"
}
listener {
  rpc = "0.0.0.0:1"
  advertise = "log.example.com:2"
  http = "0.0.0.0:3"
  max_connections = 3
  max_streams = 4
}
tls {
  source = "Vault"
  cert_file = "/tc"
  key_file = "/tk"
  ca_file = "/tca"
  dev_dir = "/td"
  min_version = "1.2"
  names = ["n1.example.com", "10.0.0.9"]
}
vault {
  address = "https://vault.service.consul:8200"
  ca_file = "/vca"
  namespace = "ns"
  auth = "jwt"
  auth_mount = "jwt-nomad"
  auth_role = "log"
  token = "vt"
  token_file = "/vt"
  role_id = "r"
  secret_id = "s"
  secret_id_file = "/s"
  jwt_file = "/j"
  pki_mount = "pki"
  pki_role = "server"
  ca_mounts = ["root"]
  ttl = "2h"
}
acl {
  enabled = true
  policy_file = "/p.csv"
  model_file = "/m.conf"
}
limits {
  max_record = "5B"
  max_batch = "6KiB"
  in_flight = "7GiB"
}
log {
  segment_size = "8MiB"
  retention_age = "48h"
  retention_bytes = "9GiB"
  scrub_interval = "13h"
}
raft {
  heartbeat_timeout = "1s"
  election_timeout = "2s"
  leader_lease_timeout = "900ms"
  commit_timeout = "11ms"
  snapshot_interval = "12s"
}
telemetry {
  pprof = true
  otlp_endpoint = "otel:4317"
  otlp_insecure = true
  otlp_ca_file = "/oca"
  sample_one_in = 7
}
`)
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		DataDir: "/data", LogLevel: "warn", LogJSON: true, ShutdownTimeout: 90 * time.Second,
		Node:      Node{Name: "n1"},
		Cluster:   Cluster{Name: "orders", BootstrapExpect: 3, Zone: "eu-1"},
		Discovery: Discovery{Type: "static", Peers: []string{"10.0.0.1:8400", "10.0.0.2:8400"}},
		Consul: Consul{Address: "https://127.0.0.1:8501", Token: "t", TokenFile: "/t", CAFile: "/ca", CertFile: "/cert", KeyFile: "/key",
			Service: "log", Tags: []string{"blue"}},
		Membership: Membership{Stabilization: time.Second, LastContact: 2 * time.Second, LeftAfter: 3 * time.Minute, DeadAfter: 4 * time.Hour},
		Disk:       Disk{StallLimit: 3 * time.Second},
		Listener:   Listener{RPC: "0.0.0.0:1", Advertise: "log.example.com:2", HTTP: "0.0.0.0:3", MaxConnections: 3, MaxStreams: 4},
		TLS:        TLS{Source: "vault", CertFile: "/tc", KeyFile: "/tk", CAFile: "/tca", DevDir: "/td", MinVersion: "1.2", Names: []string{"n1.example.com", "10.0.0.9"}},
		Vault: Vault{Address: "https://vault.service.consul:8200", CAFile: "/vca", Namespace: "ns", Auth: "jwt", AuthMount: "jwt-nomad", AuthRole: "log",
			Token: "vt", TokenFile: "/vt", RoleID: "r", SecretID: "s", SecretIDFile: "/s", JWTFile: "/j",
			PKIMount: "pki", PKIRole: "server", CAMounts: []string{"root"}, TTL: 2 * time.Hour},
		ACL:    ACL{Enabled: true, PolicyFile: "/p.csv", ModelFile: "/m.conf"},
		Limits: Limits{MaxRecord: 5, MaxBatch: 6 << 10, InFlight: 7 << 30},
		Log:    Log{SegmentSize: 8 << 20, RetentionAge: 48 * time.Hour, RetentionBytes: 9 << 30, ScrubInterval: 13 * time.Hour},
		Raft: Raft{HeartbeatTimeout: time.Second, ElectionTimeout: 2 * time.Second, LeaderLeaseTimeout: 900 * time.Millisecond,
			CommitTimeout: 11 * time.Millisecond, SnapshotInterval: 12 * time.Second},
		Telemetry: Telemetry{PProf: true, OTLPEndpoint: "otel:4317", OTLPInsecure: true, OTLPCAFile: "/oca", SampleOneIn: 7},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestMergeOrder(t *testing.T) {
	dir := write(t,
		"first.hcl", `
data_dir = "/first"
log_level = "debug"
`+plaintext+`
raft {
  heartbeat_timeout = "100ms"
  commit_timeout = "7ms"
}`,
		"d/20.json", `{"log_level": "error", "raft": {"heartbeat_timeout": "300ms", "leader_lease_timeout": "300ms"}, "node": {"name": "${env(\"NAME\")}"}}`,
		"d/10.hcl", "raft {\n heartbeat_timeout = env(\"UNSET\")\n}\nnode { name = \"ten\" }",
		// None of these may be read.
		"d/x.hcl~", "garbage", "d/.hidden.hcl", "garbage", "d/#x.hcl#", "garbage", "d/.#x.hcl", "garbage",
		"d/notes.txt", "garbage", "d/sub.hcl/30.hcl", "garbage",
	)
	c := mustLoad(t, Sources{
		Files:     []string{filepath.Join(dir, "first.hcl")},
		Dirs:      []string{filepath.Join(dir, "d")},
		Overrides: []Override{{Flag: "-data-dir", Key: "data_dir", Value: "/flag"}},
	})
	if c.DataDir != "/flag" || c.LogLevel != "error" || c.Node.Name != "from-env" ||
		c.Raft.HeartbeatTimeout != 300*time.Millisecond || c.Raft.CommitTimeout != 7*time.Millisecond {
		t.Errorf("merged wrongly: %+v", c)
	}
}

// Kubernetes mounts configuration as links to links.
func TestDirFollowsLinks(t *testing.T) {
	dir := write(t, "real/..data/a.hcl", `data_dir = "/linked"`+"\n"+plaintext)
	if err := os.Symlink(filepath.Join("..data", "a.hcl"), filepath.Join(dir, "real", "a.hcl")); err != nil {
		t.Fatal(err)
	}
	if c := mustLoad(t, Sources{Dirs: []string{filepath.Join(dir, "real")}}); c.DataDir != "/linked" {
		t.Errorf("DataDir = %q", c.DataDir)
	}
}

func TestExpressions(t *testing.T) {
	dir := write(t, "conf/node.hcl", `
data_dir = "/srv/${hostname()}"
log_level = env("LEVEL", "error")
log_json = null
node { name = trimspace(file("name.txt")) }
`+plaintext+`
listener {
  rpc = "{{ GetPrivateIP | replace \"10\" \"10\" }}:9"
  advertise = env("EMPTY")
}
`, "conf/name.txt", "from-file\n")
	h := testHost()
	h.expand = func(s string) (string, error) {
		return strings.Replace(s, `{{ GetPrivateIP | replace "10" "10" }}`, "10.9.9.9", 1), nil
	}
	c, err := load(Sources{Files: []string{filepath.Join(dir, "conf", "node.hcl")}}, h)
	if err != nil {
		t.Fatal(err)
	}
	if c.DataDir != "/srv/box" || c.LogLevel != "error" || c.LogJSON || c.Node.Name != "from-file" ||
		c.Listener.RPC != "10.9.9.9:9" || c.Listener.Advertise != "10.9.9.9:9" {
		t.Errorf("got %+v", c)
	}
}

// The template engine is the real one: loopback is the interface every machine
// has.
func TestRealTemplate(t *testing.T) {
	c, err := loadText(t, `listener { rpc = "{{ GetAllInterfaces | include \"flags\" \"loopback\" | include \"type\" \"IPv4\" | limit 1 | attr \"address\" }}:8400" }`)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(c.Listener.RPC, "127.") {
		t.Errorf("RPC = %q", c.Listener.RPC)
	}
}

func TestAdvertise(t *testing.T) {
	for _, tc := range []struct{ rpc, advertise, want string }{
		{"127.0.0.1:8400", "", "127.0.0.1:8400"},
		{"127.0.0.1:0", "", "127.0.0.1:0"},
		{"[::1]:8400", "", "[::1]:8400"},
		{"localhost:8400", "", "localhost:8400"},
		{"0.0.0.0:8400", "", "10.1.2.3:8400"},
		{":8400", "", "10.1.2.3:8400"},
		{"[::]:0", "", "10.1.2.3:0"},
		{"0.0.0.0:8400", "node-1.example.com:9", "node-1.example.com:9"},
		{"127.0.0.1:8400", "[2001:db8::1]:9", "[2001:db8::1]:9"},
	} {
		c, err := loadText(t, "listener {\n rpc = \""+tc.rpc+"\"\n advertise = \""+tc.advertise+"\"\n}")
		if err != nil {
			t.Errorf("%+v: %v", tc, err)
		} else if c.Listener.RPC != tc.rpc || c.Listener.Advertise != tc.want {
			t.Errorf("%+v: rpc %q, advertise %q", tc, c.Listener.RPC, c.Listener.Advertise)
		}
	}
}

func TestFlags(t *testing.T) {
	var src Sources
	fs := flag.NewFlagSet("agent", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	src.Register(fs)
	dir := write(t, "a.hcl", `log_level = "trace"`)
	err := fs.Parse([]string{"-config-file", filepath.Join(dir, "a.hcl"), "-config-dir", dir, "-dev", "-data-dir=/d", "-node", "n", "-rpc-addr", "127.0.0.1:1", "-log-json"})
	if err != nil {
		t.Fatal(err)
	}
	c := mustLoad(t, src)
	want := defaults(testHost())
	want.forDev()
	want.DataDir, want.Node.Name, want.LogLevel, want.LogJSON = "/d", "n", "trace", true
	want.Listener.RPC, want.Listener.Advertise = "127.0.0.1:1", "127.0.0.1:1"
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
	if err := fs.Parse([]string{"-log-json=false", "-log-level", "warn"}); err != nil {
		t.Fatal(err)
	}
	if c := mustLoad(t, src); c.LogJSON || c.LogLevel != "warn" {
		t.Errorf("the later flag must win: %+v", c)
	}
}

// A development node hurries only where it is alone.
func TestDevPace(t *testing.T) {
	for _, tc := range []struct {
		overrides []Override
		want      time.Duration
	}{
		{nil, 100 * time.Millisecond},
		{[]Override{{Key: "cluster.bootstrap_expect", Value: "2"}, {Key: "discovery.peers", Value: "127.0.0.1:1"}}, time.Second},
		{[]Override{{Key: "cluster.bootstrap_expect", Value: "3"}, {Key: "discovery.type", Value: "consul"}}, time.Second},
		{[]Override{{Key: "cluster.bootstrap_expect", Value: "3"}, {Key: "discovery.type", Value: "consul"},
			{Key: "raft.leader_lease_timeout", Value: "50ms"}, {Key: "raft.heartbeat_timeout", Value: "100ms"}}, 100 * time.Millisecond},
	} {
		c := mustLoad(t, Sources{Dev: true, Overrides: tc.overrides})
		if c.Raft.HeartbeatTimeout != tc.want {
			t.Errorf("%v: %v, want %v", tc.overrides, c.Raft.HeartbeatTimeout, tc.want)
		}
	}
}

func TestChanges(t *testing.T) {
	a := defaults(testHost())
	if got := Changes(a, a); got != nil {
		t.Errorf("no change, but %v", got)
	}
	b := *a
	b.LogLevel, b.LogJSON, b.Listener.MaxStreams, b.Limits.MaxBatch = "trace", true, 7, 3*mib
	b.Raft.HeartbeatTimeout = 50 * time.Millisecond
	b.Consul.Token, b.Log.RetentionBytes, b.Discovery.Peers = "hush", mib, []string{"a:1", "b:2"}
	want := []Change{
		{"log_level", "info", "trace", true},
		{"log_json", "false", "true", false},
		{"discovery.peers", "", "a:1,b:2", false},
		{"consul.token", "(secret)", "(another secret)", false},
		{"listener.max_streams", "4096", "7", false},
		{"limits.max_batch", "1088KiB", "3MiB", false},
		{"log.retention_bytes", "0B", "1MiB", true},
		{"raft.heartbeat_timeout", "1s", "50ms", false},
	}
	if got := Changes(a, &b); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestSizes(t *testing.T) {
	for s, want := range map[string]int64{"1B": 1, "1KiB": 1 << 10, "64 MiB": 64 << 20, "+3GiB": 3 << 30, "8388607TiB": 8388607 << 40, "0B": 0} {
		got, err := parseSize(s)
		if err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v, want %d", s, got, err, want)
		}
		if back, err := parseSize(formatSize(want)); err != nil || back != want {
			t.Errorf("formatSize(%d) = %q, which reads as %d, %v", want, formatSize(want), back, err)
		}
	}
}
