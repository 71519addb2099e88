package replica

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs"
)

// maxRPCBytes bounds what one AppendEntries request may carry; hashicorp/raft
// itself counts entries, not bytes.
const maxRPCBytes = 64 << 20

// Config of a replica. Fields without a default must be set.
type Config struct {
	// Dir holds everything of this replica. It is made if it is missing. The
	// caller keeps other processes out of it.
	Dir string
	// FS is where all of it lives. Default: vfs.OS.
	FS vfs.FS

	// ID is this server's id. It belongs to the data: a server that lost its
	// disk must come back under another one.
	ID string
	// Address is what other servers reach this one at.
	Address string
	// Network connects to the other servers. The replica closes it, as does an
	// Open that fails. Default: one that reaches nobody, for a group of one.
	Network Network
	// transport stands in for one over Network, in tests.
	transport raft.Transport
	// Bootstrap is the first voters of a new cluster, this server among them, in
	// the same order on all of them; only their ids and addresses count. It is
	// used where there is no log yet. Without it, such a server waits to be added
	// to a cluster.
	Bootstrap []Server
	// ClusterID is the cluster that this server believes to be in; "" if it does
	// not know. The first leader of a new cluster commits its own; a replica
	// whose group has another one fails with a *ForeignClusterError.
	ClusterID string
	// OnClusterID is called, once, when a replica that had no ClusterID learns
	// it, perhaps before Open returns. The replica waits for it when it closes.
	// Default: nothing.
	OnClusterID func(string)

	// SegmentSize of the log, in bytes. Default: logstore.DefaultSegmentSize.
	SegmentSize int64
	// EntryBytes bounds one entry, and with it one batch. Default: 1 MiB.
	EntryBytes int
	// EntriesInFlight is how many entries are on their way at once. Default: 4.
	EntriesInFlight int
	// InFlightBytes bounds all batches that wait for their outcome. Default:
	// 64 MiB.
	InFlightBytes int64

	// Retention is what the log keeps. Default: everything. See SetRetention.
	Retention Retention
	// ScrubInterval is the time in which all of the log is read, slowly, to find
	// damage before somebody needs what it hit. Default: 24 h. Negative: never.
	ScrubInterval time.Duration

	// Raft's clockwork. Defaults: heartbeat and election 2 s, lease 1.5 s,
	// commit 50 ms (a follower that keeps up hears at once, see pipeline), snapshots
	// every 5 to 10 s.
	HeartbeatTimeout   time.Duration
	ElectionTimeout    time.Duration
	LeaderLeaseTimeout time.Duration
	CommitTimeout      time.Duration
	SnapshotInterval   time.Duration

	// SnapshotStall ends the stream of a snapshot to or from another server that
	// makes no progress for so long. Default: ten election timeouts, and at least
	// 30 s.
	SnapshotStall time.Duration
	// StallLimit is for how long an operation of the disk's that Raft waits for may
	// take before this server gives up its part in the group, see ErrStalled. A
	// group of one goes on. Default: the election timeout, and at least 1 s.
	StallLimit time.Duration
	// MinFreeBytes of the disk are kept free: below, proposals are refused with
	// ErrDiskFull, and leadership is handed to somebody else. 0 for no limit.
	MinFreeBytes int64
	// Autopilot looks after the group's members.
	Autopilot AutopilotConfig

	// Observer is told what the replica does. Default: nobody.
	Observer Observer

	// Now is the clock for append times and for how long others have been
	// silent. Default: time.Now.
	Now func() time.Time
	// Logger. Default: none.
	Logger hclog.Logger
	// OnFatal is called, once, with what closes Failed. Default: nothing.
	OnFatal func(error)
}

// Observer is told what a replica does. Its funcs must be quick and must not use
// the replica. Those that are nil are not called.
type Observer struct {
	// Log is told what this replica writes, be it the leader or not.
	Log logstore.Observer
	// Committed is told, on the leader and for every entry with records, how long
	// it took from the arrival of the first of its batches until the entry was
	// committed and can be read.
	Committed func(took time.Duration)
}

func (c *Config) applyDefaultsAndValidate() error {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	if c.FS == nil {
		c.FS = vfs.OS
	}
	if c.EntryBytes == 0 {
		c.EntryBytes = 1 << 20
	}
	if c.EntriesInFlight == 0 {
		c.EntriesInFlight = 4
	}
	if c.InFlightBytes == 0 {
		c.InFlightBytes = 64 << 20
	}
	def(&c.HeartbeatTimeout, 2*time.Second)
	def(&c.ElectionTimeout, 2*time.Second)
	def(&c.LeaderLeaseTimeout, min(1500*time.Millisecond, c.HeartbeatTimeout))
	def(&c.CommitTimeout, 50*time.Millisecond)
	def(&c.SnapshotInterval, 5*time.Second)
	def(&c.ScrubInterval, 24*time.Hour)
	if c.OnClusterID == nil {
		c.OnClusterID = func(string) {}
	}
	def(&c.SnapshotStall, max(30*time.Second, 10*c.ElectionTimeout))
	def(&c.StallLimit, max(time.Second, c.ElectionTimeout))
	c.Autopilot.applyDefaults(c.HeartbeatTimeout)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	if c.OnFatal == nil {
		c.OnFatal = func(error) {}
	}
	switch {
	case c.Dir == "", c.ID == "", c.Address == "":
		return errors.New("a replica needs a directory, an id and an address")
	case c.EntryBytes < 1<<10 || c.EntryBytes > maxRPCBytes/8:
		return fmt.Errorf("entry size %d is not between 1 KiB and %d", c.EntryBytes, maxRPCBytes/8)
	case c.InFlightBytes < int64(c.EntryBytes)+proposalOverhead:
		return fmt.Errorf("%d bytes in flight leave no room for an entry of %d", c.InFlightBytes, c.EntryBytes)
	case c.EntriesInFlight < 1:
		return fmt.Errorf("%d entries in flight are too few", c.EntriesInFlight)
	case len(c.ClusterID) > maxControlString:
		return fmt.Errorf("the cluster id is longer than %d bytes", maxControlString)
	}
	return c.Retention.validate()
}

func (c *Config) raftConfig() *raft.Config {
	r := raft.DefaultConfig()
	r.LocalID = raft.ServerID(c.ID)
	r.Logger = quiet{c.Logger}
	r.HeartbeatTimeout = c.HeartbeatTimeout
	r.ElectionTimeout = c.ElectionTimeout
	r.LeaderLeaseTimeout = c.LeaderLeaseTimeout
	r.CommitTimeout = c.CommitTimeout
	r.MaxAppendEntries = min(64, maxRPCBytes/c.EntryBytes)
	r.BatchApplyCh = true
	// A Raft that shuts itself down leaves proposals without an answer; one that
	// was removed and stays a follower refuses them.
	r.ShutdownOnRemove = false
	// Snapshots are a few hundred bytes; each spares the next start the entries
	// before it.
	r.SnapshotInterval = c.SnapshotInterval
	r.SnapshotThreshold = 1024
	// Raft never deletes a prefix: the log belongs to its readers.
	r.TrailingLogs = math.MaxUint64
	r.NoSnapshotRestoreOnStart = true
	r.NoLegacyTelemetry = true
	return r
}
