//go:build !linux

package agent

import (
	"syscall"
	"testing"
)

// childAttr puts a child into a process group of its own.
func childAttr() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

type fileWatch struct{}

// watchFiles cannot.
func watchFiles(testing.TB, string) *fileWatch { return nil }

func (*fileWatch) next(<-chan struct{}) bool { return false }
func (*fileWatch) close(testing.TB)          {}
