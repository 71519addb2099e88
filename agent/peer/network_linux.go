package peer

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// limitSilence bounds how long sent data may stay unacknowledged: keep-alive
// asks only while nothing is under way, and the kernel would repeat what is for
// a quarter of an hour. Accepted connections inherit it from the listener.
func limitSilence(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadAfter.Milliseconds()))
	})
	if err != nil {
		return err
	}
	return failed
}
