package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/hashicorp/cli"

	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/rpc/cli/flags"
)

// recoverCommand has a node go on without the others, for the day on which more
// than half of the voters are gone for good.
type recoverCommand struct {
	stdout, stderr io.Writer
	dataDir        string
	confirm        bool
	compare        bool
	json           bool
}

func (c *recoverCommand) options() *flags.Set {
	f := flags.New()
	f.Text(&c.dataDir, "data-dir", "folder", "", "The data directory of a node that is stopped.")
	f.Bool(&c.confirm, "confirm", "Do it. Without this, the command only says what the node holds.")
	f.Bool(&c.compare, "compare", "Read what -json has printed on each survivor, from the files that are named, and say which of them to keep.")
	f.Bool(&c.json, "json", "Print a JSON object.")
	return f
}

// Synopsis implements cli.Command.
func (c *recoverCommand) Synopsis() string {
	return "Have a node go on alone when the quorum is lost for good"
}

// Help implements cli.Command.
func (c *recoverCommand) Help() string {
	return c.options().Help("diurna operator raft recover -data-dir=<folder> [options]\n       diurna operator raft recover -compare <file> ...", `
For a cluster of which half of the voters or more are gone for good, with their
disks. As long as one of those can come back with its data, bring it back instead:
nothing is lost then, and nothing else is needed.

Without -confirm it only tells what the node holds. Stop all survivors, run it on
each of them, and compare: the one whose last entry has the highest term, and
among those the highest index, is the one to keep.

With -confirm it makes that node the only voter of the cluster, under a new
cluster id. All that is in its log is kept. What was acknowledged is lost if only
nodes had it that are gone; no survivor can tell. The other survivors have to be
started with empty data directories: the node that was kept adds them, and they
get the log from it. With their old data, it refuses them.

The node must be stopped. Run it as the user that runs the node. What is replaced
is kept in the data directory, in before-recovery-<index>. If it is interrupted,
run it again. Exits 0 when it has done what it says, 2 when the data is damaged,
and 1 for everything else.
`, `
Examples:

  What a node holds:

      $ diurna operator raft recover -data-dir /var/lib/diurna

  Which of two survivors to keep:

      $ diurna operator raft recover -data-dir /var/lib/diurna -json > db1.json
      $ diurna operator raft recover -compare db1.json db2.json

  Have it go on alone:

      $ diurna operator raft recover -data-dir /var/lib/diurna -confirm
`)
}

// Run implements cli.Command.
func (c *recoverCommand) Run(args []string) int {
	const verb = "operator raft recover"
	f := c.options()
	rest, err := f.ParseArgs(args)
	switch {
	case err != nil:
	case c.compare:
		if err = errors.Join(f.Exclusive("compare", "confirm"), f.Exclusive("compare", "data-dir")); err == nil && len(rest) < 2 {
			err = errors.New("name at least two files, one of each survivor")
		}
	case len(rest) > 0:
		err = fmt.Errorf("unexpected argument %q", rest[0])
	case c.dataDir == "":
		err = errors.New("say which node's data it is about, with -data-dir")
	}
	switch {
	case err != nil:
		return usageError(c.stderr, verb, err)
	case c.compare:
		return c.compareAll(rest)
	}
	if err := ownedByUs(c.dataDir); err != nil {
		return c.failed(err)
	}
	s, err := openStopped(vfs.OS, c.dataDir)
	if err != nil {
		return c.failed(err)
	}
	code := c.run(s)
	if err := s.Close(); err != nil {
		return max(code, c.failed(err))
	}
	return code
}

// ownedByUs refuses a directory of another user's: the node, which runs as that
// one, could not open what we write into it.
func ownedByUs(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return nil // whoever opens it says so
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to the user with the id %d, and this is run by %d: run it as the user that runs the node", dir, st.Uid, os.Geteuid())
	}
	return nil
}

func (c *recoverCommand) failed(err error) int {
	say(c.stderr, "Error: %v\n", err)
	if errors.Is(err, replica.ErrDamaged) {
		say(c.stderr, "The node's data is damaged. Look at another survivor, or restore a snapshot (`diurna operator snapshot restore`).\n")
		return exitServer
	}
	return exitUsage
}

func (c *recoverCommand) run(s *stopped) int {
	h, err := s.survey()
	if err != nil {
		return c.failed(err)
	}
	v := s.describe(&h)
	if !c.confirm {
		return printAnswer(c.stdout, c.stderr, c.json, v, describeSurvivor(&v)+c.next(&v))
	}
	if v.Kept, err = s.recover(&h); err != nil {
		code := c.failed(err)
		if s.plan != nil {
			say(c.stderr, "The recovery is not finished, and the node does not start until it is: run this again.\n")
		}
		return code
	}
	v.NewClusterID, v.Begun = s.plan.To, false
	return printAnswer(c.stdout, c.stderr, c.json, v, fmt.Sprintf(`%s
Done: node %s is the only voter of cluster %s now,
which was cluster %s. What was replaced is in
%s.

Start it. Then, on every other node that was in the cluster, remove the data
directory and start the node: it comes back as a new one.
`, describeSurvivor(&v), v.NodeID, v.NewClusterID, s.plan.From, v.Kept))
}

func (c *recoverCommand) next(v *survivor) string {
	if v.Begun {
		return "\nA recovery was begun here and not finished: with -confirm it is.\n"
	}
	return `
Nothing was changed. If this is the survivor with the highest term of the last
entry, and among those the highest index, -confirm makes it the only voter.
What only nodes had that are gone is lost then, even if it was acknowledged.
`
}

func describeSurvivor(v *survivor) string {
	var b strings.Builder
	line := labelled(&b)
	line("node", "%s", v.NodeID)
	line("cluster", "%s", v.ClusterID)
	line("last entry", "term %d, index %d", v.LastTerm, v.LastIndex)
	if v.NextOffset == v.FirstOffset {
		line("records", "none; the next offset is %d", v.NextOffset)
	} else {
		line("records", "offsets %d–%d, the last one appended at %s", v.FirstOffset, v.NextOffset-1, v.LastAppendTime)
	}
	if v.CommittedOffset < v.NextOffset {
		line("committed", "up to offset %d for sure; those from there on may never have been acknowledged, and are kept", v.CommittedOffset)
	}
	for i, m := range v.Servers {
		name, more := "", ""
		if i == 0 {
			name = "servers"
		}
		if !m.Voter {
			more = ", without a vote"
		}
		if m.ID == v.NodeID {
			more += ", this node"
		}
		line(name, "%s at %s%s", m.ID, m.Address, more)
	}
	if v.Removed {
		line("note", "the cluster had removed this node: it may lack what came after that")
	}
	return b.String()
}

func (c *recoverCommand) compareAll(files []string) int {
	var all []survivor
	names := make(map[string]string)
	for _, name := range files {
		file, err := os.Open(name)
		if err != nil {
			return c.failed(err)
		}
		s, err := readSurvivor(file)
		if err := errors.Join(err, file.Close()); err != nil {
			return c.failed(fmt.Errorf("%s: %w", name, err))
		}
		if before, twice := names[s.NodeID]; twice {
			return c.failed(fmt.Errorf("%s and %s are of the same node, %s", before, name, s.NodeID))
		}
		names[s.NodeID] = name
		all = append(all, s)
	}
	best, same, err := fullest(all)
	if err != nil {
		return c.failed(err)
	}
	var b strings.Builder
	for _, s := range all {
		_, _ = fmt.Fprintf(&b, "%s: node %s, last entry of term %d, index %d, next offset %d\n", names[s.NodeID], s.NodeID, s.LastTerm, s.LastIndex, s.NextOffset)
	}
	_, _ = fmt.Fprintf(&b, "Keep %s: node %s.", names[best.NodeID], best.NodeID)
	if same > 1 {
		_, _ = fmt.Fprintf(&b, " %d of them hold the same; any of these will do.", same)
	}
	return printAnswer(c.stdout, c.stderr, c.json, best, b.String()+"\n")
}

var _ cli.Command = (*recoverCommand)(nil)
