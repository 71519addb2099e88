package peer_test

import (
	"context"
	"net"
	"testing"

	"github.com/diurnalog/diurna/agent/peer"
)

// TestTCP runs a port and a dialler over the machine's own network.
func TestTCP(t *testing.T) {
	l, err := peer.TCP.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := peer.NewPort(l, peer.PortConfig{Self: selfIs("n-a", "c1")})
	defer p.Close()
	address := p.Addr().String()
	d := &peer.Dialer{Self: selfIs("n-b", "c1")}
	c := mustDial(t, d, "n-a", address)
	defer c.Close()
	s := accept(t, p.Peers())
	defer s.Close()
	write(t, c, "there")
	write(t, s, "back")
	expect(t, s, "there")
	expect(t, c, "back")
	for _, conn := range []net.Conn{c, s} {
		checkSilenceLimit(t, conn.(*peer.Conn).NetConn().(*net.TCPConn))
	}

	_ = expectRefusal(t, d, "n-z", address, peer.ReasonNotMe)

	client, err := peer.TCP.Dial(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	write(t, client, preface)
	served := accept(t, p.Clients())
	defer served.Close()
	expect(t, served, preface)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := peer.TCP.Dial(ctx, address); err == nil {
		t.Error("dialled with a context that had ended")
	}
	if _, err := peer.TCP.Listen(address); err == nil {
		t.Error("two listen at one address")
	}
}
