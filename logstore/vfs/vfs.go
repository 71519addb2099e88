// Package vfs is the seam between the segment log and the filesystem.
//
// Everything the log store does to a disk goes through FS and File, so that
// tests can crash it between any two calls, tear a write, fill the disk, or
// fail a sync (package vfstest), and so that the few calls whose semantics
// durability rests on stand in one place:
//
//   - File.Sync makes a file's content and size durable, not its name;
//   - FS.SyncDir makes the names in a directory durable: after Create, Rename
//     and Remove nothing is certain until it returned nil;
//   - after a failed Sync or SyncDir the kernel may have dropped what it could
//     not write and call the next sync a success. A caller must stop using the
//     file, never try again (see "Can Applications Recover from fsync
//     Failures?", USENIX ATC 2020).
//
// OS is the real filesystem.
package vfs

import "io"

// FS is a filesystem. Names are slash-separated paths as package os takes
// them. Methods are safe for concurrent use; errors satisfy errors.Is with
// fs.ErrNotExist, fs.ErrExist and syscall errors where they apply.
type FS interface {
	// Create makes a file that must not exist yet and opens it for reading and
	// writing.
	Create(name string) (File, error)
	// Open opens an existing file for reading.
	Open(name string) (File, error)
	// OpenReadWrite opens an existing file for reading and writing.
	OpenReadWrite(name string) (File, error)
	// Remove deletes a file. Files that are open stay readable.
	Remove(name string) error
	// Rename moves a file, atomically replacing newname if it exists.
	Rename(oldname, newname string) error
	// List returns the names in a directory, sorted, without the directory.
	List(dir string) ([]string, error)
	// MkdirAll makes a directory and its parents, and syncs the parents of
	// those it made.
	MkdirAll(dir string) error
	// SyncDir makes the names in a directory durable.
	SyncDir(dir string) error
	// Free returns how many bytes can still be written to the filesystem that
	// holds dir, by a user without privileges.
	Free(dir string) (bytes uint64, err error)
	// Lock takes an exclusive lock, making the lock file if needed, and fails
	// at once with ErrLocked when another process or another call holds it.
	// The lock ends with Close, or with the process.
	Lock(name string) (io.Closer, error)
}

// File is an open file. ReadAt may be used concurrently with everything else;
// WriteAt, Truncate, Preallocate and Sync belong to one goroutine at a time.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Size is the file's length in bytes.
	Size() (int64, error)
	// Sync makes the file's content and length durable (fdatasync). A failed
	// Sync must never be retried.
	Sync() error
	// Truncate sets the length; growing fills with zeros.
	Truncate(size int64) error
	// Preallocate grows the file to size with zeros and reserves the space
	// where the filesystem can, so that later writes there neither change the
	// length nor run out of space. It never shrinks a file.
	Preallocate(size int64) error
	// Map maps the first size bytes for reading. The file must not shrink while
	// it is mapped: touching a page past its end kills the process.
	Map(size int64) (Mapping, error)
}

// Mapping is a read-only view of a file.
type Mapping interface {
	// Bytes is valid until Close.
	Bytes() []byte
	Close() error
}
