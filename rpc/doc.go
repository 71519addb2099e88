// Package rpc serves Diurna's gRPC API: appending to a log, reading it, asking
// who is in the cluster. It talks to the log through the small interface Log,
// so that gRPC never reaches into storage, and to the cluster through Cluster.
//
//	svc, err := rpc.New(rpc.Config{Log: log, Cluster: cluster, Logger: logger})
//	...
//	go func() { served <- svc.Serve(listener) }()
//	...
//	err = svc.Shutdown(ctx) // drains; past ctx's end it cuts off
//
// # Records stay in wire form
//
// The one idea of this package is that a server need not decode what it
// stores. ProduceRequest.records and RecordBatch.records share their field
// number, so the bytes that a producer sends are the bytes that are stored,
// and the bytes that are stored are the bytes that a consumer is sent:
//
//	ProduceRequest   log  expected_offset  7a len record  7a len record ...
//	                                      └──────────── stored ───────────┘
//	RecordBatch      base_offset  append_time  7a len record  7a len record ...
//
// On the way in, wire.go walks the request and checks every record, since
// nothing after it can: what it lets pass is handed to clients in any language
// for ever. On the way out, a read lands in a pooled buffer, batch.go writes
// the few bytes that make a stored batch an element of ConsumeResponse in
// front of it (Headroom), chunk.go cuts what was not asked for off both ends,
// and gRPC sends from the same buffer, which goes back to its pool when the
// last byte is written. codec.go is what lets such messages past gRPC's own
// encoding; service.go is the service description that uses it.
//
// # Where to look
//
//	server.go          Config, Service, its life from New to Shutdown
//	limits.go          what clients can use, with defaults
//	log.go, errors.go  what a Log is and which errors it returns
//	status.go          the one place that makes errors gRPC statuses
//	produce*.go        Produce and ProduceStream
//	consume.go         Consume and ConsumeStream; position.go finds the start
//	servers.go         GetServers
//	interceptors.go    counting, panics, streams that know no shutdown
//	listener.go        connections that never say anything
//
// # What it does not do
//
// It does not forward: a Log that is not the leader's returns *NotLeaderError,
// or forwards by itself. It does not authenticate: credentials come in through
// Config.Options, permission is asked through Config.Authorize.
package rpc
