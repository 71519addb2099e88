package client

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// DefaultPort is the port that Dial adds to an address without one.
const DefaultPort = "8400"

const (
	connectTimeout = 5 * time.Second
	// Far above any batch a server accepts, so that what could be stored can
	// be read, and still a bound on what a broken server can make us hold.
	maxMessageBytes = 64 << 20
)

// Record is what is appended: key, value and headers, each optional.
type Record = v1.Record

// Header is one piece of metadata beside a record's value. Its name is UTF-8
// and may repeat within a record.
type Header = v1.Header

// Client is a connection to a cluster. It is safe for concurrent use.
type Client struct {
	conn *grpc.ClientConn
	addr string
	// Why the last attempt to connect failed; nil after one that worked. gRPC
	// reports such failures only as text inside a status.
	dialErr atomic.Pointer[error]
}

// Option changes how Dial connects.
type Option func(*options)

type options struct {
	creds credentials.TransportCredentials
	dial  func(ctx context.Context, addr string) (net.Conn, error)
}

// WithTransportCredentials secures the connection. Without it the connection
// is plaintext.
func WithTransportCredentials(creds credentials.TransportCredentials) Option {
	return func(o *options) { o.creds = creds }
}

// WithDialer replaces how connections are made; addr is what was given to
// Dial, with a port. The default dials TCP.
func WithDialer(dial func(ctx context.Context, addr string) (net.Conn, error)) Option {
	return func(o *options) { o.dial = dial }
}

// Dial returns a client of the node at addr, "host:port" or "host" for the
// default port; a name with several addresses is tried one by one. It does not
// wait for the connection: calls report, with reason UNREACHABLE, that there
// is none.
func Dial(addr string, opts ...Option) (*Client, error) {
	addr, err := withPort(addr)
	if err != nil {
		return nil, err
	}
	o := options{creds: insecure.NewCredentials(), dial: dialTCP}
	for _, opt := range opts {
		opt(&o)
	}
	c := &Client{addr: addr}
	// passthrough leaves the name to our dialer, so that a name that does not
	// resolve is reported like an address that does not answer. No proxy: a
	// node is never behind the one a machine uses for the web.
	c.conn, err = grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(o.creds),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithContextDialer(c.watchDial(o.dial)),
		grpc.WithReadBufferSize(128<<10),
		grpc.WithWriteBufferSize(128<<10),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(maxMessageBytes),
			grpc.MaxCallSendMsgSize(math.MaxInt32),
		),
	)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	return c, nil
}

// Close ends the connection and fails every call that is under way. Close
// Producers and Consumers before it.
func (c *Client) Close() error {
	if err := c.conn.Close(); err != nil {
		return fmt.Errorf("close connection to %s: %w", c.addr, err)
	}
	return nil
}

// Addr is the address the client was made for, with its port.
func (c *Client) Addr() string { return c.addr }

func dialTCP(ctx context.Context, addr string) (net.Conn, error) {
	d := net.Dialer{
		Timeout: connectTimeout,
		// A machine that vanishes says nothing: without probes, a consumer
		// that follows would wait for it for ever. TCP's own probes need no
		// agreement with the server, unlike HTTP/2 pings.
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 4},
	}
	return d.DialContext(ctx, "tcp", addr)
}

func (c *Client) watchDial(dial func(context.Context, string) (net.Conn, error)) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, addr string) (net.Conn, error) {
		conn, err := dial(ctx, addr)
		if err != nil {
			// Closing the client cancels a dial under way; that tells nothing
			// about the address.
			if !errors.Is(err, context.Canceled) {
				c.dialErr.Store(&err)
			}
			return nil, err
		}
		c.dialErr.Store(nil)
		return conn, nil
	}
}

// withPort checks addr and completes it with the default port.
func withPort(addr string) (string, error) {
	if addr == "" {
		return "", errors.New("address is empty, want host:port")
	}
	if strings.Contains(addr, "/") {
		return "", fmt.Errorf("address %q is not host:port", addr)
	}
	if host, port, err := net.SplitHostPort(addr); err == nil {
		if port == "" {
			port = DefaultPort
		}
		return net.JoinHostPort(host, port), nil
	}
	// No port: a name, an IPv4 address, or an IPv6 one with brackets or bare.
	host := strings.TrimSuffix(strings.TrimPrefix(addr, "["), "]")
	if strings.Contains(host, ":") && net.ParseIP(host) == nil {
		return "", fmt.Errorf("address %q is not host:port", addr)
	}
	return net.JoinHostPort(host, DefaultPort), nil
}
