// Package peertest is a faulty network in memory.
package peertest
