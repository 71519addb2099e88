package agent

import (
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
)

// A history is everything that the clients of a simulated cluster tried and
// saw. It is written while the cluster runs and checked when it is over: see
// violations and linearizable. Methods are safe for concurrent use.
type history struct {
	began time.Time

	mu sync.Mutex
	// clock numbers calls and returns in the order in which they happened. In a
	// bubble many things happen at the same time.
	clock   int64
	appends []*simAppend
	reads   []*simRead
	notes   []simNote
	// How much happened to the nodes: their lives, and the last term.
	lives int
	terms uint64
}

func newHistory() *history { return &history{began: time.Now()} }

// simAppend is one attempt to append a batch. A batch has one content however
// often it is tried.
type simAppend struct {
	client, batch, count int
	// stream is not 0 where the attempt was made on a produce stream, which has
	// that number; position is its place on it.
	stream, position int
	expected         *uint64
	node             simPlace

	call, returned int64 // by history.clock; 0: it has not returned
	at, until      time.Duration

	outcome simOutcome
	base    uint64 // where it was acknowledged
	// next is what a refusal said the end of the log was.
	next *uint64
	why  string
}

// simPlace is a life of a node: from one start of its process to its end.
type simPlace struct {
	node string
	life int
}

func (p simPlace) String() string { return fmt.Sprintf("%s/%d", p.node, p.life) }

type simOutcome int

const (
	simUnknown simOutcome = iota // nobody knows, also while it has not returned
	simAcked
	simRefused // definitely not appended
)

func (o simOutcome) String() string { return [...]string{"unknown", "acked", "refused"}[o] }

// simRecord is a record as somebody read it.
type simRecord struct {
	offset uint64
	id     string // its key, see simKey
	sum    uint32 // of the rest
	time   int64
}

// simRead is one read, from an offset to the end of the log as its node shows
// it.
type simRead struct {
	client int
	node   simPlace
	linear bool // it was asked to be linearizable
	from   uint64
	// limit is how many records were asked for; 0 all.
	limit int
	// final is the audit at the end: all of the log of one node.
	final bool

	call, returned int64
	at, until      time.Duration

	records []simRecord
	// complete: the read got as far as it was to. Otherwise the node or the
	// network failed in between. end is then the node's high watermark, if there
	// was no limit.
	complete bool
	end      uint64
	why      string
}

// simNote is something that was done to the cluster.
type simNote struct {
	at    time.Duration
	clock int64
	text  string
}

func (h *history) tick() (int64, time.Duration) {
	h.clock++
	return h.clock, time.Since(h.began)
}

func (h *history) note(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	clock, at := h.tick()
	h.notes = append(h.notes, simNote{at, clock, fmt.Sprintf(format, args...)})
}

// beginAppend notes an attempt before anything of it is sent.
func (h *history) beginAppend(a simAppend) *simAppend {
	h.mu.Lock()
	defer h.mu.Unlock()
	a.call, a.at = h.tick()
	h.appends = append(h.appends, &a)
	return &a
}

// endAppend notes an attempt's outcome, which change fills in.
func (h *history) endAppend(a *simAppend, change func(a *simAppend)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	a.returned, a.until = h.tick()
	change(a)
}

func (h *history) beginRead(r simRead) *simRead {
	h.mu.Lock()
	defer h.mu.Unlock()
	r.call, r.at = h.tick()
	h.reads = append(h.reads, &r)
	return &r
}

func (h *history) endRead(r *simRead, change func(r *simRead)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r.returned, r.until = h.tick()
	change(r)
}

// count says how much there is of what.
func (h *history) count() (acked, refused, unknown, reads int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, a := range h.appends {
		switch a.outcome {
		case simAcked:
			acked++
		case simRefused:
			refused++
		default:
			unknown++
		}
	}
	return acked, refused, unknown, len(h.reads)
}

// simKey identifies a record for ever: which client made it in which batch, and
// where in it.
func simKey(client, batch, i, count int) string {
	return fmt.Sprintf("%d/%d/%d/%d", client, batch, i, count)
}

func parseSimKey(key string) (client, batch, i, count int, ok bool) {
	n, err := fmt.Sscanf(key, "%d/%d/%d/%d", &client, &batch, &i, &count)
	return client, batch, i, count, err == nil && n == 4 && simKey(client, batch, i, count) == key
}

// simValue is what a record with a key holds: no two are alike, and some are
// longer than a disk's sector.
func simValue(key string) []byte {
	seed := simSum([]byte(key))
	return []byte(strings.Repeat(fmt.Sprintf("%s:%08x ", key, seed), 1+int(seed%5)*int(seed>>8%16)))
}

var simTable = crc32.MakeTable(crc32.Castagnoli)

func simSum(b []byte) uint32 { return crc32.Checksum(b, simTable) }

// write tells the whole story, in the order in which it happened.
func (h *history) write(w io.Writer) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	type line struct {
		clock int64
		text  string
	}
	var lines []line
	say := func(clock int64, at time.Duration, format string, args ...any) {
		lines = append(lines, line{clock, fmt.Sprintf("%6d %12v  ", clock, at.Round(time.Microsecond)) + fmt.Sprintf(format, args...)})
	}
	for _, n := range h.notes {
		say(n.clock, n.at, "*** %s", n.text)
	}
	for _, a := range h.appends {
		what := fmt.Sprintf("client %d append %d/%d (%d) at %v", a.client, a.client, a.batch, a.count, a.node)
		if a.expected != nil {
			what += fmt.Sprintf(" expecting %d", *a.expected)
		}
		if a.stream != 0 {
			what += fmt.Sprintf(" on stream %d.%d", a.stream, a.position)
		}
		say(a.call, a.at, "%s ...", what)
		if a.returned == 0 {
			continue
		}
		switch a.outcome {
		case simAcked:
			say(a.returned, a.until, "%s: acked at %d", what, a.base)
		default:
			say(a.returned, a.until, "%s: %v (%s)", what, a.outcome, a.why)
		}
	}
	for _, r := range h.reads {
		what := fmt.Sprintf("client %d read from %d at %v", r.client, r.from, r.node)
		if r.linear {
			what += " linearizable"
		}
		if r.limit > 0 {
			what += fmt.Sprintf(" limit %d", r.limit)
		}
		say(r.call, r.at, "%s ...", what)
		if r.returned == 0 {
			continue
		}
		got := make([]string, len(r.records))
		for i, rec := range r.records {
			got[i] = rec.id
		}
		text := "failed: " + r.why
		if r.complete {
			text = fmt.Sprintf("up to %d", r.end)
		}
		say(r.returned, r.until, "%s: %s %v", what, text, got)
	}
	slices.SortFunc(lines, func(a, b line) int { return int(a.clock - b.clock) })
	for _, l := range lines {
		if _, err := fmt.Fprintln(w, l.text); err != nil {
			return err
		}
	}
	return nil
}
