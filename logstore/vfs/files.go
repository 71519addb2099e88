package vfs

import (
	"errors"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// TempSuffix ends the names of files that a crash may leave unfinished and
// that are removed or made anew.
const TempSuffix = ".tmp"

// WriteFile makes a file that, whatever happens, is there with all of its
// content or as it was before. It is durable when WriteFile returns nil.
func WriteFile(fsys FS, name string, content []byte) error {
	if err := writeTemp(fsys, name+TempSuffix, content); err != nil {
		if IsFull(err) {
			// Not to hold on to the part that there was space for.
			err = errors.Join(err, RemoveIfThere(fsys, name+TempSuffix))
		}
		return err
	}
	if err := fsys.Rename(name+TempSuffix, name); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(name))
}

func writeTemp(fsys FS, name string, content []byte) (err error) {
	f, err := CreateOver(fsys, name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.WriteAt(content, 0); err != nil {
		return err
	}
	return f.Sync()
}

// ReadFile reads a whole file of at most limit bytes.
func ReadFile(fsys FS, name string, limit int64) (b []byte, err error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, &fs.PathError{Op: "read", Path: name, Err: errors.New("file is too large")}
	}
	b = make([]byte, size)
	if size == 0 {
		return b, nil
	}
	_, err = f.ReadAt(b, 0)
	return b, err
}

// CreateOver creates a file, removing one of the same name that a crash left.
func CreateOver(fsys FS, name string) (File, error) {
	if err := RemoveIfThere(fsys, name); err != nil {
		return nil, err
	}
	return fsys.Create(name)
}

// RemoveIfThere removes a file; one that is not there is no error.
func RemoveIfThere(fsys FS, name string) error {
	if err := fsys.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// IsFull tells whether an error means that there is no space left: on the
// filesystem, or in what its user may take.
func IsFull(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}
