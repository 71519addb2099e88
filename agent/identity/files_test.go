package identity

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/config"
)

// folder has the files of config.TLSFiles.
type folder struct{ dir string }

func (f folder) name(file string) string { return filepath.Join(f.dir, file) }

func (f folder) config(t *testing.T) (Config, *logs) {
	logger, l := newLogs(t, nil)
	return Config{
		TLS:     config.TLS{Source: config.TLSFiles, CertFile: f.name("cert.pem"), KeyFile: f.name("key.pem"), CAFile: f.name("ca.pem")},
		Cluster: "Test", Logger: logger,
	}, l
}

func (f folder) put(t *testing.T, p *pair, cas ...*authority) {
	t.Helper()
	f.putCert(t, p)
	f.putKey(t, p)
	var text []byte
	for _, ca := range cas {
		text = append(text, encodeCerts(ca.cert)...)
	}
	write(t, f.name("ca.pem"), string(text))
}

func (f folder) putCert(t *testing.T, p *pair) {
	write(t, f.name("cert.pem"), string(encodeCerts(p.leaf)))
}

func (f folder) putKey(t *testing.T, p *pair) {
	text, err := encodeKey(p.key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, f.name("key.pem"), string(text))
}

// TestFiles has files replaced by others, good and bad.
func TestFiles(t *testing.T) {
	ca, next := authorityFor(t, "ca"), authorityFor(t, "next")
	now := time.Now()
	f := folder{t.TempDir()}
	first := ca.issue(t, nodeNames("n1"), true, time.Hour, now)
	f.put(t, first, ca)
	cfg, l := f.config(t)
	i := mustOpen(t, cfg, hurried())
	if s := i.Status(); s.Serial != serialOf(first.leaf) || !s.RenewAt.IsZero() || s.Source != "files" {
		t.Errorf("status %+v", s)
	}
	for range 3 {
		if i.src.changed() {
			t.Error("what was just read is new")
		}
	}
	start(t, i)

	second := ca.issue(t, nodeNames("n1"), true, time.Hour, now)
	f.putCert(t, second)
	await(t, i, "the pair that does not fit is seen", func(s Status) bool { return s.RenewFailures == 1 })
	if s := i.Status(); s.Serial != serialOf(first.leaf) || !strings.Contains(s.LastError, "is for another key") {
		t.Errorf("status %+v", s)
	}
	f.putKey(t, second)
	await(t, i, "the second is used", func(s Status) bool { return s.Serial == serialOf(second.leaf) && s.LastError == "" })

	// A reload does not wait, and says what is wrong.
	write(t, f.name("ca.pem"), "-----BEGIN CERTIFICATE-----\n")
	if err := i.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), f.name("ca.pem")) {
		t.Errorf("a reload of a bad file: %v", err)
	}
	third := next.issue(t, nodeNames("n1"), true, time.Hour, now)
	f.put(t, third, next)
	if err := i.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	s := i.Status()
	if s.Serial != serialOf(third.leaf) || len(s.Issuers) != 1 || s.Issuers[0] != "CN=next" {
		t.Errorf("status %+v", s)
	}
	// A file is a whole: what is no longer in it is not trusted.
	if _, err := second.verify(now, i.cur.Load().trust.pool); err == nil {
		t.Error("the old CA is still trusted")
	}

	// Nothing is tried again and again, nor said again.
	tries := i.Status().RenewFailures
	write(t, f.name("key.pem"), "rubbish")
	await(t, i, "the rubbish is seen", func(s Status) bool { return s.RenewFailures > tries })
	for range 20 {
		i.src.changed()
	}
	if s := i.Status(); s.RenewFailures != tries+1 {
		t.Errorf("tried %d times", s.RenewFailures-tries)
	}
	if n := l.count("holds 0 keys"); n != 1 {
		t.Errorf("%d lines about it", n)
	}
	if err := os.Remove(f.name("key.pem")); err != nil {
		t.Fatal(err)
	}
	await(t, i, "the removed file is seen", func(s Status) bool { return strings.Contains(s.LastError, "no such file") })
}

// TestBadFiles has Open name the file and the trouble, at once.
func TestBadFiles(t *testing.T) {
	ca, stranger := authorityFor(t, "ca"), authorityFor(t, "stranger")
	now := time.Now()
	issue := func(n names, server bool, at time.Time) *pair { return ca.issue(t, n, server, time.Hour, at) }
	good := issue(nodeNames("n1"), true, now)
	for name, tc := range map[string]struct {
		pair   *pair
		ca     *authority
		change func(folder)
		is     error
		says   string
	}{
		"expired":         {pair: issue(nodeNames("n1"), true, now.Add(-2*time.Hour)), is: ErrExpired},
		"not yet valid":   {pair: issue(nodeNames("n1"), true, now.Add(30*time.Minute)), is: ErrNotYetValid},
		"a client's":      {pair: issue(clientNames("Test", "app"), false, now), is: ErrWrongRole, says: "lacks the DNS name server.test.diurna"},
		"not for servers": {pair: issue(nodeNames("n1"), false, now), is: ErrWrongRole, says: "lacks server authentication"},
		"wrong CA":        {ca: stranger, is: ErrUntrusted},
		"no certificate":  {change: func(f folder) { write(t, f.name("cert.pem"), "") }, says: "cert.pem holds no certificate"},
		"no CA":           {change: func(f folder) { write(t, f.name("ca.pem"), "") }, says: "ca.pem holds no certificate"},
		"CA that is none": {change: func(f folder) { write(t, f.name("ca.pem"), string(encodeCerts(good.leaf))) }, says: "is listed as a CA and is none"},
		"key of another":  {change: func(f folder) { f.putKey(t, issue(nodeNames("n1"), true, now)) }, is: ErrKeyMismatch, says: "cert.pem and"},
		"no key":          {change: func(f folder) { write(t, f.name("key.pem"), "") }, says: "key.pem holds 0 keys"},
		"absent":          {change: func(f folder) { _ = os.Remove(f.name("cert.pem")) }, is: os.ErrNotExist, says: "tls.cert_file: open"},
		"damaged":         {change: func(f folder) { damage(t, f.name("cert.pem")) }, says: "cert.pem: a PEM block is damaged"},
		"encrypted": {change: func(f folder) {
			write(t, f.name("key.pem"), "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
		}, says: "the private key is encrypted"},
		"key that is none": {change: func(f folder) {
			write(t, f.name("key.pem"), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
		}, says: "cannot be parsed"},
		"something else in it": {change: func(f folder) {
			write(t, f.name("ca.pem"), "-----BEGIN PGP MESSAGE-----\nAAAA\n-----END PGP MESSAGE-----\n")
		}, says: "unexpected PEM block"},
	} {
		t.Run(name, func(t *testing.T) {
			f := folder{t.TempDir()}
			p, by := tc.pair, tc.ca
			if p == nil {
				p = good
			}
			if by == nil {
				by = ca
			}
			f.put(t, p, by)
			if tc.change != nil {
				tc.change(f)
			}
			cfg, _ := f.config(t)
			_, err := Open(t.Context(), cfg)
			if err == nil || !strings.Contains(err.Error(), tc.says) || tc.is != nil && !errors.Is(err, tc.is) {
				t.Fatalf("error %v, which should say %q and be %v", err, tc.says, tc.is)
			}
			text, _ := encodeKey(p.key)
			noSecrets(t, err.Error(), func() []string { return []string{string(text)} })
		})
	}
}

func damage(t *testing.T, name string) {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	write(t, name, string(text[:len(text)/2]))
}

// TestFilesOfAnotherPKI reads what openssl and others write: text around the
// blocks, the chain with its root, another kind of key, a revocation list
// beside the CA.
func TestFilesOfAnotherPKI(t *testing.T) {
	ca := authorityFor(t, "ca")
	p := ca.issue(t, nodeNames("n1"), true, time.Hour, time.Now())
	f := folder{t.TempDir()}
	der, err := x509.MarshalECPrivateKey(p.key.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	write(t, f.name("key.pem"), "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"+block("EC PRIVATE KEY", der))
	write(t, f.name("cert.pem"), "Certificate:\n  Data: x\n"+string(encodeCerts(p.leaf, ca.cert)))
	bad := ca.issue(t, nodeNames("n2"), true, time.Hour, time.Now())
	write(t, f.name("ca.pem"), string(encodeCerts(ca.cert))+block("X509 CRL", ca.crl(t, 1, bad.leaf).Raw))
	cfg, _ := f.config(t)
	i := mustOpen(t, cfg, hurried())
	if s := i.Status(); s.Revoked != 1 {
		t.Errorf("status %+v", s)
	}
	if n := len(i.cur.Load().pair.cert.Certificate); n != 1 {
		t.Errorf("%d certificates are sent: the root is of no use to anybody", n)
	}
}

func block(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}
