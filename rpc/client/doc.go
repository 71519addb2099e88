// Package client talks to a Diurna cluster: it appends records to a log, reads
// them back, and asks who is there.
//
//	c, err := client.Dial("127.0.0.1:8400")
//	if err != nil { ... }
//	defer c.Close()
//
// # Appending
//
// [Client.Produce] appends one batch and answers when it is durable on a
// quorum. Where many goroutines call it at the same time, their records travel
// together; [WithSeparateCalls] prevents that. A [Producer] is for streams of records: it gathers them into batches
// by bytes, count and time, keeps several batches in flight on one stream with
// a bound on their bytes, and reports acknowledgements in order:
//
//	p, err := c.NewProducer(ctx, client.ProducerOptions{OnAck: func(a client.Ack) { ... }})
//	for ... {
//		err := p.Append(ctx, &client.Record{Value: line})
//	}
//	outcome, err := p.Close(ctx)
//
// Nothing is ever appended twice. A record that was sent and not acknowledged
// may be in the log or not, so this package sends again only what was definitely
// not appended, for as long as [WithRetry] allows: the [Outcome] counts what is
// acknowledged, what is definitely not appended and what is unknown, and an
// [Error] says in its Definite field which of the latter two it stands for.
// (gRPC itself re-sends a call on a new connection only where the old one proves
// that no server has seen it.)
//
// # Reading
//
// [Client.Consume] reads from a [Start] to an end, or follows the log. The
// [Consumer] walks the received bytes in place and reuses its buffers:
//
//	r, err := c.Consume(ctx, client.ConsumeOptions{Start: client.Earliest()})
//	defer r.Close()
//	for r.Next() {
//		rec := r.Record() // valid until the next call of Next
//	}
//	if err := r.Err(); err != nil { ... }
//
// One that follows outlives a node: it resumes at the next offset with another.
//
// # Several nodes
//
// [Dial] takes several addresses. One is used until it cannot be reached, is
// stopping or knows no leader, then the next one is. [Client.ListPeers] and its
// neighbours are for operators.
//
// # TLS
//
// [WithTLS] takes a CA, a certificate and a key from files, which are read anew for
// each connection. Where one cannot be secured, the [Error] has reason TLS_FAILED
// and says who refused whom.
//
// # What it does not do yet
//
// It uses the addresses that it was given and finds no others, and does not
// prefer the leader: a node that does not lead forwards.
package client
