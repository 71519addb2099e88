package rpc

import (
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// TestPropose: each request is answered by itself, in turn, whatever becomes of
// the others; only what concerns all ends the stream.
func TestPropose(t *testing.T) {
	_, c := newCluster(t, []string{"a"}, nil)
	stream, err := v1.NewPeerClient(c["a"].conn).Propose(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	requests := []struct {
		req    *v1.ProposeRequest
		reason string // empty: appended
	}{
		{&v1.ProposeRequest{ClusterId: "c1", Records: []*v1.Record{{}}}, ""},
		{&v1.ProposeRequest{}, ReasonEmptyBatch},
		{&v1.ProposeRequest{Log: "other", Records: []*v1.Record{{}}}, ReasonLogNotFound},
		{&v1.ProposeRequest{Log: "default", ExpectedOffset: ptr(uint64(9)), Records: []*v1.Record{{}}}, ReasonOffsetMismatch},
		{&v1.ProposeRequest{Records: []*v1.Record{{Value: make([]byte, 1<<20+1)}}}, ReasonRecordTooLarge},
		{&v1.ProposeRequest{Records: []*v1.Record{{Value: make([]byte, HardBatchBytes-100)}}}, ReasonRecordTooLarge},
		{&v1.ProposeRequest{ExpectedOffset: ptr(uint64(1)), Records: []*v1.Record{{}, {}}}, ""},
	}
	for i, r := range requests {
		r.req.Sequence = uint64(i)
		if err := stream.Send(r.req); err != nil {
			t.Fatal(err)
		}
	}
	for i, r := range requests {
		resp, err := stream.Recv()
		if err != nil || resp.GetSequence() != uint64(i) {
			t.Fatalf("answer %d: %v, %v", i, resp, err)
		}
		if (r.reason == "") != (resp.GetAppended() != nil) {
			t.Errorf("answer %d: %v, want reason %q", i, resp, r.reason)
		}
		if resp.GetError() != nil {
			st := &forwardStream{f: c["a"].forward}
			if got := reasonOf(statusOf(st.refusal(resp.GetError()))); got != r.reason {
				t.Errorf("answer %d: reason %q, want %q", i, got, r.reason)
			}
		}
	}
	if err := stream.Send(&v1.ProposeRequest{Sequence: 99, Records: []*v1.Record{{}}}); err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	if meta := wantStatus(t, err, codes.InvalidArgument, ReasonInvalidArgument); meta[MetaRequest] != "7" {
		t.Errorf("metadata %v", meta)
	}
	if b := c["a"].Bounds(); b.End != 3 {
		t.Errorf("the log has %d records", b.End)
	}
}

// TestProposeDeposed: a node that turns out not to lead ends the stream, with
// the number of what it took, and takes nothing more even if it leads again.
func TestProposeDeposed(t *testing.T) {
	_, c := newCluster(t, []string{"a"}, nil)
	c["a"].hold = true
	stream, err := v1.NewPeerClient(c["a"].conn).Propose(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	send := func(i uint64) {
		t.Helper()
		if err := stream.Send(&v1.ProposeRequest{Sequence: i, Records: []*v1.Record{{}}}); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	c["a"].proposeErr = func(n int) error {
		if n == 2 {
			c["a"].proposeErr = nil // it leads again right after
			return &NotLeaderError{"b", "b:1"}
		}
		return nil
	}
	for i := range uint64(5) {
		send(i)
	}
	eventually(t, "two are proposed", func() bool { return c["a"].heldCount() == 2 })
	c["a"].resolve(0, Ack{NextOffset: 1}, nil)
	c["a"].resolve(1, Ack{BaseOffset: 1, NextOffset: 2}, nil)
	for i := range uint64(2) {
		if resp, err := stream.Recv(); err != nil || resp.GetAppended().GetBaseOffset() != i {
			t.Fatalf("answer %d: %v, %v", i, resp, err)
		}
	}
	_, err = stream.Recv()
	if meta := wantStatus(t, err, codes.Unavailable, ReasonNotLeader); meta[MetaRequest] != "2" || meta["leader_id"] != "b" {
		t.Errorf("metadata %v", meta)
	}
	if n := c["a"].heldCount(); n != 2 {
		t.Errorf("%d were proposed", n)
	}
}

// TestProposeWire: what is written by hand is what the generated code reads.
func TestProposeWire(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		sequence := rng.Uint64() >> rng.IntN(64)
		var expected *uint64
		if i%2 == 0 {
			expected = ptr(rng.Uint64() >> rng.IntN(64))
		}
		cluster := ""
		if i%3 == 0 {
			cluster = "c1"
		}
		records := encode(t, record(i, 30), record(i+1, 3))
		raw := append(appendProposeHead(nil, sequence, expected, cluster), records...)
		var m v1.ProposeRequest
		if err := proto.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		if m.GetSequence() != sequence || m.GetClusterId() != cluster || len(m.GetRecords()) != 2 || m.GetLog() != "" ||
			(m.ExpectedOffset == nil) != (expected == nil) || expected != nil && m.GetExpectedOffset() != *expected {
			t.Fatalf("reads as %v", &m)
		}
		limits, err := Limits{}.withDefaults()
		if err != nil {
			t.Fatal(err)
		}
		req, err := parseProduceRequest(raw, limits)
		if err != nil || req.sequence != sequence || req.cluster != cluster || string(req.records) != string(records) {
			t.Fatalf("parsed as %+v, %v", req, err)
		}
	}
}
