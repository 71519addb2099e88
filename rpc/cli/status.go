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

type statusCommand struct {
	question
	self bool
}

func (c *statusCommand) Synopsis() string { return "Tell whether a node is healthy" }

func (c *statusCommand) options() *flags.Set {
	f := c.question.options()
	f.Bool(&c.self, "self", "Look at the node only, not at the other voters: for a health check that "+
		"decides whether this node is restarted, or waited for.")
	return f
}

func (c *statusCommand) Help() string {
	return c.options().Help("diurna status [options]", `
Tells how one node is, and its cluster. All is well when the node serves, belongs
to the cluster, knows a leader, and the leader finds no voter unhealthy; if not,
it says what is wrong.

Exits 0 when all is well, 2 when something is not or the node cannot be reached,
and 1 when the command was called wrongly.
`, `
Examples:

  Wait for a node to come up:

      $ until diurna status >/dev/null 2>&1; do sleep 1; done`+tlsHelp)
}

// nodeStatus is the answer; -json prints it.
type nodeStatus struct {
	Address string `json:"address"`
	Healthy bool   `json:"healthy"`
	// Problem says why not all is well: Problems, as one text.
	Problem  string             `json:"problem,omitempty"`
	Problems []string           `json:"problems,omitempty"`
	Health   string             `json:"health,omitempty"`
	Self     *client.ServerJSON `json:"self,omitempty"`
	Leader   *client.ServerJSON `json:"leader,omitempty"`
	Servers  int                `json:"servers"`
	Voters   int                `json:"voters"`
}

func (c *statusCommand) Run(args []string) int {
	return c.ask("status", c.options(), args, func(ctx context.Context, cl *client.Client) int {
		status, err := c.askStatus(ctx, cl)
		if err != nil {
			status.Problems = []string{explain(err)}
		}
		status.Problem = strings.Join(status.Problems, "; ")
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

func (c *statusCommand) askStatus(ctx context.Context, cl *client.Client) (nodeStatus, error) {
	serving, health, err := cl.Health(ctx)
	status := nodeStatus{Address: cl.Addr()} // after it is clear which one answers
	if err != nil {
		return status, err
	}
	status.Health = health
	list, err := cl.Servers(ctx)
	var e *client.Error
	if err != nil && (serving || !errors.As(err, &e)) {
		return status, err
	}
	if !c.self {
		c.askOthers(ctx, &list)
	}
	status.Servers, status.Voters = len(list.Servers), list.Voters()
	var unhealthy []string
	for i, s := range list.JSON().Servers {
		if s.ID == list.AnsweredBy {
			status.Self = &s
		}
		if s.Leader {
			status.Leader = &s
		}
		if !c.self && list.Servers[i].Voter && s.Healthy != nil && !*s.Healthy {
			unhealthy = append(unhealthy, nameOf(&s))
		}
	}
	problem := func(format string, args ...any) {
		status.Problems = append(status.Problems, fmt.Sprintf(format, args...))
	}
	if !serving {
		problem("the node at %s says %s", cl.Addr(), health)
	}
	if s := status.Self; s != nil && s.CertificateExpires != nil && time.Until(*s.CertificateExpires) <= 0 {
		problem("the certificate of the node at %s has expired: see its log for why it was not renewed", cl.Addr())
	}
	switch {
	case err != nil && !serving: // it is on its way up or down
	case status.Self == nil && len(list.Servers) == 0:
		problem("the node at %s belongs to no cluster yet: it waits to find or to be added to one", cl.Addr())
	case status.Self == nil:
		problem("the node at %s is not in the cluster's configuration: it was removed, or not added yet", cl.Addr())
	}
	if status.Leader == nil && serving {
		problem("the node at %s knows no leader: one is being elected, or the quorum is lost", cl.Addr())
	}
	switch len(unhealthy) {
	case 0:
	case 1:
		problem("the voter %s is unhealthy: it is down, cut off, or far behind", unhealthy[0])
	default:
		problem("%d of %d voters are unhealthy: %s", len(unhealthy), status.Voters, strings.Join(unhealthy, ", "))
	}
	status.Healthy = len(status.Problems) == 0
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
	if s.Self != nil && s.Self.CertificateExpires != nil {
		at := *s.Self.CertificateExpires
		row("Certificate", fmt.Sprintf("until %s, %s left", at.UTC().Format(time.RFC3339), time.Until(at).Round(time.Second)))
	}
	_ = w.Flush()
	return b.String()
}

func nameOf(s *client.ServerJSON) string {
	if s.Name == "" || s.Name == s.ID {
		return s.ID
	}
	return fmt.Sprintf("%s (%s)", s.Name, s.ID)
}
