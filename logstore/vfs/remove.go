package vfs

import (
	"errors"
	"io/fs"
	"path/filepath"
	"syscall"
)

// RemoveAll removes a file, or a directory with all that is in it, and makes
// that durable. It is no error if there is none. It is not atomic: whoever
// needs that first renames, or changes what names it.
func RemoveAll(fsys FS, name string) error {
	if err := removeAll(fsys, name); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(name))
}

func removeAll(fsys FS, name string) error {
	names, err := fsys.List(name)
	if err == nil {
		for _, n := range names {
			if err := removeAll(fsys, filepath.Join(name, n)); err != nil {
				return err
			}
		}
	} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
		return err
	}
	return RemoveIfThere(fsys, name)
}
