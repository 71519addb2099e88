package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Each bad file must be refused with a message that names the line and says
// what to do about it.
func TestBadInput(t *testing.T) {
	for name, tc := range map[string]struct {
		text string
		line string   // "" for problems that are in no file
		want []string // all of these, somewhere in the message
	}{
		"unknown key":          {"log_lvel = \"info\"", "1", []string{"Unsupported argument", `Did you mean "log_level"?`}},
		"unknown key in block": {"raft {\n  hartbeat_timeout = \"1s\"\n}", "2", []string{`Did you mean "heartbeat_timeout"?`}},
		"unknown block":        {"listenr {\n}", "1", []string{"Unsupported block type", `Did you mean "listener"?`}},
		"block as argument":    {"limits = {}", "1", []string{`Did you mean to define a block of type "limits"?`}},
		"argument as block":    {"log_level {\n}", "1", []string{"Unsupported block type"}},
		"label":                {"log \"main\" {\n}", "1", []string{"Extraneous label"}},
		"duplicate block":      {"log {\n}\nlog {\n}", "3", []string{"Duplicate log block", "node.hcl:1"}},
		"duplicate key":        {"log_json = true\nlog_json = true", "2", []string{"Attribute redefined"}},
		"syntax":               {"log_level = ", "1", []string{"Missing expression"}},
		"unclosed":             {"raft {", "1", []string{"Unclosed configuration block"}},

		"unknown function": {`log_level = emv("X")`, "1", []string{"unknown function", `Did you mean "env"?`}},
		"variable":         {`log_level = info`, "1", []string{"Variables not allowed"}},
		"env not set":      {"\n" + `log_level = env("NOPE")`, "2", []string{"NOPE is not set", `env("NOPE", "...")`}},
		"env arguments":    {`log_level = env("A", "b", "c")`, "1", []string{"at most one default"}},
		"file missing":     {`node { name = file("gone.txt") }`, "1", []string{"gone.txt", "no such file"}},
		"file is a folder": {`node { name = file(".") }`, "1", []string{"it is a folder"}},
		"file is a device": {`node { name = file("/dev/zero") }`, "1", []string{"not a regular file"}},

		"level":        {`log_level = "loud"`, "1", []string{`no "loud"`, "trace, debug, info, warn, error"}},
		"empty level":  {`log_level = ""`, "1", []string{"must not be empty"}},
		"flag":         {`log_json = "maybe"`, "1", []string{"log_json", "Write true or false"}},
		"list":         {`log_level = ["info"]`, "1", []string{"must be a string"}},
		"name":         {`node { name = "a b" }`, "1", []string{"node.name", "letters, digits"}},
		"name newline": {`node { name = "a\n" }`, "1", []string{"control character", "trimspace(file("}},
		"data_dir":     {"data_dir = \"/a\\u0000b\"", "1", []string{"data_dir", "control character"}},

		"count zero":     {"listener {\n max_streams = 0\n}", "2", []string{"listener.max_streams", "0 is out of range: from 1"}},
		"count negative": {"listener {\n max_connections = -1\n}", "2", []string{"-1 is out of range"}},
		"count fraction": {"listener {\n max_connections = 1.5\n}", "2", []string{"whole number from 1"}},
		"count huge":     {"listener {\n max_connections = 1e300\n}", "2", []string{"whole number from 1"}},
		"count text":     {"listener {\n max_connections = \"many\"\n}", "2", []string{"whole number"}},

		"size no unit":     {"limits {\n max_record = \"64\"\n}", "2", []string{"limits.max_record", "unit is missing", `Did you mean "64MiB"?`}},
		"size number":      {"limits {\n max_record = 64\n}", "2", []string{"unit is missing"}},
		"size decimal":     {"limits {\n max_record = \"1MB\"\n}", "2", []string{`no unit "MB"`, `Did you mean "1MiB"?`}},
		"size lower case":  {"limits {\n max_record = \"1kib\"\n}", "2", []string{`Did you mean "1KiB"?`}},
		"size unit":        {"limits {\n max_record = \"1apple\"\n}", "2", []string{`no unit "apple"`, "KiB"}},
		"size negative":    {"limits {\n max_record = \"-1MiB\"\n}", "2", []string{"cannot be negative"}},
		"size zero":        {"limits {\n max_record = \"0B\"\n}", "2", []string{"out of range: from 1B up to 3MiB"}},
		"size fraction":    {"limits {\n max_record = \"1.5MiB\"\n}", "2", []string{"1MiB is 1024KiB"}},
		"size overflow":    {"limits {\n in_flight = \"99999999TiB\"\n}", "2", []string{"too large to be a size"}},
		"size overflow 2":  {"limits {\n in_flight = \"99999999999999999999B\"\n}", "2", []string{"too large to be a size"}},
		"size nonsense":    {"limits {\n in_flight = \"big\"\n}", "2", []string{"is not a size", `"64MiB"`}},
		"batch limit":      {"limits {\n max_batch = \"4MiB\"\n}", "2", []string{"4MiB is out of range", "3MiB"}},
		"record > batch":   {"limits {\n max_batch = \"1KiB\"\n}", "2", []string{"limits.max_record (1MiB and 10B of framing) must be at most limits.max_batch (1KiB)"}},
		"framing":          {"limits {\n max_batch = \"1MiB\"\n}", "2", []string{"limits.max_record", "A batch of one largest record must fit"}},
		"batch > inflight": {"limits {\n in_flight = \"1KiB\"\n}", "2", []string{"limits.max_batch (1088KiB) must be at most limits.in_flight (1KiB)"}},
		"segment small":    {"log {\n segment_size = \"1KiB\"\n}", "2", []string{"from 1MiB up to 1GiB"}},
		"segment large":    {"log {\n segment_size = \"2GiB\"\n}", "2", []string{"from 1MiB up to 1GiB"}},

		"duration no unit":  {"raft {\n commit_timeout = \"5\"\n}", "2", []string{"unit is missing", `Did you mean "5s"?`}},
		"duration number":   {"raft {\n commit_timeout = 5\n}", "2", []string{"unit is missing"}},
		"duration days":     {"raft {\n snapshot_interval = \"1d\"\n}", "2", []string{"no days", `"24h"`}},
		"duration negative": {"raft {\n commit_timeout = \"-5ms\"\n}", "2", []string{"cannot be negative"}},
		"duration zero":     {"raft {\n commit_timeout = \"0s\"\n}", "2", []string{"longer than zero"}},
		"duration bare 0":   {"raft {\n commit_timeout = \"0\"\n}", "2", []string{"longer than zero"}},
		"duration overflow": {"raft {\n commit_timeout = \"99999999999h\"\n}", "2", []string{"is not a duration"}},
		"duration range":    {"shutdown_timeout = \"1h\"", "1", []string{"from 100ms up to 10m0s"}},
		"duration infinite": {"shutdown_timeout = \"inf\"", "1", []string{"shutdown_timeout"}},
		"otlp URL":          {"telemetry {\n otlp_endpoint = \"https://otel:4317\"\n}", "2", []string{"telemetry.otlp_endpoint", "no https:// before it"}},
		"otlp no port":      {"telemetry {\n otlp_endpoint = \"otel\"\n}", "2", []string{"telemetry.otlp_endpoint", "usually 4317"}},
		"sample none":       {"telemetry {\n sample_one_in = 0\n}", "2", []string{"0 is out of range"}},
		"election":          {"raft {\n election_timeout = \"100ms\"\n}", "2", []string{"raft.heartbeat_timeout (1s) must be at most raft.election_timeout (100ms)"}},
		"lease":             {"raft {\n leader_lease_timeout = \"1001ms\"\n}", "2", []string{"raft.leader_lease_timeout (1.001s) must be at most"}},
		"commit":            {"raft {\n heartbeat_timeout = \"500ms\"\n leader_lease_timeout = \"500ms\"\n commit_timeout = \"600ms\"\n}", "4", []string{"raft.commit_timeout (600ms) must be at most"}},

		"cluster name":       {"cluster {\n name = \"a b\"\n}", "2", []string{"cluster.name", "letters, digits"}},
		"no peers":           {"cluster {\n bootstrap_expect = 3\n}", "2", []string{"names 0 other nodes"}},
		"waits for nobody":   {"cluster {\n bootstrap_expect = 0\n}", "2", []string{"there is nobody to find"}},
		"expect missing":     {"discovery {\n peers = [\"10.0.0.1:1\"]\n}", "2", []string{"Missing cluster.bootstrap_expect", "usually 3"}},
		"expect for consul":  {"discovery {\n type = \"consul\"\n}", "2", []string{"Missing cluster.bootstrap_expect"}},
		"peer":               {"discovery {\n peers = [\"10.0.0.1\"]\n}", "2", []string{"discovery.peers", "not the host:port"}},
		"peers, text":        {"discovery {\n peers = 7\n}", "2", []string{"must be a list of strings"}},
		"peers twice":        {"discovery {\n peers = [\"10.0.0.1:1\", \"10.0.0.1:1\"]\n}", "2", []string{"stands in it twice"}},
		"peers empty":        {"discovery {\n peers = [\"\"]\n}", "2", []string{"is empty"}},
		"peers and consul":   {"discovery {\n type = \"consul\"\n peers = [\"10.0.0.1:1\"]\n}", "3", []string{"Consul knows the peers"}},
		"retention too soon": {"log {\n retention_age = \"1ms\"\n}", "2", []string{"log.retention_age", "out of range"}},

		"address no port":     {`listener { rpc = "127.0.0.1" }`, "1", []string{"not host:port", `"127.0.0.1:8400"`}},
		"address bare v6":     {`listener { rpc = "::1:8400" }`, "1", []string{"not host:port", `"[::1]:8400"`}},
		"address port":        {`listener { rpc = "127.0.0.1:http" }`, "1", []string{"not a port"}},
		"address port range":  {`listener { rpc = "127.0.0.1:65536" }`, "1", []string{"65535"}},
		"address port sign":   {`listener { rpc = "127.0.0.1:+80" }`, "1", []string{"not a port"}},
		"address host":        {`listener { rpc = "a b:8400" }`, "1", []string{"neither an IP address nor a host name"}},
		"address mistyped v4": {`listener { rpc = "127.0.0.256:8400" }`, "1", []string{"neither an IP address nor a host name"}},
		"address multicast":   {`listener { rpc = "224.0.0.1:8400" }`, "1", []string{"not the address of one node"}},
		"template syntax":     {"listener {\n rpc = \"{{ GetPrivateIP\"\n}", "2", []string{"Invalid address template", "go-sockaddr"}},
		"template function":   {"listener {\n rpc = \"{{ GetPrivatIP }}:1\"\n}", "2", []string{"Invalid address template", "GetPrivatIP"}},
		"template no port":    {"listener {\n rpc = \"{{ GetAllInterfaces | include \\\"name\\\" \\\"^nope$\\\" | join \\\"address\\\" \\\" \\\" }}\"\n}", "2", []string{"A port goes after the template"}},
		"template nothing":    {"listener {\n rpc = \"{{ GetAllInterfaces | include \\\"name\\\" \\\"^nope$\\\" | join \\\"address\\\" \\\" \\\" }}:1\"\n}", "2", []string{"found no address"}},
		"advertise wildcard":  {"listener {\n advertise = \"0.0.0.0:8400\"\n}", "2", []string{"listener.advertise", "must be one address"}},
		"advertise no host":   {"listener {\n advertise = \":8400\"\n}", "2", []string{"must be one address"}},
		"advertise port 0":    {"listener {\n advertise = \"10.0.0.1:0\"\n}", "2", []string{"with a port"}},

		"tls source":        {"tls {\n source = \"letsencrypt\"\n}", "2", []string{"tls.source", "none, dev, files, vault"}},
		"tls file":          {"tls {\n source = \"files\"\n cert_file = \"c\"\n key_file = \"k\"\n ca_file = \"\"\n}", "5", []string{"Missing tls.ca_file"}},
		"tls name":          {"tls {\n names = [\"a b\"]\n}", "2", []string{"neither a DNS name nor an IP address"}},
		"tls cluster":       {"tls {\n source = \"dev\"\n}\ncluster { name = \"my_cluster\" }", "4", []string{"cluster.name", "part of a DNS name"}},
		"vault address":     {"tls { source = \"vault\" }\nvault {\n address = \"vault:8200\"\n token = \"t\"\n}", "3", []string{"vault.address", "not a URL"}},
		"vault token":       {"tls { source = \"vault\" }\nvault {\n token = \"\"\n}", "3", []string{"Missing vault.token", "VAULT_TOKEN"}},
		"vault approle":     {"tls { source = \"vault\" }\nvault {\n auth = \"approle\"\n role_id = \"r\"\n secret_id = \"\"\n}", "5", []string{"Missing vault.secret_id", "secret_id_file"}},
		"vault two secrets": {"tls { source = \"vault\" }\nvault {\n auth = \"approle\"\n secret_id = \"s\"\n secret_id_file = \"f\"\n role_id = \"r\"\n}", "5", []string{"one of the two"}},
		"vault jwt":         {"tls { source = \"vault\" }\nvault {\n auth = \"jwt\"\n auth_role = \"r\"\n jwt_file = \"\"\n}", "5", []string{"Missing vault.jwt_file"}},
		"vault kubernetes":  {"tls { source = \"vault\" }\nvault {\n auth = \"kubernetes\"\n auth_role = \"\"\n}", "4", []string{"Missing vault.auth_role"}},
		"acl without tls":   {"acl {\n enabled = true\n policy_file = \"p\"\n}", "2", []string{"acl.enabled", "needs certificates"}},
		"acl without rules": {"tls { source = \"dev\" }\nacl {\n enabled = true\n policy_file = \"\"\n}", "4", []string{"Missing acl.policy_file"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := loadText(t, "\n"+tc.text)
			if name == "data_dir" {
				// The flag of loadText would hide it.
				dir := write(t, "node.hcl", "\n"+tc.text+"\n"+plaintext)
				_, err = load(Sources{Files: []string{filepath.Join(dir, "node.hcl")}}, testHost())
			}
			var bad *Error
			if !errors.As(err, &bad) {
				t.Fatalf("not refused: %v", err)
			}
			msg := err.Error()
			// Files begin with an empty line, so that line 1 cannot pass by
			// being the zero value.
			place := "node.hcl:" + map[string]string{"1": "2", "2": "3", "3": "4", "4": "5", "5": "6"}[tc.line] + ": "
			want := tc.want
			for i, w := range want {
				if w == "node.hcl:1" {
					want[i] = "node.hcl:2"
				}
			}
			for _, w := range append(want, place) {
				if !strings.Contains(msg, w) {
					t.Errorf("the message lacks %q:\n%s", w, msg)
				}
			}
			if n := len(bad.Diagnostics); n != 1 {
				t.Errorf("%d problems instead of 1:\n%s", n, msg)
			}
		})
	}
}

func TestBadJSON(t *testing.T) {
	dir := write(t, "a.json", "{\n \"log_lvel\": \"info\",\n \"limits\": {\"max_record\": \"1\"},\n \"node\": {\"name\": \"${env(\\\"X\\\")}\"}\n}", "b.json", `{"log_level": `)
	_, err := load(Sources{Dev: true, Dirs: []string{dir}}, testHost())
	if err == nil {
		t.Fatal("not refused")
	}
	for _, w := range []string{
		"a.json:2: ", `Did you mean "log_level"?`,
		"a.json:3: Invalid value for limits.max_record",
		"a.json:4: ", "X is not set",
		"b.json:1: ",
	} {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the message lacks %q:\n%s", w, err)
		}
	}
}

func TestBadSources(t *testing.T) {
	dir := write(t, "a.txt", "", "big.hcl", "#"+strings.Repeat("x", int(maxFile)))
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "d", "dangling.hcl")); err != nil {
		t.Fatal(err)
	}
	_, err := load(Sources{
		Files:     []string{filepath.Join(dir, "a.txt"), filepath.Join(dir, "gone.hcl"), filepath.Join(dir, "d"), filepath.Join(dir, "big.hcl")},
		Dirs:      []string{filepath.Join(dir, "nodir"), filepath.Join(dir, "d")},
		Overrides: []Override{{Flag: "-x", Key: "no.such", Value: "1"}, {Flag: "-log-level", Key: "log_level", Value: "loud"}},
	}, testHost())
	if err == nil {
		t.Fatal("not refused")
	}
	for _, w := range []string{
		"a.txt: A configuration file's name ends in .hcl or .json.",
		"gone.hcl: no such file or directory.",
		"did you mean -config-dir?",
		"big.hcl: it is larger than 1MiB.",
		"-config-dir " + filepath.Join(dir, "nodir") + ": no such file or directory.",
		"dangling.hcl",
		`-x sets "no.such"`,
		"It was given by -log-level.",
	} {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the message lacks %q:\n%s", w, err)
		}
	}
	if strings.Contains(err.Error(), "data_dir") {
		t.Errorf("data_dir may well be in a file that could not be read:\n%s", err)
	}
}

func TestNoPrivateAddress(t *testing.T) {
	for _, fail := range []error{nil, errors.New("no routes")} {
		h := testHost()
		h.privateIP = func() (string, error) { return "", fail }
		_, err := load(Sources{Dev: true, Overrides: []Override{{Flag: "-rpc-addr", Key: "listener.rpc", Value: ":1"}}}, h)
		if err == nil || !strings.Contains(err.Error(), "Set listener.advertise") || !strings.Contains(err.Error(), "given by -rpc-addr") {
			t.Errorf("privateIP %v: %v", fail, err)
		}
	}
}

// Plaintext has to be asked for by name.
func TestTLSHasToBeSaid(t *testing.T) {
	dir := write(t, "node.hcl", "data_dir = \"/data\"")
	_, err := load(Sources{Files: []string{filepath.Join(dir, "node.hcl")}}, testHost())
	if err == nil || !strings.Contains(err.Error(), "Missing tls.source") || !strings.Contains(err.Error(), "plaintext") {
		t.Errorf("%v", err)
	}
}

// All problems of all files at once, each with its line of source; colour and
// folding only where asked for.
func TestPrint(t *testing.T) {
	dir := write(t, "a.hcl", "log_level = \"loud\"\n"+plaintext, "b.hcl", "limits {\n  max_record = \"64\"\n  max_bach = \"1MiB\"\n}\n")
	_, err := load(Sources{Dirs: []string{dir}}, testHost())
	var bad *Error
	if !errors.As(err, &bad) {
		t.Fatalf("not refused: %v", err)
	}
	if len(bad.Diagnostics) != 4 {
		t.Errorf("%d problems instead of 4: %v", len(bad.Diagnostics), bad)
	}
	var plain, fancy strings.Builder
	if err := bad.Print(&plain); err != nil {
		t.Fatal(err)
	}
	if err := bad.print(&fancy, 60, true); err != nil {
		t.Fatal(err)
	}
	for _, w := range []string{
		"a.hcl line 1:\n   1: log_level = \"loud\"\n",
		"b.hcl line 2, in limits:\n   2:   max_record = \"64\"\n",
		"b.hcl line 3, in limits", `Did you mean "max_batch"?`, "Missing data_dir",
	} {
		if !strings.Contains(plain.String(), w) {
			t.Errorf("the text lacks %q:\n%s", w, plain.String())
		}
	}
	order := []string{"a.hcl line 1", "b.hcl line 2", "b.hcl line 3", "Missing data_dir"}
	for i := 1; i < len(order); i++ {
		if strings.Index(plain.String(), order[i-1]) > strings.Index(plain.String(), order[i]) {
			t.Errorf("%s comes after %s", order[i-1], order[i])
		}
	}
	if strings.Contains(plain.String(), "\x1b") {
		t.Error("colour in what is no terminal")
	}
	if !strings.Contains(fancy.String(), "\x1b[31m") {
		t.Error("no colour")
	}
	if err := bad.Print(failingWriter{}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Print to a closed file: %v", err)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, os.ErrClosed }
