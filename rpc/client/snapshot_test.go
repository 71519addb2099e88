package client

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// snapshotServer answers Snapshot with what it is told.
type snapshotServer struct {
	v1.UnimplementedAdminServer
	parts []*v1.SnapshotResponse
	err   error
}

func (s *snapshotServer) Snapshot(_ *v1.SnapshotRequest, stream grpc.ServerStreamingServer[v1.SnapshotResponse]) error {
	for _, p := range s.parts {
		if err := stream.Send(p); err != nil {
			return err
		}
	}
	return s.err
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// TestSnapshot: nothing that is not all of what the node has sent is called a
// snapshot.
func TestSnapshot(t *testing.T) {
	content := bytes.Repeat([]byte("diurna"), 1000)
	sum := sha256.Sum256(content)
	info := &v1.SnapshotResponse{Part: &v1.SnapshotResponse_Info{Info: &v1.SnapshotInfo{Size: uint64(len(content)), ClusterId: "c", NextOffset: 7}}}
	data := func(b []byte) *v1.SnapshotResponse {
		return &v1.SnapshotResponse{Part: &v1.SnapshotResponse_Data{Data: b}}
	}
	end := func(sum []byte) *v1.SnapshotResponse {
		return &v1.SnapshotResponse{Part: &v1.SnapshotResponse_End{End: &v1.SnapshotEnd{Sha256: sum}}}
	}
	altered := bytes.Clone(content)
	altered[77] ^= 1
	full := errors.New("no space left")
	for name, tc := range map[string]struct {
		parts  []*v1.SnapshotResponse
		err    error
		writer error
		want   string // reason; "" for none
	}{
		"whole":            {parts: []*v1.SnapshotResponse{info, data(content[:100]), data(content[100:]), end(sum[:])}},
		"altered":          {parts: []*v1.SnapshotResponse{info, data(altered), end(sum[:])}, want: ReasonProtocol},
		"short":            {parts: []*v1.SnapshotResponse{info, data(content[:100]), end(sum[:])}, want: ReasonProtocol},
		"without an end":   {parts: []*v1.SnapshotResponse{info, data(content)}, want: ReasonProtocol},
		"too long":         {parts: []*v1.SnapshotResponse{info, data(content), data(content), end(sum[:])}, want: ReasonProtocol},
		"without an info":  {parts: []*v1.SnapshotResponse{data(content), end(sum[:])}, want: ReasonProtocol},
		"an unknown part":  {parts: []*v1.SnapshotResponse{info, {}, end(sum[:])}, want: ReasonProtocol},
		"nothing":          {want: ReasonProtocol},
		"broken off":       {parts: []*v1.SnapshotResponse{info, data(content[:100])}, err: status.Error(codes.Unavailable, "gone"), want: ReasonConnectionLost},
		"nowhere to write": {parts: []*v1.SnapshotResponse{info, data(content), end(sum[:])}, writer: full},
	} {
		t.Run(name, func(t *testing.T) {
			l := bufconn.Listen(1 << 20)
			s := grpc.NewServer()
			v1.RegisterAdminServer(s, &snapshotServer{parts: tc.parts, err: tc.err})
			served := make(chan error, 1)
			go func() { served <- s.Serve(l) }()
			defer func() {
				s.Stop()
				if err := <-served; err != nil {
					t.Error(err)
				}
			}()
			c, err := Dial("node", WithDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			}()
			var got bytes.Buffer
			told := 0
			opts := SnapshotOptions{OnInfo: func(i SnapshotInfo) { told++ }}
			var saved SnapshotInfo
			if tc.writer != nil {
				_, err = c.Snapshot(t.Context(), failingWriter{tc.writer}, opts)
				if failed := (*Error)(nil); !errors.Is(err, full) || errors.As(err, &failed) {
					t.Errorf("got %v", err)
				}
				return
			}
			saved, err = c.Snapshot(t.Context(), &got, opts)
			if tc.want == "" {
				if err != nil || !bytes.Equal(got.Bytes(), content) || saved.SHA256 != fmt.Sprintf("%x", sum) || saved.ClusterID != "c" || saved.NextOffset != 7 || told != 1 {
					t.Errorf("%+v, %d bytes, told %d times, %v", saved, got.Len(), told, err)
				}
				return
			}
			var failed *Error
			if !errors.As(err, &failed) || failed.Reason != tc.want || saved.SHA256 != "" {
				t.Errorf("%+v, %v, want %s", saved, err, tc.want)
			}
		})
	}
}
