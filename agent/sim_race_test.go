//go:build race

package agent

// simHistories is how many random histories make a test: each takes ten times
// as long with the race detector.
const simHistories = 30
