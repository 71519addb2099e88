package identity

import (
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"maps"
	"strings"
	"time"
)

// anchor is a CA that is trusted.
type anchor struct {
	cert *x509.Certificate
	// gone is when the source first no longer listed it; zero while it does.
	gone time.Time
}

func (a anchor) id() string { return fmt.Sprint(a.gone.UnixNano(), string(a.cert.Raw)) }

// issuers are what a source says about whom to trust.
type issuers struct {
	certs []*x509.Certificate
	crls  []*x509.RevocationList
	// complete is false where some of it could not be read: then nothing is
	// taken to have vanished.
	complete bool
	// exact says that nothing else is to be trusted, also nothing that was.
	exact bool
	// problems are lists that could not be read.
	problems []error
}

// trust is whom to believe. It does not change; there is a new one instead.
type trust struct {
	anchors []anchor
	// crls has the latest list of each issuer that has one, by its key.
	crls map[keyID]*x509.RevocationList
	// pool holds the anchors, less those that another one revoked.
	pool *x509.CertPool
	// listed is the pool without those that have vanished.
	listed  *x509.CertPool
	revoked map[serial]struct{}
	// size is how many the pool holds.
	size int
}

// keyID tells issuers apart: by key, since a subject can be reused.
type keyID [sha256.Size]byte

type serial struct {
	issuer keyID
	number string
}

func keyOf(c *x509.Certificate) keyID { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }

func serialFor(c, issuer *x509.Certificate) serial {
	return serial{keyOf(issuer), string(c.SerialNumber.Bytes())}
}

// newTrust builds the pool. CRLs whose signature is not an anchor's do not
// count, and are returned as a problem.
func newTrust(anchors []anchor, crls []*x509.RevocationList) (*trust, error) {
	t := &trust{
		anchors: anchors, crls: make(map[keyID]*x509.RevocationList), revoked: make(map[serial]struct{}),
		pool: x509.NewCertPool(), listed: x509.NewCertPool(),
	}
	var problem error
	for _, crl := range crls {
		by := t.signer(crl)
		if by == nil {
			problem = fmt.Errorf("a revocation list of %q is signed by none of the trusted CAs", crl.Issuer)
			continue
		}
		id := keyOf(by)
		if have := t.crls[id]; have != nil && have.ThisUpdate.After(crl.ThisUpdate) {
			continue
		}
		t.crls[id] = crl
	}
	for id, crl := range t.crls {
		for _, entry := range crl.RevokedCertificateEntries {
			if entry.SerialNumber != nil {
				t.revoked[serial{id, string(entry.SerialNumber.Bytes())}] = struct{}{}
			}
		}
	}
	for _, a := range t.anchors {
		if t.revokedAnchor(a.cert) {
			continue
		}
		t.pool.AddCert(a.cert)
		t.size++
		if a.gone.IsZero() {
			t.listed.AddCert(a.cert)
		}
	}
	return t, problem
}

func (t *trust) signer(crl *x509.RevocationList) *x509.Certificate {
	for _, a := range t.anchors {
		if string(a.cert.RawSubject) == string(crl.RawIssuer) && crl.CheckSignatureFrom(a.cert) == nil {
			return a.cert
		}
	}
	return nil
}

// revokedAnchor tells a CA that another one took back.
func (t *trust) revokedAnchor(c *x509.Certificate) bool {
	for _, a := range t.anchors {
		_, bad := t.revoked[serialFor(c, a.cert)]
		if bad && c.CheckSignatureFrom(a.cert) == nil {
			return true
		}
	}
	return false
}

// revokedOf returns a revoked certificate that is in each of the chains, nil if
// one chain is without.
func (t *trust) revokedOf(chains [][]*x509.Certificate) *x509.Certificate {
	var bad *x509.Certificate
	for _, chain := range chains {
		at := t.revokedIn(chain)
		if at == nil {
			return nil
		}
		bad = at
	}
	return bad
}

func (t *trust) revokedIn(chain []*x509.Certificate) *x509.Certificate {
	for i := 0; i+1 < len(chain); i++ {
		if _, bad := t.revoked[serialFor(chain[i], chain[i+1])]; bad {
			return chain[i]
		}
	}
	return nil
}

// merge is the trust after a source was asked. An anchor that it no longer
// lists is kept for as long as a certificate may live that it signed, and a CA
// is gone at its end in any case.
func merge(old *trust, from *issuers, now time.Time, keep time.Duration) (*trust, error) {
	if from == nil {
		if old == nil {
			return nil, fmt.Errorf("there is no CA to trust")
		}
		return old, nil
	}
	var anchors []anchor
	var crls []*x509.RevocationList
	listed := make(map[string]bool)
	var problem error
	for _, c := range from.certs {
		switch {
		case listed[string(c.Raw)]:
		case !c.BasicConstraintsValid || !c.IsCA:
			problem = fmt.Errorf("%q is listed as a CA and is none", c.Subject)
		case now.After(c.NotAfter):
			problem = fmt.Errorf("the CA %q has expired at %s", c.Subject, c.NotAfter.UTC().Format(time.RFC3339))
		default:
			listed[string(c.Raw)] = true
			anchors = append(anchors, anchor{cert: c})
		}
	}
	if old != nil && !from.exact {
		for _, a := range old.anchors {
			if listed[string(a.cert.Raw)] || now.After(a.cert.NotAfter) {
				continue
			}
			if a.gone.IsZero() && from.complete {
				a.gone = now.Round(0) // by the wall's clock: it is kept on disk
			}
			if !a.gone.IsZero() && now.Sub(a.gone) > keep {
				continue
			}
			anchors = append(anchors, a)
		}
		for _, crl := range old.crls {
			crls = append(crls, crl)
		}
	}
	if len(anchors) == 0 {
		if problem == nil {
			problem = fmt.Errorf("there is no CA to trust")
		}
		return nil, problem
	}
	// The lists of CAs that are no longer trusted go with them, silently.
	mine := crls[:0]
	probe := &trust{anchors: anchors}
	for _, crl := range crls {
		if probe.signer(crl) != nil {
			mine = append(mine, crl)
		}
	}
	t, err := newTrust(anchors, append(mine, from.crls...))
	if err == nil {
		err = problem
	}
	return t, err
}

// same tells whether two trust the same. Revocation lists are made anew without
// anything new in them.
func (t *trust) same(o *trust) bool {
	if len(t.anchors) != len(o.anchors) || !maps.Equal(t.revoked, o.revoked) {
		return false
	}
	have := make(map[string]bool)
	for _, a := range o.anchors {
		have[a.id()] = true
	}
	for _, a := range t.anchors {
		if !have[a.id()] {
			return false
		}
	}
	return true
}

// subjects names the anchors, a few of them.
func (t *trust) subjects() string {
	const few = 5
	var names []string
	for _, a := range t.anchors {
		if len(names) == few {
			names = append(names, "…")
			break
		}
		names = append(names, fmt.Sprintf("%q", a.cert.Subject))
	}
	return strings.Join(names, ", ")
}
