package client

import "time"

// Defaults of ProducerOptions.
const (
	DefaultBatchRecords     = 16384
	DefaultBatchBytes       = 512 << 10
	DefaultLinger           = 5 * time.Millisecond
	DefaultMaxInFlightBytes = 8 << 20
)

// ProducerOptions configure a Producer. The zero value is usable.
type ProducerOptions struct {
	// Log names the log to append to; empty means the default log.
	Log string
	// BatchRecords and BatchBytes (wire form) close a batch that has reached
	// them. A record larger than BatchBytes travels alone. A batch is appended
	// whole or not at all, so the server's batch limit is the ceiling.
	BatchRecords, BatchBytes int
	// Linger is how long a batch may wait for more records: what a lone record
	// pays so that a busy producer needs fewer, larger batches. 0 means
	// DefaultLinger, negative none.
	Linger time.Duration
	// MaxInFlightBytes bounds what is buffered or sent and not yet
	// acknowledged; Append blocks above it. One record always fits.
	MaxInFlightBytes int
	// AckTimeout, if positive, fails the producer when something is sent and
	// no acknowledgement comes for so long. 0 waits for ever.
	AckTimeout time.Duration
	// ExpectedOffset, if set, must be the offset of the very first record;
	// otherwise nothing is appended and the error is OFFSET_MISMATCH. Other
	// producers may still append between the batches after the first.
	ExpectedOffset *uint64
	// OnAck, if set, is called for every acknowledged batch, in order, from
	// one goroutine. While it runs no further acknowledgement is taken, and it
	// must not call Append, Flush or Close, which may wait for it.
	OnAck func(Ack)
}

func (o *ProducerOptions) applyDefaults() {
	if o.BatchRecords <= 0 {
		o.BatchRecords = DefaultBatchRecords
	}
	if o.BatchBytes <= 0 {
		o.BatchBytes = DefaultBatchBytes
	}
	if o.Linger == 0 {
		o.Linger = DefaultLinger
	}
	if o.MaxInFlightBytes <= 0 {
		o.MaxInFlightBytes = DefaultMaxInFlightBytes
	}
}
