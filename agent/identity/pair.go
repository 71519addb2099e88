package identity

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// pair is a certificate with its key and the certificates that lead to a CA. It
// does not change.
type pair struct {
	cert *tls.Certificate
	key  crypto.Signer
	leaf *x509.Certificate
	// above are the certificates that are sent besides the leaf.
	above []*x509.Certificate
}

// newPair checks that key and certificate belong together. The chain begins
// with the leaf; roots in it are not sent, since whoever does not have them
// does not trust them either.
func newPair(key crypto.Signer, chain []*x509.Certificate) (*pair, error) {
	if len(chain) == 0 {
		return nil, errors.New("there is no certificate")
	}
	p := &pair{key: key, leaf: chain[0]}
	if !samePublic(key, p.leaf) {
		return nil, fmt.Errorf("%s: %w", subjectOf(p.leaf), ErrKeyMismatch)
	}
	p.cert = &tls.Certificate{PrivateKey: key, Leaf: p.leaf, Certificate: [][]byte{p.leaf.Raw}}
	for _, c := range chain[1:] {
		root := c.CheckSignatureFrom(c) == nil
		if root || c.Equal(p.leaf) || slices.ContainsFunc(p.above, c.Equal) {
			continue
		}
		p.above = append(p.above, c)
		p.cert.Certificate = append(p.cert.Certificate, c.Raw)
	}
	return p, nil
}

// check tells why a server of the cluster cannot use this certificate.
func (p *pair) check(now time.Time, serverName string, t *trust) error {
	// Not the serial number: each try has another, and the same trouble.
	fail := func(err error) error { return fmt.Errorf("%s: %w", subjectOf(p.leaf), err) }
	switch {
	case now.After(p.leaf.NotAfter):
		return fail(fmt.Errorf("%w: at %s", ErrExpired, p.leaf.NotAfter.UTC().Format(time.RFC3339)))
	case now.Before(p.leaf.NotBefore):
		return fail(fmt.Errorf("%w: it will be at %s, and this machine's clock says %s", ErrNotYetValid,
			p.leaf.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)))
	case !holdsDNS(p.leaf, serverName):
		return fail(fmt.Errorf("%w: it lacks the DNS name %s", ErrWrongRole, serverName))
	}
	for _, need := range []struct {
		usage x509.ExtKeyUsage
		name  string
	}{{x509.ExtKeyUsageServerAuth, "server"}, {x509.ExtKeyUsageClientAuth, "client"}} {
		if !allows(p.leaf, need.usage) {
			return fail(fmt.Errorf("%w: its extended key usage lacks %s authentication", ErrWrongRole, need.name))
		}
	}
	chains, err := p.verify(now, t.pool)
	if err != nil {
		return fail(fmt.Errorf("%w: issued by %q, and trusted are %s (%w)", ErrUntrusted, p.leaf.Issuer, t.subjects(), err))
	}
	if bad := t.revokedOf(chains); bad != nil {
		return fail(fmt.Errorf("%w: serial %s", ErrRevoked, serialOf(bad)))
	}
	return nil
}

// verify finds the chains to CAs of the pool, as a peer would.
func (p *pair) verify(now time.Time, pool *x509.CertPool) ([][]*x509.Certificate, error) {
	between := x509.NewCertPool()
	for _, c := range p.above {
		between.AddCert(c)
	}
	return p.leaf.Verify(x509.VerifyOptions{
		Roots: pool, Intermediates: between, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
}

func allows(c *x509.Certificate, usage x509.ExtKeyUsage) bool {
	return slices.Contains(c.ExtKeyUsage, usage) || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny)
}

// life is how long a certificate lives in all.
func life(c *x509.Certificate) time.Duration { return c.NotAfter.Sub(c.NotBefore) }
