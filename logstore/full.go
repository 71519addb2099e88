package logstore

import (
	"fmt"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// full makes an ErrFull of an error that says that the disk is full.
func full(err error) error {
	if vfs.IsFull(err) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}
