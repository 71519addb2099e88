package vfs

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// datasync does not write out times, which fsync would, and which no reader
// of a log needs; a changed length it does write.
func datasync(f *os.File) error {
	return retryEINTR(func() error { return unix.Fdatasync(int(f.Fd())) })
}

func allocate(f *os.File, off, size int64) error {
	return retryEINTR(func() error { return unix.Fallocate(int(f.Fd()), 0, off, size) })
}

// retryEINTR repeats an interrupted call. An interrupted fdatasync has not
// reported a write error, so that repeating it hides none.
func retryEINTR(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
