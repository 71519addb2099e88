package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/diurnalog/diurna/rpc/client"
)

var errStopped = errors.New("stopped")

// produceRun feeds one input to one producer.
type produceRun struct {
	p      *client.Producer
	start  time.Time
	ctx    context.Context // ends when nothing is waited for any more
	giveUp context.CancelFunc
	input  chan error    // gets what ended the input; nil is its end
	closed chan struct{} // closed when outcome is there

	// mu is held while a record is handed to the producer, so that stopping
	// falls between two records: the one in hand is still taken in.
	mu       sync.Mutex
	stopped  bool
	read     uint64 // records taken from the input
	accepted uint64 // and by the producer
	bytes    uint64 // of keys and values accepted

	// What ended the input, if anything did before close; nil is its end.
	ended    bool
	inputErr error

	outcome client.Outcome // set by close
}

func newProduceRun(p *client.Producer) *produceRun {
	r := &produceRun{p: p, start: time.Now(), input: make(chan error, 1), closed: make(chan struct{})}
	r.ctx, r.giveUp = context.WithCancel(context.Background())
	return r
}

// feedAll runs until the input ends or the run is stopped. A read that blocks
// cannot be ended; then this goroutine stays behind, and whatever it reads
// later is not taken in.
func (r *produceRun) feedAll(src source) { r.input <- src(r.feed) }

func (r *produceRun) feed(record *client.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped {
		return errStopped
	}
	r.read++
	if err := r.p.Append(r.ctx, record); err != nil {
		return errStopped // the producer keeps the reason
	}
	r.accepted++
	r.bytes += uint64(len(record.Key) + len(record.Value))
	return nil
}

// giveUpAfter bounds how long close may take; 0 does not.
func (r *produceRun) giveUpAfter(d time.Duration) {
	if d > 0 {
		timer := time.AfterFunc(d, r.giveUp)
		context.AfterFunc(r.ctx, func() { timer.Stop() })
	}
}

func (r *produceRun) inputEnded(err error) {
	if !errors.Is(err, errStopped) {
		r.ended, r.inputErr = true, err
	}
}

func (r *produceRun) close() {
	defer close(r.closed)
	r.mu.Lock() // waits for the record in hand
	r.stopped = true
	r.mu.Unlock()
	r.outcome, _ = r.p.Close(r.ctx) // report asks the producer for its error
}

// offsetPrinter prints the offsets of acknowledged records.
type offsetPrinter struct {
	w      *bufio.Writer
	line   []byte
	failed chan struct{} // closed by the first failure

	mu    sync.Mutex
	cause error
}

func newOffsetPrinter(w io.Writer) *offsetPrinter {
	return &offsetPrinter{w: bufio.NewWriterSize(w, 32<<10), failed: make(chan struct{})}
}

// print runs after the acknowledgement and reaches the reader before the next
// one is taken, so that who reads an offset can rely on its record.
func (o *offsetPrinter) print(a client.Ack) {
	if o.err() != nil {
		return
	}
	for offset := a.BaseOffset; offset < a.NextOffset; offset++ {
		o.line = append(strconv.AppendUint(o.line[:0], offset, 10), '\n')
		if _, err := o.w.Write(o.line); err != nil {
			break // it is sticky: Flush returns it too
		}
	}
	if err := o.w.Flush(); err != nil {
		o.mu.Lock()
		o.cause = err
		o.mu.Unlock()
		close(o.failed)
	}
}

func (o *offsetPrinter) err() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.cause
}

// openContext bounds the opening by an interrupt and the timeout.
// What it returns ends that, and tells whether there was an interrupt.
func (c *produceCommand) openContext(requests <-chan os.Signal) (context.Context, func() bool) {
	ctx, cancel := context.WithCancel(context.Background())
	release := cancel
	if c.timeout > 0 {
		ctx, release = context.WithTimeout(ctx, c.timeout)
	}
	interrupted := make(chan bool, 1)
	go func() {
		select {
		case <-requests:
			cancel()
			interrupted <- true
		case <-ctx.Done():
			interrupted <- false
		}
	}()
	return ctx, func() bool {
		release()
		cancel()
		return <-interrupted
	}
}

// report tells what became of the records and returns the exit code.
func (c *produceCommand) report(r *produceRun, outputErr error, interrupted bool) int {
	o := r.outcome
	notAppended := o.NotAppended + r.read - r.accepted
	complete := o.Acknowledged == r.read
	took := time.Since(r.start)
	code := ExitOK

	// A producer that failed when all was acknowledged matters only to input
	// that is still to come.
	failure := r.p.Err()
	if !complete || failure != nil && !r.ended && !interrupted {
		code = ExitServer
		if failure != nil {
			c.errorf("%s", explain(failure))
		}
	}
	if r.inputErr != nil {
		c.errorf("%s", r.inputErr)
		code = max(code, ExitUsage)
	}
	if outputErr != nil {
		if !isClosedPipe(outputErr) {
			c.errorf("write to standard output: %s", outputErr)
		} else {
			c.errorf("standard output was closed while offsets were being printed; no more input was read")
		}
		code = max(code, ExitUsage)
	}
	if c.quiet && complete {
		return code
	}
	size := ""
	if complete {
		size = fmt.Sprintf(" (%s)", humanize.Bytes(r.bytes))
	}
	text := fmt.Sprintf("%s%s acknowledged", records(o.Acknowledged), size)
	if o.Acknowledged > 0 {
		text += ", " + span(o)
	}
	if o.AppendedAfter > 0 {
		text += fmt.Sprintf(", %d appended after a failed batch", o.AppendedAfter)
	}
	if !complete {
		text += fmt.Sprintf(", %d not appended, %d unknown", notAppended, o.Unknown)
	}
	text += fmt.Sprintf(", in %s", seconds(took))
	// Of one record, or of what somebody types, it would say nothing.
	if rate := float64(o.Acknowledged) / took.Seconds(); took > 0 && o.Acknowledged > 1 && rate >= 1 && !c.stdinIsTerminal() {
		text += fmt.Sprintf(" (%s/s)", humanize.Comma(int64(rate)))
	}
	if interrupted {
		text += "; interrupted"
	}
	c.notef("%s", text)
	if again := o.Unknown + o.AppendedAfter; again > 0 {
		from := fmt.Sprintf("last:%d", again)
		if o.Acknowledged > 0 {
			from = strconv.FormatUint(o.Last+1, 10)
		}
		c.notef("Look into the log (`diurna consume -from %s`) before you send those again.", from)
	}
	return code
}

func records(n uint64) string {
	if n == 1 {
		return "1 record"
	}
	return humanize.Comma(int64(n)) + " records"
}

func span(o client.Outcome) string {
	s := fmt.Sprintf("offsets %d–%d", o.First, o.Last)
	if o.First == o.Last {
		s = fmt.Sprintf("offset %d", o.First)
	}
	if o.Last-o.First+1 != o.Acknowledged {
		s += " with others in between"
	}
	return s
}

func seconds(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// showProgress draws how many records were acknowledged.
func (c *produceCommand) showProgress(p *client.Producer) *progress {
	// Nor between the lines that somebody types.
	if c.quiet || c.stdinIsTerminal() {
		return noProgress()
	}
	start, drawn := time.Now(), false
	return c.startProgress(func() string {
		n := p.Outcome().Acknowledged
		if n == 0 && !drawn {
			return "" // there may never be anything to tell
		}
		drawn = true
		rate := float64(n) / time.Since(start).Seconds()
		return fmt.Sprintf("%s acknowledged, %s/s", records(n), humanize.Comma(int64(rate)))
	})
}
