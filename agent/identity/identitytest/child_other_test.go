//go:build !linux

package identitytest

// running cannot tell: only Linux ends a child with its parent.
func running(int) bool { return false }
