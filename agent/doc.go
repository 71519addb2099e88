// Package agent is one node's life.
package agent
