package logstore

import (
	"fmt"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// MaxPayload is the greatest payload of an entry, in bytes. It bounds what a
// damaged length can make a reader allocate.
const MaxPayload = 16 << 20

// Bounds and default of Options.SegmentSize.
const (
	MinSegmentSize     = 4 << 10
	MaxSegmentSize     = 1 << 30
	DefaultSegmentSize = 64 << 20
)

// Options of a log. The zero value means the defaults.
type Options struct {
	// FS is where the log lives. Default: vfs.OS.
	FS vfs.FS
	// SegmentSize is the size at which a segment is sealed and the next one
	// begun, in bytes; an entry that is larger gets a segment of its own.
	// Default: DefaultSegmentSize. It may change from one opening to the next.
	SegmentSize int64
	// CheckpointInterval is how long after an append the durable position is
	// recorded at the latest. Default: 1 s. Negative: only on Close.
	CheckpointInterval time.Duration
	// MaxOpenSegments bounds the sealed segments whose files are kept open.
	// Default: 256.
	MaxOpenSegments int
	// FirstIndex and FirstOffset are where a log that does not exist yet
	// starts. Default: index 1, offset 0.
	FirstIndex  uint64
	FirstOffset uint64
	// Observer is told what the log does. Default: nobody.
	Observer Observer

	// inline does the keeper's work within the call that causes it, so that
	// tests repeat exactly.
	inline bool

	// start is where a log begins that Import makes, instead of FirstIndex and
	// FirstOffset.
	start *tail
}

func (o *Options) applyDefaultsAndValidate() error {
	if o.FS == nil {
		o.FS = vfs.OS
	}
	o.Observer.applyDefaults()
	if o.SegmentSize == 0 {
		o.SegmentSize = DefaultSegmentSize
	}
	if o.SegmentSize < MinSegmentSize || o.SegmentSize > MaxSegmentSize {
		return fmt.Errorf("segment size %d is not between %d and %d", o.SegmentSize, MinSegmentSize, MaxSegmentSize)
	}
	if o.CheckpointInterval == 0 {
		o.CheckpointInterval = time.Second
	}
	if o.MaxOpenSegments == 0 {
		o.MaxOpenSegments = 256
	}
	if o.MaxOpenSegments < 1 {
		return fmt.Errorf("at least 1 segment must stay open, not %d", o.MaxOpenSegments)
	}
	if o.FirstIndex == 0 {
		o.FirstIndex = 1
	}
	return nil
}
