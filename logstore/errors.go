package logstore

import (
	"errors"
	"fmt"
)

var (
	// ErrNotFound: no entry with that index, or no record with that offset, is
	// stored (any more, or yet).
	ErrNotFound = errors.New("not in the log")
	// ErrClosed: the log was closed.
	ErrClosed = errors.New("log is closed")
	// ErrRejected: entries do not continue the log. Nothing was written.
	ErrRejected = errors.New("entries do not continue the log")
	// ErrTooLarge: an entry's payload is over MaxPayload. Nothing was written.
	ErrTooLarge = errors.New("entry is too large")
	// ErrFailed: a write, sync or truncation failed earlier; the log takes no
	// more of them until it is opened anew. The error wraps the first failure.
	ErrFailed = errors.New("log takes no more writes after a failure")
	// ErrNotALog: the directory holds something else.
	ErrNotALog = errors.New("not a log directory")
)

// CorruptError says that bytes which were durable are no longer what was
// written. It is never the outcome of a crash alone.
type CorruptError struct {
	File     string // with its directory
	Position int64  // in bytes from the start of the file
	Detail   string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s is damaged at byte %d: %s", e.File, e.Position, e.Detail)
}

// VersionError: a file was written by a newer Diurna.
type VersionError struct {
	File           string
	Version, Known uint32
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("%s has format version %d, this program knows versions up to %d: use a newer Diurna", e.File, e.Version, e.Known)
}

// ShortBufferError: a read needs a buffer of at least Need bytes.
type ShortBufferError struct{ Need int }

func (e *ShortBufferError) Error() string {
	return fmt.Sprintf("the buffer must have at least %d bytes", e.Need)
}
