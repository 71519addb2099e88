package discovery

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Static is a list of addresses that somebody wrote down. Nothing is registered
// anywhere, nothing changes, and it is never trusted: that an address is
// missing from it, or that nobody answers there, says nothing about a node.
type Static struct {
	nodes []Node
}

var _ Discovery = (*Static)(nil)

// NewStatic takes addresses, each host:port or id@host:port. Who is at an
// address without an id has to be asked there. No addresses at all is a node
// that knows nobody.
func NewStatic(addresses []string) (*Static, error) {
	s := &Static{nodes: make([]Node, 0, len(addresses))}
	for _, a := range addresses {
		n, err := parseStatic(a)
		if err != nil {
			return nil, err
		}
		for _, have := range s.nodes {
			switch {
			case have.Address == n.Address && have.ID == n.ID:
				return nil, fmt.Errorf("static peer %q is listed twice", a)
			case have.Address == n.Address:
				return nil, fmt.Errorf("static peer %q: %s is listed under another id too: keep one of them", a, n.Address)
			case have.ID == n.ID && n.ID != "":
				return nil, fmt.Errorf("static peer %q: this id is listed at %s too: keep one of them", a, have.Address)
			}
		}
		s.nodes = append(s.nodes, n)
	}
	slices.SortFunc(s.nodes, Compare)
	return s, nil
}

// Compare orders nodes by ID, then Address, as they are in a Snapshot.
func Compare(a, b Node) int {
	return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.Address, b.Address))
}

func parseStatic(s string) (Node, error) {
	id, address, found := strings.Cut(s, "@")
	if !found {
		id, address = "", s
	} else if id == "" || strings.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return Node{}, fmt.Errorf("static peer %q: what stands before the @ is not a node's id: write host:port or id@host:port", s)
	}
	if err := CheckAddress(address); err != nil {
		return Node{}, fmt.Errorf("static peer %q: %w: write host:port or id@host:port", s, err)
	}
	return Node{ID: id, Address: address}, nil
}

// CheckAddress tells what keeps others from dialling an address: it must be
// host:port, with a host that is not a wildcard and a port from 1 to 65535.
func CheckAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%q is not host:port", address)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
		return fmt.Errorf("%q is not a port", port)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		return fmt.Errorf("nobody can dial the host of %q", address)
	}
	if strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '@' || r == '/' }) {
		return fmt.Errorf("%q is not a host", host)
	}
	return nil
}

// Run waits for ctx to end: there is nothing to do.
func (s *Static) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Announce does nothing: nobody would hear it.
func (s *Static) Announce(Registration) {}

// Latest is the list.
func (s *Static) Latest() Snapshot {
	return Snapshot{Nodes: slices.Clone(s.nodes), At: time.Time{}, Why: "a static list of addresses does not say who is there"}
}

// Changed never fires.
func (s *Static) Changed() <-chan struct{} { return nil }

// Bootstrap is nil: a list cannot keep anything.
func (s *Static) Bootstrap() Record { return nil }
