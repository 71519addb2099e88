package logstore

// SegmentInfo is what a segment holds.
type SegmentInfo struct {
	FirstIndex  uint64
	FirstOffset uint64
	LastTime    int64 // greatest append time so far, in nanoseconds since 1970 UTC
	Bytes       int64 // of its frames and header
}

// Segments returns the log's segments, the active one last.
func (l *Log) Segments() []SegmentInfo {
	st := l.state.Load()
	infos := make([]SegmentInfo, len(st.segs))
	for i, s := range st.segs {
		infos[i] = SegmentInfo{FirstIndex: s.firstIndex, FirstOffset: s.firstOffset, LastTime: s.lastTime, Bytes: l.opts.SegmentSize}
		if s == st.last() {
			infos[i].LastTime, infos[i].Bytes = st.tail.time, st.tail.pos
		}
	}
	return infos
}
