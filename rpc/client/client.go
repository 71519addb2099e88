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
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// DefaultPort is the port that Dial adds to an address without one.
const DefaultPort = "8400"

const (
	connectTimeout = 3 * time.Second
	// DefaultRetry is for how long calls are repeated that may be.
	DefaultRetry = 30 * time.Second
	// Far above any batch a server accepts, so that what could be stored can
	// be read, and still a bound on what a broken server can make us hold.
	maxMessageBytes = 64 << 20
)

// Record is what is appended: key, value and headers, each optional.
type Record = v1.Record

// Header is one piece of metadata beside a record's value. Its name is UTF-8
// and may repeat within a record.
type Header = v1.Header

// Client talks to a cluster through any of its nodes. It is safe for
// concurrent use.
type Client struct {
	endpoints []*endpoint
	current   atomic.Int64 // index of the endpoint to use
	// connected says that some node could be reached some time.
	connected atomic.Bool
	// spoke says that some node has answered some time, past whatever secures
	// the connection.
	spoke    atomic.Bool
	retry    time.Duration
	gatherer *gatherer // nil for a client that makes separate calls
}

// endpoint is a connection to one address.
type endpoint struct {
	client *Client
	conn   *grpc.ClientConn
	addr   string
	index  int64
	// Why the last attempt to connect failed; nil after one that worked. gRPC
	// reports such failures only as text inside a status.
	dialErr atomic.Pointer[error]
}

// Option changes how Dial connects.
type Option func(*options)

type options struct {
	creds    credentials.TransportCredentials
	tls      *TLSFiles // goes before creds
	dial     func(ctx context.Context, addr string) (net.Conn, error)
	retry    time.Duration
	separate bool
}

// WithTransportCredentials secures the connection. Without it, and without
// WithTLS, which is easier and goes before it, the connection is plaintext.
func WithTransportCredentials(creds credentials.TransportCredentials) Option {
	return func(o *options) { o.creds = creds }
}

// WithDialer replaces how connections are made; addr is what was given to
// Dial, with a port. The default dials TCP.
func WithDialer(dial func(ctx context.Context, addr string) (net.Conn, error)) Option {
	return func(o *options) { o.dial = dial }
}

// WithRetry sets for how long, within a call's context, what failed is tried
// again where that can neither append twice nor leave anything out: because
// there was no leader, say, or because a node was stopping. The default is
// DefaultRetry; 0 repeats nothing.
func WithRetry(d time.Duration) Option {
	return func(o *options) { o.retry = max(d, 0) }
}

// WithSeparateCalls makes every Produce a call of its own. Without it, the
// records of goroutines that call Produce while others wait for their answers
// travel as one batch, up to 256 KiB, which is many times cheaper: they share an
// append time and, if the connection breaks, an unknown outcome. Calls with
// ExpectOffset, or with metadata in their context, are always separate.
func WithSeparateCalls() Option { return func(o *options) { o.separate = true } }

// Dial returns a client of the cluster whose nodes are at addr: "host:port", or
// "host" for the default port, or several of those with commas between. A name
// with several addresses is tried one by one. One node is used until it cannot
// be reached, is stopping or knows no leader; then the next one is.
//
// Dial does not wait for a connection: calls report, with reason UNREACHABLE,
// that there is none, or, with TLS_FAILED, that it could not be secured.
func Dial(addr string, opts ...Option) (*Client, error) {
	o := options{creds: insecure.NewCredentials(), dial: dialTCP, retry: DefaultRetry}
	for _, opt := range opts {
		opt(&o)
	}
	if o.tls != nil {
		if _, err := o.tls.config(); err != nil {
			return nil, fmt.Errorf("prepare TLS: %w", err)
		}
		o.creds = fileCreds{*o.tls}
	}
	c := &Client{retry: o.retry}
	for part := range strings.SplitSeq(addr, ",") {
		ep := &endpoint{client: c, index: int64(len(c.endpoints))}
		var err error
		if ep.addr, err = withPort(strings.TrimSpace(part)); err == nil {
			err = ep.connect(&o)
		}
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
		c.endpoints = append(c.endpoints, ep)
	}
	if !o.separate {
		c.gatherer = newGatherer(c)
	}
	return c, nil
}

func (ep *endpoint) connect(o *options) error {
	var err error
	// passthrough leaves the name to our dialer, so that a name that does not
	// resolve is reported like an address that does not answer. No proxy: a
	// node is never behind the one a machine uses for the web.
	ep.conn, err = grpc.NewClient("passthrough:///"+ep.addr,
		grpc.WithTransportCredentials(watchedCreds{o.creds, ep}),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithContextDialer(ep.watchDial(o.dial)),
		// gRPC's own goes up to two minutes, long after a node is back.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 1500 * time.Millisecond},
			MinConnectTimeout: connectTimeout,
		}),
		// A machine that vanishes in the middle of a call says nothing either.
		// Servers allow it as often as this.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithReadBufferSize(readBuffer(o)),
		grpc.WithWriteBufferSize(128<<10),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(maxMessageBytes),
			grpc.MaxCallSendMsgSize(math.MaxInt32),
			// A stream whose connection breaks is over. gRPC would keep what was
			// sent and send it again on another one, and hold the stream's lock
			// until there is one.
			grpc.MaxRetryRPCBufferSize(0),
		),
	)
	if err != nil {
		return fmt.Errorf("dial %s: %w", ep.addr, err)
	}
	return nil
}

// Close ends the connections and fails every call that is under way. Close
// Producers and Consumers before it.
func (c *Client) Close() error {
	var errs []error
	for _, ep := range c.endpoints {
		if err := ep.conn.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close connection to %s: %w", ep.addr, err))
		}
	}
	if c.gatherer != nil {
		c.gatherer.close()
	}
	return errors.Join(errs...)
}

// Addr is the address that the next call goes to first, with its port: the
// only one, or one of those that the client was made for.
func (c *Client) Addr() string { return c.endpoint().addr }

// Addrs are all addresses that the client was made for.
func (c *Client) Addrs() []string {
	var addrs []string
	for _, ep := range c.endpoints {
		addrs = append(addrs, ep.addr)
	}
	return addrs
}

func dialTCP(ctx context.Context, addr string) (net.Conn, error) {
	d := net.Dialer{
		Timeout: connectTimeout,
		// A machine that vanishes says nothing: without probes, a consumer
		// that follows would wait for it for ever. TCP's own probes need no
		// agreement with the server, unlike HTTP/2 pings.
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 6 * time.Second, Interval: 2 * time.Second, Count: 3},
	}
	return d.DialContext(ctx, "tcp", addr)
}

func (ep *endpoint) watchDial(dial func(context.Context, string) (net.Conn, error)) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, addr string) (net.Conn, error) {
		conn, err := dial(ctx, addr)
		if err != nil {
			// Closing the client cancels a dial under way; that tells nothing
			// about the address.
			if !errors.Is(err, context.Canceled) {
				ep.dialErr.Store(&err)
			}
			return nil, err
		}
		ep.client.connected.Store(true) // the rest is watchedConn's to judge
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

// readBuffer is how much gRPC reads ahead. TLS has a buffer of its own: another
// one would be one more copy of everything, a tenth of the time of a read.
func readBuffer(o *options) int {
	if o.tls != nil {
		return 0
	}
	return 128 << 10
}
