package agent

import (
	"context"
	"crypto/tls"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/diurnalog/diurna/rpc"
)

func TestProfiles(t *testing.T) {
	f := serveHTTP(t, func(c *httpConfig) { c.Profiles = true })
	for path, want := range map[string]string{
		"/debug/pprof/":                         "full goroutine stack dump",
		"/debug/pprof":                          "full goroutine stack dump",
		"/debug/pprof/heap?debug=1":             "heap profile",
		"/debug/pprof/goroutine?debug=2":        "TestProfiles",
		"/debug/pprof/cmdline":                  "agent.test",
		"/debug/pprof/profile?seconds=1":        "\x1f\x8b", // gzip
		"/debug/pprof/trace?seconds=0.01":       "go 1.",
		"/debug/pprof/allocs?seconds=1&debug=0": "\x1f\x8b",
		"/debug/pprof/profile?seconds=121":      "BAD_QUERY",
		"/debug/pprof/trace?seconds=1e9":        "BAD_QUERY",
		"/debug/pprof/heap?seconds=NaN":         "BAD_QUERY",
		"/debug/pprof/mutex?seconds=-1":         "BAD_QUERY",
		"/debug/pprof/nothing":                  "NOT_FOUND",
		"/debug/pprof/../v1/health/live":        "NOT_FOUND",
	} {
		status, text := f.get(t, path)
		if !strings.Contains(text, want) || (status != 200) != (want == "BAD_QUERY" || want == "NOT_FOUND") {
			t.Errorf("%s: %d, %.200q", path, status, text)
		}
	}
	resp, _ := f.do(t, f.client, http.MethodPost, "/debug/pprof/symbol", strings.NewReader("0x1"))
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", resp.StatusCode)
	}

	// Unasked, there is nothing.
	plain := serveHTTP(t, nil)
	if status, text := plain.get(t, "/debug/pprof/"); status != 404 || strings.Contains(text, "pprof") {
		t.Errorf("without being asked: %d, %q", status, text)
	}
}

// TestProfilesTakeAdmin: who may look may not look into the process.
func TestProfilesTakeAdmin(t *testing.T) {
	ca := newTestCA(t)
	server := ca.server(t)
	var asked []string
	f := serveHTTP(t, func(c *httpConfig) {
		c.Profiles, c.TLS = true, func() *tls.Config { return server }
		c.Authorize = func(_ *tls.ConnectionState, action string) error {
			asked = append(asked, action)
			if action == "admin" {
				return &rpc.DeniedError{Subject: "x", Object: rpc.DefaultLog, Action: action}
			}
			return nil
		}
	})
	for _, path := range f.paths() {
		asked = nil
		resp, _ := f.do(t, ca.client(t, ca, "x"), http.MethodGet, path, nil)
		want := 200
		if strings.HasPrefix(path, "/debug/") {
			want = 403
		}
		if resp.StatusCode != want {
			t.Errorf("%s: %d, want %d (asked %q)", path, resp.StatusCode, want, asked)
		}
	}
}

// TestProfileEndsWithTheNode: a profile that would take minutes does not hold up
// the node's end.
func TestProfileEndsWithTheNode(t *testing.T) {
	f := serveHTTP(t, func(c *httpConfig) { c.Profiles = true })
	begun := make(chan struct{})
	inner := f.routes["/debug/pprof/trace"].serve
	f.routes["/debug/pprof/trace"] = route{serve: func(w http.ResponseWriter, r *http.Request) {
		close(begun)
		inner(w, r)
	}}
	ended := make(chan error, 1)
	go func() {
		resp, err := f.client.Get("http://" + f.Addr() + "/debug/pprof/trace?seconds=120")
		if err == nil {
			err = resp.Body.Close()
		}
		ended <- err
	}()
	<-begun
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	begin := time.Now()
	if err := f.Shutdown(ctx); err != nil {
		t.Errorf("after %v: %v", time.Since(begin), err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
