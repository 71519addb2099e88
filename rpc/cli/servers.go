package cli

import (
	"context"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/diurnalog/diurna/rpc/cli/flags"
	"github.com/diurnalog/diurna/rpc/client"
)

type serversCommand struct {
	question
	local bool
}

func (c *serversCommand) options() *flags.Set {
	f := c.question.options()
	f.Bool(&c.local, "local", "Ask nobody but the one node, and tell what it knows.")
	return f
}

func (c *serversCommand) Synopsis() string { return "List the nodes of the cluster" }

func (c *serversCommand) Help() string {
	return c.options().Help("diurna servers [options]", `
Lists the nodes of the cluster; a * marks the one that was asked. What it does
not know of the others it has from themselves, as far as they can be reached
from here, and whether they are healthy from the leader. Offsets are those of
the default log. A - stands for what is not known.
`, `
Examples:

  List the nodes that the one on db1 knows:

      $ diurna servers -addr db1

  The leader's address, for a script:

      $ diurna servers -json | jq -r '.servers[] | select(.leader).address'`+tlsHelp)
}

func (c *serversCommand) Run(args []string) int {
	return c.ask("servers", c.options(), args, func(ctx context.Context, cl *client.Client) int {
		list, err := cl.Servers(ctx)
		if err != nil {
			return c.failed(err)
		}
		if !c.local {
			c.askOthers(ctx, &list)
		}
		if c.json {
			return c.printJSON(list.JSON())
		}
		return c.print(serversTable(list))
	})
}

func serversTable(list client.ServerList) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(cells ...string) {
		for i, cell := range cells {
			if cell == "" {
				cells[i] = "-"
			}
		}
		// A strings.Builder takes everything.
		_, _ = fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	row("NAME", "ID", "ADDRESS", "ROLE", "LEADER", "HEALTH", "TERM", "LAST CONTACT", "APPLIED", "FIRST", "NEXT", "VERSION")
	for _, s := range list.Servers {
		id := s.ID
		if id == list.AnsweredBy {
			id += " *"
		}
		first, next := "", ""
		if list.OffsetsKnown(s) {
			first, next = fmt.Sprint(s.FirstOffset), fmt.Sprint(s.HighWatermark)
		}
		row(s.Name, id, s.Address, role(s), yes(s.Leader), health(s), number(s.Term), contact(s.LastContact), number(s.AppliedIndex), first, next, s.Version)
	}
	_ = w.Flush()
	return b.String()
}

func role(s client.Server) string {
	if s.Voter {
		return "voter"
	}
	return "nonvoter"
}

// health is what the leader says of a node, with what the node says of itself
// where that is out of the ordinary.
func health(s client.Server) string {
	text := ""
	if s.Healthy != nil {
		text = "unhealthy"
		if *s.Healthy {
			text = "healthy"
		}
	}
	if s.State != "" && s.State != "member" {
		text = strings.TrimPrefix(text+", "+s.State, ", ")
	}
	return text
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func number(n uint64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

func contact(d time.Duration) string {
	if d < 0 {
		return ""
	}
	return d.Round(time.Millisecond).String()
}
