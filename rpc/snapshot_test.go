package rpc

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// bytesSnapshot is a snapshot of any bytes.
type bytesSnapshot struct {
	r      io.Reader
	size   int64
	fails  error // instead of the end
	read   atomic.Int64
	closed chan struct{}
	once   sync.Once
}

func newBytesSnapshot(size int64) *bytesSnapshot {
	return &bytesSnapshot{r: io.LimitReader(pattern{}, size), size: size, closed: make(chan struct{})}
}

// pattern is zeros without end.
type pattern struct{}

func (pattern) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func (s *bytesSnapshot) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.read.Add(int64(n))
	if errors.Is(err, io.EOF) && s.fails != nil {
		err = s.fails
	}
	return n, err
}
func (s *bytesSnapshot) Close() error { s.once.Do(func() { close(s.closed) }); return nil }
func (s *bytesSnapshot) Info() SnapshotInfo {
	return SnapshotInfo{ClusterID: "c1", NodeID: "a", NextOffset: 7, Size: s.size, SHA256: []byte("sum")}
}

// TestSnapshot: any node serves one, after it has asked the leader how far it has
// to be; without a leader only one that may be stale.
func TestSnapshot(t *testing.T) {
	_, c := newCluster(t, []string{"a", "b"}, nil)
	const size = 3*snapshotChunk + 5
	for _, at := range []string{"a", "b"} {
		snap := newBytesSnapshot(size)
		c[at].saved = snap
		stream, err := v1.NewAdminClient(c[at].conn).Snapshot(testContext(t), &v1.SnapshotRequest{})
		if err != nil {
			t.Fatal(err)
		}
		first, err := stream.Recv()
		if i := first.GetInfo(); err != nil || i.GetSize() != size || i.GetNextOffset() != 7 || i.GetClusterId() != "c1" {
			t.Fatalf("at %s: %v, %v", at, first, err)
		}
		var got []byte
		for {
			m, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if end := m.GetEnd(); end != nil {
				if string(end.GetSha256()) != "sum" {
					t.Errorf("at %s: it ends with %v", at, end)
				}
				break
			}
			got = append(got, m.GetData()...)
		}
		if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
			t.Error(err)
		}
		if sha256.Sum256(got) != sha256.Sum256(make([]byte, size)) || !bytes.Equal(got, make([]byte, size)) {
			t.Errorf("at %s: %d bytes, not %d", at, len(got), size)
		}
		<-snap.closed
	}
	c["b"].mu.Lock()
	asked := len(c["b"].applied)
	c["b"].mu.Unlock()
	if asked != 1 {
		t.Errorf("the follower waited %d times for what the leader had acknowledged", asked)
	}

	c["b"].setLeader("")
	admin := v1.NewAdminClient(c["b"].conn)
	wantStatus(t, firstOf(t, admin, &v1.SnapshotRequest{}), codes.Unavailable, ReasonNoLeader)
	c["b"].saved = newBytesSnapshot(1)
	if err := firstOf(t, admin, &v1.SnapshotRequest{Stale: true}); err != nil {
		t.Error(err)
	}
	// A disk that fails in the middle is no end.
	broken := newBytesSnapshot(size)
	broken.fails = &CorruptError{File: "x.log", Position: 3, Detail: "rot"}
	c["b"].saved = broken
	stream, err := admin.Snapshot(testContext(t), &v1.SnapshotRequest{Stale: true})
	for err == nil {
		_, err = stream.Recv()
	}
	wantStatus(t, err, codes.DataLoss, ReasonCorrupt)
}

func firstOf(t *testing.T, admin v1.AdminClient, req *v1.SnapshotRequest) error {
	t.Helper()
	stream, err := admin.Snapshot(testContext(t), req)
	if err == nil {
		_, err = stream.Recv()
	}
	return err
}

// TestSnapshotBounds: as many as there may be, no more; a caller that takes
// nothing makes the node read no more than what fits on the way, and is given up.
func TestSnapshotBounds(t *testing.T) {
	_, c := newCluster(t, []string{"a"}, func(m *member, _ *ForwarderConfig) {
		m.limits = Limits{Snapshots: 3, SnapshotStall: 300 * time.Millisecond}
	})
	admin := v1.NewAdminClient(c["a"].conn)
	var streams []grpc.ServerStreamingClient[v1.SnapshotResponse]
	var snaps []*bytesSnapshot
	for range 3 {
		snap := newBytesSnapshot(1 << 40)
		c["a"].saved = snap
		s, err := admin.Snapshot(testContext(t), &v1.SnapshotRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		if err != nil {
			t.Fatal(err)
		}
		streams, snaps = append(streams, s), append(snaps, snap)
	}
	wantStatus(t, firstOf(t, admin, &v1.SnapshotRequest{}), codes.ResourceExhausted, ReasonTooManyCalls)
	for i, s := range streams {
		<-snaps[i].closed
		if n := snaps[i].read.Load(); n > 64<<20 {
			t.Errorf("%d bytes were read for a caller that took nothing", n)
		}
		var err error
		for err == nil {
			_, err = s.Recv()
		}
		wantStatus(t, err, codes.DeadlineExceeded, ReasonDeadlineExceeded)
	}
	// There is room again.
	c["a"].saved = newBytesSnapshot(1)
	if err := firstOf(t, admin, &v1.SnapshotRequest{}); err != nil {
		t.Error(err)
	}
}
