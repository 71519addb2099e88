package identity

import (
	"crypto/x509"
	"time"
)

// Status tells how things are. It holds no secrets.
type Status struct {
	// Source is config's tls.source.
	Source string
	// FromCache tells that the certificate in use was issued to an earlier run.
	FromCache bool
	// Subject, Serial (hexadecimal), NotBefore and NotAfter are those of the
	// certificate in use.
	Subject             string
	Serial              string
	NotBefore, NotAfter time.Time
	// RenewAt is when it is to be renewed, or tried again; zero where it is not
	// for us to renew.
	RenewAt time.Time
	// Issuers are the subjects of the CAs that are trusted, Revoked is how many
	// certificates they took back.
	Issuers []string
	Revoked int
	// Renewals and RenewFailures count since Open; the first certificate
	// counts, one from the cache does not.
	Renewals, RenewFailures int
	// LastRenewal is when the last one succeeded.
	LastRenewal time.Time
	// LastError is why the last one failed; empty when it did not.
	LastError string
	// VaultUp tells that Vault answered when last asked, and was not sealed.
	// False with other sources.
	VaultUp bool
}

// Status returns how things are now.
func (i *Identity) Status() Status {
	i.mu.Lock()
	s := i.status
	s.Issuers = append([]string(nil), s.Issuers...)
	s.RenewAt = i.nextTry
	i.mu.Unlock()
	if v, ok := i.src.(*vaultSource); ok {
		s.VaultUp = v.up.Load()
	}
	return s
}

// Changed returns a channel that is closed at the next swap of certificate or
// trust. Ask for it before looking at Status, so that no swap is missed.
func (i *Identity) Changed() <-chan struct{} {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.changed
}

func (s *Status) certificate(leaf *x509.Certificate, renewAt time.Time) {
	s.Subject, s.Serial = subjectOf(leaf), serialOf(leaf)
	s.NotBefore, s.NotAfter, s.RenewAt = leaf.NotBefore, leaf.NotAfter, renewAt
}

func (s *Status) trust(t *trust) {
	s.Issuers = nil
	for _, a := range t.anchors {
		s.Issuers = append(s.Issuers, a.cert.Subject.String())
	}
	s.Revoked = len(t.revoked)
}
