package client

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// SnapshotOptions say how the log is to be copied.
type SnapshotOptions struct {
	// Stale is content with what the node that is asked has, which may lack what
	// was acknowledged last. It works without a leader.
	Stale bool
	// OnInfo, if set, is called once, before the first byte is written.
	OnInfo func(SnapshotInfo)
}

// SnapshotInfo says what a snapshot holds.
type SnapshotInfo struct {
	// ClusterID and Cluster are the cluster's id and its configured name, NodeID is
	// the node that it was read from.
	ClusterID, Cluster, NodeID string
	// Taken is when, by that node's clock.
	Taken time.Time
	// FirstOffset is that of the first record, NextOffset that after the last one.
	FirstOffset, NextOffset uint64
	// Index and Term are Raft's, of the last entry.
	Index, Term uint64
	// Size is how many bytes there are. SHA256 is that of all of them, in
	// hexadecimal, and empty until Snapshot returns.
	Size   int64
	SHA256 string
}

// Snapshot writes a copy of the log to w, as a file that
// `diurna operator snapshot restore` takes: every record from the first one to the
// last one that was acknowledged before the call. The node that is asked reads it
// from its own disk, whether it leads or not.
//
// What was written is a snapshot only if Snapshot returns nil: then its length
// and its SHA-256 are those that the node has sent. An error that is not an
// *Error is w's.
func (c *Client) Snapshot(ctx context.Context, w io.Writer, opts SnapshotOptions) (SnapshotInfo, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a := attempts{client: c, quick: true}
	for {
		ep := c.endpoint()
		stream, info, e := ep.openSnapshot(ctx, opts.Stale)
		if e == nil {
			if opts.OnInfo != nil {
				opts.OnInfo(info)
			}
			return ep.readSnapshot(stream, info, w)
		}
		if !a.again(ctx, ep, e) {
			return SnapshotInfo{}, e
		}
	}
}

func (ep *endpoint) openSnapshot(ctx context.Context, stale bool) (grpc.ClientStream, SnapshotInfo, *Error) {
	failed := func(err error, sent bool) (grpc.ClientStream, SnapshotInfo, *Error) {
		e := ep.wrap(err, sent)
		e.Definite = true // nothing was to be changed
		return nil, SnapshotInfo{}, e
	}
	stream, err := ep.conn.NewStream(ctx, &v1.Admin_ServiceDesc.Streams[0], v1.Admin_Snapshot_FullMethodName)
	if err != nil {
		return failed(err, false)
	}
	err = stream.SendMsg(&v1.SnapshotRequest{Stale: stale})
	if err == nil {
		err = stream.CloseSend()
	}
	if err != nil && !errors.Is(err, io.EOF) { // after EOF the reason is received
		return failed(err, true)
	}
	var resp v1.SnapshotResponse
	if err := stream.RecvMsg(&resp); err != nil {
		return failed(err, true)
	}
	m := resp.GetInfo()
	if m == nil {
		return failed(ep.protocolError(true, "the node sent something else than a snapshot's beginning"), true)
	}
	return stream, SnapshotInfo{
		ClusterID: m.GetClusterId(), Cluster: m.GetCluster(), NodeID: m.GetNodeId(), Taken: m.GetTaken().AsTime(),
		FirstOffset: m.GetFirstOffset(), NextOffset: m.GetNextOffset(), Index: m.GetIndex(), Term: m.GetTerm(), Size: int64(m.GetSize()),
	}, nil
}

func (ep *endpoint) readSnapshot(stream grpc.ClientStream, info SnapshotInfo, w io.Writer) (SnapshotInfo, error) {
	sum := sha256.New()
	size := int64(0)
	var resp v1.SnapshotResponse
	for {
		resp.Reset()
		if err := stream.RecvMsg(&resp); errors.Is(err, io.EOF) {
			return info, ep.protocolError(true, "the snapshot ended early: the node sent %d of %d bytes", size, info.Size)
		} else if err != nil {
			return info, ep.wrap(err, true)
		}
		switch part := resp.GetPart().(type) {
		case *v1.SnapshotResponse_Data:
			sum.Write(part.Data) // never fails
			if size += int64(len(part.Data)); size > info.Size {
				return info, ep.protocolError(true, "the node sent more than the %d bytes that it had announced", info.Size)
			}
			if _, err := w.Write(part.Data); err != nil {
				return info, fmt.Errorf("write the snapshot: %w", err)
			}
		case *v1.SnapshotResponse_End:
			got := sum.Sum(nil)
			if size != info.Size || !bytes.Equal(got, part.End.GetSha256()) {
				return info, ep.protocolError(true, "what arrived is not what was sent: %d bytes with SHA-256 %x, sent were %d with %x", size, got, info.Size, part.End.GetSha256())
			}
			info.SHA256 = hex.EncodeToString(got)
			return info, nil
		default:
			return info, ep.protocolError(true, "the node sent a part of a snapshot that this version does not know")
		}
	}
}
