package identitytest

import (
	"os/exec"
	"runtime"
	"syscall"
)

// childAttr puts a child into a process group of its own, and has it end with
// this process.
func childAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// run starts a command from a thread that lasts as long as the child: on Linux
// the child gets its death signal when the thread ends that made it.
func run(cmd *exec.Cmd) error {
	runtime.LockOSThread()
	return cmd.Start()
}

func killGroup(cmd *exec.Cmd) {
	// Fails only if all of it is gone.
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
}
