// Package replica is one log's copy on one node: a member of a Raft group whose
// log is the segment log itself.
//
//	r, err := replica.Open(replica.Config{
//		Dir: "data/log/default", ID: id, Address: addr, Transport: transport, Bootstrap: true,
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
// # Files
//
//	log/        the segment log, see package logstore
//	snapshots/  the state machine's numbers, the two newest
//	raft.db     term and vote, one record with a checksum
//
// # What it stands on
//
// hashicorp/raft v1.7.3, with settings and precautions that the comments here
// give reasons for. Only this package imports it. Nothing is global: a process
// may run any number of replicas.
package replica
