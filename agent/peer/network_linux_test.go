package peer_test

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// checkSilenceLimit asks the kernel when it will give up.
func checkSilenceLimit(t *testing.T, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for name, opt := range map[string]struct{ level, option, want int }{
		"keep-alive":                 {unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		"idle seconds before asking": {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 15},
		"seconds between":            {unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 5},
		"times":                      {unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3},
		"milliseconds for data":      {unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 30000},
	} {
		var got int
		var failed error
		if err := raw.Control(func(fd uintptr) { got, failed = unix.GetsockoptInt(int(fd), opt.level, opt.option) }); err != nil || failed != nil {
			t.Fatal(err, failed)
		}
		if got != opt.want {
			t.Errorf("%s: %d, want %d", name, got, opt.want)
		}
	}
}
