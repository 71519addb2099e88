package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/diurnalog/diurna/rpc/cli/flags"
	"github.com/diurnalog/diurna/rpc/client"
)

type consumeCommand struct {
	node
	log                  string
	from                 string
	until                *uint64
	max                  uint64
	follow, linearizable bool
	raw, nul, json       bool
	separator            string
	keySeparator         string
	retry                time.Duration
}

func (c *consumeCommand) options() *flags.Set {
	f := flags.New()
	c.nodeFlags(f)
	logFlag(f, &c.log)

	f.Text(&c.from, "from", "start", "earliest", "Where to start: earliest (the first record that is kept), latest (only what is yet to come; see -follow), an offset (17 or offset:17), last:N for the last N records, a time (2026-01-31T12:00:00Z), or how long ago (90s, 10m, 2d). Default earliest.")
	f.Offset(&c.until, "until", "Stop before this offset.")
	f.Count(&c.max, "count", "count", "Stop after so many records. Default 0, no limit.")
	f.Bool(&c.follow, "follow", "Do not stop at the end of the log; wait for more.")
	f.Bool(&c.linearizable, "linearizable", "See every record that any node has acknowledged before now, for a round trip to a majority of the servers.")

	retryFlag(f, &c.retry, "For how long -follow looks for another server, or the same one, when the connection breaks; it goes on where it was.")

	f.Text(&c.separator, "separator", "text", "\n", "What to write after every record. Default a newline.")
	f.Bool(&c.raw, "raw", "Write nothing but the values: what -separator '' does. A file sent with produce -file comes back byte for byte.")
	f.Bool(&c.nul, "0", "Write a NUL byte after every record.")
	f.Text(&c.keySeparator, "key-separator", "text", "", "Write every record's key and this text in front of its value.")
	f.Bool(&c.json, "json", "Write every record as one line of JSON: offset, time, key, value and headers. What is not UTF-8 comes as key_base64 or value_base64. produce -json reads it back.")
	return f
}

func (c *consumeCommand) Synopsis() string { return "Write records to standard output" }

func (c *consumeCommand) Help() string {
	return c.options().Help("diurna consume [options]", `
Writes the values of records to standard output, exactly as they were produced,
each followed by a newline: the lines of a text file that went into produce come
out as the same file. (One whose last line lacked its newline gets it.)

It ends at the end of the log as it was when it started, unless -follow is
given. What is written is flushed whenever there is nothing more to read.

Exits 0 at the end, after an interrupt (Ctrl-C), and when standard output is
closed, as by head; 2 when the server fails or refuses, where everything
before is written; 1 when the command was called wrongly.
`, `
Examples:

  Print the whole log:

      $ diurna consume

  Follow it, beginning with the last ten records:

      $ diurna consume -from last:10 -follow

  What happened in the last hour, with times and keys:

      $ diurna consume -from 1h -json

  Get one record back as a file:

      $ diurna consume -from 42 -count 1 -raw > photo.jpg`+tlsHelp)
}

func (c *consumeCommand) Run(args []string) int {
	f := c.options()
	err := c.parse(f, args)
	var start client.Start
	if err == nil {
		start, err = parseFrom(c.from, time.Now())
	}
	if err == nil {
		err = f.Exclusive("separator", "raw", "0", "json")
	}
	if err == nil {
		err = f.Exclusive("key-separator", "json")
	}
	if err != nil {
		return c.usage("consume", err)
	}
	if c.raw {
		c.separator = ""
	}
	if c.nul {
		c.separator = "\x00"
	}
	return c.withClient(func(cl *client.Client) int { return c.consume(cl, start) }, client.WithRetry(c.retry))
}

// consume copies in a goroutine of its own, so that a second interrupt ends
// even a write that blocks.
func (c *consumeCommand) consume(cl *client.Client, start client.Start) int {
	requests, stop := c.interrupts()
	defer stop()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	result := make(chan copied, 1)
	go func() { result <- c.copy(ctx, cl, start) }()

	interrupted := false
	for {
		select {
		case r := <-result:
			return c.report(r, interrupted)
		case <-requests:
			if interrupted {
				c.errorf("interrupted while standard output was being written")
				return ExitUsage
			}
			interrupted = true
			cancel()
		}
	}
}

// copied is what became of a read.
type copied struct {
	records   uint64
	next      uint64
	nextKnown bool
	writeErr  error
	readErr   error
}

func (c *consumeCommand) copy(ctx context.Context, cl *client.Client, start client.Start) (done copied) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := bufio.NewWriterSize(c.Stdout, 64<<10)
	r, err := cl.Consume(ctx, client.ConsumeOptions{
		Log: c.log, Start: start, End: c.until, MaxRecords: c.max,
		Follow: c.follow, Linearizable: c.linearizable,
		OnIdle: func() {
			if err := w.Flush(); err != nil && done.writeErr == nil {
				done.writeErr = err
				cancel() // Next is about to wait, for records that nobody wants
			}
		},
	})
	if err != nil {
		done.readErr = err
		return done
	}
	defer r.Close()
	write := c.writeValue
	if c.json {
		write = c.writeJSON()
	}
	for done.writeErr == nil && r.Next() {
		if err := write(w, r.Record()); err != nil {
			done.writeErr = err
			break
		}
		done.records++
	}
	if err := w.Flush(); err != nil && done.writeErr == nil {
		done.writeErr = err
	}
	done.readErr = r.Err()
	done.next, done.nextKnown = r.NextOffset()
	return done
}

func (c *consumeCommand) writeValue(w *bufio.Writer, r *client.ConsumedRecord) error {
	if c.keySeparator != "" {
		// Errors of a bufio.Writer stay: the last write tells.
		_, _ = w.Write(r.Key)
		_, _ = w.WriteString(c.keySeparator)
	}
	_, _ = w.Write(r.Value)
	_, err := w.WriteString(c.separator)
	return err
}

func (c *consumeCommand) writeJSON() func(*bufio.Writer, *client.ConsumedRecord) error {
	var line []byte
	return func(w *bufio.Writer, r *client.ConsumedRecord) error {
		line = appendLine(line[:0], r)
		_, err := w.Write(line)
		return err
	}
}

func (c *consumeCommand) report(r copied, interrupted bool) int {
	switch {
	case r.writeErr != nil && isClosedPipe(r.writeErr):
		return ExitOK // the reader has had enough
	case r.writeErr != nil:
		c.errorf("write to standard output: %s", r.writeErr)
		return ExitUsage
	case r.readErr == nil, interrupted && errors.Is(r.readErr, context.Canceled):
		if interrupted && c.stderrIsTerminal() {
			text := records(r.records)
			if r.nextKnown && r.records > 0 {
				text += fmt.Sprintf(", up to offset %d", r.next-1)
			}
			c.notef("%s", text)
		}
		return ExitOK
	}
	code := c.failed(r.readErr)
	if r.nextKnown && r.records > 0 {
		c.notef("%s written; go on with -from %d.", records(r.records), r.next)
	}
	return code
}
