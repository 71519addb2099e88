package identity

import (
	"errors"
	"strings"
)

// What can be wrong with a certificate. Errors of this package wrap them.
var (
	// ErrExpired is a certificate whose life is over.
	ErrExpired = errors.New("the certificate has expired")
	// ErrNotYetValid is a certificate whose life has not begun: mostly a clock
	// is wrong.
	ErrNotYetValid = errors.New("the certificate is not valid yet")
	// ErrKeyMismatch is a certificate for another key.
	ErrKeyMismatch = errors.New("the certificate is for another key")
	// ErrWrongRole is a certificate that does not make its holder a server of
	// this cluster.
	ErrWrongRole = errors.New("the certificate is not that of a server of this cluster")
	// ErrUntrusted is a certificate that none of the trusted CAs vouches for.
	ErrUntrusted = errors.New("no trusted CA vouches for the certificate")
	// ErrRevoked is a certificate that its CA took back.
	ErrRevoked = errors.New("the certificate is revoked")
	// ErrNoCertificate is a Raft stream by somebody who shows no certificate.
	ErrNoCertificate = errors.New("a Raft stream needs a certificate")
)

// permanentError is one that waiting does not mend.
type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }

func permanent(err error) error { return &permanentError{err} }

func isPermanent(err error) bool {
	var p *permanentError
	return errors.As(err, &p)
}

// redacted returns an error's text without the secrets, should an answer repeat
// one, on one line and of bounded length.
func redacted(text string, secrets ...string) string {
	for _, s := range secrets {
		if len(s) >= 4 {
			text = strings.ReplaceAll(text, s, "[secret]")
		}
	}
	text = strings.Join(strings.Fields(text), " ")
	const limit = 400
	if len(text) > limit {
		text = strings.ToValidUTF8(text[:limit], "") + "…"
	}
	return text
}

// causes tells whether a problem is new, so that it is logged once and not at
// each try.
type causes struct{ last string }

// isNew compares without digits: the ports of connections differ in each try.
func (c *causes) isNew(err error) bool {
	cause := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, err.Error())
	if cause == c.last {
		return false
	}
	c.last = cause
	return true
}

func (c *causes) clear() { c.last = "" }
