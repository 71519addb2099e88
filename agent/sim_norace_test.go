//go:build !race

package agent

// simHistories is how many random histories make a test.
const simHistories = 200
