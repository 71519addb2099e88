// Package peer is how nodes reach one another: one port that clients and nodes
// share, the greeting by which a node makes sure whom it talks to, and what it
// remembers of where the others are.
//
// In plaintext, a connection's first byte decides what it is for: 'P' opens
// HTTP/2, which is gRPC; 'd' opens the stream that Raft runs over (see Hello).
// With TLS (PortConfig.TLS, Dialer.TLS) the two sides agree on that by ALPN, see
// ProtocolClients and ProtocolRaft. Everything else is closed.
//
// Nodes are dialled by id, never by address alone: an address says where to
// knock, and the greeting refuses unless the wanted node opens. So addresses may
// change hands, all at once if they like, and nothing is sent to the wrong node.
package peer

import (
	"context"
	"net"
	"time"
)

// Network listens and dials. TCP is the real one; tests bring one that loses
// and delays (package peertest). Methods are safe for concurrent use.
type Network interface {
	// Listen accepts connections at host:port; port 0 chooses a free one.
	Listen(address string) (net.Listener, error)
	// Dial connects to host:port. It gives up when ctx ends; ctx has no
	// influence on the connection afterwards.
	Dial(ctx context.Context, address string) (net.Conn, error)
}

// TCP is the machine's network. A connection whose other side has gone without
// a word fails within about deadAfter, whether it is idle or has data under way.
var TCP Network = tcp{}

// deadAfter is how long a silent other side is believed to be there. Raft finds
// out sooner; this is what frees the connection and whoever waits on it.
const deadAfter = 30 * time.Second

// keepAlive asks after half of deadAfter, then three times within the rest.
var keepAlive = net.KeepAliveConfig{
	Enable:   true,
	Idle:     deadAfter / 2,
	Interval: deadAfter / 6,
	Count:    3,
}

type tcp struct{}

func (tcp) Listen(address string) (net.Listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: keepAlive, Control: limitSilence}
	return lc.Listen(context.Background(), "tcp", address)
}

func (tcp) Dial(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{KeepAliveConfig: keepAlive, Control: limitSilence}
	return d.DialContext(ctx, "tcp", address)
}
