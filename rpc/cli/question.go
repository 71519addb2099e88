package cli

import (
	"context"
	"time"

	"github.com/diurnalog/diurna/rpc/cli/flags"
	"github.com/diurnalog/diurna/rpc/client"
)

// question is what verbs have in common that ask one node one thing and print
// the answer.
type question struct {
	node
	timeout time.Duration
	json    bool
}

func (q *question) options() *flags.Set {
	f := flags.New()
	q.nodeFlags(f)
	f.Duration(&q.timeout, "timeout", 5*time.Second, "How long to wait for the answer. Default 5s.")
	f.Bool(&q.json, "json", "Print a JSON object.")
	return f
}

// ask takes the verb's arguments and calls put, in the time there is.
func (q *question) ask(verb string, f *flags.Set, args []string, put func(context.Context, *client.Client) int) int {
	if err := q.parse(f, args); err != nil {
		return q.usage(verb, err)
	}
	return q.answer(put)
}

// answer calls put, in the time there is.
func (q *question) answer(put func(context.Context, *client.Client) int) int {
	return q.withClient(func(c *client.Client) int {
		interrupted, stop := q.untilInterrupted()
		defer stop()
		ctx, cancel := context.WithTimeout(interrupted, q.timeout)
		defer cancel()
		return put(ctx, c)
	})
}
