package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// The types of PEM blocks.
const (
	pemCertificate = "CERTIFICATE"
	pemKey         = "PRIVATE KEY"
	pemCRL         = "X509 CRL"
)

// maxPEM bounds a file or an answer that is parsed. The largest bundle of
// public CAs has a quarter of it.
const maxPEM = 1 << 20

// bundle is what a PEM text holds, in its order.
type bundle struct {
	certs []*x509.Certificate
	crls  []*x509.RevocationList
	keys  []crypto.Signer
	// headers are those of the certificates.
	headers []map[string]string
}

// parsePEM reads certificates, revocation lists and keys. What is between
// blocks is ignored, as everywhere, but a block that it does not know or that
// is damaged is an error: half of a file is worse than none.
func parsePEM(text []byte) (*bundle, error) {
	if len(text) > maxPEM {
		return nil, fmt.Errorf("%d bytes, more than %d", len(text), maxPEM)
	}
	b := &bundle{}
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			if bytes.Contains(text, []byte("-----BEGIN")) {
				return nil, errors.New("a PEM block is damaged or cut off")
			}
			return b, nil
		}
		// Decode skips a damaged block that an intact one follows.
		if bytes.Count(text[:len(text)-len(rest)], []byte("-----BEGIN")) != 1 {
			return nil, errors.New("a PEM block is damaged")
		}
		text = rest
		if err := b.add(block); err != nil {
			return nil, err
		}
	}
}

func (b *bundle) add(block *pem.Block) error {
	switch block.Type {
	case pemCertificate:
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return fmt.Errorf("parse certificate: %w", err)
		}
		b.certs = append(b.certs, c)
		b.headers = append(b.headers, block.Headers)
	case pemCRL:
		crl, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return fmt.Errorf("parse revocation list: %w", err)
		}
		b.crls = append(b.crls, crl)
	case pemKey, "EC PRIVATE KEY", "RSA PRIVATE KEY":
		key, err := parseKey(block)
		if err != nil {
			// Not wrapped: nothing of a key's bytes belongs into an error.
			return errors.New("the private key cannot be parsed")
		}
		b.keys = append(b.keys, key)
	case "EC PARAMETERS": // openssl puts them before a key
	case "ENCRYPTED PRIVATE KEY":
		return errors.New("the private key is encrypted: nobody is there to type its passphrase")
	default:
		return fmt.Errorf("unexpected PEM block %.40q", block.Type)
	}
	return nil
}

func parseKey(block *pem.Block) (crypto.Signer, error) {
	var key any
	var err error
	switch block.Type {
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("it cannot sign")
	}
	return signer, nil
}

// newKey makes a P-256 key.
func newKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der}), nil
}

func encodeCerts(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: c.Raw})...)
	}
	return out
}

// samePublic tells whether a key is the one of a certificate.
func samePublic(key crypto.Signer, c *x509.Certificate) bool {
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(c.PublicKey)
}
