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
	// ErrFull: there is no space on the disk for the next segment. Nothing of
	// the call was written, the log has not failed, reading goes on, and the
	// same call succeeds once there is space.
	ErrFull = errors.New("no space on the disk for more of the log")
	// ErrNotALog: the directory holds something else.
	ErrNotALog = errors.New("not a log directory")
	// ErrNotEmpty: a log cannot be imported into a directory that holds
	// something.
	ErrNotEmpty = errors.New("the directory is not empty")
	// ErrUnfinished: the directory holds what an Import left that did not
	// finish. Remove clears it.
	ErrUnfinished = errors.New("the import of this log did not finish")
)

// RangeError: an Export through an index that the log does not reach, or
// starts behind. It is an ErrNotFound.
type RangeError struct {
	Index       uint64 // that was asked for
	First, Last uint64 // what the log has
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("index %d is not within the log, which holds %d to %d", e.Index, e.First, e.Last)
}

// Unwrap returns ErrNotFound.
func (e *RangeError) Unwrap() error { return ErrNotFound }

// StreamError says that a stream is not a whole and undamaged export of a log.
type StreamError struct {
	Position int64 // in bytes from the start of the stream
	Detail   string
	// Err is io.ErrUnexpectedEOF if the stream ends early, else nil.
	Err error
}

func (e *StreamError) Error() string {
	return fmt.Sprintf("the export stream is damaged at byte %d: %s", e.Position, e.Detail)
}

// Unwrap returns Err.
func (e *StreamError) Unwrap() error { return e.Err }

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
