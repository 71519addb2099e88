//go:build race

package agent

// simScale is by how much less is simulated with the race detector, which takes
// that much longer.
const simScale = 8
