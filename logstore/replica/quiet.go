package replica

import (
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// quiet is a logger for Raft, which warns of a server that has just started and
// knows no leader yet.
type quiet struct{ hclog.Logger }

func (q quiet) Warn(msg string, args ...any) {
	first := true // no leader was known before
	for i := 1; i < len(args); i += 2 {
		if args[i-1] == "last-leader-id" {
			first = args[i] == raft.ServerID("")
		}
	}
	if msg == "heartbeat timeout reached, starting election" && first {
		q.Info(msg, args...)
		return
	}
	q.Logger.Warn(msg, args...)
}
