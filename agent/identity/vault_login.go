package identity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"path"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/diurnalog/diurna/agent/config"
)

// kubernetesJWT is where Kubernetes puts a pod's token.
const kubernetesJWT = "/var/run/secrets/kubernetes.io/serviceaccount/token"

// token is one that a login gave. It does not change; a renewal makes another.
type token struct {
	id        string
	renewable bool
	// granted is the lease of the login, which renewals cannot exceed.
	granted time.Duration
	// expires is when Vault forgets it; zero is never.
	expires time.Time
	// keepAt is when to renew it, or to log in again; zero is never.
	keepAt time.Time
}

func newToken(a *api.SecretAuth, granted time.Duration, now time.Time, r float64) *token {
	t := &token{id: a.ClientToken, renewable: a.Renewable, granted: granted}
	lease := time.Duration(a.LeaseDuration) * time.Second
	if t.granted == 0 {
		t.granted = lease
	}
	if lease > 0 {
		t.expires = now.Add(lease)
		t.keepAt = now.Add(time.Duration(float64(lease) * (0.6 + r*0.1)))
	}
	return t
}

// worthRenewing tells whether renewing can work.
func (t *token) worthRenewing(now time.Time) bool {
	return t.renewable && now.Before(t.expires)
}

// ours tells whether tokens are obtained by a login, and so for us to keep
// alive. Others are somebody else's.
func (v *vaultSource) ours() bool {
	return v.cfg.Auth != config.VaultToken && v.cfg.Auth != config.VaultTokenFile
}

// authorised makes a request with the token. One that is refused is tried once
// more with another token, if there may be one.
func (v *vaultSource) authorised(ctx context.Context, op string, do func(context.Context, *api.Logical) (*api.Secret, error)) (*api.Secret, error) {
	id, err := v.currentToken(ctx)
	if err != nil {
		return nil, err
	}
	secret, err := v.call(ctx, op, id, do)
	if !isStatus(err, http.StatusForbidden) {
		return secret, err
	}
	// It was revoked, Vault has lost it, or its policies have changed.
	v.forget(id)
	other, lerr := v.currentToken(ctx)
	if lerr != nil {
		return nil, lerr
	}
	if other != id {
		if secret, err = v.call(ctx, op, other, do); !isStatus(err, http.StatusForbidden) {
			return secret, err
		}
		v.forget(other)
	}
	return nil, fmt.Errorf("%w: the token is not valid, or its policies do not allow it (vault.auth = %q)", err, v.cfg.Auth)
}

// currentToken is the token to use, obtained first where there is none.
func (v *vaultSource) currentToken(ctx context.Context) (string, error) {
	switch v.cfg.Auth {
	case config.VaultToken:
		return v.cfg.Token, nil
	case config.VaultTokenFile:
		return v.readSecret("vault.token_file", v.cfg.TokenFile) // each time: it changes
	}
	select {
	case v.loggingIn <- struct{}{}:
		defer func() { <-v.loggingIn }()
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	now := v.opts.now()
	if t := v.held(); t != nil && (t.expires.IsZero() || now.Before(t.expires)) {
		return t.id, nil
	}
	t, err := v.login(ctx)
	if err != nil {
		return "", err
	}
	v.hold(t)
	kick(v.fresh)
	return t.id, nil
}

func (v *vaultSource) held() *token {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.token
}

func (v *vaultSource) hold(t *token) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.token = t
}

// forget drops a token that does not work, unless there is another by now.
func (v *vaultSource) forget(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.token != nil && v.token.id == id {
		v.token = nil
	}
}

// login obtains a token. What it logs in with is read from its file each time.
func (v *vaultSource) login(ctx context.Context) (*token, error) {
	at := path.Join("auth", v.cfg.AuthMount, "login")
	data := make(map[string]any)
	var secret string
	var err error
	switch v.cfg.Auth {
	case config.VaultAppRole:
		if secret = v.cfg.SecretID; v.cfg.SecretIDFile != "" {
			secret, err = v.readSecret("vault.secret_id_file", v.cfg.SecretIDFile)
		}
		data["role_id"], data["secret_id"] = v.cfg.RoleID, secret
	case config.VaultKubernetes, config.VaultJWT:
		secret, err = v.readSecret("vault.jwt_file", v.cfg.JWTFile)
		data["role"], data["jwt"] = v.cfg.AuthRole, secret
	default:
		err = permanent(fmt.Errorf("vault.auth = %q is not known", v.cfg.Auth))
	}
	if err != nil {
		return nil, err
	}
	op := fmt.Sprintf("log in by %s at %s", v.cfg.Auth, at)
	answer, err := v.call(ctx, op, "", func(ctx context.Context, l *api.Logical) (*api.Secret, error) {
		return l.WriteWithContext(ctx, at, data)
	})
	if err != nil {
		var e *VaultError
		if errors.As(err, &e) {
			e.Err = errors.New(redacted(e.Err.Error(), secret))
		}
		return nil, err
	}
	if answer == nil || answer.Auth == nil || answer.Auth.ClientToken == "" {
		return nil, &VaultError{Op: op, Address: v.cfg.Address, Err: errors.New("the answer holds no token")}
	}
	t := newToken(answer.Auth, 0, v.opts.now(), v.opts.random())
	v.logger.Debug("logged in to Vault", "auth", v.cfg.Auth, "mount", v.cfg.AuthMount, "lease", t.granted, "renewable", t.renewable)
	return t, nil
}

// readSecret reads a file of one line.
func (v *vaultSource) readSecret(key, name string) (string, error) {
	text, err := readFile(name)
	if err != nil {
		return "", fmt.Errorf("%s: %w", key, err)
	}
	text = bytes.TrimSpace(text)
	if len(text) == 0 {
		return "", fmt.Errorf("%s: %s is empty", key, name)
	}
	if bytes.ContainsAny(text, "\r\n\x00") {
		return "", fmt.Errorf("%s: %s holds more than one line", key, name)
	}
	return string(text), nil
}

// secrets are what no text may repeat.
func (v *vaultSource) secrets(token string) []string {
	s := []string{token, v.cfg.Token, v.cfg.SecretID}
	if t := v.held(); t != nil {
		s = append(s, t.id)
	}
	return s
}

// run keeps the token that a login gave alive, so that a renewal need not log
// in, which may be limited.
func (v *vaultSource) run(ctx context.Context) {
	defer v.close()
	if !v.ours() {
		<-ctx.Done()
		return
	}
	fails := 0
	var seen causes
	retry := time.Time{}
	for {
		wait := time.Hour // nothing to keep: until there is
		if t := v.held(); t != nil && !t.keepAt.IsZero() {
			at := t.keepAt
			if retry.After(at) {
				at = retry
			}
			wait = max(at.Sub(v.opts.now()), 0)
		}
		timer := time.NewTimer(min(wait, time.Minute))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-v.fresh:
			timer.Stop()
			fails, retry = 0, time.Time{}
			continue
		case <-timer.C:
		}
		t := v.held()
		if t == nil || t.keepAt.IsZero() || v.opts.now().Before(t.keepAt) || v.opts.now().Before(retry) {
			continue
		}
		err := v.keepToken(ctx, t)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			fails, retry = 0, time.Time{}
			seen.clear()
		default:
			if seen.isNew(err) {
				v.logger.Warn("cannot keep the token for Vault alive", "expires", t.expires, "error", err)
			}
			retry = v.opts.now().Add(v.opts.timing.retryAfter(fails, t.expires.Sub(v.opts.now()), v.opts.random()))
			fails++
		}
	}
}

// keepToken renews a token, or replaces it.
func (v *vaultSource) keepToken(ctx context.Context, t *token) error {
	if t.worthRenewing(v.opts.now()) {
		answer, err := v.call(ctx, "renew the token", t.id, func(ctx context.Context, l *api.Logical) (*api.Secret, error) {
			return l.WriteWithContext(ctx, "auth/token/renew-self", map[string]any{})
		})
		if err == nil && answer != nil && answer.Auth != nil {
			next := newToken(answer.Auth, t.granted, v.opts.now(), v.opts.random())
			next.id = t.id
			// Shortly before its longest life, leases shrink to nothing.
			if lease := next.expires.Sub(v.opts.now()); next.expires.IsZero() || lease > t.granted/4 {
				v.replace(t, next)
				return nil
			}
		} else if err != nil && !isStatus(err, http.StatusForbidden) && !isStatus(err, http.StatusBadRequest) {
			return err
		}
	}
	// It is lost or about to be: Vault came back empty, or its time is over.
	fresh, err := v.login(ctx)
	if err != nil {
		return err
	}
	v.replace(t, fresh)
	return nil
}

// replace swaps a token, unless somebody else did.
func (v *vaultSource) replace(old, by *token) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.token == old {
		v.token = by
	}
}

func (v *vaultSource) close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.httpc.CloseIdleConnections()
}
