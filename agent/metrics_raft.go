package agent

import (
	"fmt"
	"strings"
	"time"

	gometrics "github.com/hashicorp/go-metrics/compat"
	"github.com/prometheus/client_golang/prometheus"
)

// raftMetric is one of hashicorp/raft's own metrics, which it tells by
// go-metrics: under a name of ours, with a unit and a help, which it has neither
// of there.
type raftMetric struct {
	about
	// key is go-metrics's name, with dots.
	key string
}

// took makes a duration, which Raft tells in milliseconds, a histogram.
func took(key, name, help string) raftMetric {
	return raftMetric{about{"raft_" + name + "_seconds", histogram, "seconds", nil, help}, "raft." + key}
}

func counts(key, name, unit, help string) raftMetric {
	return raftMetric{about{"raft_" + name + "_total", counter, unit, nil, help}, "raft." + key}
}

func last(key, name, unit, help string) raftMetric {
	return raftMetric{about{"raft_" + name, gauge, unit, nil, help}, "raft." + key}
}

var raftMetrics = []raftMetric{
	counts("apply", "apply", "entries", "Entries with records or orders that the node, as the leader, handed to Raft."),
	counts("barrier", "barrier", "entries", "Entries without records by which a leader finds out that all before them is applied."),
	counts("verify_leader", "verify_leader", "questions", "Times that a leader asked a quorum whether it still leads, as it does for linearizable reads."),
	counts("state.leader", "state_leader", "times", "Times that the node became the leader."),
	counts("state.candidate", "state_candidate", "times", "Times that the node stood for election. Many of them without a leader are a sign of a network that is cut."),
	counts("state.follower", "state_follower", "times", "Times that the node became a follower."),
	counts("transition.heartbeat_timeout", "heartbeat_timeout", "times", "Times that the node, as a follower, missed its leader."),
	counts("transition.leader_lease_timeout", "leader_lease_timeout", "times", "Times that the node, as the leader, missed its quorum and stepped down."),
	counts("replication.appendEntries.logs", "replication_entries", "entries", "Entries that the node, as the leader, sent to followers, each counted for each of them."),
	last("peers", "peers", "nodes", "Members of the cluster, as the leader last saw."),
	last("commitNumLogs", "commit_entries", "entries", "Entries that the last commit brought."),
	last("leader.dispatchNumLogs", "leader_dispatch_entries", "entries", "Entries that the leader last wrote at once."),
	last("thread.main.saturation", "thread_main_saturation_ratio", "0 to 1", "How much of its time Raft's main goroutine was busy, lately. Near 1, it is what holds the node up."),
	last("thread.fsm.saturation", "thread_fsm_saturation_ratio", "0 to 1", "How much of its time the goroutine was busy that applies what is committed."),

	took("commitTime", "commit", "At the leader: from when an entry is taken up by Raft until it is committed."),
	took("leader.dispatchLog", "leader_dispatch_log", "At the leader: what writing entries to its own disk takes."),
	took("leader.lastContact", "leader_last_contact", "At the leader: how long ago it heard from the slowest follower of a quorum, whenever it checks."),
	took("replication.appendEntries.rpc", "replication_append_entries", "At the leader: what sending entries to a follower takes, with the answer, when it is not sent ahead of that."),
	took("replication.heartbeat", "replication_heartbeat", "At the leader: what a heartbeat takes, with the answer."),
	took("replication.installSnapshot", "replication_install_snapshot", "At the leader: what sending the whole log to a follower takes."),
	took("rpc.appendEntries", "rpc_append_entries", "At a follower: what taking a leader's entries takes, in all."),
	took("rpc.appendEntries.storeLogs", "rpc_append_entries_store", "At a follower: what writing them to the disk takes of that."),
	took("rpc.appendEntries.processLogs", "rpc_append_entries_process", "At a follower: what handing on what is committed takes of that."),
	took("rpc.requestVote", "rpc_request_vote", "What answering a request for a vote takes."),
	took("rpc.installSnapshot", "rpc_install_snapshot", "At a follower: what getting the whole log takes."),
	took("candidate.electSelf", "candidate_elect_self", "What a request for a vote takes, at who asks for it."),
	took("candidate.preElectSelf", "candidate_pre_elect_self", "What asking whether it would get a vote takes, at who asks."),
	took("fsm.enqueue", "fsm_enqueue", "How long what is committed waits to be given to the state machine. Long waits mean that it does not keep up."),
	took("fsm.applyBatch", "fsm_apply_batch", "What applying a batch of entries takes."),
	took("fsm.snapshot", "fsm_snapshot", "What looking at the state for a snapshot takes."),
	took("fsm.restore", "fsm_restore", "What taking over the state of a snapshot takes."),
	took("snapshot.create", "snapshot_create", "What beginning to write a snapshot takes."),
	took("snapshot.persist", "snapshot_persist", "What writing it takes."),
	took("snapshot.takeSnapshot", "snapshot_take", "What a snapshot takes in all."),
	took("net.rpcDecode", "net_decode", "What decoding a message of another node takes."),
	took("net.rpcEnqueue", "net_enqueue", "How long a decoded message waits until Raft takes it up."),
	took("net.rpcRespond", "net_respond", "How long Raft then takes to answer it."),
}

// raftUntold are metrics of hashicorp/raft's that mean nothing here, each with
// why.
var raftUntold = map[string]string{
	"raft.restore":                 "this node never does what it counts",
	"raft.restoreUserSnapshot":     "likewise",
	"raft.fsm.apply":               "entries are applied in batches",
	"raft.fsm.store_config":        "the state machine does not keep configurations",
	"raft.fsm.applyBatchNum":       "commit_entries tells as much",
	"raft.fsm.lastRestoreDuration": "fsm_restore tells it",
	"raft.net.getRPCType":          "it is the time between two messages",
	"raft.rpc.processHeartbeat":    "heartbeats have no way of their own, see the transport",
	"raft.compactLogs":             "Raft never deletes a prefix here",
	"raft.removeOldLogs":           "likewise",
	"raft.leader":                  "it begins the name of oldestLogAge: retention is the log's",
}

// raftSink takes what hashicorp/raft tells go-metrics, which is one for the whole
// process: so there is one of these for a process that has just one node, and
// none where there are more. It may be registered with one node's registry after
// another. It keeps no labels: of the peers that Raft could name, none is
// forgotten by a metric.
type raftSink struct {
	gauges     map[string]prometheus.Gauge
	counters   map[string]prometheus.Counter
	histograms map[string]prometheus.Histogram
	all        []prometheus.Collector
}

var _ gometrics.MetricSink = (*raftSink)(nil)

// tellRaft makes a sink, and Raft tell it.
func tellRaft() (*raftSink, error) {
	s := newRaftSink()
	_, err := gometrics.NewGlobal(&gometrics.Config{TimerGranularity: time.Millisecond, FilterDefault: true}, s)
	if err != nil {
		return nil, fmt.Errorf("metrics of Raft: %w", err)
	}
	return s, nil
}

func newRaftSink() *raftSink {
	s := &raftSink{map[string]prometheus.Gauge{}, map[string]prometheus.Counter{}, map[string]prometheus.Histogram{}, nil}
	for _, m := range raftMetrics {
		switch m.kind {
		case gauge:
			g := prometheus.NewGauge(prometheus.GaugeOpts{Name: m.name, Help: m.help})
			s.gauges[m.key], s.all = g, append(s.all, g)
		case counter:
			c := prometheus.NewCounter(prometheus.CounterOpts{Name: m.name, Help: m.help})
			s.counters[m.key], s.all = c, append(s.all, c)
		case histogram:
			h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: m.name, Help: m.help, Buckets: diskBuckets})
			s.histograms[m.key], s.all = h, append(s.all, h)
		}
	}
	return s
}

// collectors are what there is to register; none for a nil sink.
func (s *raftSink) collectors() []prometheus.Collector {
	if s == nil {
		return nil
	}
	return s.all
}

// SetGauge implements go-metrics.
func (s *raftSink) SetGauge(key []string, v float32) {
	if g, ok := s.gauges[strings.Join(key, ".")]; ok {
		g.Set(float64(v))
	}
}

// SetGaugeWithLabels implements go-metrics.
func (s *raftSink) SetGaugeWithLabels(key []string, v float32, _ []gometrics.Label) {
	s.SetGauge(key, v)
}

// EmitKey implements go-metrics. Raft does not use it.
func (s *raftSink) EmitKey([]string, float32) {}

// IncrCounter implements go-metrics.
func (s *raftSink) IncrCounter(key []string, v float32) {
	if c, ok := s.counters[strings.Join(key, ".")]; ok && v > 0 {
		c.Add(float64(v))
	}
}

// IncrCounterWithLabels implements go-metrics.
func (s *raftSink) IncrCounterWithLabels(key []string, v float32, _ []gometrics.Label) {
	s.IncrCounter(key, v)
}

// AddSample implements go-metrics: a duration in milliseconds, or a share.
func (s *raftSink) AddSample(key []string, v float32) {
	name := strings.Join(key, ".")
	if h, ok := s.histograms[name]; ok {
		h.Observe(float64(v) / 1000)
	} else if g, ok := s.gauges[name]; ok {
		g.Set(float64(v))
	}
}

// AddSampleWithLabels implements go-metrics.
func (s *raftSink) AddSampleWithLabels(key []string, v float32, _ []gometrics.Label) {
	s.AddSample(key, v)
}
