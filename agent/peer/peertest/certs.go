package peertest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// CA signs certificates for tests.
type CA struct {
	Cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes one that is valid from an hour ago for ten years.
func NewCA(tb testing.TB, name string) *CA {
	tb.Helper()
	key := newKey(tb)
	now := time.Now()
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(10 * 365 * 24 * time.Hour),
		IsCA:         true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
	return &CA{Cert: sign(tb, cert, cert, key, key), key: key}
}

// Pool trusts the CA and nobody else.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.Cert)
	return pool
}

// ServerRole is the DNS name that every node's certificate of a cluster has.
func ServerRole(cluster string) string { return "server." + cluster + ".diurna" }

// Server makes a node's certificate, as change alters it.
func (ca *CA) Server(tb testing.TB, cluster, id string, change ...func(*x509.Certificate)) tls.Certificate {
	return ca.issue(tb, &x509.Certificate{
		Subject:     pkix.Name{CommonName: id},
		DNSNames:    []string{ServerRole(cluster), "localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: cluster + ".diurna", Path: "/server/" + id}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, change)
}

// Client makes a client's certificate, as change alters it.
func (ca *CA) Client(tb testing.TB, cluster, name string, change ...func(*x509.Certificate)) tls.Certificate {
	return ca.issue(tb, &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: cluster + ".diurna", Path: "/client/" + name}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, change)
}

// Expired makes a certificate that is not valid any more.
func Expired(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
}

// NotYetValid makes a certificate that will be valid.
func NotYetValid(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
}

func (ca *CA) issue(tb testing.TB, cert *x509.Certificate, change []func(*x509.Certificate)) tls.Certificate {
	tb.Helper()
	key := newKey(tb)
	cert.SerialNumber = big.NewInt(time.Now().UnixNano())
	cert.NotBefore, cert.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(365*24*time.Hour)
	cert.KeyUsage = x509.KeyUsageDigitalSignature
	for _, f := range change {
		f(cert)
	}
	parent, signer := ca.Cert, ca.key
	if parent == nil {
		parent, signer = cert, key
	}
	leaf := sign(tb, cert, parent, key, signer)
	return tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
}

// SelfSigned is a CA whose certificates sign themselves.
var SelfSigned = &CA{}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func sign(tb testing.TB, cert, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) *x509.Certificate {
	tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, key.Public(), signer)
	if err != nil {
		tb.Fatal(err)
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return made
}

// PortTLS is how a node of the cluster secures its port: a client's certificate
// is checked where it is shown, and a stream of Raft takes a node's.
func PortTLS(ca *CA, cluster string, cert tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates:           []tls.Certificate{cert},
		ClientCAs:              ca.Pool(),
		ClientAuth:             tls.VerifyClientCertIfGiven,
		SessionTicketsDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			if state.NegotiatedProtocol == "h2" {
				return nil
			}
			if len(state.PeerCertificates) == 0 {
				return errors.New("a node has to show a certificate")
			}
			if !slices.Contains(state.PeerCertificates[0].DNSNames, ServerRole(cluster)) {
				return errors.New("the certificate is not one of a node of cluster " + cluster)
			}
			return nil
		},
	}
}

// DialTLS is how a node of the cluster, or one of its clients, secures what it
// dials. Without a cert it shows none.
func DialTLS(ca *CA, cluster string, cert ...tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: cert, RootCAs: ca.Pool(), ServerName: ServerRole(cluster)}
}

// WriteCA writes the CA's certificate into dir, as PEM.
func WriteCA(tb testing.TB, dir string, ca *CA) (file string) {
	tb.Helper()
	file = filepath.Join(dir, "ca.pem")
	writePEM(tb, file, "CERTIFICATE", ca.Cert.Raw)
	return file
}

// WritePair writes a certificate and its key into dir, as PEM.
func WritePair(tb testing.TB, dir, name string, cert tls.Certificate) (certFile, keyFile string) {
	tb.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		tb.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+"-key.pem")
	writePEM(tb, certFile, "CERTIFICATE", cert.Certificate[0])
	writePEM(tb, keyFile, "PRIVATE KEY", key)
	return certFile, keyFile
}

func writePEM(tb testing.TB, file, kind string, der []byte) {
	tb.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		tb.Fatal(err)
	}
}
