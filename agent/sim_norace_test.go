//go:build !race

package agent

const simScale = 1
