package logstore

// SegmentInfo is one segment of a log, for deciding what to keep.
type SegmentInfo struct {
	FirstIndex uint64
	// LastIndex is one less than FirstIndex in an empty (active) segment.
	LastIndex   uint64
	FirstOffset uint64
	// NextOffset is the offset of the first record behind the segment.
	NextOffset uint64
	// LastAppendTime is that of its last entry (of the one before, if it is
	// empty), in nanoseconds since 1970 UTC: no entry in it is later.
	LastAppendTime int64
	// Bytes is how much of the disk deleting it would free: its file, with the
	// space that is reserved in it.
	Bytes int64
}

// Segments returns all segments, by index; the last one is active and cannot
// be deleted. They are one consistent look at the log, taken without a lock and
// without touching the disk.
func (l *Log) Segments() []SegmentInfo {
	st := l.state.Load()
	out := make([]SegmentInfo, len(st.segs))
	for i, s := range st.segs {
		info := &out[i]
		info.FirstIndex, info.FirstOffset = s.firstIndex, s.firstOffset
		if i < len(st.segs)-1 {
			info.LastIndex, info.NextOffset = s.last, s.nextOff
			info.LastAppendTime, info.Bytes = s.lastTime, s.size
		} else {
			// Only the state knows the active one's; roll sets them in the
			// segment while others may look at this state.
			info.LastIndex, info.NextOffset = st.tail.index, st.tail.offset
			info.LastAppendTime, info.Bytes = st.tail.time, st.size
		}
	}
	return out
}
