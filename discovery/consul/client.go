package consul

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"unicode/utf8"

	"github.com/hashicorp/consul/api"
)

// Error is a request that Consul did not do.
type Error struct {
	Address string // of the Consul agent
	Op      string // what was asked for
	Hint    string // what to do about it; may be empty
	Err     error  // an api.StatusError if Consul answered
}

func (e *Error) Error() string {
	text := e.Err.Error()
	var status api.StatusError
	if errors.As(e.Err, &status) {
		text = fmt.Sprintf("status %d: %s", status.Code, clip(strings.TrimSpace(status.Body), 300))
	}
	if e.Hint != "" {
		text += " (" + e.Hint + ")"
	}
	return fmt.Sprintf("consul at %s: %s: %s", e.Address, e.Op, text)
}

func (e *Error) Unwrap() error { return e.Err }

// statusOf returns the HTTP status of an answer that was an error, 0 if there
// was no answer.
func statusOf(err error) int {
	var status api.StatusError
	if errors.As(err, &status) {
		return status.Code
	}
	return 0
}

// unknown tells that the agent does not know the check or service that a
// request named. Agents of different ages say it in different ways.
func unknown(err error) bool {
	var status api.StatusError
	if !errors.As(err, &status) {
		return false
	}
	body := strings.ToLower(status.Body)
	return status.Code == http.StatusNotFound ||
		status.Code == http.StatusInternalServerError &&
			(strings.Contains(body, "unknown") || strings.Contains(body, "does not have associated ttl"))
}

// client is the API with a token that may change.
type client struct {
	cfg *Config
	api *api.Client
	// closeIdle closes connections that wait for their next request.
	closeIdle func()
	// envToken says that the API adds a token from the environment to requests
	// that have none.
	envToken bool

	mu    sync.Mutex
	token string
}

func newClient(cfg *Config) (*client, error) {
	ac := api.DefaultConfig() // with a connection pool of its own
	ac.Address = cfg.Address
	if cfg.Scheme != "" {
		ac.Scheme = cfg.Scheme
	}
	c := &client{cfg: cfg, token: cfg.Token, closeIdle: ac.Transport.CloseIdleConnections}
	if _, err := c.rereadToken(); err != nil {
		return nil, err
	}
	ac.TokenFile = "" // read here
	if c.token != "" {
		ac.Token = c.token
	}
	c.envToken = ac.Token != ""
	ac.Datacenter, ac.Namespace, ac.Partition = cfg.Datacenter, cfg.Namespace, cfg.Partition
	set := func(p *string, v string) {
		if v != "" {
			*p = v
		}
	}
	set(&ac.TLSConfig.CAFile, cfg.CAFile)
	set(&ac.TLSConfig.CertFile, cfg.CertFile)
	set(&ac.TLSConfig.KeyFile, cfg.KeyFile)
	set(&ac.TLSConfig.Address, cfg.ServerName)
	ac.TLSConfig.InsecureSkipVerify = ac.TLSConfig.InsecureSkipVerify || cfg.SkipVerify
	hc, err := api.NewHttpClient(ac.Transport, ac.TLSConfig)
	if err != nil {
		return nil, fmt.Errorf("consul at %s: TLS files: %w", cfg.Address, err)
	}
	// Consul redirects only to its UI, and a token must not follow anywhere.
	hc.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	ac.HttpClient = hc
	if c.api, err = api.NewClient(ac); err != nil {
		return nil, fmt.Errorf("consul at %s: %w", cfg.Address, err)
	}
	return c, nil
}

// rereadToken takes the token from its file and tells whether it is another
// one. A file that is empty or gone leaves the old one in use.
func (c *client) rereadToken() (changed bool, err error) {
	if c.cfg.TokenFile == "" {
		return false, nil
	}
	text, err := os.ReadFile(c.cfg.TokenFile)
	if err != nil {
		return false, fmt.Errorf("consul's token file: %w", err)
	}
	token := strings.TrimSpace(string(text))
	if token == "" {
		return false, fmt.Errorf("consul's token file %s is empty", c.cfg.TokenFile)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	changed, c.token = token != c.token, token
	return changed, nil
}

// do makes a request. One that is refused is made once more if the token file
// has another token by now.
func (c *client) do(op string, request func(token string) error) error {
	for again := false; ; again = true {
		token := c.currentToken()
		err := request(token)
		if err == nil {
			return nil
		}
		hint := c.hint(err)
		if statusOf(err) == http.StatusForbidden && !again {
			changed, readErr := c.rereadToken()
			if changed {
				continue
			}
			if readErr != nil {
				hint = readErr.Error()
			}
		}
		var wrapped *url.Error
		if errors.As(err, &wrapped) {
			err = wrapped.Err // its URL says no more than op
		}
		return &Error{Address: c.cfg.Address, Op: op, Hint: hint, Err: err}
	}
}

func (c *client) currentToken() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.token
}

// hasToken tells whether requests carry a token, ours or one that the
// environment names.
func (c *client) hasToken() bool { return c.currentToken() != "" || c.envToken }

// hint says what to do about an error.
func (c *client) hint(err error) string {
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	switch status := statusOf(err); {
	case status == http.StatusForbidden && c.cfg.TokenFile != "":
		return fmt.Sprintf("the token in %s needs service write on %q, node read, and key write below %q",
			c.cfg.TokenFile, c.cfg.Service, c.cfg.kvDir())
	case status == http.StatusForbidden:
		return fmt.Sprintf("a token is needed that has service write on %q, node read, and key write below %q", c.cfg.Service, c.cfg.kvDir())
	case status == http.StatusBadRequest && strings.Contains(err.Error(), "HTTPS"):
		return "this port speaks TLS: set the scheme to https"
	case status == http.StatusTooManyRequests:
		return "Consul limits requests: raise its limits for this client"
	case strings.Contains(err.Error(), "No cluster leader"):
		return "Consul's servers have no leader: see consul operator raft list-peers"
	case status != 0:
		return ""
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		return "is the local Consul agent running, and is this its HTTP address?"
	case errors.As(err, &authority):
		return "its certificate is not signed by the configured CA"
	case errors.As(err, &name):
		return "its certificate is for another name: set the server name"
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return "this port does not speak TLS: set the scheme to http"
	case errors.Is(err, context.DeadlineExceeded):
		return "it took too long: is the agent overloaded or unreachable?"
	}
	return ""
}

// close lets go of idle connections.
func (c *client) close() { c.closeIdle() }

// query is the options of a read.
func (c *client) query(ctx context.Context, token string) *api.QueryOptions {
	return (&api.QueryOptions{Token: token}).WithContext(ctx)
}

// kvDir is where the cluster's keys lie.
func (c *Config) kvDir() string { return c.KVPrefix + c.Cluster + "/" }

// clip cuts a text to at most n bytes, between characters.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}
