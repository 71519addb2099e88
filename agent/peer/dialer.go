package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

// The defaults of Dialer.
const (
	DefaultDialTimeout = 10 * time.Second
	DefaultBackoffMin  = time.Second
	DefaultBackoffMax  = time.Minute
)

// refusalsLimit is how many refusals are remembered; a cluster has few nodes.
const refusalsLimit = 1024

// Dialer opens peer streams by node id. Its fields must not change after the
// first Dial; Self is required. Safe for concurrent use.
type Dialer struct {
	// Network is what it dials through; nil is TCP.
	Network Network
	// Self returns this node's id, and its cluster's, empty if it is in none
	// yet. It is asked with every Dial.
	Self func() (nodeID, clusterID string)
	// Lookup returns where a node is now. Nil knows nothing.
	Lookup func(id string) (address string, ok bool)
	// TLS returns what to secure the next connection by; nil is plaintext. It is
	// asked with every Dial, for ProtocolRaft, so that certificates and trust may
	// change; a nil config fails the Dial. The Dialer sets NextProtos in a copy
	// and, where ServerName is empty, the address's host as that.
	TLS func(protocol string) *tls.Config
	// Failed is as PortConfig's.
	Failed func(error)
	// Check, if set, has the last word on a node that accepted: from is its id,
	// to is ours, the cluster id is its own. An error closes the connection and
	// counts as a refusal. conn is for looking at: ConnectionState has the
	// node's certificate.
	Check func(conn net.Conn, remote Hello) error
	// Timeout bounds connecting, securing and greeting together. Default 10 s.
	Timeout time.Duration
	// After a refusal, a node is left alone for BackoffMin, then twice as long
	// after every further one, up to BackoffMax; a random part of up to half
	// is taken off. Defaults: 1 s and 1 min.
	BackoffMin, BackoffMax time.Duration
	// Jitter returns a number in [0, 1) for that part; nil is a random one.
	Jitter func() float64

	mu      sync.Mutex
	refused map[string]refusal // by node id; guarded by mu
}

// refusal is what is remembered of a node that did not want to talk, and what
// it did not want: if any of that is different now, it may think otherwise.
type refusal struct {
	address, self, cluster string

	err   *RefusedError
	wait  time.Duration // before the random part is taken off
	until time.Time
}

// Dial opens a stream to the node with this id, at the address that Lookup has
// for it, or else at fallbackAddress. What it returns is a *Conn. The error is a
// *RefusedError if the node was reached and refused, or was refused not long
// ago at this address, in which case it is not asked again.
func (d *Dialer) Dial(ctx context.Context, id, fallbackAddress string) (net.Conn, error) {
	address := fallbackAddress
	if d.Lookup != nil {
		if known, ok := d.Lookup(id); ok && known != "" {
			address = known
		}
	}
	if address == "" {
		return nil, fmt.Errorf("dial node %s: its address is not known", id)
	}
	self, cluster := d.Self()
	if id == self {
		err := Refuse(ReasonSelf, "that is this node")
		err.ID, err.Address, err.RemoteCluster = id, address, cluster
		return nil, err
	}
	if err := d.recent(id, address, self, cluster); err != nil {
		return nil, err
	}
	timeout := d.Timeout
	if timeout <= 0 {
		timeout = DefaultDialTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	conn, err := d.dial(ctx, id, address, Hello{ClusterID: cluster, From: self, To: id})
	refused, ok := errors.AsType[*RefusedError](err)
	switch {
	case ok:
		d.remember(id, refusal{address: address, self: self, cluster: cluster, err: refused})
		return nil, refused
	case err != nil:
		return nil, fmt.Errorf("dial node %s at %s: %w", id, address, err)
	}
	d.forget(id)
	return conn, nil
}

func (d *Dialer) dial(ctx context.Context, id, address string, hello Hello) (*Conn, error) {
	network := d.Network
	if network == nil {
		network = TCP
	}
	raw, err := network.Dial(ctx, address)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() {
		// Ends the greeting; if it fails the connection is broken anyway.
		_ = raw.SetDeadline(time.Unix(1, 0))
	})
	conn := raw
	if d.TLS != nil {
		var secured *tls.Conn
		if secured, err = d.secure(raw, address); err == nil {
			conn = secured
		}
	}
	if err == nil {
		err = d.greet(conn, hello)
	}
	if !stop() {
		err = errors.Join(ctx.Err(), err)
	}
	if refused, ok := errors.AsType[*RefusedError](err); ok {
		refused.ID, refused.Address = id, address
	}
	if err != nil {
		discard(raw)
		return nil, err
	}
	return &Conn{Conn: conn, hello: hello}, nil
}

// greet says hello and judges the answer.
func (d *Dialer) greet(conn net.Conn, hello Hello) error {
	if err := writeMessage(conn, magic, hello); err != nil {
		return fmt.Errorf("say hello: %w", err)
	}
	b, err := readMessage(conn)
	if errors.Is(err, errTooLong) {
		return Refuse(ReasonMalformed, "what listens there is no plaintext port of Diurna, but perhaps one with TLS: %v", err)
	}
	if err != nil {
		if blame(err) == faultOurs {
			return tlsFailure(err)
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("no answer to the hello: %w", err)
	}
	a, err := decodeAnswer(b)
	if err != nil {
		return Refuse(ReasonMalformed, "what listens there is no Diurna: %v", err)
	}
	if !a.OK {
		return &RefusedError{Reason: a.Reason, Text: a.Text, RemoteCluster: a.ClusterID}
	}
	remote := Hello{ClusterID: a.ClusterID, From: a.NodeID, To: hello.From}
	switch {
	case remote.From != hello.To:
		err = Refuse(ReasonNotMe, "node %q answered", remote.From)
	default:
		err = Match(hello.From, hello.ClusterID, remote)
	}
	if err == nil && d.Check != nil {
		err = d.Check(conn, remote)
	}
	if err == nil {
		return nil
	}
	refused, ok := errors.AsType[*RefusedError](err)
	if !ok {
		refused = Refuse(ReasonRefused, "%v", err)
	}
	refused.RemoteCluster = a.ClusterID
	return refused
}

// recent returns the last refusal while it counts.
func (d *Dialer) recent(id, address, self, cluster string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	r, ok := d.refused[id]
	if !ok {
		return nil
	}
	if r.address != address || r.self != self || r.cluster != cluster {
		delete(d.refused, id)
		return nil
	}
	if !time.Now().Before(r.until) {
		return nil
	}
	again := *r.err
	return &again
}

// remember notes a refusal.
func (d *Dialer) remember(id string, r refusal) {
	shortest, longest := d.BackoffMin, d.BackoffMax
	if shortest <= 0 {
		shortest = DefaultBackoffMin
	}
	if longest <= 0 {
		longest = DefaultBackoffMax
	}
	jitter := d.Jitter
	if jitter == nil {
		jitter = rand.Float64
	}
	now := time.Now()

	d.mu.Lock()
	defer d.mu.Unlock()
	last, again := d.refused[id]
	again = again && last.address == r.address && last.self == r.self && last.cluster == r.cluster
	switch {
	case again && now.Before(last.until):
		return // Several dialled at the same time; it is one refusal.
	case again:
		r.wait = min(2*last.wait, longest)
	default:
		r.wait = min(shortest, longest)
	}
	r.until = now.Add(r.wait - time.Duration(jitter()*float64(r.wait)/2))
	if d.refused == nil {
		d.refused = make(map[string]refusal)
	}
	if !again && len(d.refused) >= refusalsLimit {
		maps.DeleteFunc(d.refused, func(_ string, r refusal) bool { return !now.Before(r.until) })
		if len(d.refused) >= refusalsLimit {
			return
		}
	}
	d.refused[id] = r
}

// Reset forgets all refusals, because something is different on this side, such
// as its certificate or whom it trusts.
func (d *Dialer) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.refused)
}

func (d *Dialer) forget(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.refused, id)
}
