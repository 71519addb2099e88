package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/diurnalog/diurna/rpc/client"
)

type statusCommand struct{ question }

func (c *statusCommand) Synopsis() string { return "Tell whether a node is healthy" }

func (c *statusCommand) Help() string {
	return c.options().Help("diurna status [options]", `
Tells how one node is and what it knows of its cluster. The node is healthy
when it says that it serves and knows a leader: then it takes records.

Exits 0 when the node is healthy, 2 when it is not or cannot be reached, and 1
when the command was called wrongly.
`, `
Examples:

  Wait for a node to come up:

      $ until diurna status >/dev/null 2>&1; do sleep 1; done
`)
}

// nodeStatus is the answer; -json prints it.
type nodeStatus struct {
	Address string `json:"address"`
	Healthy bool   `json:"healthy"`
	// Problem says why the node is not healthy.
	Problem string      `json:"problem,omitempty"`
	Health  string      `json:"health,omitempty"`
	Self    *serverJSON `json:"self,omitempty"`
	Leader  *serverJSON `json:"leader,omitempty"`
	Servers int         `json:"servers"`
	Voters  int         `json:"voters"`
}

func (c *statusCommand) Run(args []string) int {
	return c.ask("status", args, func(ctx context.Context, cl *client.Client) int {
		status, err := askStatus(ctx, cl)
		if err != nil {
			status.Problem = explain(err)
		}
		code := ExitServer
		if status.Healthy {
			code = ExitOK
		}
		if c.json {
			return max(code, c.printJSON(status))
		}
		if err == nil {
			code = max(code, c.print(statusText(status)))
		}
		if !status.Healthy {
			c.errorf("%s", status.Problem)
		}
		return code
	})
}

func askStatus(ctx context.Context, cl *client.Client) (nodeStatus, error) {
	status := nodeStatus{Address: cl.Addr()}
	serving, health, err := cl.Health(ctx)
	if err != nil {
		return status, err
	}
	status.Health = health
	list, err := cl.Servers(ctx)
	var e *client.Error
	if err != nil && (serving || !errors.As(err, &e)) {
		return status, err
	}
	status.Servers = len(list.Servers)
	for i, s := range toServersJSON(list).Servers {
		if s.ID == list.AnsweredBy {
			status.Self = &s
		}
		if s.Leader {
			status.Leader = &s
		}
		if list.Servers[i].Voter {
			status.Voters++
		}
	}
	switch {
	case !serving:
		status.Problem = fmt.Sprintf("the node at %s says %s", cl.Addr(), health)
	case status.Leader == nil:
		status.Problem = fmt.Sprintf("the node at %s knows no leader: one is being elected, or the quorum is lost", cl.Addr())
	default:
		status.Healthy = true
	}
	return status, nil
}

func statusText(s nodeStatus) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(name, value string) { _, _ = fmt.Fprintf(w, "%s\t%s\n", name, value) } // a strings.Builder takes everything
	row("Address", s.Address)
	row("Health", s.Health)
	if s.Self != nil {
		row("Node", nameOf(s.Self))
		r := s.Self.Role
		if s.Self.Leader {
			r = "leader"
		}
		row("Role", r)
		if s.Self.Term > 0 {
			row("Term", fmt.Sprint(s.Self.Term))
		}
	}
	if s.Leader != nil {
		row("Leader", fmt.Sprintf("%s at %s", nameOf(s.Leader), s.Leader.Address))
	} else {
		row("Leader", "none known")
	}
	row("Servers", fmt.Sprintf("%d, %d of them voters", s.Servers, s.Voters))
	if s.Self != nil && s.Self.HighWatermark != nil {
		first, next := *s.Self.FirstOffset, *s.Self.HighWatermark
		if first < next {
			row("Log", fmt.Sprintf("offsets %d–%d", first, next-1))
		} else {
			row("Log", fmt.Sprintf("empty, the next offset is %d", next))
		}
	}
	_ = w.Flush()
	return b.String()
}

func nameOf(s *serverJSON) string {
	if s.Name == "" || s.Name == s.ID {
		return s.ID
	}
	return fmt.Sprintf("%s (%s)", s.Name, s.ID)
}
