package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"path"
	"slices"

	"github.com/hashicorp/vault/api"
)

// maxIssuers bounds how many CAs one engine may name.
const maxIssuers = 100

// issuers are the CAs of all mounts, with their revocation lists. These are
// public: no token is needed, so that who has no token any more still learns of
// a new root. Where some mounts fail, those of the others are returned beside
// the error, and nothing if the mount that signs fails.
func (v *vaultSource) issuers(ctx context.Context) (*issuers, error) {
	from := &issuers{complete: true}
	var problems []error
	for k, mount := range append([]string{v.cfg.PKIMount}, v.cfg.CAMounts...) {
		err := v.mountIssuers(ctx, mount, from)
		if err == nil {
			continue
		}
		if k == 0 || isPermanent(err) {
			return nil, err
		}
		from.complete = false
		problems = append(problems, err)
	}
	return from, errors.Join(append(problems, from.problems...)...)
}

func (v *vaultSource) mountIssuers(ctx context.Context, mount string, from *issuers) error {
	op := "list the issuers of " + mount
	secret, err := v.call(ctx, op, "", func(ctx context.Context, l *api.Logical) (*api.Secret, error) {
		return l.ListWithContext(ctx, path.Join(mount, "issuers"))
	})
	if err != nil {
		return err
	}
	var keys []any
	var info map[string]any
	if secret != nil {
		keys, _ = secret.Data["keys"].([]any) // absent is none
		info, _ = secret.Data["key_info"].(map[string]any)
	}
	switch {
	case len(keys) == 0:
		return &VaultError{Op: op, Address: v.cfg.Address, Err: errors.New("there are none: is a PKI engine mounted there, with a CA? scripts/vault-pki.sh sets it up")}
	case len(keys) > maxIssuers:
		return &VaultError{Op: op, Address: v.cfg.Address, Err: fmt.Errorf("there are %d, more than %d", len(keys), maxIssuers)}
	}
	for _, key := range keys {
		ref, ok := key.(string)
		if !ok {
			continue
		}
		// Asked for the list of a CA that it has not the key of, Vault fails.
		about, _ := info[ref].(map[string]any)
		lists := about["key_id"] != ""
		if err := v.issuer(ctx, path.Join(mount, "issuer", ref), lists, from); err != nil {
			return err
		}
	}
	return nil
}

// issuer adds one CA and, if it lists them, what it revoked.
func (v *vaultSource) issuer(ctx context.Context, at string, lists bool, from *issuers) error {
	op := "read " + at
	b, err := v.readPEM(ctx, op, path.Join(at, "json"), "certificate")
	if err != nil {
		return err
	}
	if len(b.certs) != 1 {
		return &VaultError{Op: op, Address: v.cfg.Address, Err: fmt.Errorf("%d certificates, not one", len(b.certs))}
	}
	if !slices.ContainsFunc(from.certs, b.certs[0].Equal) {
		from.certs = append(from.certs, b.certs[0])
	}
	if !lists || b.certs[0].KeyUsage&x509.KeyUsageCRLSign == 0 {
		return nil
	}
	b, err = v.readPEM(ctx, "read the revocation list of "+at, path.Join(at, "crl"), "crl")
	if err != nil {
		// Not knowing the newest list is no reason not to know the CA. The one
		// before stays in force.
		from.problems = append(from.problems, err)
		return nil
	}
	from.crls = append(from.crls, b.crls...)
	return nil
}

// readPEM reads a field of a public answer. One that is not there is empty.
func (v *vaultSource) readPEM(ctx context.Context, op, at, field string) (*bundle, error) {
	secret, err := v.call(ctx, op, "", func(ctx context.Context, l *api.Logical) (*api.Secret, error) {
		return l.ReadWithContext(ctx, at)
	})
	if err != nil {
		return nil, err
	}
	var text string
	if secret != nil {
		text, _ = secret.Data[field].(string) // absent is empty
	}
	b, err := parsePEM([]byte(text))
	if err != nil {
		return nil, &VaultError{Op: op, Address: v.cfg.Address, Err: err}
	}
	return b, nil
}
