package rpc

import (
	"context"
	"time"
)

// Log is what the server needs of one log. The agent adapts a replica to it,
// so that gRPC never reaches into storage; tests use an in-memory one.
//
// All methods are safe for concurrent use. Errors are those of errors.go;
// anything else is answered as INTERNAL.
type Log interface {
	// Propose hands a batch to the log and returns at once with a handle on
	// its outcome. Batches proposed one after the other by one goroutine are
	// appended in that order. With wait it blocks for room until ctx ends;
	// without, it fails with ErrOverloaded when the log has too much in
	// flight. ctx bounds only this call: what it has taken stays in line. An
	// error means that nothing was or will be appended.
	Propose(ctx context.Context, p Proposal, wait bool) (Pending, error)

	// Bounds tells which offsets can be read now.
	Bounds() Bounds

	// WaitReadable returns once the record at offset is committed, so that a
	// read of it succeeds, or with ctx's error or ErrClosed.
	WaitReadable(ctx context.Context, offset uint64) error

	// Linearize returns once every record acknowledged before the call, by
	// any node, is below this node's high watermark.
	Linearize(ctx context.Context) error

	// OffsetAtTime returns the first committed offset whose append time is t
	// or later; the high watermark when there is none.
	OffsetAtTime(t time.Time) (uint64, error)

	// ReadBatches fills buf with stored batches, in order, the first being the
	// one that holds offset from, and appends their places in buf to dst. It
	// reads only committed records and always at least one batch:
	//
	//   - buf too short for the first batch: *ShortBufferError, nothing read;
	//   - from outside of [First, HighWatermark): *OffsetOutOfRangeError;
	//   - stored bytes that fail their check: *CorruptError.
	//
	// Every byte appended to dst has been checked against its CRC.
	ReadBatches(from uint64, buf []byte, dst []Batch) ([]Batch, error)
}

// Proposal is one batch to append.
type Proposal struct {
	// Records is the wire form of ProduceRequest.records: one or more fields
	// number 15, back to back, nothing between. The log may keep it until the
	// outcome is known, and does not change it.
	Records []byte
	// Count is the number of records in it, at least 1.
	Count uint32
	// Expected, if set, is the offset the first record must get.
	Expected *uint64
}

// Pending is the outcome of a proposal that is under way.
type Pending interface {
	// Done is closed when the outcome is known.
	Done() <-chan struct{}
	// Result returns the outcome; it may be called only after Done is closed.
	// An error other than ErrUnknownOutcome means that nothing was appended.
	Result() (Ack, error)
}

// Ack says where an appended batch went.
type Ack struct {
	BaseOffset uint64
	NextOffset uint64
	AppendTime time.Time
}

// Bounds of a log, as one consistent look at it.
type Bounds struct {
	// First is the lowest offset that is kept.
	First uint64
	// HighWatermark is the offset after the last committed record: offsets in
	// [First, HighWatermark) can be read.
	HighWatermark uint64
	// End is the offset after the last stored record. Those from
	// HighWatermark on are not yet known to be committed: a read there waits,
	// it is not out of range.
	End uint64
}

// Headroom is how many bytes in front of Batch.Start in the buffer belong to
// the batch and may be overwritten by the reader.
const Headroom = 64

// Batch is the place of one stored batch in a buffer filled by ReadBatches.
type Batch struct {
	BaseOffset uint64
	Count      uint32
	AppendTime time.Time
	// Start and End bound the batch's records in the buffer: the wire form of
	// RecordBatch.records.
	Start, End int
}

// Cluster is what the server needs to know of the cluster.
type Cluster interface {
	// Servers lists the nodes; the one with ID == Self is this node.
	Servers(ctx context.Context) (ServerList, error)
}

// ServerList is the answering node's view of the cluster.
type ServerList struct {
	Self    string
	Servers []Server
}

// Server is one node. Zero values mean unknown.
type Server struct {
	ID, Name, Address string
	Voter, Leader     bool
	Term              uint64
	// LastContact is since the leader last heard from the node; negative where
	// unknown and on the leader itself.
	LastContact   time.Duration
	AppliedIndex  uint64
	FirstOffset   uint64
	HighWatermark uint64
	Version       string
	// Healthy is whether the leader finds that the node keeps up; nil where
	// that is not known. StableSince is since when it is what it is.
	Healthy     *bool
	StableSince time.Time
	// State is what the node says of its own membership: see NodeStatus.State.
	State string
	// CatalogAddress is where the discovery says that the node is.
	CatalogAddress string
	// Build is what the node's program was built from.
	Build string
	// CertificateExpires is when the node's certificate does; zero where it has
	// none, and where that is not known.
	CertificateExpires time.Time
}
