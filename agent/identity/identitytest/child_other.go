//go:build !linux

package identitytest

import (
	"os/exec"
	"syscall"
)

func childAttr() *syscall.SysProcAttr { return nil }

func run(cmd *exec.Cmd) error { return cmd.Start() }

func killGroup(cmd *exec.Cmd) {
	// Fails only if it is gone.
	_ = cmd.Process.Kill()
}
