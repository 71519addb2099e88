package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/diurnalog/diurna/rpc/cli/flags"
	"github.com/diurnalog/diurna/rpc/client"
)

// peerFlags are how verbs let a node be named.
type peerFlags struct{ id, address string }

func (p *peerFlags) add(f *flags.Set) {
	f.Text(&p.id, "peer-id", "id", "", "The node's id, or its name where only one has it.")
	f.Text(&p.address, "peer-address", "host:port", "", "The node's address, instead of its id.")
}

// check returns what is wrong with how the node was named.
func (p *peerFlags) check(f *flags.Set, required bool) error {
	if err := f.Exclusive("peer-id", "peer-address"); err != nil {
		return err
	}
	if required && p.id == "" && p.address == "" {
		return errors.New("say which node: -peer-id or -peer-address")
	}
	return nil
}

// find returns the node that is meant.
func (p *peerFlags) find(list client.ServerList) (client.Server, error) {
	var found []client.Server
	for _, s := range list.Servers {
		switch {
		case p.id != "" && s.ID == p.id:
			return s, nil
		case p.id != "" && s.Name == p.id, p.address != "" && s.Address == p.address:
			found = append(found, s)
		}
	}
	what := p.id + p.address
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return client.Server{}, fmt.Errorf("there is no server %q in the cluster. `diurna operator raft list-peers` lists those there are", what)
	}
	return client.Server{}, fmt.Errorf("%d servers are called %q: use the -peer-id that `diurna operator raft list-peers` shows", len(found), what)
}

func nameOfServer(s client.Server) string { return nameOf(&client.ServerJSON{ID: s.ID, Name: s.Name}) }

// votersText says how many voters there are and what that means.
func votersText(n int) string {
	voters := fmt.Sprintf("%d voters", n)
	if n == 1 {
		voters = "1 voter"
	}
	switch spare := (n - 1) / 2; spare {
	case 0:
		return voters + "; the cluster stands still if one fails"
	case 1:
		return voters + "; one may fail"
	default:
		return fmt.Sprintf("%s; %d may fail", voters, spare)
	}
}

type listPeersCommand struct {
	question
	stale bool
}

func (c *listPeersCommand) options() *flags.Set {
	f := c.question.options()
	f.Bool(&c.stale, "stale", "Be content with what the node that is asked knows, which may be out of date. Works without a leader.")
	return f
}

func (c *listPeersCommand) Synopsis() string { return "List who is in the Raft configuration" }

func (c *listPeersCommand) Help() string {
	return c.options().Help("diurna operator raft list-peers [options]", `
Lists the servers of the cluster's Raft configuration as the leader has it,
whichever node is asked. A - stands for what is not known.
`, `
Examples:

  Who has a vote:

      $ diurna operator raft list-peers

  What one node takes the cluster for, when there is no leader:

      $ diurna operator raft list-peers -stale -addr db2`+tlsHelp)
}

func (c *listPeersCommand) Run(args []string) int {
	return c.ask("operator raft list-peers", c.options(), args, func(ctx context.Context, cl *client.Client) int {
		list, err := cl.ListPeers(ctx, c.stale)
		if err != nil {
			code := c.failed(err)
			if e := (*client.Error)(nil); !c.stale && errors.As(err, &e) && e.Reason == client.ReasonNoLeader {
				c.notef("With -stale the node tells what it knows without a leader.")
			}
			return code
		}
		if c.json {
			return c.printJSON(list.JSON())
		}
		return c.print(peersTable(list))
	})
}

func peersTable(list client.ServerList) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(cells ...string) {
		for i, cell := range cells {
			if cell == "" {
				cells[i] = "-"
			}
		}
		_, _ = fmt.Fprintln(w, strings.Join(cells, "\t")) // a strings.Builder takes everything
	}
	row("NAME", "ID", "ADDRESS", "STATE", "VOTER", "HEALTH", "LAST CONTACT", "APPLIED")
	for _, s := range list.Servers {
		state := "follower"
		if s.Leader {
			state = "leader"
		}
		row(s.Name, s.ID, s.Address, state, yes(s.Voter), health(s), contact(s.LastContact), number(s.AppliedIndex))
	}
	_ = w.Flush()
	return b.String()
}

// changed is what verbs that change the cluster print with -json.
type changed struct {
	Changed string `json:"changed"` // "added", "removed", "leader", "left"
	ID      string `json:"id"`
	Name    string `json:"name,omitempty"`
	Address string `json:"address,omitempty"`
	// Voters is left out where it is not known.
	Voters *int `json:"voters,omitempty"`
}

func (q *question) tell(what changed, text string) int {
	if q.json {
		return q.printJSON(what)
	}
	return q.print(text + "\n")
}

type addPeerCommand struct {
	question
	id, address string
}

func (c *addPeerCommand) options() *flags.Set {
	f := c.question.options()
	f.Text(&c.id, "peer-id", "id", "", "The node's id, as `diurna status` on that node shows it.")
	f.Text(&c.address, "peer-address", "host:port", "", "Where the other nodes reach it.")
	return f
}

func (c *addPeerCommand) Synopsis() string { return "Add a node to the cluster" }

func (c *addPeerCommand) Help() string {
	return c.options().Help("diurna operator raft add-peer -peer-id=<id> -peer-address=<host:port> [options]", `
Adds a node to the cluster. It receives the log from then on, and becomes a
voter once it has caught up and was stable for a while. Nodes that find one
another by discovery are added without this. A node that is there already gets
the new address.
`, `
Examples:

      $ diurna operator raft add-peer -peer-id 3d33da75-9e0d-4612-8163-382cf16e54f2 -peer-address 10.0.0.4:8400`+tlsHelp)
}

func (c *addPeerCommand) Run(args []string) int {
	const verb = "operator raft add-peer"
	f := c.options()
	err := c.parse(f, args)
	if err == nil && (c.id == "" || c.address == "") {
		err = errors.New("both -peer-id and -peer-address are needed")
	}
	if err != nil {
		return c.usage(verb, err)
	}
	return c.answer(func(ctx context.Context, cl *client.Client) int {
		voters, known, err := cl.AddPeer(ctx, c.id, c.address)
		if err != nil {
			return c.failed(err)
		}
		what := changed{Changed: "added", ID: c.id, Address: c.address}
		text := fmt.Sprintf("Added %s at %s. It becomes a voter when it has caught up.", c.id, c.address)
		if known {
			what.Voters = &voters
			text += fmt.Sprintf(" Now: %s.", votersText(voters))
		}
		return c.tell(what, text)
	})
}

type removePeerCommand struct {
	question
	peer peerFlags
}

func (c *removePeerCommand) options() *flags.Set {
	f := c.question.options()
	c.peer.add(f)
	return f
}

func (c *removePeerCommand) Synopsis() string { return "Remove a node from the cluster for good" }

func (c *removePeerCommand) Help() string {
	return c.options().Help("diurna operator raft remove-peer -peer-id=<id> [options]", `
Removes a node from the cluster, whether it is up or not, and says how many
voters are left. It is for nodes that will not come back: one that does is not
taken in again unless add-peer names it. A node that is up leaves more gently by
itself: see `+"`diurna leave`"+`.

It is refused where the servers that are left could not agree on anything.
`, `
Examples:

  Remove the node whose disk is gone:

      $ diurna operator raft remove-peer -peer-id db3`+tlsHelp)
}

func (c *removePeerCommand) Run(args []string) int {
	const verb = "operator raft remove-peer"
	f := c.options()
	err := c.parse(f, args)
	if err == nil {
		err = c.peer.check(f, true)
	}
	if err != nil {
		return c.usage(verb, err)
	}
	return c.answer(func(ctx context.Context, cl *client.Client) int {
		list, err := cl.ListPeers(ctx, false)
		if err != nil {
			return c.failed(err)
		}
		s, err := c.peer.find(list)
		if err != nil {
			c.errorf("%s.", err)
			return ExitServer
		}
		voters, known, err := cl.RemovePeer(ctx, s.ID)
		if err != nil {
			return c.failed(err)
		}
		what := changed{Changed: "removed", ID: s.ID, Name: s.Name, Address: s.Address}
		text := fmt.Sprintf("Removed %s at %s.", nameOfServer(s), s.Address)
		if known {
			what.Voters = &voters
			text += fmt.Sprintf(" Left: %s.", votersText(voters))
		}
		return c.tell(what, text)
	})
}

type transferCommand struct {
	question
	peer peerFlags
}

func (c *transferCommand) options() *flags.Set {
	f := c.question.options()
	c.peer.add(f)
	return f
}

func (c *transferCommand) Synopsis() string { return "Hand leadership to another node" }

func (c *transferCommand) Help() string {
	return c.options().Help("diurna operator raft transfer-leadership [options]", `
Makes the leader hand over to the voter that is named, or to the one that is
furthest along, and says who leads then. Producers notice nothing but a short
pause.
`, `
Examples:

  Before maintenance of the leader's machine:

      $ diurna operator raft transfer-leadership

  Back to the one that is nearest:

      $ diurna operator raft transfer-leadership -peer-id db1`+tlsHelp)
}

func (c *transferCommand) Run(args []string) int {
	const verb = "operator raft transfer-leadership"
	f := c.options()
	err := c.parse(f, args)
	if err == nil {
		err = c.peer.check(f, false)
	}
	if err != nil {
		return c.usage(verb, err)
	}
	return c.answer(func(ctx context.Context, cl *client.Client) int {
		list, err := cl.ListPeers(ctx, false)
		if err != nil {
			return c.failed(err)
		}
		before, _ := list.Leader()
		var to client.Server
		if c.peer != (peerFlags{}) {
			if to, err = c.peer.find(list); err != nil {
				c.errorf("%s.", err)
				return ExitServer
			}
			if to.ID == before.ID {
				return c.tell(changed{Changed: "leader", ID: to.ID, Name: to.Name, Address: to.Address}, nameOfServer(to)+" leads already.")
			}
		}
		if err := cl.TransferLeadership(ctx, to.ID); err != nil {
			return c.failed(err)
		}
		now, err := newLeader(ctx, cl, before.ID)
		if err != nil {
			c.errorf("%s has handed over, but who leads now is not known yet: %s", nameOfServer(before), explain(err))
			return ExitServer
		}
		return c.tell(changed{Changed: "leader", ID: now.ID, Name: now.Name, Address: now.Address},
			fmt.Sprintf("%s leads now, at %s.", nameOfServer(now), now.Address))
	})
}

// newLeader waits until another node than before is known to lead.
func newLeader(ctx context.Context, cl *client.Client, before string) (client.Server, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		list, err := cl.ListPeers(ctx, false)
		if leader, ok := list.Leader(); err == nil && ok && leader.ID != before {
			return leader, nil
		}
		if err == nil {
			err = errors.New("nobody has taken over")
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return client.Server{}, err
		}
	}
}

type leaveCommand struct {
	question
	id string
}

func (c *leaveCommand) options() *flags.Set {
	f := c.question.options()
	f.Text(&c.id, "id", "id", "", "The id of the node that is meant: any other at this address refuses.")
	return f
}

func (c *leaveCommand) Synopsis() string { return "Make a node leave the cluster" }

func (c *leaveCommand) Help() string {
	return c.options().Help("diurna leave [options]", `
Makes the node at -addr leave its cluster: it hands leadership over if it leads,
is taken out of the configuration, and stops. Its data stays on its disk. To
stop a node for a while, stop its process instead (SIGTERM): it then stays a
member.

-addr must name one address, since it is that node which leaves.
`, `
Examples:

      $ diurna leave -addr db3 -timeout 1m`+tlsHelp)
}

func (c *leaveCommand) Run(args []string) int {
	f := c.options()
	err := c.parse(f, args)
	if err == nil && strings.Contains(c.addr, ",") {
		err = errors.New("several addresses are given: it must be clear which node is to leave. Name one with -addr")
	}
	if err != nil {
		return c.usage("leave", err)
	}
	return c.answer(func(ctx context.Context, cl *client.Client) int {
		id, err := cl.Leave(ctx, c.id)
		if err != nil {
			return c.failed(err)
		}
		return c.tell(changed{Changed: "left", ID: id, Address: cl.Addr()}, fmt.Sprintf("%s at %s has left the cluster and stops.", id, cl.Addr()))
	})
}
