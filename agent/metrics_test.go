package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/grpc/codes"

	ident "github.com/diurnalog/diurna/agent/identity"
	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/rpc"
)

func fullSources() metricSources {
	up := true
	return metricSources{
		Status: func(context.Context) (rpc.NodeStatus, error) {
			return rpc.NodeStatus{
				NodeID: "n1", Name: "one", Cluster: "orders", Version: "1.2.3", Role: "leader", Term: 3, LastIndex: 12, AppliedIndex: 11,
				LastContact: 1500 * time.Millisecond, FirstOffset: 4, NextOffset: 9, DiskFull: true,
			}, nil
		},
		Ready: func() bool { return true },
		Replica: func() replica.Status {
			return replica.Status{Committed: 14, DiskFree: 5000, Log: logstore.Stats{Segments: 7, Bytes: 900}}
		},
		Servers: func() ([]replica.Server, error) {
			well, ill := &replica.ServerHealth{Healthy: true}, &replica.ServerHealth{}
			return []replica.Server{{Voter: true, Health: well}, {Voter: true, Health: ill}, {Voter: true, Health: well}, {Health: well}, {Health: ill}}, nil
		},
		Retention: func() replica.Retention { return replica.Retention{Age: time.Minute, Bytes: 4000} },
		Registry: func() discovery.Snapshot {
			return discovery.Snapshot{Nodes: make([]discovery.Node, 4), At: time.Unix(1200, 0), Trusted: true}
		},
		Port: func() rpc.Stats { return rpc.Stats{Connections: 8, Received: 80, Sent: 90} },
		Certificate: func() (certificateStatus, bool) {
			return certificateStatus{NotBefore: time.Unix(1000, 0), NotAfter: time.Unix(2000, 0), Renewals: 5, RenewFailures: 6, VaultUp: &up}, true
		},
		Policy: func() ident.PolicyStats {
			return ident.PolicyStats{
				Decisions: []ident.DecisionCount{{Action: "produce", Allowed: 10, Denied: 2}, {Action: "other", Denied: 1}},
				Rules:     3, Loaded: time.Unix(1500, 0), Reloads: 8, ReloadFailures: 9, Refused: true,
			}
		},
	}
}

// ours are the metrics that a node with all that there can be tells, one a line,
// without help and types.
func ours(t *testing.T, sources metricSources) string {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(&nodeCollector{sources: sources}); err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%s", l.GetName(), l.GetValue()))
			}
			value := m.GetGauge().GetValue() + m.GetCounter().GetValue()
			lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s %v %s", strings.TrimPrefix(f.GetName(), "diurna_"), value, strings.Join(labels, " "))))
		}
	}
	return strings.Join(lines, "\n")
}

func TestMetrics(t *testing.T) {
	want := `authorization_decisions_total 0 action=other result=allowed
authorization_decisions_total 1 action=other result=denied
authorization_decisions_total 10 action=produce result=allowed
authorization_decisions_total 2 action=produce result=denied
certificate_expiry_timestamp_seconds 2000
certificate_not_before_timestamp_seconds 1000
certificate_renew_failures_total 6
certificate_renewals_total 5
disk_free_bytes 5000
disk_full 1
grpc_connections 8
grpc_received_bytes_total 80
grpc_sent_bytes_total 90
log_bytes 900 log=default
log_first_offset 4 log=default
log_next_offset 9 log=default
log_retention_bytes 4000 log=default
log_retention_seconds 60 log=default
log_segments 7 log=default
node_info 1 cluster=orders id=n1 name=one version=1.2.3
policy_loaded_timestamp_seconds 1500
policy_refused 1
policy_reload_failures_total 9
policy_reloads_total 8
policy_rules 3
raft_applied_index 11
raft_committed_index 14
raft_failure_tolerance 0
raft_is_leader 1
raft_last_contact_seconds 1.5
raft_last_index 12
raft_servers 2 role=nonvoter
raft_servers 3 role=voter
raft_term 3
raft_unhealthy_servers 2
ready 1
registry_answered_timestamp_seconds 1200
registry_nodes 4
registry_trusted 1
vault_up 1`
	if got := ours(t, fullSources()); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}

	// What is not there is left out, and not told as 0.
	s := fullSources()
	s = metricSources{Ready: s.Ready}
	s.Status = func(context.Context) (rpc.NodeStatus, error) {
		return rpc.NodeStatus{NodeID: "n1", Role: "follower", LastContact: -1}, nil
	}
	want = `disk_full 0
log_first_offset 0 log=default
log_next_offset 0 log=default
node_info 1 cluster= id=n1 name= version=
raft_applied_index 0
raft_is_leader 0
raft_last_index 0
raft_term 0
ready 1`
	if got := ours(t, s); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	s.Certificate = func() (certificateStatus, bool) { return certificateStatus{}, false }
	s.Retention = func() replica.Retention { return replica.Retention{} }
	s.Servers = func() ([]replica.Server, error) { return nil, errors.New("closed") }
	if got := ours(t, s); got != want {
		t.Errorf("without a certificate yet, and so on: %s", got)
	}
	// Consul has never answered, and the node does not lead.
	s.Registry = func() discovery.Snapshot { return discovery.Snapshot{} }
	s.Servers = func() ([]replica.Server, error) { return []replica.Server{{Voter: true}}, nil }
	want += "\nregistry_nodes 0\nregistry_trusted 0"
	want = strings.Replace(want, "raft_term", "raft_servers 0 role=nonvoter\nraft_servers 1 role=voter\nraft_term", 1)
	if got := ours(t, s); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}

	s.Status = func(context.Context) (rpc.NodeStatus, error) { return rpc.NodeStatus{}, errors.New("closed") }
	r, err := newMetrics(s)
	if err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err == nil || !strings.Contains(err.Error(), "closed") || !slices.ContainsFunc(families, func(f *dto.MetricFamily) bool { return f.GetName() == "diurna_ready" }) {
		t.Errorf("%v, %v", families, err)
	}
}

// TestMetricsOfTwoNodes: nodes of one process do not get into each other's way.
func TestMetricsOfTwoNodes(t *testing.T) {
	for range 2 {
		if _, err := newMetrics(fullSources()); err != nil {
			t.Error(err)
		}
	}
}

// registered is a registry with all that a node can have, each told once.
func registered(t *testing.T) *prometheus.Registry {
	t.Helper()
	l, raft := newLive(), newRaftSink()
	l.observer().Log.Appended(1, 1, time.Millisecond)
	l.CallBegins("/s/M", false)
	l.CallEnds("/s/M", false, rpc.CallEnd{Code: codes.Internal})
	for _, m := range raftMetrics {
		key := strings.Split(m.key, ".")
		raft.SetGauge(key, 1)
		raft.IncrCounter(key, 1)
		raft.AddSample(key, 1)
	}
	traces := &tracing{exporter: newTraceExporter(nil, "", nil)}
	r, err := newMetrics(fullSources(), slices.Concat(l.all, raft.collectors(), traces.collectors())...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestMetricsAreDocumented: docs/metrics.md has every metric, as it is, and each
// has a unit, a help, and a name as Prometheus wants it.
func TestMetricsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	told := make(map[string]string)
	for _, m := range regexp.MustCompile("(?m)^\\| `((?:diurna|grpc_server|raft)_[a-z_]+)` (\\|.*\\|)$").FindAllStringSubmatch(string(text), -1) {
		if told[m[1]] != "" {
			t.Errorf("docs/metrics.md has %s twice", m[1])
		}
		told[m[1]] = m[2]
	}
	families, err := registered(t).Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := described()
	for _, m := range all {
		if m.help == "" || !strings.HasSuffix(m.help, ".") {
			t.Errorf("%s has no help that is a sentence: %q", m.name, m.help)
		}
		name := strings.TrimSuffix(m.name, "_total")
		for _, base := range []string{"seconds", "bytes"} {
			if strings.HasSuffix(name, "_"+base) != (m.unit == base) {
				t.Errorf("%s counts %s, which its name should say, and nothing else", m.name, m.unit)
			}
		}
		if m.unit == "" || strings.HasSuffix(m.name, "_total") != (m.kind == counter) {
			t.Errorf("%s is a %s of %q", m.name, m.kind, m.unit)
		}
		labels := "—"
		if len(m.labels) > 0 {
			labels = "`" + strings.Join(m.labels, "`, `") + "`"
		}
		if want := fmt.Sprintf("| %s | %s | %s | %s |", m.kind, m.unit, labels, m.help); told[m.name] != want {
			t.Errorf("docs/metrics.md should say\n| `%s` %s, not\n%s", m.name, want, told[m.name])
		}
		delete(told, m.name)
		if !slices.ContainsFunc(families, func(f *dto.MetricFamily) bool { return f.GetName() == m.name && f.GetHelp() == m.help }) {
			t.Errorf("%s is never told", m.name)
		}
	}
	for name := range told {
		t.Errorf("docs/metrics.md tells of %s, which there is not", name)
	}
	for _, f := range families {
		name := f.GetName()
		if f.GetHelp() == "" {
			t.Errorf("%s has no help", name)
		}
		if !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") && !slices.ContainsFunc(all, func(a about) bool { return a.name == name }) {
			t.Errorf("%s is not described", name)
		}
	}
	// Names, units and helps as Prometheus wants them.
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// TestRaftMetrics: everything that hashicorp/raft tells is told here, or is left
// out on purpose.
func TestRaftMetrics(t *testing.T) {
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/hashicorp/raft").Output()
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(dir)), "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	known := make(map[string]bool)
	for _, m := range raftMetrics {
		if known[m.key] || raftUntold[m.key] != "" {
			t.Errorf("%s is there twice", m.key)
		}
		known[m.key] = true
	}
	for key := range raftUntold {
		known[key] = true
	}
	said := regexp.MustCompile(`\[\]string\{("raft"(?:, "\w+")+)\}`)
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range said.FindAllStringSubmatch(string(text), -1) {
			key := strings.NewReplacer(`"`, "", ", ", ".").Replace(m[1])
			if _, ok := known[key]; !ok {
				t.Errorf("%s tells %s", filepath.Base(file), key)
			}
			known[key] = false
		}
	}
	for key, unseen := range known {
		if unseen {
			t.Errorf("nobody tells %s", key)
		}
	}
}

// TestLiveMetrics: what is counted while it happens.
func TestLiveMetrics(t *testing.T) {
	l := newLive()
	l.led("", 0)
	l.led("a", 1)
	l.led("a", 1)
	l.led("b", 2)
	l.led("", 2)
	l.led("b", 3)
	l.read([]logstore.Batch{{Count: 3, Start: 10, End: 30}, {Count: 1, Start: 40, End: 50}})
	o := l.observer()
	o.Log.Appended(7, 700, time.Second)
	o.Log.Synced(time.Second)
	o.Committed(2 * time.Second)
	const produce, stream = "/diurna.v1.Log/Produce", "/diurna.v1.Log/ProduceStream"
	l.CallBegins(produce, false)
	l.CallEnds(produce, false, rpc.CallEnd{Took: 2 * time.Millisecond})
	l.CallBegins(produce, false)
	l.CallEnds(produce, false, rpc.CallEnd{Code: codes.ResourceExhausted, Reason: rpc.ReasonOverloaded, Took: time.Millisecond})
	l.CallBegins(stream, true)
	l.CallEnds(stream, true, rpc.CallEnd{Code: codes.Canceled, Took: time.Hour})
	l.CallBegins(stream, true)

	r := prometheus.NewPedanticRegistry()
	for _, c := range l.all {
		if err := r.Register(c); err != nil {
			t.Fatal(err)
		}
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, f := range families {
		for _, m := range f.GetMetric() {
			line := f.GetName()
			for _, l := range m.GetLabel() {
				line += " " + strings.TrimPrefix(l.GetValue(), "diurna.v1.")
			}
			if h := m.GetHistogram(); h != nil {
				line += fmt.Sprintf(" %d in %v", h.GetSampleCount(), h.GetSampleSum())
			} else {
				line += fmt.Sprint(" ", m.GetGauge().GetValue()+m.GetCounter().GetValue())
			}
			lines = append(lines, line)
		}
	}
	want := `diurna_grpc_errors_total OTHER 1
diurna_grpc_errors_total OVERLOADED 1
diurna_log_append_seconds default 1 in 1
diurna_log_appended_bytes_total default 700
diurna_log_appended_records_total default 7
diurna_log_commit_seconds default 1 in 2
diurna_log_read_bytes_total default 30
diurna_log_read_records_total default 4
diurna_log_sync_seconds default 1 in 1
diurna_raft_leader_changes_total 3
grpc_server_handled_total OK Produce Log unary 1
grpc_server_handled_total ResourceExhausted Produce Log unary 1
grpc_server_handled_total Canceled ProduceStream Log stream 1
grpc_server_handling_seconds Produce Log unary 2 in 0.003
grpc_server_in_flight Produce Log unary 0
grpc_server_in_flight ProduceStream Log stream 1
grpc_server_started_total Produce Log unary 2
grpc_server_started_total ProduceStream Log stream 2`
	slices.Sort(lines)
	sorted := strings.Split(want, "\n")
	slices.Sort(sorted)
	if !slices.Equal(lines, sorted) {
		t.Errorf("got\n%s", strings.Join(lines, "\n"))
	}
}
