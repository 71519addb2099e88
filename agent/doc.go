// Package agent is one node's life: it builds the parts in order, runs them,
// and stops them in the opposite order.
//
//	cfg, err := config.Load(sources)
//	a, err := agent.Start(ctx, cfg, agent.Options{Logger: logger})
//	err = a.WaitReady(ctx) // it takes records
//	...
//	err = a.Stop(ctx) // answers what is under way, closes the log
//
// Start listens, takes the data directory (datadir.go), opens the log's replica
// and serves it over gRPC; service.go is the seam between the two, which know
// nothing of each other. Reload applies what can change while the node runs.
//
// The verbs that run or examine a node on this machine are here as well:
// `diurna agent`, `validate` and `debug segment`. Commands hands them to main.
package agent
