// Package logstore keeps a log in segment files: entries in order, each checked
// on every read, durable before an append returns.
//
// An entry is what Raft replicates as one unit. It has an index, and none, one
// or many records in its payload, which have offsets; both numbers are dense,
// and the store refuses entries that would leave a hole in either. What is in
// a payload, and what Raft makes of an entry, it does not know.
//
// # Life of a log
//
// Open makes a log, or opens one and cuts off what a crash left half written.
// It never takes away anything that an Append has returned for: where such
// bytes are not as they were, it refuses with a *CorruptError that names the
// place.
//
//	l, err := logstore.Open(dir, logstore.Options{})
//	if err != nil {
//		return err
//	}
//
// Append writes entries, of which many cost one sync, and returns once they are
// durable. They continue the log in every respect, or nothing is written:
//
//	err = l.Append([]logstore.Entry{{
//		Index: l.LastIndex() + 1, Term: term,
//		BaseOffset: l.NextOffset(), Count: 3,
//		AppendTime: now, Payload: records,
//	}})
//
// ReadBatches reads records by their offset into a buffer, many entries at
// once; Entry reads one entry by its index. IndexOfOffset and OffsetAtTime find
// the place:
//
//	batches, err := l.ReadBatches(offset, limit, buf, nil)
//	for _, b := range batches {
//		use(b.BaseOffset, buf[b.Start:b.End])
//	}
//
// TruncateSuffix takes entries off the end, as Raft asks when a leader has
// others there. DeletePrefix deletes whole segments from the front, as retention
// decides:
//
//	err = l.TruncateSuffix(index)        // the entry with that index goes, too
//	first, err := l.DeletePrefix(index)  // first may be lower: segments are whole
//
// Segments tells what there is to be deleted. Verify reads everything anew, at a
// rate that the caller sets, and finds damage before a reader does.
//
// Export makes a stream of the log as it is, for a node that needs what no other
// log has any more; Import makes a log of it, whole and durable, or nothing that
// Open would take for one:
//
//	x, err := l.Export(index)                     // through that entry
//	stats, err := logstore.Import(dir, opts, x)   // on the other node
//
// Close records where the log ends, so that opening it again reads next to
// nothing. Without it, opening reads the last segment.
//
//	err = l.Close()
//
// A write, sync or truncation that fails ends all writing: Failed is closed,
// Err says why, and the process should stop. After a failed sync nobody but a
// new look at the disk can tell what it holds. A full disk is no failure: an
// Append that needs space which is not there is ErrFull, has written nothing,
// and can be tried again.
//
// # Files
//
//	00000000000000000001.log   entries from index 1 on
//	00000000000000000001.idx   where they are in it; derived
//	00000000000000004711.log   the next segment; the last one is appended to
//	checkpoint                 how far the log is known to be durable
//	next.tmp                   the segment to come
//
// docs/FORMAT.md has them byte by byte, and the rules of recovery. Inspect reads
// a segment file without opening its log.
//
// # Concurrency
//
// All methods may be called from any goroutine. One at a time writes; others
// wait. Readers take no lock but a short one to find an open file, see only what
// is durable, and are not disturbed by what is appended or deleted meanwhile:
// each read works on the state that it found. So does an Export, which may take
// much longer: the files that it needs stay until it has read them.
//
// # What it does not do
//
// It does not keep other processes out of the directory (vfs.FS.Lock does), does
// not know what is committed (the caller's limit on reads does), does not decide
// what is old enough to be deleted, does not read a clock, and does not mend
// damage: that is for whoever has another copy.
package logstore
