package rpc

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that codec falls back on
	"google.golang.org/grpc/mem"
)

// rawRequest is a request in wire form. Its bytes belong to the receiver, for
// as long as it likes: a proposal's records are kept by the log, and by
// replication even beyond the proposal's outcome, so they never come from a
// pool.
type rawRequest struct{ data []byte }

// rawResponse is a message to send, usually a response, in wire form. Sending
// it gives the references to its buffers away.
type rawResponse struct{ data mem.BufferSlice }

// String keeps tracers, which may format messages long after they were sent,
// off buffers that have gone back to their pool.
func (*rawResponse) String() string { return "message in wire form" }
func (*rawRequest) String() string  { return "request in wire form" }

// codec is gRPC's "proto" with a way around it for messages that are to be
// received or sent as they are.
type codec struct{ proto encoding.CodecV2 }

func newCodec() (codec, error) {
	c := encoding.GetCodecV2("proto")
	if c == nil {
		return codec{}, fmt.Errorf("gRPC has no codec %q", "proto")
	}
	return codec{proto: c}, nil
}

func (c codec) Name() string { return c.proto.Name() }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if r, ok := v.(*rawResponse); ok {
		data := r.data
		r.data = nil // a second send would use references that are gone
		return data, nil
	}
	return c.proto.Marshal(v)
}

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	if r, ok := v.(*rawRequest); ok {
		r.data = data.Materialize()
		return nil
	}
	return c.proto.Unmarshal(data, v)
}
