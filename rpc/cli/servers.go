package cli

import (
	"context"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/diurnalog/diurna/rpc/client"
)

type serversCommand struct{ question }

func (c *serversCommand) Synopsis() string { return "List the nodes of the cluster" }

func (c *serversCommand) Help() string {
	return c.options().Help("diurna servers [options]", `
Lists the nodes of the cluster as one of them knows them; a * marks the one
that answered. Offsets are those of the default log and, like the applied
index, known only of some nodes; a - stands for what is not known.
`, `
Examples:

  List the nodes that the one on db1 knows:

      $ diurna servers -addr db1

  The leader's address, for a script:

      $ diurna servers -json | jq -r '.servers[] | select(.leader).address'
`)
}

func (c *serversCommand) Run(args []string) int {
	return c.ask("servers", args, func(ctx context.Context, cl *client.Client) int {
		list, err := cl.Servers(ctx)
		if err != nil {
			return c.failed(err)
		}
		if c.json {
			return c.printJSON(toServersJSON(list))
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
	row("ID", "NAME", "ADDRESS", "ROLE", "LEADER", "TERM", "LAST CONTACT", "APPLIED", "FIRST", "NEXT", "VERSION")
	for _, s := range list.Servers {
		id := s.ID
		first, next := "", ""
		if id == list.AnsweredBy {
			id += " *"
			first, next = fmt.Sprint(s.FirstOffset), fmt.Sprint(s.HighWatermark)
		}
		row(id, s.Name, s.Address, role(s), yes(s.Leader), number(s.Term), contact(s.LastContact), number(s.AppliedIndex), first, next, s.Version)
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

type serversJSON struct {
	AnsweredBy string       `json:"answered_by"`
	Servers    []serverJSON `json:"servers"`
}

type serverJSON struct {
	ID            string  `json:"id"`
	Name          string  `json:"name"`
	Address       string  `json:"address"`
	Role          string  `json:"role"`
	Leader        bool    `json:"leader"`
	Term          uint64  `json:"term,omitempty"`
	LastContact   string  `json:"last_contact,omitempty"`
	AppliedIndex  uint64  `json:"applied_index,omitempty"`
	FirstOffset   *uint64 `json:"first_offset,omitempty"`
	HighWatermark *uint64 `json:"high_watermark,omitempty"`
	Version       string  `json:"version,omitempty"`
}

func toServersJSON(list client.ServerList) serversJSON {
	out := serversJSON{AnsweredBy: list.AnsweredBy, Servers: []serverJSON{}}
	for _, s := range list.Servers {
		j := serverJSON{
			ID: s.ID, Name: s.Name, Address: s.Address, Role: role(s), Leader: s.Leader, Term: s.Term,
			LastContact: contact(s.LastContact), AppliedIndex: s.AppliedIndex, Version: s.Version,
		}
		if s.ID == list.AnsweredBy {
			j.FirstOffset, j.HighWatermark = &s.FirstOffset, &s.HighWatermark
		}
		out.Servers = append(out.Servers, j)
	}
	return out
}
