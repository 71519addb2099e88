package identitytest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"slices"
	"time"
)

// signer is a CA of a Fake.
type signer struct {
	cert    *x509.Certificate
	key     *ecdsa.PrivateKey
	revoked []x509.RevocationListEntry
	lists   int64
}

// fakeCA is a root with an intermediate.
type fakeCA struct{ root, between, stranger *signer }

func newFakeCA() (*fakeCA, error) {
	root, err := newSigner("Fake root", nil)
	if err != nil {
		return nil, err
	}
	between, err := newSigner("Fake intermediate", root)
	if err != nil {
		return nil, err
	}
	stranger, err := newSigner("Stranger", nil)
	if err != nil {
		return nil, err
	}
	return &fakeCA{root, between, stranger}, nil
}

func newSigner(name string, by *signer) (*signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	s := &signer{key: key}
	t := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if by == nil {
		by = &signer{cert: t, key: key}
	}
	s.cert, err = by.sign(t, key.Public())
	return s, err
}

func (s *signer) sign(t *x509.Certificate, public crypto.PublicKey) (*x509.Certificate, error) {
	number, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	if err != nil {
		return nil, err
	}
	t.SerialNumber = number
	der, err := x509.CreateCertificate(rand.Reader, t, s.cert, public, s.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func (s *signer) crl() ([]byte, error) {
	s.lists++
	return x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(s.lists), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour),
		RevokedCertificateEntries: s.revoked,
	}, s.cert, s.key)
}

// list names the issuers of a mount: the intermediate's engine has no root.
func (c *fakeCA) list(mount string) []string {
	switch mount {
	case "pki_diurna":
		return []string{"between"}
	case "pki_diurna_root":
		return []string{"root"}
	}
	return nil
}

func (c *fakeCA) of(ref string) *signer {
	if ref == "root" {
		return c.root
	}
	return c.between
}

func (c *fakeCA) revoke(text []byte) error {
	block, _ := pem.Decode(text)
	if block == nil {
		return errors.New("no PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return err
	}
	by := c.between
	if cert.CheckSignatureFrom(c.root.cert) == nil {
		by = c.root
	}
	by.revoked = append(by.revoked, x509.RevocationListEntry{SerialNumber: cert.SerialNumber, RevocationTime: time.Now()})
	return nil
}

// sign answers a request for a certificate as the role says, and the faults.
func (f *Fake) sign(r *http.Request) (int, object) {
	var in struct{ CSR, TTL string }
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		return refuse(http.StatusBadRequest, "%v", err)
	}
	block, _ := pem.Decode([]byte(in.CSR))
	if block == nil {
		return refuse(http.StatusBadRequest, "csr contains no data")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return refuse(http.StatusBadRequest, "certificate request could not be parsed: %v", err)
	}
	for _, name := range csr.DNSNames {
		if len(f.allowed) > 0 && !slices.Contains(f.allowed, name) {
			return refuse(http.StatusBadRequest, "subject alternate name %s not allowed by this role", name)
		}
	}
	now := time.Now()
	t := &x509.Certificate{
		Subject: csr.Subject, DNSNames: csr.DNSNames, IPAddresses: csr.IPAddresses, URIs: csr.URIs,
		NotBefore: now.Add(-30 * time.Second), NotAfter: now.Add(f.ttl), BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	public := csr.PublicKey
	by := f.ca.between
	faults := f.faults
	if faults.NotBefore != 0 {
		t.NotBefore = now.Add(faults.NotBefore)
	}
	if faults.NotAfter != 0 {
		t.NotAfter = now.Add(faults.NotAfter)
	}
	if faults.NoNames {
		t.DNSNames, t.URIs = nil, nil
	}
	if faults.ClientOnly {
		t.ExtKeyUsage = t.ExtKeyUsage[1:]
	}
	if faults.Mismatch {
		public = f.ca.stranger.key.Public()
	}
	if faults.OtherCA {
		by = f.ca.stranger
	}
	cert, err := by.sign(t, public)
	if err != nil {
		return refuse(http.StatusInternalServerError, "%v", err)
	}
	chain := []string{encode("CERTIFICATE", by.cert.Raw)}
	if faults.Rooted {
		chain = append(chain, encode("CERTIFICATE", f.ca.root.cert.Raw))
	}
	data := object{"certificate": encode("CERTIFICATE", cert.Raw), "issuing_ca": chain[0], "ca_chain": chain}
	if faults.NoChain {
		delete(data, "ca_chain")
		delete(data, "issuing_ca")
	}
	return http.StatusOK, object{"data": data}
}
