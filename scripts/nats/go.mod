// Nothing of ours: it names the rival that `make bench-cluster` measures beside
// Diurna, and its own load generator; go.sum fixes every module that goes into
// them.
module github.com/diurnalog/diurna/scripts/nats

go 1.26.0

require (
	github.com/nats-io/nats-server/v2 v2.15.2
	github.com/nats-io/natscli v0.4.0
)
