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
// # Any node will do
//
// A Log that is not the leader's returns *NotLeaderError. With Config.Forward
// the server then takes the batch to the leader, over one stream for all of its
// clients, and asks the leader how far a linearizable read has to see. What
// came from another node is never passed on again.
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
//	admin*.go          what operators ask for
//	peer*.go           what other nodes ask for; check.go refuses nonsense
//	forward.go         what a node that does not lead takes to the leader:
//	                   forward_stream.go batches, forward_log.go reads,
//	                   forward_conn.go connections and what their errors mean
//	caller.go          who calls, by the certificate, and what that allows
//	interceptors.go    counting, panics, streams that know no shutdown
//	listener.go        connections that never say anything
//
// # What it does not do
//
// It does no handshakes: with Config.Caller its listeners hand out connections
// that are secured already, such as those of a peer.Port, and it takes what TLS
// found out from there. What a caller may do is asked through Config.Authorize.
package rpc
