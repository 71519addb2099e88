package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/hashicorp/cli"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/rpc/cli/flags"
)

// snapshotJSON is what -json prints of a saved snapshot.
type snapshotJSON struct {
	File           string `json:"file"`
	ClusterID      string `json:"cluster_id"`
	Cluster        string `json:"cluster,omitempty"`
	NodeID         string `json:"node_id"`
	Version        string `json:"version,omitempty"`
	Taken          string `json:"taken"`
	FirstOffset    uint64 `json:"first_offset"`
	NextOffset     uint64 `json:"next_offset"`
	Records        uint64 `json:"records"`
	LastAppendTime string `json:"last_append_time,omitempty"`
	Index          uint64 `json:"index"`
	Term           uint64 `json:"term"`
	Bytes          int64  `json:"bytes"`
	SHA256         string `json:"sha256"`
	// Of a restore:
	DataDir      string `json:"data_dir,omitempty"`
	NewNodeID    string `json:"new_node_id,omitempty"`
	NewClusterID string `json:"new_cluster_id,omitempty"`
}

func toSnapshotJSON(file string, i *replica.SavedInfo) snapshotJSON {
	return snapshotJSON{
		File: file, ClusterID: i.ClusterID, Cluster: i.ClusterName, NodeID: i.NodeID, Version: i.Version,
		Taken: i.Taken.Format(time.RFC3339Nano), FirstOffset: i.FirstOffset, NextOffset: i.NextOffset, Records: i.Records(),
		LastAppendTime: timeJSON(i.LastAppendTime), Index: i.Index, Term: i.Term, Bytes: i.Size, SHA256: i.SHA256,
	}
}

// labelled returns what writes one line of a description.
func labelled(b *strings.Builder) func(name, format string, args ...any) {
	return func(name, format string, args ...any) {
		_, _ = fmt.Fprintf(b, "  %-12s%s\n", name, fmt.Sprintf(format, args...)) // a strings.Builder takes everything
	}
}

func describeSnapshot(i *replica.SavedInfo) string {
	var b strings.Builder
	line := labelled(&b)
	line("cluster", "%s, id %s", i.ClusterName, i.ClusterID)
	line("taken", "%s, by node %s", i.Taken.Format(time.RFC3339), i.NodeID)
	if i.Records() == 0 {
		line("records", "none; the next offset is %d", i.NextOffset)
	} else {
		line("records", "%s, offsets %d–%d", humanize.Comma(int64(i.Records())), i.FirstOffset, i.NextOffset-1)
		line("appended", "the last one at %s", timeJSON(i.LastAppendTime))
	}
	line("raft", "index %d, term %d", i.Index, i.Term)
	line("size", "%s (%d bytes)", humanize.IBytes(uint64(i.Size)), i.Size)
	line("sha256", "%s", i.SHA256)
	return b.String()
}

// explainSnapshot says what is the case with a file that was refused, and how to
// exit: 2 where it is not what was saved.
func explainSnapshot(file string, err error) (text string, code int) {
	var corrupt *replica.CorruptError
	var stream *logstore.StreamError
	var newer *replica.VersionError
	var newerLog *logstore.VersionError
	switch {
	case errors.As(err, &newer), errors.As(err, &newerLog):
		return fmt.Sprintf("%s: %v", file, err), exitUsage
	case errors.As(err, &corrupt), errors.As(err, &stream):
		return fmt.Sprintf("%s is not the snapshot that was saved, or not all of it: %v. It is of no use; take another copy of it, or another snapshot.", file, err), exitServer
	case errors.Is(err, context.Canceled):
		return "interrupted", exitUsage
	}
	return err.Error(), exitUsage
}

func oneFile(args []string) (string, error) {
	if len(args) != 1 {
		return "", errors.New("name one file: a snapshot that `diurna operator snapshot save` has written")
	}
	return args[0], nil
}

// withSnapshot opens a file for as long as do reads it; ctx ends when the process is
// asked to stop.
func withSnapshot(name string, do func(ctx context.Context, file io.ReadSeeker) error) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return errors.Join(do(ctx, file), file.Close())
}

type inspectSnapshotCommand struct {
	stdout, stderr io.Writer
	json           bool
}

func (c *inspectSnapshotCommand) options() *flags.Set {
	f := flags.New()
	f.Bool(&c.json, "json", "Print a JSON object.")
	return f
}

// Synopsis implements cli.Command.
func (c *inspectSnapshotCommand) Synopsis() string { return "Check a snapshot and show what it holds" }

// Help implements cli.Command.
func (c *inspectSnapshotCommand) Help() string {
	return c.options().Help("diurna operator snapshot inspect [options] <file>", `
Reads a snapshot to its end, checks every byte of it, and tells what it holds. It
needs no node.

Exits 0 when the snapshot is whole and unaltered, 2 when not, and 1 when the
command was called wrongly, or the file cannot be read or is of a newer version.
`, `
Examples:

      $ diurna operator snapshot inspect orders.snapshot
      $ diurna operator snapshot inspect -json orders.snapshot
`)
}

// Run implements cli.Command.
func (c *inspectSnapshotCommand) Run(args []string) int {
	rest, err := c.options().ParseArgs(args)
	var name string
	if err == nil {
		name, err = oneFile(rest)
	}
	if err != nil {
		return usageError(c.stderr, "operator snapshot inspect", err)
	}
	var info replica.SavedInfo
	if err := withSnapshot(name, func(ctx context.Context, file io.ReadSeeker) (err error) {
		info, err = replica.CheckSaved(interruptible{ctx, file})
		return err
	}); err != nil {
		text, code := explainSnapshot(name, err)
		say(c.stderr, "Error: %s\n", text)
		return code
	}
	return printAnswer(c.stdout, c.stderr, c.json, toSnapshotJSON(name, &info), name+": whole and unaltered\n"+describeSnapshot(&info))
}

// printAnswer prints what a verb has to say, in one of its two forms.
func printAnswer(stdout, stderr io.Writer, asJSON bool, v any, text string) int {
	out := bufio.NewWriter(stdout)
	var err error
	if asJSON {
		err = printJSONLine(out, v)
	} else {
		_, err = out.WriteString(text)
	}
	if err := errors.Join(err, out.Flush()); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, io.ErrClosedPipe) {
		say(stderr, "Error: write to standard output: %v\n", err)
		return exitUsage
	}
	return exitOK
}

type restoreCommand struct {
	stdout, stderr io.Writer
	dataDir        string
	json           bool
}

func (c *restoreCommand) options() *flags.Set {
	f := flags.New()
	f.Text(&c.dataDir, "data-dir", "folder", "", "The data directory to make: that of the new cluster's first node. It must be empty, or not there.")
	f.Bool(&c.json, "json", "Print a JSON object.")
	return f
}

// Synopsis implements cli.Command.
func (c *restoreCommand) Synopsis() string { return "Make a new cluster's first node of a snapshot" }

// Help implements cli.Command.
func (c *restoreCommand) Help() string {
	return c.options().Help("diurna operator snapshot restore -data-dir=<folder> [options] <file>", `
Makes a data directory of a snapshot. The node that is started with it is the
first one of a new cluster, with an id of its own, and has every record of the
snapshot, at the same offset and with the same append time. Start it, wait until
it is ready, then start the others, with empty data directories: it adds them,
and they get the log from it.

The snapshot is checked to its end before anything is written. A snapshot cannot
be restored into a cluster that exists; that one's nodes and the new one's do not
talk to each other.

Run it as the user that runs the node. Exits 0 when the data directory is
complete, 2 when the snapshot is not whole and unaltered, and 1 for everything
else; then there is no data directory.
`, `
Examples:

      $ diurna operator snapshot restore -data-dir /var/lib/diurna orders.snapshot
      $ diurna agent -config-file /etc/diurna.hcl
`)
}

// Run implements cli.Command.
func (c *restoreCommand) Run(args []string) int {
	rest, err := c.options().ParseArgs(args)
	var name string
	if err == nil {
		name, err = oneFile(rest)
	}
	if err == nil && c.dataDir == "" {
		err = errors.New("say where the node's data is to be, with -data-dir")
	}
	if err != nil {
		return usageError(c.stderr, "operator snapshot restore", err)
	}
	if err := ownedByUs(c.dataDir); err != nil {
		say(c.stderr, "Error: %v\n", err)
		return exitUsage
	}
	var id identity
	var info replica.SavedInfo
	if err := withSnapshot(name, func(ctx context.Context, file io.ReadSeeker) (err error) {
		id, info, err = restore(ctx, vfs.OS, c.dataDir, file)
		return err
	}); err != nil {
		text, code := explainSnapshot(name, err)
		say(c.stderr, "Error: %s\nNothing was restored.\n", text)
		return code
	}
	v := toSnapshotJSON(name, &info)
	v.DataDir, v.NewNodeID, v.NewClusterID = c.dataDir, id.node, id.cluster
	return printAnswer(c.stdout, c.stderr, c.json, v, fmt.Sprintf(`Restored %s into %s:
%s
It is the data of node %s, the only one so far of the new cluster %s.
Start it with its configuration, and when it is ready the other nodes, with empty
data directories.
`, name, c.dataDir, describeSnapshot(&info), id.node, id.cluster))
}

var (
	_ cli.Command = (*inspectSnapshotCommand)(nil)
	_ cli.Command = (*restoreCommand)(nil)
)
