package rpc

import (
	"context"

	"google.golang.org/grpc/metadata"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// RemovePeer asks the leader at address to remove a node.
func (f *Forwarder) RemovePeer(ctx context.Context, address, id string) error {
	return f.change(ctx, address, v1.Admin_RemovePeer_FullMethodName, &v1.RemovePeerRequest{Id: id}, new(v1.RemovePeerResponse))
}

// change takes a change to the cluster to the leader at address, which is not
// to pass it on.
func (f *Forwarder) change(ctx context.Context, address, method string, req, resp any) error {
	ctx = metadata.AppendToOutgoingContext(ctx, forwardedKey, "1")
	sent, err := f.call(ctx, address, method, req, resp)
	if err != nil && sent && !isOurs(err) {
		return &UnknownChangeError{Cause: leaderError(err, address)}
	}
	return leaderError(err, address)
}
