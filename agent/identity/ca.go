package identity

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"path/filepath"
	"regexp"
	"time"
)

// The files of a CA's folder.
const (
	// CAFile is the CA's certificate: whom to trust.
	CAFile = "ca.pem"
	// CAKeyFile is the CA's key and certificate: who has it can be anybody.
	CAKeyFile = "ca-key.pem"
	// DevClientFile and DevClientKeyFile are a client's, made beside a
	// throw-away CA.
	DevClientFile, DevClientKeyFile = "client.pem", "client-key.pem"
)

// skew is how long before its making a certificate is valid, for clocks that
// are behind.
const skew = time.Minute

// CreateCA makes a CA for those who have no other: CAFile and CAKeyFile in dir,
// which is made if it is not there. ttl is its life; nothing that it signs
// lives longer. Files that are there are never overwritten: fs.ErrExist.
func CreateCA(dir, cluster string, ttl time.Duration) error {
	ca, err := newCA(CAName(cluster), ttl, time.Now())
	if err != nil {
		return err
	}
	if err := makeDir(dir); err != nil {
		return fmt.Errorf("create CA: %w", err)
	}
	if err := absent(dir, CAKeyFile, CAFile); err != nil {
		return fmt.Errorf("create CA: %w", err)
	}
	key, err := ca.encode()
	if err != nil {
		return err
	}
	if err := createFile(filepath.Join(dir, CAKeyFile), key); err != nil {
		return fmt.Errorf("create CA: %w", err)
	}
	if err := createFile(filepath.Join(dir, CAFile), encodeCerts(ca.cert)); err != nil {
		return fmt.Errorf("create CA: %w", err)
	}
	return nil
}

// CAName is the common name of a CA that CreateCA makes.
func CAName(cluster string) string { return "Diurna CA of " + cluster }

// ServerCert is what CreateServer is to make.
type ServerCert struct {
	// Cluster is the cluster's name; required.
	Cluster string
	// Service is its name in Consul; empty means "diurna".
	Service string
	// NodeID is the node's UUID. Empty is a certificate for any node.
	NodeID string
	// Names are DNS names and IP addresses at which the server is reached,
	// besides localhost.
	Names []string
	// File is what the files are called, FILE.pem and FILE-key.pem; empty means
	// "server".
	File string
	// TTL is its life. It ends with the CA at the latest.
	TTL time.Duration
}

// CreateServer makes a server's certificate and key with the CA in dir, beside
// it. It never overwrites: fs.ErrExist.
func CreateServer(dir string, s ServerCert) error {
	if s.Cluster == "" {
		return errors.New("create certificate: the cluster has no name")
	}
	if s.File == "" {
		s.File = "server"
	}
	n := serverNames(s.Cluster, s.Service, s.NodeID, "", s.Names)
	return create(dir, s.File, n, true, s.TTL)
}

// clientName is what may be in a SPIFFE name, and in a file's.
var clientName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?$`)

// CreateClient makes a client's certificate and key with the CA in dir, beside
// it: NAME.pem and NAME-key.pem. Permissions are given to its subject,
// spiffe://CLUSTER.diurna/client/NAME. It never overwrites: fs.ErrExist.
func CreateClient(dir, cluster, name string, ttl time.Duration) error {
	if cluster == "" {
		return errors.New("create certificate: the cluster has no name")
	}
	return create(dir, name, clientNames(cluster, name), false, ttl)
}

func clientNames(cluster, name string) names {
	n := names{common: name}
	n.uris = append(n.uris, clientURI(cluster, name))
	return n
}

// CheckName tells whether certificates can be called so: clients, and files.
func CheckName(name string) error {
	if !clientName.MatchString(name) {
		return fmt.Errorf("%q is no name: letters, digits, '.', '_' and '-'", name)
	}
	if name == "ca" {
		return errors.New(`"ca" is the CA's own`)
	}
	return nil
}

func create(dir, file string, n names, server bool, ttl time.Duration) error {
	fail := func(err error) error { return fmt.Errorf("create certificate: %w", err) }
	if err := CheckName(file); err != nil {
		return fail(err)
	}
	ca, err := loadCA(dir)
	if err != nil {
		return fail(err)
	}
	if err := absent(dir, file+"-key.pem", file+".pem"); err != nil {
		return fail(err)
	}
	key, err := newKey()
	if err != nil {
		return fail(err)
	}
	cert, err := ca.sign(key.Public(), n, server, ttl, time.Now())
	if err != nil {
		return fail(err)
	}
	text, err := encodeKey(key)
	if err != nil {
		return fail(err)
	}
	if err := createFile(filepath.Join(dir, file+"-key.pem"), text); err != nil {
		return fail(err)
	}
	if err := createFile(filepath.Join(dir, file+".pem"), encodeCerts(cert)); err != nil {
		return fail(err)
	}
	return nil
}

// authority is a CA that can sign.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newCA(name string, ttl time.Duration, now time.Time) (*authority, error) {
	if ttl <= 0 {
		return nil, fmt.Errorf("create CA: a life of %s", ttl)
	}
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	number, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: number, Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-skew), NotAfter: now.Add(ttl),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{cert, key}, nil
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

// encode is the content of CAKeyFile: one file, so that it is there as a whole
// or not at all.
func (a *authority) encode() ([]byte, error) {
	key, err := encodeKey(a.key)
	if err != nil {
		return nil, err
	}
	return append(key, encodeCerts(a.cert)...), nil
}

func loadCA(dir string) (*authority, error) {
	name := filepath.Join(dir, CAKeyFile)
	b, err := loadPEM(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no CA in %s: %w", dir, err)
	}
	if err != nil {
		return nil, err
	}
	if len(b.keys) != 1 || len(b.certs) != 1 {
		return nil, fmt.Errorf("%s does not hold one key and its certificate", name)
	}
	a := &authority{b.certs[0], b.keys[0]}
	if !samePublic(a.key, a.cert) {
		return nil, fmt.Errorf("%s: %w", name, ErrKeyMismatch)
	}
	return a, nil
}

// sign makes a certificate. One of a server is a client's too.
func (a *authority) sign(public crypto.PublicKey, n names, server bool, ttl time.Duration, now time.Time) (*x509.Certificate, error) {
	if ttl <= 0 {
		return nil, fmt.Errorf("a life of %s", ttl)
	}
	number, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: number, Subject: pkix.Name{CommonName: n.common},
		NotBefore: now.Add(-skew), NotAfter: now.Add(ttl),
		BasicConstraintsValid: true,
		DNSNames:              n.dns, IPAddresses: n.ips, URIs: n.uris,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if server {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if t.NotAfter.After(a.cert.NotAfter) {
		t.NotAfter = a.cert.NotAfter
	}
	if !now.Before(t.NotAfter) {
		return nil, fmt.Errorf("the CA %q: %w at %s", a.cert.Subject, ErrExpired, a.cert.NotAfter.UTC().Format(time.RFC3339))
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, public, a.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
