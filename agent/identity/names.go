package identity

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
)

// ALPNRaft is the protocol of Raft streams, which only servers may open. On the
// wire, never change.
const ALPNRaft = "diurna-raft/1"

// anonymous is the subject of somebody without a name.
const anonymous = "anonymous"

// ServerName is the DNS name that the certificate of every server of a cluster
// holds, and no other certificate: who has it is a server.
func ServerName(cluster string) string { return "server." + trustDomain(cluster) }

// trustDomain is what the SPIFFE names of a cluster begin with.
func trustDomain(cluster string) string { return strings.ToLower(cluster) + ".diurna" }

func serverURI(cluster, nodeID string) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: trustDomain(cluster), Path: "/server/" + nodeID}
}

func clientURI(cluster, name string) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: trustDomain(cluster), Path: "/client/" + name}
}

// names are what a certificate is for.
type names struct {
	common string
	dns    []string
	ips    []net.IP
	uris   []*url.URL
}

// serverNames are those of a node's certificate. Host is where others reach it;
// extra are DNS names and IP addresses besides.
func serverNames(cluster, service, nodeID, host string, extra []string) names {
	if service == "" {
		service = "diurna"
	}
	n := names{
		common: ServerName(cluster),
		dns: []string{
			ServerName(cluster), "localhost",
			service + ".service.consul", "leader." + service + ".service.consul",
		},
		ips: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	if nodeID != "" {
		n.uris = append(n.uris, serverURI(cluster, nodeID))
	}
	for _, name := range append([]string{host}, extra...) {
		n.add(name)
	}
	return n
}

func (n *names) add(name string) {
	if ip := net.ParseIP(name); ip != nil {
		if !slices.ContainsFunc(n.ips, ip.Equal) {
			n.ips = append(n.ips, ip)
		}
		return
	}
	name = strings.ToLower(name)
	if name != "" && !slices.Contains(n.dns, name) {
		n.dns = append(n.dns, name)
	}
}

// missing returns a name that the certificate lacks, "" if it lacks none.
func (n *names) missing(c *x509.Certificate) string {
	for _, name := range n.dns {
		if !holdsDNS(c, name) {
			return name
		}
	}
	for _, ip := range n.ips {
		if !slices.ContainsFunc(c.IPAddresses, ip.Equal) {
			return ip.String()
		}
	}
	for _, u := range n.uris {
		if !slices.ContainsFunc(c.URIs, func(have *url.URL) bool { return have.String() == u.String() }) {
			return u.String()
		}
	}
	return ""
}

// holdsDNS tells whether a certificate holds exactly this name: a wildcard that
// would match it does not make a server.
func holdsDNS(c *x509.Certificate, name string) bool {
	return slices.ContainsFunc(c.DNSNames, func(have string) bool { return strings.EqualFold(have, name) })
}

// Caller is who is at the other end of a connection.
type Caller struct {
	// Subject is what permissions are given to: the certificate's first URI
	// name, else its common name, else "anonymous".
	Subject string
	// Server tells a server of this cluster.
	Server bool
	// NodeID is the id that a server's certificate names; empty where it names
	// none.
	NodeID string
}

// Caller tells who is at the other end, by the certificate that the handshake
// verified. Without one it is Caller{Subject: "anonymous"}.
func (i *Identity) Caller(cs tls.ConnectionState) Caller {
	if len(cs.VerifiedChains) == 0 || len(cs.VerifiedChains[0]) == 0 {
		return Caller{Subject: anonymous}
	}
	leaf := cs.VerifiedChains[0][0]
	c := Caller{Subject: subjectOf(leaf), Server: holdsDNS(leaf, i.serverName)}
	if c.Server {
		c.NodeID, _ = nodeIDOf(leaf, i.cfg.Cluster)
	}
	return c
}

// subjectOf names the holder of a certificate.
//
// A common name is easy to get, and is compared with the same rules as URIs and
// as the names of roles: one that could be taken for either, such as
// "spiffe://…" or "role:admin", names nobody. So does a URI without a host.
func subjectOf(c *x509.Certificate) string {
	for _, u := range c.URIs {
		if u.Scheme != "" && u.Host != "" {
			return u.String()
		}
	}
	if cn := c.Subject.CommonName; cn != "" && !strings.Contains(cn, ":") {
		return cn
	}
	return anonymous
}

// nodeIDOf is the id in a server's SPIFFE name.
func nodeIDOf(c *x509.Certificate, cluster string) (string, bool) {
	for _, u := range c.URIs {
		id, ok := strings.CutPrefix(u.Path, "/server/")
		if ok && id != "" && u.Scheme == "spiffe" && strings.EqualFold(u.Host, trustDomain(cluster)) {
			return id, true
		}
	}
	return "", false
}

// describe names a certificate for a log line or an error.
func describe(c *x509.Certificate) string {
	return fmt.Sprintf("%s (serial %s)", subjectOf(c), serialOf(c))
}

func serialOf(c *x509.Certificate) string { return fmt.Sprintf("%x", c.SerialNumber) }
