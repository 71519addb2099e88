package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// snapshotChunk is how much of one goes into a message.
const snapshotChunk = 256 << 10

// Snapshot implements v1.AdminServer. It is never passed on: a node that does not
// lead asks the leader how far it has to be, and is as good a source then.
func (a *adminService) Snapshot(req *v1.SnapshotRequest, stream grpc.ServerStreamingServer[v1.SnapshotResponse]) error {
	ctx, cancel := a.s.untilStopping(stream.Context())
	defer cancel()
	if err := a.authorize(ctx); err != nil {
		return err
	}
	select {
	case a.s.snapshots <- struct{}{}:
	default:
		return &tooManyCallsError{limit: a.s.limits.Snapshots, what: "snapshots"}
	}
	done := func() { <-a.s.snapshots }
	if !req.GetStale() {
		if err := a.s.log.Linearize(ctx); err != nil {
			done()
			return a.s.orShutdown(ctx, err, nil)
		}
	}
	snap, err := a.s.admin.Snapshot(ctx)
	if err != nil {
		done()
		return a.s.orShutdown(ctx, err, nil)
	}
	info := snap.Info()
	a.audit(ctx, "an operator saves the log", "first_offset", info.FirstOffset, "next_offset", info.NextOffset, "bytes", info.Size)

	// A send to a caller who takes nothing ends when this returns, and not before.
	sent, moved := make(chan error, 1), make(chan struct{}, 1)
	a.s.background.Add(1)
	go func() {
		defer a.s.background.Done()
		defer done()
		defer func() {
			if r := recover(); r != nil {
				sent <- a.s.panicked(v1.Admin_Snapshot_FullMethodName, r, debug.Stack())
			}
		}()
		err := sendSnapshot(snap, stream, moved)
		sent <- errors.Join(err, snap.Close())
	}()
	stall := time.NewTimer(a.s.limits.SnapshotStall)
	defer stall.Stop()
	for {
		select {
		case err := <-sent:
			return a.s.orShutdown(ctx, err, nil)
		case <-moved:
			stall.Reset(a.s.limits.SnapshotStall)
		case <-stall.C:
			return fmt.Errorf("nothing of the snapshot was taken for %v: %w", a.s.limits.SnapshotStall, context.DeadlineExceeded)
		case <-ctx.Done():
			return a.s.orShutdown(ctx, ctx.Err(), nil)
		}
	}
}

// sendSnapshot sends all of a snapshot, and says after each message that it was
// taken.
func sendSnapshot(snap Snapshot, stream grpc.ServerStreamingServer[v1.SnapshotResponse], moved chan<- struct{}) error {
	info := snap.Info()
	first := &v1.SnapshotResponse{Part: &v1.SnapshotResponse_Info{Info: &v1.SnapshotInfo{
		ClusterId: info.ClusterID, Cluster: info.Cluster, NodeId: info.NodeID, Taken: timestamppb.New(info.Taken),
		FirstOffset: info.FirstOffset, NextOffset: info.NextOffset, Index: info.Index, Term: info.Term, Size: uint64(info.Size),
	}}}
	if err := stream.Send(first); err != nil {
		return err
	}
	// Encoded before Send returns, so that it can be used again.
	chunk := make([]byte, snapshotChunk)
	data := new(v1.SnapshotResponse_Data)
	message := &v1.SnapshotResponse{Part: data}
	for {
		n, err := io.ReadFull(snap, chunk)
		if n > 0 {
			data.Data = chunk[:n]
			if err := stream.Send(message); err != nil {
				return err
			}
			select {
			case moved <- struct{}{}:
			default:
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return stream.Send(&v1.SnapshotResponse{Part: &v1.SnapshotResponse_End{End: &v1.SnapshotEnd{Sha256: snap.Info().SHA256}}})
		case err != nil:
			return err
		}
	}
}
