package rpc

import (
	"fmt"
	"time"
)

// HardBatchBytes caps Limits.MaxBatchBytes: a stored batch goes out as one
// message, and clients by default receive no message above 4 MiB.
const HardBatchBytes = 3 << 20

// batchSlack is the room that the default batch limit leaves, over one record
// of the maximum size, for that record's tag and length and some small company.
const batchSlack = 64 << 10

// recordOverhead is the most that one record's tag and length take: five bytes
// each.
const recordOverhead = 10

// Limits bound what clients can make the server hold. Zero values mean the
// defaults named below; past a limit a call fails with RESOURCE_EXHAUSTED, or
// INVALID_ARGUMENT for what could never be accepted.
type Limits struct {
	// MaxRecordBytes is the largest encoded record: key, value, headers and
	// their framing, without the record's own tag and length. Default 1 MiB.
	MaxRecordBytes int
	// MaxBatchBytes is the largest batch: all its records with their tags and
	// lengths. At least MaxRecordBytes + 10, so that the largest record fits,
	// at most HardBatchBytes. Default MaxRecordBytes + 64 KiB. Requests of up
	// to about twice this are received, to be refused with a typed error.
	MaxBatchBytes int

	// StreamRequests and StreamBytes are the window of one ProduceStream: with
	// so many requests, or bytes of them, received and not acknowledged, the
	// server stops reading until acknowledgements catch up. The bytes may be
	// overshot by one request. Defaults 1024 and 8 MiB.
	StreamRequests, StreamBytes int

	// ConsumeBytes is what one response of a read aims at; a stored batch that
	// is larger still goes out whole. Default 256 KiB, at most HardBatchBytes.
	ConsumeBytes int
	// ConsumeMemory is what the responses of all readers together may hold
	// unsent before new ones get smaller, so that many slow readers cost
	// throughput and not the process. Default 256 MiB.
	ConsumeMemory int

	// OpenCalls is how many calls, streams or not, may be open over all
	// connections. Health checks and reflection do not count. A produce stream
	// can make the server hold about 1 MiB of received and unread bytes on top
	// of its window. Default 4096.
	OpenCalls int
	// StreamsPerConnection is how many of them one connection may have open;
	// a client waits for room on its side. Default 1024.
	StreamsPerConnection int
	// Connections is how many are served at a time per listener; further ones
	// wait in the listener's backlog. Default 4096.
	Connections int
	// Snapshots is how many are served at a time. Each holds 256 KiB in memory,
	// and the files of the log open, so that what retention deletes takes up space
	// until it is over. Default 2.
	Snapshots int
	// SnapshotStall is for how long a caller may take nothing of one. Default 1
	// minute.
	SnapshotStall time.Duration
	// HandshakeTimeout is how long a new connection may take until it speaks
	// gRPC. Default 10 s.
	HandshakeTimeout time.Duration
}

func (l Limits) withDefaults() (Limits, error) {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&l.MaxRecordBytes, 1<<20)
	def(&l.MaxBatchBytes, min(l.MaxRecordBytes+batchSlack, HardBatchBytes))
	def(&l.StreamRequests, 1024)
	def(&l.StreamBytes, 8<<20)
	def(&l.ConsumeBytes, 256<<10)
	def(&l.ConsumeMemory, 256<<20)
	def(&l.OpenCalls, 4096)
	def(&l.StreamsPerConnection, 1024)
	def(&l.Connections, 4096)
	def(&l.Snapshots, 2)
	if l.SnapshotStall <= 0 {
		l.SnapshotStall = time.Minute
	}
	if l.HandshakeTimeout == 0 {
		l.HandshakeTimeout = 10 * time.Second
	}

	for _, c := range []struct {
		name   string
		v, max int
	}{
		{"MaxRecordBytes", l.MaxRecordBytes, HardBatchBytes},
		{"MaxBatchBytes", l.MaxBatchBytes, HardBatchBytes},
		{"StreamRequests", l.StreamRequests, 1 << 20},
		{"StreamBytes", l.StreamBytes, 1 << 30},
		{"ConsumeBytes", l.ConsumeBytes, HardBatchBytes},
		{"ConsumeMemory", l.ConsumeMemory, 1 << 40},
		{"OpenCalls", l.OpenCalls, 1 << 24},
		{"StreamsPerConnection", l.StreamsPerConnection, 1 << 24},
		{"Connections", l.Connections, 1 << 24},
		{"Snapshots", l.Snapshots, 1 << 10},
	} {
		if c.v < 1 || c.v > c.max {
			return l, fmt.Errorf("limit %s is %d, must be from 1 to %d", c.name, c.v, c.max)
		}
	}
	if l.MaxBatchBytes < l.MaxRecordBytes+recordOverhead {
		return l, fmt.Errorf("limit MaxBatchBytes is %d, must be at least %d to hold one record of MaxRecordBytes",
			l.MaxBatchBytes, l.MaxRecordBytes+recordOverhead)
	}
	if l.HandshakeTimeout < 0 {
		return l, fmt.Errorf("limit HandshakeTimeout is %s, must be positive", l.HandshakeTimeout)
	}
	return l, nil
}

// maxRequestBytes is the largest request that is received at all. Above the
// batch limit it is there to be refused by name.
func (l Limits) maxRequestBytes() int { return 2*l.MaxBatchBytes + 64<<10 }
