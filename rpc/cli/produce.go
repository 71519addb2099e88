package cli

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/diurnalog/diurna/rpc/cli/flags"
	"github.com/diurnalog/diurna/rpc/client"
)

type produceCommand struct {
	node
	log                     string
	nul, json, quiet        bool
	printOffsets            bool
	files                   []string
	key, keySeparator       string
	headers                 []*client.Header
	batchRecords            uint64
	batchBytes, maxInFlight uint64
	maxRecord               uint64
	linger, timeout, retry  time.Duration
	expected                *uint64
}

func (c *produceCommand) options() *flags.Set {
	f := flags.New()
	c.nodeFlags(f)
	logFlag(f, &c.log)

	f.Bool(&c.nul, "0", "Records end with a NUL byte instead of a newline, as from find -print0.")
	f.Bool(&c.json, "json", `Every line is a JSON object: {"key": "…", "value": "…", "headers": [{"name": "…", "value": "…"}]}, each part optional; headers may also be an object. Bytes that are not text go into key_base64 and value_base64. What consume -json prints is read back: offset and time are passed over. Any other field is an error.`)
	c.files = nil
	f.Each(func(s string) error {
		c.files = append(c.files, s)
		return nil
	}, "file", "path", "Send the whole file as one record, byte for byte, instead of reading standard input. May be repeated.")
	f.Text(&c.key, "key", "text", "", "Key of every record.")
	f.Text(&c.keySeparator, "key-separator", "text", "", "Split every line at the first such text: what is before it is the key. A line without it is an error.")
	c.headers = nil
	f.Each(func(s string) error {
		name, value, ok := strings.Cut(s, "=")
		if !ok || !utf8.ValidString(name) {
			return errors.New("want name=value")
		}
		c.headers = append(c.headers, &client.Header{Name: name, Value: []byte(value)})
		return nil
	}, "header", "name=value", "Header of every record. May be repeated.")
	f.Offset(&c.expected, "expected-offset", "Append only if the first record gets exactly this offset; otherwise append nothing and exit 2.")

	f.Count(&c.batchRecords, "batch-records", "count", fmt.Sprintf("Records in one batch, at most. Default %d.", client.DefaultBatchRecords))
	f.Size(&c.batchBytes, "batch-bytes", client.DefaultBatchBytes, "Size of one batch, at most. A larger record travels alone. Default 512KiB.")
	f.Duration(&c.linger, "linger", client.DefaultLinger, "How long a batch may wait for more records. Default 5ms.")
	f.Size(&c.maxInFlight, "max-in-flight", client.DefaultMaxInFlightBytes, "How much may be sent and not yet acknowledged. Default 8MiB.")
	f.Size(&c.maxRecord, "max-record-bytes", 1<<20, "Largest record. A larger one is an error before it is sent. The server has a limit of its own. Default 1MiB.")
	f.Duration(&c.timeout, "timeout", 30*time.Second, "Give up when the server acknowledges nothing for so long; also how long to wait for acknowledgements after an interrupt. 0 waits for ever. Default 30s.")

	retryFlag(f, &c.retry, "For how long to try again what was definitely not appended, when a server fails or there is no leader.")
	f.Bool(&c.printOffsets, "print-offsets", "Print the offset of every record, one a line, in the order of the input, once it is acknowledged.")
	f.Bool(&c.quiet, "quiet", "No progress and no summary; errors are still told.")
	return f
}

func (c *produceCommand) Synopsis() string { return "Append records from standard input" }

func (c *produceCommand) Help() string {
	return c.options().Help("diurna produce [options]", `
Appends records to a log. Every line of standard input is a record; the newline
is not part of it. A last line without a newline is a record as well.

A record that is acknowledged is on disk on a majority of the servers. The
summary, on standard error, says how many are, and at which offsets. When a
server fails on the way, the rest goes to the next one. Only records of which
it is unknown whether they were appended end it: nothing is ever appended
twice, so look for those in the log before you send them again. The summary
says how many they are, and how many were definitely not appended.

Interrupt (Ctrl-C) or terminate it to stop: what was read so far is still sent
and waited for. A second interrupt gives up at once.

Exits 0 when every record that was read is acknowledged, also after an
interrupt; 2 when one is not; 1 when the command was called wrongly or the
input cannot be read, where records before the mistake are appended.
`, `
Examples:

  Append the lines of a file:

      $ diurna produce < access.log

  Follow a file; every line is sent as it comes:

      $ tail -F access.log | diurna produce

  One record with a key and a header:

      $ printf %s "$BODY" | diurna produce -key order-17 -header type=created

  A binary file as one record:

      $ diurna produce -file photo.jpg

  Copy a log, keys and headers included:

      $ diurna consume -json | diurna produce -json -addr other:8400`+tlsHelp)
}

func (c *produceCommand) Run(args []string) int {
	f := c.options()
	err := c.parse(f, args)
	for _, group := range [][]string{
		{"0", "json", "file"},
		{"json", "key"}, {"json", "header"}, {"json", "key-separator"},
		{"key", "key-separator"}, {"file", "key-separator"},
	} {
		if err == nil {
			err = f.Exclusive(group...)
		}
	}
	if err == nil && f.Given("key-separator") && c.keySeparator == "" {
		err = errors.New("-key-separator is empty")
	}
	if err == nil && c.batchRecords > 1<<24 {
		err = errors.New("-batch-records is more than anyone can want")
	}
	if err == nil && c.maxRecord > 1<<30 {
		err = errors.New("-max-record-bytes is more than 1GiB")
	}
	if err != nil {
		return c.usage("produce", err)
	}
	return c.withClient(c.produce, client.WithRetry(c.retry))
}

func (c *produceCommand) source() source {
	switch {
	case len(c.files) > 0:
		return c.wholeFiles()
	case c.json:
		return c.jsonLines()
	case c.nul:
		return c.pieces(0)
	}
	return c.pieces('\n')
}

func (c *produceCommand) producerOptions() client.ProducerOptions {
	opts := client.ProducerOptions{
		Log:              c.log,
		BatchRecords:     int(c.batchRecords),
		BatchBytes:       int(c.batchBytes),
		Linger:           c.linger,
		MaxInFlightBytes: int(c.maxInFlight),
		AckTimeout:       c.timeout,
		ExpectedOffset:   c.expected,
	}
	if c.linger == 0 {
		opts.Linger = -1 // for the client, 0 is its default
	}
	return opts
}

// produce is the life of one run: open, feed until the input ends or somebody
// wants it to, close, report.
func (c *produceCommand) produce(cl *client.Client) int {
	requests, stop := c.interrupts()
	defer stop()
	offsets := newOffsetPrinter(c.Stdout)
	opts := c.producerOptions()
	if c.printOffsets {
		opts.OnAck = offsets.print
	}
	opening, stopOpening := c.openContext(requests)
	p, err := cl.NewProducer(opening, opts)
	interrupted := stopOpening()
	if err != nil {
		return c.failed(err)
	}
	run := newProduceRun(p)
	defer run.giveUp()
	progress := c.showProgress(p)
	go run.feedAll(c.source())

	if !interrupted {
		select {
		case err := <-run.input:
			run.inputEnded(err)
		case <-p.Failed():
		case <-offsets.failed:
		case <-requests:
			interrupted = true
		}
	}
	if interrupted {
		run.giveUpAfter(c.timeout)
	}
	go run.close()
	var overdue <-chan time.Time
	for open := true; open; {
		select {
		case <-run.closed:
			open = false
		case <-requests:
			if !interrupted {
				interrupted = true
				run.giveUpAfter(c.timeout)
				continue
			}
			run.giveUp()
			// What is left to block is standard output, and that cannot be
			// ended.
			overdue = time.After(time.Second)
		case <-overdue:
			progress.stop()
			c.errorf("interrupted while offsets were being printed to standard output")
			return ExitServer
		}
	}
	progress.stop()
	return c.report(run, offsets.err(), interrupted)
}
