package replica

import (
	"errors"
	"time"

	"github.com/diurnalog/diurna/logstore"
)

// first returns the first offset that may be read: the log's start as the group
// has agreed on it, which may be behind that of the files.
func (r *Replica) first() uint64 { return max(r.start.Load(), r.gens.log().FirstOffset()) }

// Bounds returns the first offset that is kept, the high watermark, and the
// offset after the last stored record, committed or not.
func (r *Replica) Bounds() (first, watermark, end uint64) {
	// In this order: the end is never below the watermark that was read before,
	// since what is above it is replaced first.
	watermark = r.watermark.load()
	first, end = r.first(), r.gens.Stats().NextOffset
	return min(first, watermark), watermark, max(end, watermark)
}

// Read reads committed entries with records into buf, as
// logstore.Log.ReadBatches does, from the one that holds offset from.
func (r *Replica) Read(from uint64, buf []byte, dst []logstore.Batch) ([]logstore.Batch, error) {
	// The limit first: a log that replaces the present one has all that is below
	// the watermark of before, but the present one may not have what is below
	// that of after.
	limit := r.watermark.load()
	gen := r.gens.use()
	defer r.gens.release(gen)
	if from < r.start.Load() {
		return dst, &OffsetOutOfRangeError{Offset: from, First: min(r.first(), limit), Next: limit}
	}
	dst, err := gen.log.ReadBatches(from, limit, buf, dst)
	switch {
	case errors.Is(err, logstore.ErrNotFound):
		return dst, &OffsetOutOfRangeError{Offset: from, First: min(r.first(), limit), Next: limit}
	case errors.Is(err, logstore.ErrClosed):
		return dst, ErrClosed
	case err != nil:
		r.damaged(err)
	}
	return dst, err
}

// OffsetAtTime returns the first committed offset whose append time is t or
// later; the high watermark when there is none.
func (r *Replica) OffsetAtTime(t time.Time) (uint64, error) {
	watermark := r.watermark.load()
	gen := r.gens.use()
	defer r.gens.release(gen)
	nanos := t.UnixNano()
	switch {
	case t.Before(time.Unix(0, 0)):
		nanos = 0
	case t.After(time.Unix(0, 1<<63-1)):
		return watermark, nil
	}
	offset, err := gen.log.OffsetAtTime(nanos)
	switch {
	case errors.Is(err, logstore.ErrClosed):
		err = ErrClosed
	case err != nil:
		r.damaged(err)
	}
	return min(max(offset, r.first()), watermark), err
}

// isDamage tells whether an error says that durable bytes have changed.
func isDamage(err error) bool {
	var inLog *logstore.CorruptError
	var beside *CorruptError
	return errors.As(err, &inLog) || errors.As(err, &beside)
}

// damaged is told of errors of reads. Damage ends this replica's part in its
// group, so that it is healed from the others; alone there are none, and what is
// not damaged goes on being served.
func (r *Replica) damaged(err error) {
	if !isDamage(err) {
		return
	}
	if r.alone() {
		r.cfg.Logger.Error("the log is damaged, and there is no other copy", "error", err)
		return
	}
	r.broken(err)
}

// alone tells whether this server is the only one that holds the log.
func (r *Replica) alone() bool {
	running := r.store.raft.Load()
	if running == nil {
		return false
	}
	future := running.GetConfiguration()
	if err := future.Error(); err != nil {
		return false
	}
	servers := future.Configuration().Servers
	return len(servers) == 0 || len(servers) == 1 && string(servers[0].ID) == r.cfg.ID
}
