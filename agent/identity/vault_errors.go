package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/hashicorp/vault/api"
)

// VaultError is a request to Vault that failed. It never holds a secret.
type VaultError struct {
	// Op is what was wanted.
	Op string
	// Address is Vault's, as configured.
	Address string
	// Status is the HTTP status that Vault answered with; 0 if it did not
	// answer.
	Status int
	// Sealed tells that Vault is sealed: somebody has to unseal it.
	Sealed bool
	// Err is the reason.
	Err error
}

func (e *VaultError) Error() string {
	status := ""
	if e.Status != 0 {
		status = fmt.Sprintf(" (status %d)", e.Status)
	}
	return fmt.Sprintf("vault at %s: %s: %v%s", e.Address, e.Op, e.Err, status)
}

func (e *VaultError) Unwrap() error { return e.Err }

// answered tells whether Vault was there and unsealed, whatever it said.
func answered(err error) bool {
	if err == nil {
		return true
	}
	var e *VaultError
	if !errors.As(err, &e) {
		return false
	}
	switch e.Status {
	case 0, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return false
	}
	return true
}

func isStatus(err error, status int) bool {
	var e *VaultError
	return errors.As(err, &e) && e.Status == status
}

// explain makes an error that says what to do, without secrets.
func (v *vaultSource) explain(ctx context.Context, op, token string, err error) error {
	e := &VaultError{Op: op, Address: v.cfg.Address}
	var resp *api.ResponseError
	if errors.As(err, &resp) {
		return v.refusal(e, token, resp)
	}
	if ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded) {
		e.Err = fmt.Errorf("no answer in time: %w", context.DeadlineExceeded)
		if errors.Is(ctx.Err(), context.Canceled) {
			e.Err = context.Cause(ctx)
		}
		return e
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // Op says it better than a URL
	}
	e.Err = errors.New(redacted(err.Error(), v.secrets(token)...))
	var unverified *tls.CertificateVerificationError
	var invalid x509.CertificateInvalidError // such as expired: it may be replaced
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &unverified) && !errors.As(err, &invalid):
		e.Err = fmt.Errorf("its certificate is not what vault.ca_file (%s) vouches for: %w", orMachine(v.cfg.CAFile), e.Err)
		return permanent(e)
	case errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch):
		e.Err = fmt.Errorf("it does not speak TLS: should vault.address begin with http://? %w", e.Err)
		return permanent(e)
	}
	return e
}

func orMachine(file string) string {
	if file == "" {
		return "empty: the machine's roots"
	}
	return file
}

func (v *vaultSource) refusal(e *VaultError, token string, resp *api.ResponseError) error {
	e.Status = resp.StatusCode
	text := redacted(strings.Join(resp.Errors, "; "), v.secrets(token)...)
	switch {
	case resp.StatusCode == http.StatusServiceUnavailable && strings.Contains(text, "sealed"):
		e.Sealed = true
		e.Err = errors.New("it is sealed")
	case resp.StatusCode == http.StatusBadRequest && strings.Contains(text, "HTTP request to an HTTPS server"):
		e.Err = errors.New("it speaks TLS: vault.address has to begin with https://")
		return permanent(e)
	case text == "":
		e.Err = errors.New(http.StatusText(resp.StatusCode))
	default:
		e.Err = errors.New(text)
	}
	return e
}

// unmendable marks a refusal to sign that waiting does not mend: the role does
// not allow the names. A role that is not there yet may be made.
func unmendable(err error) error {
	if !isStatus(err, http.StatusBadRequest) {
		return err
	}
	for _, text := range []string{"not allowed", "not valid for this role", "role requires"} {
		if strings.Contains(err.Error(), text) {
			return permanent(err)
		}
	}
	return err
}

// maxAnswer bounds what is read of an answer.
const maxAnswer = 8 << 20

// bounded cuts answers off that are longer than anything Vault sends.
type bounded struct{ *http.Transport }

func (b *bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.Transport.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, maxAnswer), resp.Body}
	return resp, nil
}
