package agent

import (
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/diurnalog/diurna/rpc/client"
)

// look asks a node by HTTP. A node that does not listen yet is asked again.
func (m *member) look(t testing.TB, path string) (status int, body []byte) {
	t.Helper()
	if _, ok := m.stderr.await(t, func(text string) bool { return strings.Contains(text, `"@message":"node started"`) }); !ok {
		t.Fatalf("%s ended:\n%s", m.name, m.stderr.text())
	}
	hc := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := hc.Get("http://" + m.httpAddr(t) + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, body
}

// status is what a node says of itself.
func (m *member) status(t testing.TB) (s statusJSON) {
	t.Helper()
	if code, body := m.look(t, "/v1/status"); code != http.StatusOK {
		t.Fatalf("%s: %d, %s", m.name, code, body)
	} else if err := json.Unmarshal(body, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// awaitHTTPReady asks until the node is ready, and returns what it said before.
func (m *member) awaitHTTPReady(t testing.TB) (said []string) {
	t.Helper()
	for begin := time.Now(); time.Since(begin) < patience; time.Sleep(5 * time.Millisecond) { // another process's state
		code, body := m.look(t, "/v1/health/ready")
		var r readyJSON
		if err := json.Unmarshal(body, &r); err != nil || r.Message == "" || r.Ready != (code == http.StatusOK) || r.Ready != (r.Reason == "") {
			t.Fatalf("%d, %s, %v", code, body, err)
		}
		if r.Ready {
			return said
		}
		if len(said) == 0 || said[len(said)-1] != r.Message {
			said = append(said, r.Message)
		}
	}
	t.Fatalf("%s is not ready; it said %q", m.name, said)
	return nil
}

// metrics are what a node tells Prometheus, by name.
func (m *member) metrics(t testing.TB) map[string]*dto.MetricFamily {
	t.Helper()
	code, body := m.look(t, "/v1/metrics")
	if code != http.StatusOK {
		t.Fatalf("%s: %d, %s", m.name, code, body)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(string(body)))
	if err != nil {
		t.Fatal(err)
	}
	return families
}

// valueOf adds up all series of a metric: values, or how many a histogram has.
func valueOf(families map[string]*dto.MetricFamily, name string) (sum float64) {
	for _, m := range families[name].GetMetric() {
		sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
	}
	return sum
}

// TestClusterReadiness: a follower that was away is ready only once it has all
// that was committed meanwhile, so that a rolling update which waits for that
// takes no quorum's data away.
func TestClusterReadiness(t *testing.T) {
	c := startNodes(t, 3, "")
	for _, m := range c.nodes {
		m.awaitHTTPReady(t)
	}
	leader := c.leader(t)
	at := slices.IndexFunc(c.nodes, func(m *member) bool { return m != leader })
	follower := c.nodes[at]
	follower.terminate(t)

	p, err := patient(t, leader.listen).NewProducer(t.Context(), client.ProducerOptions{BatchRecords: 16})
	if err != nil {
		t.Fatal(err)
	}
	record := &client.Record{Value: make([]byte, 64<<10)}
	for range 1024 { // 64 MiB
		if err := p.Append(t.Context(), record); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := c.leader(t).status(t).HighWatermark

	c.launch(t, follower)
	said := follower.awaitHTTPReady(t)
	if s := follower.status(t); s.HighWatermark < want || s.Role != "follower" && s.Role != "leader" {
		t.Errorf("ready at offset %d as a %s, while the leader had %d; before, it said %q", s.HighWatermark, s.Role, want, said)
	}
	if !slices.ContainsFunc(said, func(why string) bool { return strings.Contains(why, "leader's") || strings.Contains(why, "leader:") }) {
		t.Errorf("it said %q", said)
	}
	t.Logf("%s said %q", follower.name, said)

	// What all nodes tell, of what happened.
	var leaders, entries, stored float64
	exported := make(map[string]bool)
	for _, m := range c.nodes {
		families := m.metrics(t)
		for name, f := range families {
			exported[name] = true
			if f.GetHelp() == "" {
				t.Errorf("%s has no help", name)
			}
		}
		leaders += valueOf(families, "diurna_raft_is_leader")
		entries += valueOf(families, "raft_replication_append_entries_seconds")
		stored += valueOf(families, "raft_rpc_append_entries_store_seconds")
		if got := valueOf(families, "diurna_log_appended_records_total"); got < float64(want) {
			t.Errorf("%s has appended %v records", m.name, got)
		}
		for _, name := range []string{"diurna_ready", "diurna_log_sync_seconds", "diurna_log_append_seconds", "diurna_raft_leader_changes_total", "diurna_disk_free_bytes", "diurna_log_bytes", "raft_fsm_apply_batch_seconds", "raft_thread_main_saturation_ratio"} {
			if _, ok := families[name]; !ok || valueOf(families, name) <= 0 && !strings.HasSuffix(name, "_ratio") {
				t.Errorf("%s tells %s = %v", m.name, name, valueOf(families, name))
			}
		}
	}
	if leaders != 1 || entries == 0 || stored == 0 {
		t.Errorf("%v leaders, %v entries sent, %v times stored", leaders, entries, stored)
	}
	// Whatever the documentation tells of is told by some node, unless it takes
	// certificates, permissions, a collector or a limit.
	for _, a := range described() {
		optional := slices.ContainsFunc([]string{"certificate", "vault", "authorization", "policy", "trace", "retention"}, func(part string) bool {
			return strings.HasPrefix(a.name, "diurna_"+part) || strings.HasPrefix(a.name, "diurna_log_"+part)
		})
		if !exported[a.name] && !optional && a.name != "grpc_server_handling_seconds" && a.name != "diurna_grpc_errors_total" {
			t.Errorf("nobody tells %s", a.name)
		}
	}

	// A node that hears from nobody is not ready, and says so at once.
	for _, m := range c.nodes {
		if m != follower {
			m.signal(t, syscall.SIGSTOP)
			defer m.signal(t, syscall.SIGCONT)
		}
	}
	eventuallyHTTP(t, follower, "/v1/health/ready", http.StatusServiceUnavailable)
	if code, _ := follower.look(t, "/v1/health/live"); code != http.StatusOK {
		t.Errorf("live: %d", code)
	}
}

func eventuallyHTTP(t testing.TB, m *member, path string, want int) {
	t.Helper()
	var code int
	for begin := time.Now(); time.Since(begin) < patience; time.Sleep(10 * time.Millisecond) { // another process's state
		if code, _ = m.look(t, path); code == want {
			return
		}
	}
	t.Fatalf("%s: %s answers %d, not %d", m.name, path, code, want)
}
