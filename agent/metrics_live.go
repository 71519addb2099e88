package agent

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/rpc"
)

// live is the metrics that are counted while things happen. Methods may be called
// by any number of goroutines unless they say otherwise.
type live struct {
	append, sync, commit           prometheus.Observer
	appendedRecords, appendedBytes prometheus.Counter
	readRecords, readBytes         prometheus.Counter
	leaderChanges                  prometheus.Counter
	started, handled, errors       *prometheus.CounterVec
	inFlight                       *prometheus.GaugeVec
	handling                       *prometheus.HistogramVec
	all                            []prometheus.Collector
	descriptions                   []about
	leader                         leadership // the last that was seen; of the goroutine that calls led
}

// What a disk and a network take, from a fast disk's sync to the limit at which
// the watchdog gives up: each bound is twice the one before, so that a quantile
// is off by half at most, and the same on all nodes, so that they add up.
var diskBuckets = prometheus.ExponentialBuckets(0.0001, 2, 17) // 100 µs to 6.6 s

// callBuckets are of calls, which may wait for an election.
var callBuckets = []float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10}

func newLive() *live {
	l := new(live)
	histogramVec := func(buckets []float64, name, help string, labels ...string) *prometheus.HistogramVec {
		v := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
		l.add(v, about{name, histogram, "seconds", labels, help})
		return v
	}
	counterVec := func(unit, name, help string, labels ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
		l.add(v, about{name, counter, unit, labels, help})
		return v
	}
	ofLog := func(v *prometheus.HistogramVec) prometheus.Observer { return v.WithLabelValues(rpc.DefaultLog) }
	l.commit = ofLog(histogramVec(diskBuckets, "diurna_log_commit_seconds",
		"At the leader, for each entry: from the arrival of its first batch until the entry is on a quorum's disks and can be read.", "log"))
	l.append = ofLog(histogramVec(diskBuckets, "diurna_log_append_seconds",
		"At each node: what writing entries to the disk takes, with the sync.", "log"))
	l.sync = ofLog(histogramVec(diskBuckets, "diurna_log_sync_seconds",
		"At each node: what the sync to the disk alone takes.", "log"))
	l.appendedRecords = counterVec("records", "diurna_log_appended_records_total",
		"Records that the node has written to its disk, as the leader or as a follower.", "log").WithLabelValues(rpc.DefaultLog)
	l.appendedBytes = counterVec("bytes", "diurna_log_appended_bytes_total",
		"What the node has written to its log, with what frames the records.", "log").WithLabelValues(rpc.DefaultLog)
	l.readRecords = counterVec("records", "diurna_log_read_records_total",
		"Records that the node has read for consumers. One that joins in the middle of a batch makes the node read all of it.", "log").WithLabelValues(rpc.DefaultLog)
	l.readBytes = counterVec("bytes", "diurna_log_read_bytes_total",
		"What these records take in the log.", "log").WithLabelValues(rpc.DefaultLog)
	l.leaderChanges = counterVec("leaders", "diurna_raft_leader_changes_total",
		"Leaders that the node has seen begin, itself included, since its start.").WithLabelValues()

	method := []string{"grpc_type", "grpc_service", "grpc_method"}
	l.started = counterVec("calls", "grpc_server_started_total",
		"Calls that have begun, refused ones included.", method...)
	l.handled = counterVec("calls", "grpc_server_handled_total",
		"Calls that are over, by gRPC's code.", append(method[:3:3], "grpc_code")...)
	const inFlight, inFlightHelp = "grpc_server_in_flight", "Calls that are under way: open streams, and unary calls."
	l.inFlight = prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: inFlight, Help: inFlightHelp}, method)
	l.add(l.inFlight, about{inFlight, gauge, "calls", method, inFlightHelp})
	l.handling = histogramVec(callBuckets, "grpc_server_handling_seconds",
		"What unary calls took. Streams last as long as their clients want.", method...)
	l.errors = counterVec("calls", "diurna_grpc_errors_total",
		"Calls that were refused or failed, by the reason that clients are given; OTHER where it is none of Diurna's.", "reason")
	return l
}

func (l *live) add(c prometheus.Collector, a about) {
	l.all = append(l.all, c)
	l.descriptions = append(l.descriptions, a)
}

// liveMetrics describes them.
func liveMetrics() []about { return newLive().descriptions }

// observer is what the log is to tell.
func (l *live) observer() replica.Observer {
	return replica.Observer{
		Log: logstore.Observer{
			Appended: func(records, bytes uint64, took time.Duration) {
				l.append.Observe(took.Seconds())
				l.appendedRecords.Add(float64(records))
				l.appendedBytes.Add(float64(bytes))
			},
			Synced: func(took time.Duration) { l.sync.Observe(took.Seconds()) },
		},
		Committed: func(took time.Duration) { l.commit.Observe(took.Seconds()) },
	}
}

// read counts what was read for consumers.
func (l *live) read(batches []logstore.Batch) {
	records, bytes := 0, 0
	for i := range batches {
		records += int(batches[i].Count)
		bytes += batches[i].End - batches[i].Start
	}
	l.readRecords.Add(float64(records))
	l.readBytes.Add(float64(bytes))
}

// led is told who leads, whenever that may have changed. It is called by one
// goroutine.
func (l *live) led(leader string, term uint64) {
	if leader == "" {
		return
	}
	if now := (leadership{leader, term}); now != l.leader {
		l.leader = now
		l.leaderChanges.Inc()
	}
}

// leadership is one leader's time.
type leadership struct {
	leader string
	term   uint64
}

var _ rpc.Observer = (*live)(nil)

// CallBegins implements rpc.Observer.
func (l *live) CallBegins(method string, stream bool) {
	typ, service, name := splitMethod(method, stream)
	l.started.WithLabelValues(typ, service, name).Inc()
	l.inFlight.WithLabelValues(typ, service, name).Inc()
}

// CallEnds implements rpc.Observer.
func (l *live) CallEnds(method string, stream bool, end rpc.CallEnd) {
	typ, service, name := splitMethod(method, stream)
	l.inFlight.WithLabelValues(typ, service, name).Dec()
	l.handled.WithLabelValues(typ, service, name, end.Code.String()).Inc()
	if !stream {
		l.handling.WithLabelValues(typ, service, name).Observe(end.Took.Seconds())
	}
	if end.Code != 0 {
		reason := end.Reason
		if reason == "" {
			reason = "OTHER"
		}
		l.errors.WithLabelValues(reason).Inc()
	}
}

// splitMethod takes "/diurna.v1.Log/Produce" apart. gRPC serves only methods
// that are registered, so that there are no more of them than these.
func splitMethod(full string, stream bool) (typ, service, method string) {
	service, method, _ = strings.Cut(strings.TrimPrefix(full, "/"), "/")
	if stream {
		return "stream", service, method
	}
	return "unary", service, method
}
