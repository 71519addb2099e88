package identity

import (
	"time"

	"github.com/hashicorp/go-hclog"
)

// AuditEvent is one thing that an operator did, or wanted to.
type AuditEvent struct {
	// Subject is who called.
	Subject string
	// OnBehalfOf is for whom, where a node passed the call on: the subject that
	// called that node. Only a node's word on it is to be believed.
	OnBehalfOf string
	// Verb is what was asked for: "remove-peer".
	Verb string
	// Target is of whom or of what: a node's id; may be empty.
	Target string
	// Outcome is "ok", or the reason of the error that was answered.
	Outcome string
	// Error says more about an outcome that is not "ok".
	Error error
	// Took is how long it took.
	Took time.Duration
}

// Auditor writes an audit line for each event: at info, by the logger "audit".
// It is safe for concurrent use.
type Auditor struct{ logger hclog.Logger }

// NewAuditor returns one that writes to a logger of that name below logger.
func NewAuditor(logger hclog.Logger) *Auditor {
	if logger == nil {
		logger = hclog.NewNullLogger()
	}
	return &Auditor{logger: logger.Named("audit")}
}

// Record writes an event's line.
func (a *Auditor) Record(e AuditEvent) {
	args := []any{"subject", clean(e.Subject)}
	add := func(key, value string) {
		if value != "" {
			args = append(args, key, clean(value))
		}
	}
	add("on_behalf_of", e.OnBehalfOf)
	add("verb", e.Verb)
	add("target", e.Target)
	add("outcome", e.Outcome)
	if e.Error != nil {
		add("error", e.Error.Error())
	}
	args = append(args, "took", e.Took.Round(time.Millisecond))
	a.logger.Info("admin call", args...)
}
