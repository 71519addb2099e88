package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// network connects nodes by made-up addresses, in memory.
type network struct {
	mu    sync.Mutex
	nodes map[string]*bufconn.Listener
	conns map[string][]net.Conn
}

func (n *network) dial(ctx context.Context, address string) (net.Conn, error) {
	n.mu.Lock()
	l := n.nodes[address]
	n.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("dial %s: nobody there", address)
	}
	conn, err := l.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.conns[address] = append(n.conns[address], conn)
	return conn, nil
}

// cut breaks every connection to address; nobody gets one until it is back.
func (n *network) cut(address string) (back func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.nodes[address]
	delete(n.nodes, address)
	for _, c := range n.conns[address] {
		_ = c.Close()
	}
	n.conns[address] = nil
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.nodes[address] = l
	}
}

// member is one node of a made-up cluster: what Raft would decide, the test
// does. Its log stands alone; nothing is replicated.
type member struct {
	*memLog
	*fixture
	id, address string
	forward     *Forwarder

	mu       sync.Mutex
	leader   string // id; empty: none known
	cluster  string
	members  map[string]*member
	indexes  int // calls of ReadIndex
	onIndex  func(n int) error
	applied  []uint64 // calls of WaitApplied
	onApply  func(uint64)
	asked    []string // Admin calls
	adminErr error
	limits   Limits
	saved    Snapshot // what Snapshot returns
}

func (m *member) setLeader(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leader = id
}

// lead says, as an error, that m does not lead.
func (m *member) lead() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch m.leader {
	case m.id:
		return nil
	case "":
		return ErrNoLeader
	}
	return &NotLeaderError{LeaderID: m.leader, LeaderAddress: m.leader + ":1"}
}

func (m *member) Propose(ctx context.Context, p Proposal, wait bool) (Pending, error) {
	if err := m.lead(); err != nil {
		return nil, err
	}
	return m.memLog.Propose(ctx, p, wait)
}

func (m *member) Linearize(context.Context) error { return m.lead() }

func (m *member) Status(context.Context) (NodeStatus, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	st := NodeStatus{
		NodeID: m.id, Name: "node " + m.id, Cluster: "test", ClusterID: m.cluster, State: "member", Expect: 3,
		FormerIDs: []string{"x", "y"}, Role: "follower", Term: 7, LastIndex: 6, LastTerm: 5, AppliedIndex: 4,
		LastContact: time.Second, LeaderID: m.leader, FirstOffset: 2, NextOffset: 3, DiskFull: true,
	}
	if m.leader != "" {
		st.LeaderAddress = m.leader + ":1"
	}
	return st, nil
}

func (m *member) ReadIndex(context.Context) (uint64, error) {
	if err := m.lead(); err != nil {
		return 0, err
	}
	m.mu.Lock()
	m.indexes++
	n, hook := m.indexes, m.onIndex
	m.mu.Unlock()
	if hook != nil {
		if err := hook(n); err != nil {
			return 0, err
		}
	}
	return uint64(100 + n), nil
}

func (m *member) WaitApplied(_ context.Context, index uint64) error {
	m.mu.Lock()
	m.applied = append(m.applied, index)
	hook := m.onApply
	m.mu.Unlock()
	if hook != nil {
		hook(index)
	}
	return nil
}

func (m *member) Servers(context.Context) (ServerList, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := ServerList{Self: m.id}
	for id := range m.members {
		list.Servers = append(list.Servers, Server{ID: id, Address: id + ":1", Voter: true, Leader: id == m.leader, LastContact: -1})
	}
	return list, nil
}

func (m *member) admin(call string) error {
	if err := m.lead(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked = append(m.asked, call)
	return m.adminErr
}

func (m *member) calls() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]string(nil), m.asked...)
}

func (m *member) AddPeer(_ context.Context, id, address string) error {
	return m.admin("add " + id + " " + address)
}
func (m *member) RemovePeer(_ context.Context, id string) error { return m.admin("remove " + id) }
func (m *member) TransferLeadership(_ context.Context, id string) error {
	return m.admin("transfer " + id)
}

func (m *member) Leave(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked = append(m.asked, "leave")
	return m.adminErr
}

func (m *member) Snapshot(context.Context) (Snapshot, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked = append(m.asked, "snapshot")
	if m.adminErr != nil {
		return nil, m.adminErr
	}
	return m.saved, nil
}

// newCluster serves members of these ids, all of which take the first for the
// leader. change may alter them and how they forward before that.
func newCluster(tb testing.TB, ids []string, change func(*member, *ForwarderConfig)) (*network, map[string]*member) {
	tb.Helper()
	net := &network{nodes: map[string]*bufconn.Listener{}, conns: map[string][]net.Conn{}}
	members := map[string]*member{}
	for _, id := range ids {
		m := &member{memLog: newMemLog(), id: id, address: id + ":1", leader: ids[0], cluster: "c1", members: members}
		members[id] = m
		cfg := ForwarderConfig{Dial: net.dial, ClusterID: func() string {
			m.mu.Lock()
			defer m.mu.Unlock()
			return m.cluster
		}}
		if change != nil {
			change(m, &cfg)
		}
		var err error
		if m.forward, err = NewForwarder(cfg); err != nil {
			tb.Fatal(err)
		}
		// After the service, which serve stops when the test is over.
		tb.Cleanup(func() {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			if err := m.forward.Close(ctx); err != nil && !errors.Is(err, context.Canceled) {
				tb.Errorf("close the forwarder of %s: %v", m.id, err)
			}
		})
	}
	for _, id := range ids {
		m := members[id]
		m.fixture = serve(tb, Config{Log: m, Cluster: m, Admin: m, Peer: m, Forward: m.forward, Limits: m.limits}, false)
		net.nodes[m.address] = m.listener
	}
	return net, members
}

// stream opens a ProduceStream at a member.
func (m *member) stream(tb testing.TB) grpc.BidiStreamingClient[v1.ProduceRequest, v1.ProduceResponse] {
	tb.Helper()
	stream, err := m.client.ProduceStream(testContext(tb))
	if err != nil {
		tb.Fatal(err)
	}
	return stream
}
