//go:build !linux

package vfs

import (
	"os"

	"golang.org/x/sys/unix"
)

// datasync is a full sync where fdatasync is missing or weaker (on macOS
// os.File.Sync is F_FULLFSYNC).
func datasync(f *os.File) error { return f.Sync() }

func allocate(*os.File, int64, int64) error { return unix.EOPNOTSUPP }
