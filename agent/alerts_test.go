package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// ofPrometheus are metrics that come with every node, and are not described: the
// scrape's own, and those of the Go runtime and the process that are used.
var ofPrometheus = map[string]kind{"up": gauge, "process_cpu_seconds_total": counter, "process_resident_memory_bytes": gauge}

// Words of PromQL that are not names of metrics. Functions are not among them:
// they are what a bracket follows.
var promWords = []string{"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless", "bool", "offset"}

var (
	promString   = regexp.MustCompile(`"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'`)
	promRange    = regexp.MustCompile(`\[[^\]]*\]`)
	promSelector = regexp.MustCompile(`([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^}]*)\}`)
	promLabel    = regexp.MustCompile(`([a-zA-Z_][a-zA-Z0-9_]*)\s*(?:=~|!~|!=|=)`)
	promGrouping = regexp.MustCompile(`\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)`)
	promWord     = regexp.MustCompile(`[0-9.]+[a-zA-Z0-9]*|[a-zA-Z_:][a-zA-Z0-9_:]*`)
)

// promUses takes an expression apart: the metrics in it, each with the labels it
// is selected by, and the labels that are grouped by.
func promUses(expr string) (metrics map[string][]string, grouped []string) {
	metrics = make(map[string][]string)
	expr = promRange.ReplaceAllString(promString.ReplaceAllString(expr, `""`), "")
	for _, m := range promSelector.FindAllStringSubmatch(expr, -1) {
		for _, label := range promLabel.FindAllStringSubmatch(m[2], -1) {
			metrics[m[1]] = append(metrics[m[1]], label[1])
		}
	}
	expr = promSelector.ReplaceAllString(expr, "$1")
	for _, m := range promGrouping.FindAllStringSubmatch(expr, -1) {
		for label := range strings.SplitSeq(m[1], ",") {
			if label = strings.TrimSpace(label); label != "" {
				grouped = append(grouped, label)
			}
		}
	}
	expr = promGrouping.ReplaceAllString(expr, " ")
	for _, at := range promWord.FindAllStringIndex(expr, -1) {
		word, rest := expr[at[0]:at[1]], strings.TrimSpace(expr[at[1]:])
		number := word[0] == '.' || '0' <= word[0] && word[0] <= '9'
		if !number && !strings.HasPrefix(rest, "(") && !slices.Contains(promWords, word) {
			metrics[word] = slices.Clip(metrics[word])
		}
	}
	return metrics, grouped
}

// promProblems says what of an expression no node tells.
func promProblems(expr string) (problems []string) {
	known := make(map[string]about)
	for _, a := range described() {
		known[a.name] = a
	}
	for name, kind := range ofPrometheus {
		known[name] = about{name: name, kind: kind}
	}
	all, grouped := promUses(expr)
	if len(all) == 0 {
		return []string{"it looks at no metric"}
	}
	labels := []string{"job", "instance"}
	for name, selected := range all {
		base := name
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if cut, ok := strings.CutSuffix(name, suffix); ok && known[cut].kind == histogram {
				base = cut
			}
		}
		m, ok := known[base]
		switch {
		case !ok:
			problems = append(problems, fmt.Sprintf("there is no %s", name))
			continue
		case m.kind == histogram && base == name:
			problems = append(problems, fmt.Sprintf("%s is a histogram: it is told as %s_bucket and so on", name, name))
		case m.kind == counter && !regexp.MustCompile(`(rate|increase)\(`+name).MatchString(expr):
			problems = append(problems, fmt.Sprintf("%s only ever grows", name))
		}
		own := append([]string{"job", "instance"}, m.labels...)
		if strings.HasSuffix(name, "_bucket") {
			own = append(own, "le")
		}
		labels = append(labels, own...)
		for _, label := range selected {
			if !slices.Contains(own, label) {
				problems = append(problems, fmt.Sprintf("%s has no label %s", name, label))
			}
		}
	}
	for _, label := range grouped {
		if !slices.Contains(labels, label) {
			problems = append(problems, fmt.Sprintf("nothing has a label %s", label))
		}
	}
	return problems
}

// TestPromProblems: what the two tests below rest on.
func TestPromProblems(t *testing.T) {
	for expr, want := range map[string]string{
		`diurna_ready == 0`: "",
		`max by (job) (diurna_raft_is_leader{job=~"a, b{c}"}) == 0 and on (job) up > 1`:                             "",
		`histogram_quantile(0.99, sum by (le, instance) (rate(diurna_log_sync_seconds_bucket{log="x"}[5m]))) > 1e3`: "",
		`rate(diurna_log_sync_seconds_sum[5m]) / rate(diurna_log_sync_seconds_count[$__rate_interval]) offset 5m`:   "",
		`predict_linear(diurna_disk_free_bytes[6h], 24 * 3600) < 0 unless vector(1)`:                                "",
		`diurna_redy == 0`:                                    "there is no diurna_redy",
		`diurna_ready + diurna_x`:                             "there is no diurna_x",
		`diurna_ready_bucket`:                                 "there is no diurna_ready_bucket",
		`diurna_log_sync_seconds > 1`:                         "is a histogram",
		`diurna_log_appended_records_total > 5`:               "only ever grows",
		`diurna_ready{log="default"}`:                         "diurna_ready has no label log",
		`sum by (job, reson) (diurna_ready)`:                  "nothing has a label reson",
		`sum(diurna_ready) without (le)`:                      "nothing has a label le",
		`time() > 5`:                                          "it looks at no metric",
		`diurna_disk_full{job="x"} / ignoring(mode) diurna_a`: "there is no diurna_a",
	} {
		got := promProblems(expr)
		if want == "" && len(got) > 0 || want != "" && !slices.ContainsFunc(got, func(p string) bool { return strings.Contains(p, want) }) {
			t.Errorf("%s: %q, want %q", expr, got, want)
		}
	}
}

// TestDashboard: docs/grafana/diurna.json can be imported, and shows what nodes
// tell.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile("../docs/grafana/diurna.json")
	if err != nil {
		t.Fatal(err)
	}
	type target struct{ Expr string }
	var d struct {
		Inputs []struct{ Name, Type string } `json:"__inputs"`
		Title  string
		UID    string
		ID     *int
		Panels []struct {
			ID          int
			Type, Title string
			Description string
			GridPos     struct{ X, Y, W, H int }
			Datasource  struct{ UID string }
			FieldConfig struct{ Defaults struct{ Unit string } }
			Targets     []target
		}
		Templating struct {
			List []struct {
				Name  string
				Query struct{ Query string }
			}
		}
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	if len(d.Inputs) != 1 || d.Inputs[0].Name != "DS_PROMETHEUS" || d.Title == "" || d.UID == "" || d.ID != nil {
		t.Errorf("it cannot be imported: inputs %v, title %q, uid %q, id %v", d.Inputs, d.Title, d.UID, d.ID)
	}
	shown := make(map[string]bool)
	ids := make(map[int]string)
	taken := make(map[[2]int]string)
	for _, p := range d.Panels {
		if other, ok := ids[p.ID]; ok {
			t.Errorf("%s and %s have one id", p.Title, other)
		}
		ids[p.ID] = p.Title
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("%s lies over %q", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Title == "" || p.Description == "" || p.FieldConfig.Defaults.Unit == "" || len(p.Targets) == 0 || p.Datasource.UID != "${DS_PROMETHEUS}" {
			t.Errorf("%s lacks something: %+v", p.Title, p)
		}
		for _, target := range p.Targets {
			for _, problem := range promProblems(target.Expr) {
				t.Errorf("%s: %s: %s", p.Title, target.Expr, problem)
			}
			if !strings.Contains(target.Expr, `job=~"$job"`) {
				t.Errorf("%s: %s is of all clusters", p.Title, target.Expr)
			}
			all, _ := promUses(target.Expr)
			for name := range all {
				shown[name] = true
			}
		}
	}
	for _, v := range d.Templating.List {
		if !strings.Contains(v.Query.Query, "diurna_node_info") {
			t.Errorf("variable %s asks %q", v.Name, v.Query.Query)
		}
	}
	for _, name := range []string{
		"diurna_ready", "diurna_raft_is_leader", "diurna_raft_leader_changes_total", "diurna_log_commit_seconds_bucket", "diurna_log_sync_seconds_bucket",
		"diurna_log_next_offset", "diurna_raft_applied_index", "diurna_disk_free_bytes", "diurna_certificate_expiry_timestamp_seconds", "diurna_grpc_errors_total",
	} {
		if !shown[name] {
			t.Errorf("it does not show %s", name)
		}
	}
}

// TestAlerts: docs/alerts.yaml looks at what nodes tell, and docs/metrics.md says
// what each alert means and what to do.
func TestAlerts(t *testing.T) {
	text, err := os.ReadFile("../docs/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	type rule struct {
		Alert       string
		Expr        string
		For         string
		Labels      struct{ Severity string }
		Annotations struct {
			Summary, Description string
			Runbook              string `yaml:"runbook_url"`
		}
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []rule
		}
	}
	decoder := yaml.NewDecoder(strings.NewReader(string(text)))
	decoder.KnownFields(true)
	if err := decoder.Decode(&file); err != nil {
		t.Fatal(err)
	}
	guide, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(guide), "\n## What each alert means and what to do\n")
	if !ok {
		t.Fatal("docs/metrics.md has no section on alerts")
	}
	told := make(map[string]string)
	for i, part := range strings.Split(section, "\n### ") {
		if name, body, ok := strings.Cut(part, "\n"); ok && i > 0 {
			told[name] = body
		}
	}
	rules := 0
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			rules++
			for _, problem := range promProblems(r.Expr) {
				t.Errorf("%s: %s", r.Alert, problem)
			}
			a := r.Annotations
			if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels.Severity) || a.Summary == "" || a.Description == "" {
				t.Errorf("%s lacks something: %+v", r.Alert, r)
			}
			if !strings.HasSuffix(a.Runbook, "/docs/metrics.md#"+strings.ToLower(r.Alert)) {
				t.Errorf("%s: the runbook is %q", r.Alert, a.Runbook)
			}
			if body := told[r.Alert]; !strings.Contains(body, "**What to do.**") {
				t.Errorf("docs/metrics.md does not say what to do about %s", r.Alert)
			}
			delete(told, r.Alert)
		}
	}
	if rules == 0 {
		t.Error("there are no alerts")
	}
	for name := range told {
		t.Errorf("docs/metrics.md tells of an alert %s, which there is not", name)
	}
}
