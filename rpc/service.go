package rpc

import (
	"context"

	"google.golang.org/grpc"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// logServiceDesc describes the service Log with handlers that receive and send
// wire form where the generated ones would decode and encode. A test holds it
// against the generated description.
func logServiceDesc() *grpc.ServiceDesc {
	return &grpc.ServiceDesc{
		ServiceName: v1.Log_ServiceDesc.ServiceName,
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{
			{MethodName: "Produce", Handler: unaryHandler(v1.Log_Produce_FullMethodName, (*Service).produce)},
			{MethodName: "Consume", Handler: unaryHandler(v1.Log_Consume_FullMethodName, (*Service).consume)},
			{MethodName: "GetServers", Handler: unaryHandler(v1.Log_GetServers_FullMethodName, (*Service).getServers)},
		},
		Streams: []grpc.StreamDesc{
			{
				StreamName:    "ProduceStream",
				Handler:       func(srv any, stream grpc.ServerStream) error { return srv.(*Service).produceStream(stream) },
				ServerStreams: true,
				ClientStreams: true,
			},
			{
				StreamName: "ConsumeStream",
				Handler: func(srv any, stream grpc.ServerStream) error {
					req := new(rawRequest)
					if err := stream.RecvMsg(req); err != nil {
						return err
					}
					return srv.(*Service).consumeStream(req, stream)
				},
				ServerStreams: true,
			},
		},
		Metadata: v1.Log_ServiceDesc.Metadata,
	}
}

// unaryHandler is what protoc-gen-go-grpc generates, for any types. The
// response is returned as nil and not as a nil pointer where there is none.
func unaryHandler[Req, Resp any](method string, call func(*Service, context.Context, *Req) (*Resp, error)) grpc.MethodHandler {
	return func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		req := new(Req)
		if err := decode(req); err != nil {
			return nil, err
		}
		handler := func(ctx context.Context, req any) (any, error) {
			resp, err := call(srv.(*Service), ctx, req.(*Req))
			if err != nil {
				return nil, err
			}
			return resp, nil
		}
		if interceptor == nil {
			return handler(ctx, req)
		}
		return interceptor(ctx, req, &grpc.UnaryServerInfo{Server: srv, FullMethod: method}, handler)
	}
}
