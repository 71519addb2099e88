package agent

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
	"google.golang.org/grpc/codes"

	ident "github.com/diurnalog/diurna/agent/identity"
	"github.com/diurnalog/diurna/rpc"
)

// httpConfig is what the HTTP endpoint needs of the node. All that is a func is
// asked anew for every request.
type httpConfig struct {
	// Address is where to listen, host:port; 0 lets the kernel choose the port.
	Address string
	// Listen defaults to TCP.
	Listen func(address string) (net.Listener, error)
	// TLS, if set, secures the endpoint: for every connection, the node's server
	// configuration as it is then. Protocols and whether clients need a
	// certificate are decided here.
	TLS func() *tls.Config
	// Authorize, if set, is asked whether a client may do something, by its
	// verified certificate: ident.ActionMonitor or ident.ActionAdmin. It refuses
	// with a *rpc.DeniedError. It needs TLS.
	Authorize func(state *tls.ConnectionState, action string) error
	// Health tells whether the node can be sent to, and why not.
	Health func() (ready bool, why string)
	// Status and Servers are what the node says of itself and of the others.
	Status  func(context.Context) (rpc.NodeStatus, error)
	Servers func(context.Context) (rpc.ServerList, error)
	// Advertise is where others reach the gRPC port.
	Advertise string
	// Certificate, if set, is the node's own.
	Certificate func() (certificateStatus, bool)
	// Metrics is what /v1/metrics shows.
	Metrics prometheus.Gatherer
	// Profiles serves those of the process, below /debug/pprof/.
	Profiles bool
	// MaxConnections defaults to 128; further ones wait.
	MaxConnections int
	// Logger defaults to none.
	Logger hclog.Logger
}

// certificateStatus is what there is to tell of the node's certificate.
type certificateStatus struct {
	// Source is the kind of tls.source, Subject who the certificate is for.
	Source, Subject, Serial string
	NotBefore, NotAfter     time.Time
	// Renewals counts certificates got since the start, the first one included,
	// RenewFailures attempts that came to nothing.
	Renewals, RenewFailures uint64
	// VaultUp is whether Vault answered when it was asked last; nil where it is
	// not the source.
	VaultUp *bool
}

// Reasons that only HTTP has. Those of gRPC are the same here as there.
const (
	reasonNotFound = "NOT_FOUND"
	reasonMethod   = "METHOD_NOT_ALLOWED"
	reasonNotReady = "NOT_READY"
	reasonBadQuery = "BAD_QUERY"
)

// Limits of a request. None has a body, and all answers are small.
const (
	httpHeaderTimeout = 5 * time.Second
	httpTimeout       = 30 * time.Second
	httpIdleTimeout   = time.Minute
	httpHeaderBytes   = 16 << 10
	httpBodyBytes     = 4 << 10
	httpConnections   = 128
)

// httpServer serves what is looked at: health, status, metrics. Make one with
// newHTTP, which listens, serve with Start, and end it with Shutdown in any
// case.
type httpServer struct {
	cfg    httpConfig
	listen net.Listener
	server *http.Server
	routes map[string]route
	done   sync.WaitGroup

	// ending ends with the beginning of Shutdown, for requests that would take
	// longer than it.
	ending context.Context
	end    context.CancelFunc
}

// route is what answers at a path.
type route struct {
	// open is for everybody, also where the rest takes a certificate: who
	// restarts a node that seems dead has none.
	open bool
	// admin is for those who may do more than look.
	admin bool
	serve http.HandlerFunc
}

func newHTTP(cfg httpConfig) (*httpServer, error) {
	if cfg.Health == nil || cfg.Status == nil || cfg.Servers == nil || cfg.Metrics == nil {
		return nil, errors.New("HTTP needs a Health, a Status, Servers and Metrics")
	}
	if cfg.Authorize != nil && cfg.TLS == nil {
		return nil, errors.New("HTTP needs TLS to know who is to be authorized")
	}
	if cfg.Listen == nil {
		cfg.Listen = func(address string) (net.Listener, error) { return net.Listen("tcp", address) }
	}
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	if cfg.MaxConnections <= 0 {
		cfg.MaxConnections = httpConnections
	}
	h := &httpServer{cfg: cfg}
	h.ending, h.end = context.WithCancel(context.Background())
	h.routes = map[string]route{
		"/v1/health/live":  {open: true, serve: h.live},
		"/v1/health/ready": {open: true, serve: h.ready},
		"/v1/status":       {serve: h.status},
		"/v1/servers":      {serve: h.servers},
		// A metric that cannot be told is missing; the others are not.
		"/v1/metrics": {serve: promhttp.HandlerFor(cfg.Metrics, promhttp.HandlerOpts{
			ErrorHandling: promhttp.ContinueOnError,
			ErrorLog:      promLog{cfg.Logger},
		}).ServeHTTP},
	}
	if cfg.Profiles {
		maps.Copy(h.routes, profiles(h))
	}
	var err error
	if h.listen, err = cfg.Listen(cfg.Address); err != nil {
		return nil, fmt.Errorf("%w: choose another address with -http-addr or listener.http", err)
	}
	protocols := new(http.Protocols)
	// Only that: one request at a time bounds what a connection can cost.
	protocols.SetHTTP1(true)
	h.server = &http.Server{
		Handler:           h,
		Protocols:         protocols,
		ReadHeaderTimeout: httpHeaderTimeout,
		ReadTimeout:       httpTimeout,
		WriteTimeout:      httpTimeout,
		IdleTimeout:       httpIdleTimeout,
		MaxHeaderBytes:    httpHeaderBytes,
		// Handshakes that fail, most of all: whoever scans ports makes them.
		ErrorLog: cfg.Logger.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
	}
	return h, nil
}

// Addr is where the server listens.
func (h *httpServer) Addr() string { return h.listen.Addr().String() }

// Start serves until Shutdown. failed is called if it ends before that.
func (h *httpServer) Start(failed func(error)) {
	l := netutil.LimitListener(h.listen, h.cfg.MaxConnections)
	if h.cfg.TLS != nil {
		l = tls.NewListener(l, &tls.Config{GetConfigForClient: h.tlsConfig})
	}
	h.done.Go(func() {
		if err := h.server.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			failed(fmt.Errorf("serve HTTP at %s: %w", h.Addr(), err))
		}
	})
}

// tlsConfig is the node's configuration as it is now, made to fit.
func (h *httpServer) tlsConfig(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	c := h.cfg.TLS()
	if c != nil && c.GetConfigForClient != nil {
		inner, err := c.GetConfigForClient(hello)
		if err != nil {
			return nil, err
		}
		if inner != nil {
			c = inner
		}
	}
	if c == nil {
		return nil, errors.New("the node has no certificate yet")
	}
	c = c.Clone()
	c.GetConfigForClient = nil
	c.NextProtos = []string{"http/1.1"}
	c.ClientAuth = tls.VerifyClientCertIfGiven
	// Who was trusted when a ticket was given may not be any more.
	c.SessionTicketsDisabled = true
	return c, nil
}

// Shutdown answers what is under way and ends. What is left when ctx ends is cut
// off, and ctx's error returned.
func (h *httpServer) Shutdown(ctx context.Context) error {
	h.end()
	err := h.server.Shutdown(ctx)
	if err != nil {
		err = fmt.Errorf("shut down HTTP: %w", errors.Join(err, ignoreClosed(h.server.Close())))
	}
	// Where it was never started, the server does not know the listener.
	err = errors.Join(err, ignoreClosed(h.listen.Close()))
	h.done.Wait()
	return err
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// ServeHTTP implements http.Handler.
func (h *httpServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if v := recover(); v != nil {
			if err, ok := v.(error); ok && errors.Is(err, http.ErrAbortHandler) {
				panic(v) // which is how net/http is told to hang up
			}
			h.cfg.Logger.Error("a request panicked", "path", r.URL.Path, "panic", v)
			// If the answer has begun, this only ends it.
			h.fail(w, http.StatusInternalServerError, rpc.ReasonInternal, "The node met an error it has no name for. Its log says more.")
		}
	}()
	r.Body = http.MaxBytesReader(w, r.Body, httpBodyBytes)
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	route, ok := h.routes[r.URL.Path]
	switch {
	case !ok:
		h.fail(w, http.StatusNotFound, reasonNotFound, "There is nothing here. There are "+strings.Join(h.paths(), ", ")+".")
		return
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		w.Header().Set("Allow", "GET, HEAD")
		h.fail(w, http.StatusMethodNotAllowed, reasonMethod, "This is only to be looked at: use GET.")
		return
	}
	if !route.open && !h.admit(w, r, route) {
		return
	}
	route.serve(w, r)
}

// admit lets only those through who may do what a route does, and answers the
// others.
func (h *httpServer) admit(w http.ResponseWriter, r *http.Request, route route) bool {
	if h.cfg.TLS == nil {
		return true
	}
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		h.fail(w, http.StatusUnauthorized, rpc.ReasonNoCertificate, "This takes a client certificate of the cluster's CA. Only /v1/health/live and /v1/health/ready do not.")
		return false
	}
	if h.cfg.Authorize == nil {
		return true
	}
	action := ident.ActionMonitor
	if route.admin {
		action = ident.ActionAdmin
	}
	if err := h.cfg.Authorize(r.TLS, action); err != nil {
		h.failWith(w, err)
		return false
	}
	return true
}

// httpError is an answer that is an error.
type httpError struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
	Advice  string `json:"advice,omitempty"`
}

func (h *httpServer) fail(w http.ResponseWriter, status int, reason, message string) {
	h.answer(w, status, httpError{Reason: reason, Message: message})
}

// failWith answers an error of package rpc with the reason that it has there.
func (h *httpServer) failWith(w http.ResponseWriter, err error) {
	code, reason, advice := rpc.Explain(err)
	status := http.StatusInternalServerError
	switch code {
	case codes.PermissionDenied:
		status = http.StatusForbidden
	case codes.Unauthenticated:
		status = http.StatusUnauthorized
	case codes.Unavailable, codes.ResourceExhausted:
		status = http.StatusServiceUnavailable
	case codes.DeadlineExceeded, codes.Canceled:
		status = http.StatusGatewayTimeout
	}
	h.answer(w, status, httpError{Reason: reason, Message: err.Error(), Advice: advice})
}

func (h *httpServer) answer(w http.ResponseWriter, status int, v any) {
	text, err := json.Marshal(v)
	if err != nil {
		h.cfg.Logger.Error("an answer cannot be written as JSON", "error", err)
		status, text = http.StatusInternalServerError, []byte(`{"reason":"`+rpc.ReasonInternal+`","message":"The answer cannot be written as JSON."}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// Who does not wait for the answer misses nothing else.
	_, _ = w.Write(append(text, '\n'))
}

// promLog is a logger as promhttp wants it.
type promLog struct{ logger hclog.Logger }

// Println implements promhttp.Logger.
func (l promLog) Println(v ...any) {
	l.logger.Warn("metrics are incomplete", "error", strings.TrimSpace(fmt.Sprintln(v...)))
}
