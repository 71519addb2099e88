package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/diurnalog/diurna/rpc/cli/flags"
	"github.com/diurnalog/diurna/rpc/client"
)

type saveCommand struct {
	node
	stale, force, json bool
}

func (c *saveCommand) options() *flags.Set {
	f := flags.New()
	c.nodeFlags(f)
	f.Bool(&c.stale, "stale", "Be content with what the node that is asked has, which may lack what was acknowledged last. Works without a leader.")
	f.Bool(&c.force, "force", "Replace the file if it is there.")
	f.Bool(&c.json, "json", "Print a JSON object.")
	return f
}

func (c *saveCommand) Synopsis() string { return "Save a copy of the log as a file" }

func (c *saveCommand) Help() string {
	return c.options().Help("diurna operator snapshot save [options] <file>", `
Saves a copy of the log: every record from the first one to the last one that was
acknowledged when the command began, with their offsets and times. Producers and
consumers notice nothing. The node that is asked reads it from its own disk; one
that does not lead does as well, and leaves the leader alone.

The file gets its name when it is complete, checked and on the disk; until then
it is <file>.partial. With - for the file, the snapshot is written to standard
output: it is whole only if the command exits 0.

The file has all records in it, in plaintext, and can be read by its owner only.
diurna operator snapshot inspect checks it, and restore makes a new cluster of it.

Exits 0 when the snapshot is saved, 2 when the server fails or refuses, and 1 for
everything else.
`, `
Examples:

      $ diurna operator snapshot save orders.snapshot

  From a certain node, into a file with the day in its name:

      $ diurna operator snapshot save -addr db3 orders-$(date +%F).snapshot

  Straight to somewhere else:

      $ diurna operator snapshot save - | ssh vault 'cat > orders.snapshot'`+tlsHelp)
}

func (c *saveCommand) Run(args []string) int {
	files, err := c.parseArgs(c.options(), args)
	if err == nil && len(files) != 1 {
		err = errors.New("name one file to save to, or - for standard output")
	}
	if err != nil {
		return c.usage("operator snapshot save", err)
	}
	return c.withClient(func(cl *client.Client) int {
		ctx, stop := c.untilInterrupted()
		defer stop()
		if files[0] == "-" {
			return c.toStdout(ctx, cl)
		}
		return c.toFile(ctx, cl, files[0])
	})
}

// savedJSON is what -json prints.
type savedJSON struct {
	File        string `json:"file"`
	ClusterID   string `json:"cluster_id"`
	Cluster     string `json:"cluster,omitempty"`
	NodeID      string `json:"node_id"`
	Taken       string `json:"taken"`
	FirstOffset uint64 `json:"first_offset"`
	NextOffset  uint64 `json:"next_offset"`
	Records     uint64 `json:"records"`
	Index       uint64 `json:"index"`
	Term        uint64 `json:"term"`
	Bytes       int64  `json:"bytes"`
	SHA256      string `json:"sha256"`
}

func toSavedJSON(file string, i *client.SnapshotInfo) savedJSON {
	return savedJSON{
		File: file, ClusterID: i.ClusterID, Cluster: i.Cluster, NodeID: i.NodeID, Taken: i.Taken.UTC().Format(time.RFC3339Nano),
		FirstOffset: i.FirstOffset, NextOffset: i.NextOffset, Records: i.NextOffset - i.FirstOffset, Index: i.Index, Term: i.Term,
		Bytes: i.Size, SHA256: i.SHA256,
	}
}

func savedText(file string, i *client.SnapshotInfo) string {
	what := fmt.Sprintf("%s, offsets %d–%d,", records(i.NextOffset-i.FirstOffset), i.FirstOffset, i.NextOffset-1)
	if i.NextOffset == i.FirstOffset {
		what = fmt.Sprintf("a log without records, whose next offset is %d,", i.NextOffset)
	}
	return fmt.Sprintf("Saved %s of cluster %s (%s) from node %s to %s.\n%s bytes, SHA-256 %s\n",
		what, i.Cluster, i.ClusterID, i.NodeID, file, humanize.Comma(i.Size), i.SHA256)
}

func (c *saveCommand) toStdout(ctx context.Context, cl *client.Client) int {
	info, err := c.copy(ctx, cl, c.Stdout)
	if err != nil {
		return c.failed(err)
	}
	c.notef("%s", savedText("standard output", &info))
	return ExitOK
}

func (c *saveCommand) toFile(ctx context.Context, cl *client.Client, name string) int {
	out, err := newPartial(name, c.force)
	if err != nil {
		c.errorf("%s", err)
		return ExitUsage
	}
	info, err := c.copy(ctx, cl, out.file)
	if err == nil {
		err = out.keep()
	}
	if err != nil {
		code := c.failed(errors.Join(err, out.drop()))
		c.notef("Nothing was saved.")
		return code
	}
	if c.json {
		return c.printJSON(toSavedJSON(name, &info))
	}
	return c.print(savedText(name, &info))
}

// copy writes a snapshot to w, and on a terminal how far it is.
func (c *saveCommand) copy(ctx context.Context, cl *client.Client, w io.Writer) (client.SnapshotInfo, error) {
	m := &meter{w: w}
	shown := c.startProgress(func() string {
		if size := m.size.Load(); size > 0 {
			return fmt.Sprintf("%s of %s", humanize.IBytes(uint64(m.written.Load())), humanize.IBytes(uint64(size)))
		}
		return ""
	})
	defer shown.stop()
	info, err := cl.Snapshot(ctx, m, client.SnapshotOptions{Stale: c.stale, OnInfo: func(i client.SnapshotInfo) { m.size.Store(i.Size) }})
	if err != nil && ctx.Err() != nil {
		return info, errors.New("interrupted")
	}
	return info, err
}

// meter counts what is written.
type meter struct {
	w             io.Writer
	size, written atomic.Int64
}

func (m *meter) Write(p []byte) (int, error) {
	n, err := m.w.Write(p)
	m.written.Add(int64(n))
	return n, err
}

// partial is a file that has its name only once it is complete and durable.
type partial struct {
	file  *os.File
	name  string
	force bool
}

const partialSuffix = ".partial"

// newPartial begins a file. One that a process left which was killed is begun
// anew; one that another process writes is left to that.
func newPartial(name string, force bool) (*partial, error) {
	p := &partial{name: name, force: force}
	if err := p.free(); err != nil {
		return nil, err
	}
	var err error
	if p.file, err = os.OpenFile(name+partialSuffix, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	err = syscall.Flock(int(p.file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = fmt.Errorf("%s is being written by another process", p.file.Name())
	}
	if err == nil && !p.same() {
		err = fmt.Errorf("%s was taken away by another process; try again", p.file.Name())
	}
	if err == nil {
		err = p.file.Truncate(0)
	}
	if err != nil {
		return nil, errors.Join(err, p.file.Close())
	}
	return p, nil
}

// same tells whether the file still has its partial name.
func (p *partial) same() bool {
	open, err1 := p.file.Stat()
	named, err2 := os.Stat(p.file.Name())
	return err1 == nil && err2 == nil && os.SameFile(open, named)
}

// free refuses a name that is taken.
func (p *partial) free() error {
	info, err := os.Lstat(p.name)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.IsDir():
		return fmt.Errorf("%s is a folder: name a file in it", p.name)
	case !p.force:
		return fmt.Errorf("%s is there already: choose another name, or replace it with -force", p.name)
	}
	return nil
}

// keep makes the file durable and gives it its name.
func (p *partial) keep() error {
	if err := p.file.Sync(); err != nil {
		return err
	}
	if err := p.free(); err != nil {
		return err
	}
	if err := os.Rename(p.file.Name(), p.name); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(p.name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close(), p.file.Close())
}

// drop removes the file; one that has got its name stays.
func (p *partial) drop() error {
	var err error
	if p.same() {
		err = os.Remove(p.file.Name())
	}
	if closed := p.file.Close(); !errors.Is(closed, os.ErrClosed) {
		err = errors.Join(err, closed)
	}
	return err
}
