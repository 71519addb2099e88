package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"

	ident "github.com/diurnalog/diurna/agent/identity"
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
		Ready:    func() bool { return true },
		Segments: func() int { return 7 },
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
disk_full 1
log_first_offset 4 log=default
log_next_offset 9 log=default
log_segments 7 log=default
node_info 1 cluster=orders id=n1 name=one version=1.2.3
policy_loaded_timestamp_seconds 1500
policy_refused 1
policy_reload_failures_total 9
policy_reloads_total 8
policy_rules 3
raft_applied_index 11
raft_is_leader 1
raft_last_contact_seconds 1.5
raft_last_index 12
raft_term 3
ready 1
vault_up 1`
	if got := ours(t, fullSources()); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}

	// What is not there is left out, and not told as 0.
	s := fullSources()
	s.Segments, s.Certificate, s.Policy = nil, nil, nil
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
	if got := ours(t, s); got != want {
		t.Errorf("without a certificate yet: %s", got)
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

// TestMetricsAreDocumented: docs/metrics.md has every metric, as it is.
func TestMetricsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	told := make(map[string]string)
	for _, m := range regexp.MustCompile("(?m)^\\| `(diurna_[a-z_]+)` (\\|.*\\|)$").FindAllStringSubmatch(string(text), -1) {
		if told[m[1]] != "" {
			t.Errorf("docs/metrics.md has %s twice", m[1])
		}
		told[m[1]] = m[2]
	}
	for _, m := range metrics {
		if m.help == "" || strings.TrimSuffix(m.help, ".") == m.help {
			t.Errorf("%s has no help that is a sentence: %q", m.name, m.help)
		}
		kind := "gauge"
		if m.kind == counter {
			kind = "counter"
		}
		labels := "—"
		if len(m.labels) > 0 {
			labels = "`" + strings.Join(m.labels, "`, `") + "`"
		}
		if want := fmt.Sprintf("| %s | %s | %s |", kind, labels, m.help); told[m.name] != want {
			t.Errorf("docs/metrics.md should say\n| `%s` %s, not\n%s", m.name, want, told[m.name])
		}
		delete(told, m.name)
	}
	for name := range told {
		t.Errorf("docs/metrics.md tells of %s, which there is not", name)
	}
	r := prometheus.NewRegistry()
	if err := r.Register(&nodeCollector{sources: fullSources()}); err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	// Names, units and helps as Prometheus wants them.
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for _, m := range metrics {
		if !slices.ContainsFunc(families, func(f *dto.MetricFamily) bool { return f.GetName() == m.name && f.GetHelp() == m.help }) {
			t.Errorf("%s is never told", m.name)
		}
	}
}
