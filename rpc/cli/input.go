package cli

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/dustin/go-humanize"

	"github.com/diurnalog/diurna/rpc/client"
)

// source hands records to feed, one by one, until there are no more, feed
// fails or the input is wrong. A record is feed's only until it returns.
type source func(feed func(*client.Record) error) error

// delimited splits what it reads at a delimiter. What follows the last one is
// a piece too, unless it is empty.
type delimited struct {
	r     *bufio.Reader
	delim byte
	limit int
	long  []byte // a piece that did not fit into r's buffer
	count uint64 // of pieces so far
}

func newDelimited(r io.Reader, delim byte, limit int) *delimited {
	return &delimited{r: bufio.NewReaderSize(r, 256<<10), delim: delim, limit: limit}
}

// next returns the next piece without its delimiter; it is good until the call
// after. io.EOF says that there is none.
func (d *delimited) next() ([]byte, error) {
	piece, err := d.r.ReadSlice(d.delim)
	if errors.Is(err, bufio.ErrBufferFull) {
		d.long = d.long[:0]
		for errors.Is(err, bufio.ErrBufferFull) {
			d.long = append(d.long, piece...)
			if len(d.long) > d.limit {
				return nil, d.tooLong()
			}
			piece, err = d.r.ReadSlice(d.delim)
		}
		d.long = append(d.long, piece...)
		piece = d.long
	}
	switch {
	case err == nil:
		piece = piece[:len(piece)-1]
	case !errors.Is(err, io.EOF):
		return nil, fmt.Errorf("read standard input: %w", err)
	case len(piece) == 0:
		return nil, io.EOF
	}
	d.count++
	if len(piece) > d.limit {
		d.count--
		return nil, d.tooLong()
	}
	return piece, nil
}

func (d *delimited) tooLong() error {
	return fmt.Errorf("%s %d is longer than the record limit of %s; nothing from it on was sent. See -max-record-bytes, or send a whole file as one record with -file",
		d.unit(), d.count+1, humanize.IBytes(uint64(d.limit)))
}

func (d *delimited) unit() string {
	if d.delim == 0 {
		return "record"
	}
	return "line"
}

// pieces makes a record of every piece of standard input.
func (c *produceCommand) pieces(delim byte) source {
	return func(feed func(*client.Record) error) error {
		in := newDelimited(c.Stdin, delim, int(c.maxRecord))
		record := &client.Record{Key: []byte(c.key), Headers: c.headers}
		separator := []byte(c.keySeparator)
		for {
			piece, err := in.next()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			record.Value = piece
			if len(separator) > 0 {
				key, value, found := bytes.Cut(piece, separator)
				if !found {
					return fmt.Errorf("%s %d has no key: %q is not in it", in.unit(), in.count, c.keySeparator)
				}
				record.Key, record.Value = key, value
			}
			if n := client.RecordSize(record); n > int(c.maxRecord) {
				in.count--
				return in.tooLong()
			}
			if err := feed(record); err != nil {
				return err
			}
		}
	}
}

// jsonLines makes a record of every line of JSON on standard input. Blank
// lines are passed over.
func (c *produceCommand) jsonLines() source {
	return func(feed func(*client.Record) error) error {
		// Written as JSON a record is longer than itself: at most six bytes
		// for one, and some for what is around it.
		in := newDelimited(c.Stdin, '\n', 6*int(c.maxRecord)+4096)
		record := &client.Record{}
		for {
			line, err := in.next()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			if len(bytes.TrimSpace(line)) == 0 {
				continue
			}
			if err := parseLine(line, record); err != nil {
				return fmt.Errorf("line %d: %w; nothing from it on was sent", in.count, err)
			}
			if n := client.RecordSize(record); n > int(c.maxRecord) {
				in.count--
				in.limit = int(c.maxRecord)
				return in.tooLong()
			}
			if err := feed(record); err != nil {
				return err
			}
		}
	}
}

// wholeFiles makes one record of each file.
func (c *produceCommand) wholeFiles() source {
	return func(feed func(*client.Record) error) error {
		for _, name := range c.files {
			value, err := readFile(name, int64(c.maxRecord))
			if err != nil {
				return err
			}
			record := &client.Record{Key: []byte(c.key), Value: value, Headers: c.headers}
			if n := client.RecordSize(record); n > int(c.maxRecord) {
				return fileTooLarge(name, int64(c.maxRecord))
			}
			if err := feed(record); err != nil {
				return err
			}
		}
		return nil
	}
}

func readFile(name string, limit int64) (value []byte, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if cerr := f.Close(); err == nil && cerr != nil {
			err = cerr
		}
	}()
	// Not by its size: it may be a pipe, or grow.
	value, err = io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if int64(len(value)) > limit {
		return nil, fileTooLarge(name, limit)
	}
	return value, nil
}

func fileTooLarge(name string, limit int64) error {
	return fmt.Errorf("%s is larger than the record limit of %s, which -max-record-bytes and the server's configuration set", name, humanize.IBytes(uint64(limit)))
}
