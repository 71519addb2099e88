package agent

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/cli"
	"google.golang.org/protobuf/proto"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/rpc/cli/flags"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// segmentCommand shows what stands in segment files, for the day on which a
// node refuses one.
type segmentCommand struct {
	stdout, stderr io.Writer

	json, records, quiet bool
}

func newSegmentCommand(stdout, stderr io.Writer) cli.Command {
	return &segmentCommand{stdout: stdout, stderr: stderr}
}

func (c *segmentCommand) options() *flags.Set {
	f := flags.New()
	f.Bool(&c.json, "json", "Print one JSON object per line: one for each frame, with its checksum and all other fields, and one for the segment.")
	f.Bool(&c.records, "records", "Decode the records of each frame and print how large their parts are.")
	f.Bool(&c.quiet, "quiet", "Print no frames.")
	return f
}

// Synopsis implements cli.Command.
func (c *segmentCommand) Synopsis() string { return "Check segment files and show what is in them" }

// Help implements cli.Command.
func (c *segmentCommand) Help() string {
	return c.options().Help("diurna debug segment [options] <file> ...", `
Reads segment files, checks every byte of them, and prints a line for each
frame and a summary. It needs no node, but may run beside one, and never
changes a file. docs/FORMAT.md explains the fields.

A segment ends in one of three ways:

  clean     behind the last frame there is nothing, or zeros
  torn      a write was cut short by a crash, or is under way; nobody was told
            that it is durable, and starting the node cuts it off
  damaged   bytes that were durable are not what was written

Which of the last two it is, the files beside it help to tell: the index, the
checkpoint and the next segment. Copy them together.

Exits 0 when all segments are sound (clean or torn), 2 when one is damaged,
and 1 when the command was called wrongly, or a file cannot be read, is no
segment or is of a newer version.
`, `
Examples:

  Check a whole log:

      $ diurna debug segment -quiet /var/lib/diurna/log/*.log

  The frame that holds offset 4711:

      $ diurna debug segment -json FILE.log | jq 'select(.kind == "frame" and
          .base_offset <= 4711 and 4711 < .base_offset + .records)'
`)
}

// Run implements cli.Command.
func (c *segmentCommand) Run(args []string) int {
	files, err := c.options().ParseArgs(args)
	if err == nil && len(files) == 0 {
		err = errors.New("name at least one segment file")
	}
	if err != nil {
		return usageError(c.stderr, "debug segment", err)
	}
	code := exitOK
	out := bufio.NewWriter(c.stdout)
	for _, file := range files {
		one, err := c.inspect(out, file)
		if err == nil {
			// Errors of this file come behind what is printed of it.
			err = out.Flush()
		}
		if err != nil {
			if errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrClosedPipe) {
				return code // nobody reads any more, as with head
			}
			say(c.stderr, "Error: write to standard output: %v\n", err)
			return max(code, exitUsage)
		}
		if one.problem != "" {
			say(c.stderr, "Error: %s\n", one.problem)
		}
		code = max(code, one.code)
	}
	return code
}

// inspected is what to tell about one file.
type inspected struct {
	code    int
	problem string
}

// inspect prints one file. The error is that of writing to out.
func (c *segmentCommand) inspect(out *bufio.Writer, file string) (inspected, error) {
	var written error
	frames := 0
	r, err := logstore.Inspect(vfs.OS, file, func(f logstore.Frame) error {
		if c.quiet {
			return nil
		}
		if frames == 0 && !c.json {
			_, written = fmt.Fprintf(out, "%s\n", tableHead)
		}
		frames++
		if written == nil {
			written = c.frame(out, file, &f)
		}
		return written
	})
	switch {
	case written != nil:
		return inspected{}, written
	case err != nil:
		return inspected{exitUsage, explainUnreadable(file, err)}, nil
	}
	if c.json {
		err = printJSONLine(out, toSegmentJSON(&r))
	} else {
		_, err = out.WriteString(summary(&r))
	}
	if r.Damage != nil {
		return inspected{exitServer, explainDamage(&r)}, err
	}
	return inspected{}, err
}

// explainUnreadable says what to do about a file that is not judged at all.
func explainUnreadable(file string, err error) string {
	var place *fs.PathError
	switch {
	case errors.Is(err, syscall.EISDIR):
		return fmt.Sprintf("%s is a directory. Name the segments in it: %s", file, filepath.Join(file, "*.log"))
	case errors.Is(err, logstore.ErrNotASegment):
		return fmt.Sprintf("%v. Segments are the files named <20 digits>.log in a log's directory.", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Sprintf("%v. Run this as the user that the node runs as.", err)
	case errors.As(err, &place), strings.Contains(err.Error(), file):
		return sentence(err)
	}
	return fmt.Sprintf("%s: %s", file, sentence(err))
}

func explainDamage(r *logstore.Report) string {
	return fmt.Sprintf("%v. %d entries before that are good. Leave the file as it is; restore it from a copy if there is one.", r.Damage, r.Frames)
}

// tableHead and the rows below it take 79 columns while numbers are not huge.
const tableHead = " POSITION    INDEX  TERM TYPE       OFFSET RECORDS    BYTES APPENDED (UTC)"

func (c *segmentCommand) frame(out *bufio.Writer, file string, f *logstore.Frame) error {
	var records []recordJSON
	var note string
	if c.records && f.Count > 0 {
		records, note = decodeRecords(f)
	}
	if c.json {
		return printJSONLine(out, toFrameJSON(file, f, records, note))
	}
	offset, appended := "-", "-"
	if f.Count > 0 {
		offset = fmt.Sprint(f.BaseOffset)
	}
	if f.AppendTime != 0 {
		appended = time.Unix(0, f.AppendTime).UTC().Format(time.DateTime)
	}
	_, err := fmt.Fprintf(out, "%9d %8d %5d %-7s %9s %7d %8d %s\n", f.Position, f.Index, f.Term, typeName(f.Type), offset, f.Count, len(f.Payload), appended)
	if note != "" && err == nil {
		_, err = fmt.Fprintf(out, "%9s %s\n", "", note)
	}
	for _, r := range records {
		if err == nil {
			_, err = fmt.Fprintf(out, "%9s offset %d: key %d bytes, value %d bytes, %d headers\n", "", r.Offset, r.Key, r.Value, r.Headers)
		}
	}
	return err
}

// typeName names Raft's entry types; the numbers are on disk.
func typeName(t uint8) string {
	switch t {
	case 0:
		return "command"
	case 1:
		return "no-op"
	case 4:
		return "barrier"
	case 5:
		return "config"
	}
	return fmt.Sprintf("type %d", t)
}

// decodeRecords decodes a payload; the note says why it cannot be. That is no
// damage of the file: its bytes are those that were written.
func decodeRecords(f *logstore.Frame) ([]recordJSON, string) {
	var batch v1.RecordBatch
	if err := proto.Unmarshal(f.Payload, &batch); err != nil {
		return nil, fmt.Sprintf("the payload is not made of records: %v", err)
	}
	var note string
	if len(batch.Records) != int(f.Count) {
		note = fmt.Sprintf("the payload has %d records, the frame's header says %d", len(batch.Records), f.Count)
	}
	out := make([]recordJSON, len(batch.Records))
	for i, r := range batch.Records {
		out[i] = recordJSON{Offset: f.BaseOffset + uint64(i), Key: len(r.Key), Value: len(r.Value), Headers: len(r.Headers)}
	}
	return out, note
}

func summary(r *logstore.Report) string {
	var b strings.Builder
	// A strings.Builder takes everything.
	line := func(format string, args ...any) { _, _ = fmt.Fprintf(&b, format+"\n", args...) }
	line("%s: %s", r.File, verdict(r))
	if r.LogID == [16]byte{} {
		return b.String()
	}
	kind := "active"
	switch {
	case r.Leftover:
		kind = "left over from a deletion that a crash cut short; starting the node removes it"
	case r.Sealed:
		kind = "sealed"
	}
	line("  segment     %s, of log %s", kind, hex.EncodeToString(r.LogID[:]))
	if r.Frames == 0 {
		line("  entries     none; the first will be index %d", r.FirstIndex)
	} else {
		line("  entries     %d, index %d–%d, the last one of term %d", r.Frames, r.FirstIndex, r.LastIndex, r.LastTerm)
	}
	if r.Records == 0 {
		line("  records     none; the next offset is %d", r.NextOffset)
	} else {
		line("  records     %d, offset %d–%d", r.Records, r.FirstOffset, r.NextOffset-1)
	}
	line("  used        %d of %d bytes", r.Position, r.Size)
	line("  durable     up to index %d, as far as is known", r.Durable)
	line("  index       %s", beside(r.Index, r.IndexDetail))
	line("  checkpoint  %s", beside(r.Checkpoint, r.CheckpointDetail))
	return b.String()
}

func verdict(r *logstore.Report) string {
	switch r.Ending {
	case logstore.EndDamaged:
		return fmt.Sprintf("damaged at byte %d: %s", r.Damage.Position, r.Damage.Detail)
	case logstore.EndTorn:
		return fmt.Sprintf("sound, with a torn tail at byte %d: %s", r.Position, r.Detail)
	default:
		return "sound"
	}
}

func beside(b logstore.Beside, detail string) string {
	if detail == "" {
		return b.String()
	}
	return b.String() + ": " + detail
}

type frameJSON struct {
	Kind         string       `json:"kind"`
	File         string       `json:"file"`
	Position     int64        `json:"position"`
	Size         int64        `json:"size"`
	Index        uint64       `json:"index"`
	Term         uint64       `json:"term"`
	Type         string       `json:"type"`
	TypeNumber   uint8        `json:"type_number"`
	BaseOffset   uint64       `json:"base_offset"`
	Records      uint32       `json:"records"`
	AppendTime   string       `json:"append_time,omitempty"`
	Synced       uint64       `json:"synced"`
	PayloadBytes int          `json:"payload_bytes"`
	CRC          string       `json:"crc"`
	PreviousCRC  string       `json:"previous_crc"`
	Decoded      []recordJSON `json:"decoded,omitempty"`
	Note         string       `json:"note,omitempty"`
}

type recordJSON struct {
	Offset  uint64 `json:"offset"`
	Key     int    `json:"key_bytes"`
	Value   int    `json:"value_bytes"`
	Headers int    `json:"headers"`
}

type segmentJSON struct {
	Kind             string `json:"kind"`
	File             string `json:"file"`
	Ending           string `json:"ending"`
	Position         int64  `json:"position"`
	Detail           string `json:"detail,omitempty"`
	Size             int64  `json:"size"`
	LogID            string `json:"log_id"`
	FirstIndex       uint64 `json:"first_index"`
	LastIndex        uint64 `json:"last_index"`
	LastTerm         uint64 `json:"last_term"`
	FirstOffset      uint64 `json:"first_offset"`
	NextOffset       uint64 `json:"next_offset"`
	Frames           int    `json:"frames"`
	Records          uint64 `json:"records"`
	LastAppendTime   string `json:"last_append_time,omitempty"`
	Durable          uint64 `json:"durable"`
	Sealed           bool   `json:"sealed"`
	Leftover         bool   `json:"leftover"`
	PreviousTerm     uint64 `json:"previous_term"`
	PreviousCRC      string `json:"previous_crc"`
	LastCRC          string `json:"last_crc"`
	Index            string `json:"index"`
	IndexDetail      string `json:"index_detail,omitempty"`
	Checkpoint       string `json:"checkpoint"`
	CheckpointDetail string `json:"checkpoint_detail,omitempty"`
}

func toFrameJSON(file string, f *logstore.Frame, records []recordJSON, note string) frameJSON {
	return frameJSON{
		Kind: "frame", File: file, Position: f.Position, Size: f.Size, Index: f.Index, Term: f.Term,
		Type: typeName(f.Type), TypeNumber: f.Type, BaseOffset: f.BaseOffset, Records: f.Count,
		AppendTime: timeJSON(f.AppendTime), Synced: f.Synced, PayloadBytes: len(f.Payload),
		CRC: crcJSON(f.CRC), PreviousCRC: crcJSON(f.PrevCRC), Decoded: records, Note: note,
	}
}

func toSegmentJSON(r *logstore.Report) segmentJSON {
	position := r.Position
	if r.Damage != nil {
		position = r.Damage.Position
	}
	return segmentJSON{
		Kind: "segment", File: r.File, Ending: r.Ending.String(), Position: position, Detail: r.Detail, Size: r.Size,
		LogID: hex.EncodeToString(r.LogID[:]), FirstIndex: r.FirstIndex, LastIndex: r.LastIndex, LastTerm: r.LastTerm,
		FirstOffset: r.FirstOffset, NextOffset: r.NextOffset, Frames: r.Frames, Records: r.Records,
		LastAppendTime: timeJSON(r.LastTime), Durable: r.Durable, Sealed: r.Sealed, Leftover: r.Leftover,
		PreviousTerm: r.PrevTerm, PreviousCRC: crcJSON(r.PrevCRC), LastCRC: crcJSON(r.LastCRC),
		Index: r.Index.String(), IndexDetail: r.IndexDetail, Checkpoint: r.Checkpoint.String(), CheckpointDetail: r.CheckpointDetail,
	}
}

func timeJSON(ns int64) string {
	if ns == 0 {
		return ""
	}
	return time.Unix(0, ns).UTC().Format(time.RFC3339Nano)
}

func crcJSON(crc uint32) string { return fmt.Sprintf("%08x", crc) }

func printJSONLine(out *bufio.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = out.Write(append(b, '\n'))
	return err
}
