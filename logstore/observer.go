package logstore

import "time"

// Observer is told how much a log writes, and how long that takes. Its funcs run
// in the middle of a write, one at a time for each log: they must be quick, and
// must not use the log. Those that are nil are not called.
type Observer struct {
	// Now is the clock that durations are taken from. Default: time.Now.
	Now func() time.Time
	// Appended is told of every Append that succeeded: how many records it wrote,
	// how many bytes of frames, and how long it took until they were durable.
	Appended func(records, bytes uint64, took time.Duration)
	// Synced is told of every sync of entries to the disk, also of one that
	// failed.
	Synced func(took time.Duration)
}

func (o *Observer) applyDefaults() {
	if o.Now == nil {
		o.Now = time.Now
	}
}

// sync makes a file durable under the observer's clock.
func (o *Observer) sync(sync func() error) error {
	if o.Synced == nil {
		return sync()
	}
	begin := o.Now()
	err := sync()
	o.Synced(o.Now().Sub(begin))
	return err
}

// appending returns what to call when entries are durable.
func (o *Observer) appending(entries []Entry) (done func()) {
	if o.Appended == nil {
		return func() {}
	}
	begin := o.Now()
	return func() {
		var records, bytes uint64
		for i := range entries {
			records += uint64(entries[i].Count)
			bytes += uint64(frameSize(len(entries[i].Payload)))
		}
		o.Appended(records, bytes, o.Now().Sub(begin))
	}
}
