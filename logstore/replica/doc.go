// Package replica is one log's copy on one node: a member of a Raft group whose
// log is the segment log itself.
//
//	r, err := replica.Open(replica.Config{
//		Dir: "data/logs/default", ID: id, Address: addr, Network: network,
//		Bootstrap: []replica.Server{{ID: id, Address: addr}},
//	})
//	err = r.WaitReady(ctx) // this server leads and takes proposals
//	pending, err := r.Propose(ctx, replica.Proposal{Records: payload, Count: 3}, true)
//	<-pending.Done()
//	ack, err := pending.Result() // durable on a quorum, and readable
//	batches, err := r.Read(ack.BaseOffset, buf, nil)
//	err = r.Close(ctx)
//
// # The way of a batch
//
// Propose queues it. The sequencer, one goroutine, makes one Raft entry of
// what waits together, with the base offset and time that it alone assigns
// while this server leads. Raft hands entries to logStore, which appends them
// to the segment log with one write and one sync, and replicates them. When a
// quorum has them, Raft applies them: fsm moves the high watermark, which wakes
// readers, and the sequencer answers the proposals, in order.
//
// A record is therefore written once, synced once, and read from the same
// bytes. A snapshot is a few numbers, so that a restart applies only what came
// after it.
//
// Control entries have no records. They change the state machine's small state:
// the cluster's id, the log's start, the servers that were removed.
//
// # The others
//
// Replicas of a group reach each other through Config.Network. While a server
// leads, it gives votes to members that have kept up and removes those that are
// gone, see AutopilotConfig. One whose disk fails or hangs, or whose data turn
// out to be damaged, ends its part in the group as a whole: it stores, votes and
// acknowledges nothing more, and asks another voter to lead if it led.
//
// # Files
//
//	CURRENT          names the generation that counts
//	vote             term and vote, twice, with checksums
//	gen-1/log        the segment log, see package logstore
//	gen-1/snapshots  the state machine's numbers, the two newest
//
// docs/FORMAT.md has them byte by byte. A snapshot that a leader sends is a
// stream of such numbers and of the log; the receiver makes the next generation
// of it, and one rename of CURRENT switches both.
//
// # When it ends
//
// Failed is closed when the replica cannot take part any more, and Err says what
// to do: ErrDamaged (come back with nothing, as another server), ErrRestart (open
// it again), a *ForeignClusterError or *VersionError (ask a person), and anything
// else, which is the disk: end the process.
//
// # What it stands on
//
// hashicorp/raft v1.7.3, with settings and precautions that the comments here
// give reasons for. Only this package imports it. Nothing is global: a process
// may run any number of replicas.
package replica
