package clienttest

import (
	"errors"
	"io"
	"net"
	"strconv"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that raw falls back on
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// StartRaw serves, on a loopback port, a log that costs next to nothing: it
// counts what is produced, and answers a read with copies copies of a batch of
// the given records. It is for measuring the client.
func StartRaw(t testing.TB, records []*v1.Record, copies int) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var batch []byte
	for _, r := range records {
		batch = protowire.AppendTag(batch, 15, protowire.BytesType)
		body := protowire.AppendTag(nil, 2, protowire.BytesType)
		body = protowire.AppendBytes(body, r.Value)
		batch = protowire.AppendBytes(batch, body)
	}
	server := grpc.NewServer(grpc.ForceServerCodecV2(rawCodec{encoding.GetCodecV2("proto")}), grpc.MaxRecvMsgSize(64<<20))
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: v1.Log_ServiceDesc.ServiceName,
		HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{
			{StreamName: "ProduceStream", ClientStreams: true, ServerStreams: true, Handler: rawProduce},
			{StreamName: "ConsumeStream", ServerStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
				return rawConsume(stream, batch, len(records), copies)
			}},
		},
	}, new(any))
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := server.Serve(l); err != nil {
			t.Errorf("serve: %v", err)
		}
	}()
	t.Cleanup(func() {
		server.Stop()
		<-served
	})
	return l.Addr().String()
}

func rawProduce(_ any, stream grpc.ServerStream) error {
	var next uint64
	for {
		var req rawMessage
		if err := stream.RecvMsg(&req); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		base := next
		for b := req.data; len(b) > 0; {
			num, typ, n := protowire.ConsumeTag(b)
			if n < 0 {
				return errors.New("bad tag")
			}
			m := protowire.ConsumeFieldValue(num, typ, b[n:])
			if m < 0 {
				return errors.New("bad field")
			}
			if num == 15 {
				next++
			}
			b = b[n+m:]
		}
		if err := stream.SendMsg(&v1.ProduceResponse{BaseOffset: base, NextOffset: next}); err != nil {
			return err
		}
	}
}

func rawConsume(stream grpc.ServerStream, batch []byte, count, copies int) error {
	var req v1.ConsumeRequest
	if err := stream.RecvMsg(&req); err != nil {
		return err
	}
	for i := range copies {
		body := protowire.AppendTag(nil, 1, protowire.VarintType)
		body = protowire.AppendVarint(body, uint64(i*count))
		head := protowire.AppendTag(nil, 1, protowire.BytesType)
		head = protowire.AppendVarint(head, uint64(len(body)+len(batch)))
		head = append(head, body...)
		tail := protowire.AppendTag(nil, 2, protowire.VarintType)
		tail = protowire.AppendVarint(tail, uint64((i+1)*count))
		if err := stream.SendMsg(mem.BufferSlice{mem.SliceBuffer(head), mem.SliceBuffer(batch), mem.SliceBuffer(tail)}); err != nil {
			return err
		}
	}
	return nil
}

type rawMessage struct{ data []byte }

type rawCodec struct{ encoding.CodecV2 }

func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if s, ok := v.(mem.BufferSlice); ok {
		return s, nil
	}
	return c.CodecV2.Marshal(v)
}

func (c rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if m, ok := v.(*rawMessage); ok {
		m.data = data.Materialize()
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}

func utoa(n uint64) string { return strconv.FormatUint(n, 10) }
