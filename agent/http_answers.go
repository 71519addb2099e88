package agent

import (
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/diurnalog/diurna/rpc/client"
)

func (h *httpServer) paths() []string { return slices.Sorted(maps.Keys(h.routes)) }

func (h *httpServer) live(w http.ResponseWriter, _ *http.Request) {
	h.answer(w, http.StatusOK, map[string]bool{"live": true})
}

// readyJSON is an error where the node is not ready.
type readyJSON struct {
	Ready   bool   `json:"ready"`
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message"`
}

func (h *httpServer) ready(w http.ResponseWriter, _ *http.Request) {
	ready, why := h.cfg.Health()
	if !ready {
		h.answer(w, http.StatusServiceUnavailable, readyJSON{Reason: reasonNotReady, Message: why})
		return
	}
	h.answer(w, http.StatusOK, readyJSON{Ready: true, Message: why})
}

type statusJSON struct {
	Ready   bool   `json:"ready"`
	Message string `json:"message"`
	Address string `json:"address,omitempty"`

	ID        string   `json:"id"`
	Name      string   `json:"name"`
	FormerIDs []string `json:"former_ids,omitempty"`
	Cluster   string   `json:"cluster"`
	ClusterID string   `json:"cluster_id,omitempty"`
	Version   string   `json:"version,omitempty"`
	State     string   `json:"state"`

	Role         string      `json:"role,omitempty"`
	Term         uint64      `json:"term"`
	LastIndex    uint64      `json:"last_index"`
	LastTerm     uint64      `json:"last_term"`
	AppliedIndex uint64      `json:"applied_index"`
	LastContact  string      `json:"last_contact,omitempty"`
	Leader       *leaderJSON `json:"leader,omitempty"`

	FirstOffset   uint64 `json:"first_offset"`
	HighWatermark uint64 `json:"high_watermark"`
	DiskFull      bool   `json:"disk_full"`

	Servers     *int             `json:"servers,omitempty"`
	Voters      *int             `json:"voters,omitempty"`
	Certificate *certificateJSON `json:"certificate,omitempty"`
}

type leaderJSON struct {
	ID      string `json:"id"`
	Address string `json:"address"`
}

type certificateJSON struct {
	Source    string    `json:"source"`
	Subject   string    `json:"subject"`
	Serial    string    `json:"serial"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	// ExpiresIn is seconds; negative once it has expired.
	ExpiresIn     int64  `json:"expires_in_seconds"`
	Renewals      uint64 `json:"renewals"`
	RenewFailures uint64 `json:"renew_failures"`
	VaultUp       *bool  `json:"vault_up,omitempty"`
}

func (h *httpServer) status(w http.ResponseWriter, r *http.Request) {
	s, err := h.cfg.Status(r.Context())
	if err != nil {
		h.failWith(w, err)
		return
	}
	ready, why := h.cfg.Health()
	j := statusJSON{
		Ready: ready, Message: why, Address: h.cfg.Advertise,
		ID: s.NodeID, Name: s.Name, FormerIDs: s.FormerIDs, Cluster: s.Cluster, ClusterID: s.ClusterID, Version: s.Version, State: s.State,
		Role: s.Role, Term: s.Term, LastIndex: s.LastIndex, LastTerm: s.LastTerm, AppliedIndex: s.AppliedIndex,
		LastContact: contactJSON(s.LastContact),
		FirstOffset: s.FirstOffset, HighWatermark: s.NextOffset, DiskFull: s.DiskFull,
	}
	if s.LeaderID != "" {
		j.Leader = &leaderJSON{ID: s.LeaderID, Address: s.LeaderAddress}
	}
	// A node that cannot tell of others yet can still tell of itself.
	if list, err := h.cfg.Servers(r.Context()); err == nil {
		servers, voters := len(list.Servers), 0
		for _, n := range list.Servers {
			if n.Voter {
				voters++
			}
		}
		j.Servers, j.Voters = &servers, &voters
	}
	if h.cfg.Certificate != nil {
		if c, ok := h.cfg.Certificate(); ok {
			j.Certificate = &certificateJSON{
				Source: c.Source, Subject: c.Subject, Serial: c.Serial, NotBefore: c.NotBefore.UTC(), NotAfter: c.NotAfter.UTC(),
				ExpiresIn: int64(time.Until(c.NotAfter) / time.Second), Renewals: c.Renewals, RenewFailures: c.RenewFailures, VaultUp: c.VaultUp,
			}
		}
	}
	h.answer(w, http.StatusOK, j)
}

// servers answers what `diurna servers -local -json` prints.
func (h *httpServer) servers(w http.ResponseWriter, r *http.Request) {
	list, err := h.cfg.Servers(r.Context())
	if err != nil {
		h.failWith(w, err)
		return
	}
	out := client.ServerList{AnsweredBy: list.Self}
	for _, n := range list.Servers {
		// The same, field by field, or this does not compile.
		out.Servers = append(out.Servers, client.Server(n))
	}
	h.answer(w, http.StatusOK, out.JSON())
}

func contactJSON(d time.Duration) string {
	if d < 0 {
		return ""
	}
	return d.Round(time.Millisecond).String()
}
