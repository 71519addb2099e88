package agent

import (
	"context"
	"fmt"
	"net/http"
	"net/http/pprof"
	runtimepprof "runtime/pprof"
	"strconv"
	"strings"
	"time"
)

// profilePrefix is where `go tool pprof` and all who know Go look.
const profilePrefix = "/debug/pprof/"

// longestProfile bounds how long one request may have the process watched.
const longestProfile = 2 * time.Minute

// profiles are the paths that serve them. They tell of the whole process: what
// it has in memory, records too, and its command line; and watching costs time. So
// they take more than the permission to look.
func profiles(h *httpServer) map[string]route {
	routes := map[string]route{
		profilePrefix: {admin: true, serve: pprof.Index},
		// As people type it; the list's links would lead nowhere from there.
		strings.TrimSuffix(profilePrefix, "/"): {admin: true, serve: http.RedirectHandler(profilePrefix, http.StatusFound).ServeHTTP},

		profilePrefix + "cmdline": {admin: true, serve: pprof.Cmdline},
		profilePrefix + "profile": {admin: true, serve: h.timed(pprof.Profile)},
		profilePrefix + "symbol":  {admin: true, serve: pprof.Symbol},
		profilePrefix + "trace":   {admin: true, serve: h.timed(pprof.Trace)},
	}
	for _, p := range runtimepprof.Profiles() {
		routes[profilePrefix+p.Name()] = route{admin: true, serve: h.timed(pprof.Handler(p.Name()).ServeHTTP)}
	}
	return routes
}

// timed refuses to watch the process for long, and ends it when the node stops.
func (h *httpServer) timed(serve http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if said := r.URL.Query().Get("seconds"); said != "" {
			if n, err := strconv.ParseFloat(said, 64); err != nil || !(n >= 0 && n <= longestProfile.Seconds()) {
				h.fail(w, http.StatusBadRequest, reasonBadQuery, fmt.Sprintf("seconds is %q: it has to be a number up to %v.", said, longestProfile.Seconds()))
				return
			}
		}
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		defer context.AfterFunc(h.ending, cancel)()
		serve(w, r.WithContext(ctx))
	}
}
