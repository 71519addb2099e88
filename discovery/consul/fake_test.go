package consul

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
)

// fake is an agent that does what a test says, for what a real one does too
// seldom. It holds whatever is registered, and shows what entries says.
type fake struct {
	*httptest.Server
	// health answers a query; index is what it waits for.
	health func(w http.ResponseWriter, r *http.Request, index uint64)
	// refuse, if not 0, is the status of answers about the agent.
	refuse    atomic.Int64
	hangs     atomic.Bool  // nothing is answered any more
	registers atomic.Int64 // registrations made
	drops     atomic.Int64 // deregistrations asked for

	mu      sync.Mutex
	held    map[string]*api.AgentServiceRegistration
	index   uint64
	changed chan struct{}
	end     chan struct{}
}

func newFake(t *testing.T) *fake {
	f := &fake{held: make(map[string]*api.AgentServiceRegistration), index: 50, changed: make(chan struct{}), end: make(chan struct{})}
	f.health = f.block
	f.Server = httptest.NewServer(http.HandlerFunc(f.serve))
	t.Cleanup(func() {
		close(f.end)
		f.Close()
	})
	return f
}

func (f *fake) serve(w http.ResponseWriter, r *http.Request) {
	if f.hangs.Load() {
		f.hang(r)
		return
	}
	if rest, ok := strings.CutPrefix(r.URL.Path, "/v1/health/service/"); ok && rest == "diurna" {
		index, _ := strconv.ParseUint(r.URL.Query().Get("index"), 10, 64)
		f.health(w, r, index)
		return
	}
	if status := f.refuse.Load(); status != 0 {
		http.Error(w, "refused by the test", int(status))
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch path := strings.TrimPrefix(r.URL.Path, "/v1/agent/"); {
	case path == "service/register":
		var reg api.AgentServiceRegistration
		if err := json.NewDecoder(r.Body).Decode(&reg); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		f.held[reg.ID] = &reg
		f.registers.Add(1)
		f.setIndex(f.index + 1)
	case strings.HasPrefix(path, "service/deregister/"):
		f.drops.Add(1)
		delete(f.held, strings.TrimPrefix(path, "service/deregister/"))
		f.setIndex(f.index + 1)
	case strings.HasPrefix(path, "service/"):
		reg := f.held[strings.TrimPrefix(path, "service/")]
		if reg == nil {
			http.Error(w, "unknown service ID", http.StatusNotFound)
			return
		}
		_ = json.NewEncoder(w).Encode(asService(reg))
	case strings.HasPrefix(path, "check/update/"):
		id, _, _ := strings.Cut(strings.TrimPrefix(path, "check/update/"), ":")
		if f.held[id] == nil {
			http.Error(w, "Unknown check ID", http.StatusNotFound)
		}
	default:
		http.NotFound(w, r)
	}
}

func asService(reg *api.AgentServiceRegistration) *api.AgentService {
	return &api.AgentService{ID: reg.ID, Service: reg.Name, Tags: reg.Tags, Meta: reg.Meta, Address: reg.Address, Port: reg.Port}
}

// entries is the catalog's view of what is registered.
func (f *fake) entries() []*api.ServiceEntry {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*api.ServiceEntry
	for _, reg := range f.held {
		all = append(all, &api.ServiceEntry{Node: &api.Node{Node: "n"}, Service: asService(reg)})
	}
	return all
}

// setIndex is called with f.mu held.
func (f *fake) setIndex(index uint64) {
	f.index = index
	close(f.changed)
	f.changed = make(chan struct{})
}

// block answers as a real one does: when its index has passed the one asked
// for, and at the latest after the time that was asked for.
func (f *fake) block(w http.ResponseWriter, r *http.Request, asked uint64) {
	wait, err := time.ParseDuration(r.URL.Query().Get("wait"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	late := time.NewTimer(wait)
	defer late.Stop()
	for {
		f.mu.Lock()
		index, changed := f.index, f.changed
		f.mu.Unlock()
		if asked == 0 || index > asked {
			answer(w, index, f.entries())
			return
		}
		select {
		case <-changed:
		case <-late.C:
			answer(w, index, f.entries())
			return
		case <-r.Context().Done():
			return
		case <-f.end:
			return
		}
	}
}

func answer(w http.ResponseWriter, index uint64, entries []*api.ServiceEntry) {
	w.Header().Set("X-Consul-Index", strconv.FormatUint(index, 10))
	w.Header().Set("X-Consul-KnownLeader", "true")
	w.Header().Set("X-Consul-LastContact", "0")
	if entries == nil {
		entries = []*api.ServiceEntry{}
	}
	_ = json.NewEncoder(w).Encode(entries)
}

// hang says nothing.
func (f *fake) hang(r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-f.end:
	}
}
