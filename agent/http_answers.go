package agent

import (
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/diurnalog/diurna/rpc"
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

// serversListJSON is what `diurna servers -local -json` prints.
type serversListJSON struct {
	AnsweredBy string       `json:"answered_by"`
	Servers    []serverJSON `json:"servers"`
}

type serverJSON struct {
	ID             string     `json:"id"`
	Name           string     `json:"name"`
	Address        string     `json:"address"`
	Role           string     `json:"role"`
	Leader         bool       `json:"leader"`
	Term           uint64     `json:"term,omitempty"`
	LastContact    string     `json:"last_contact,omitempty"`
	AppliedIndex   uint64     `json:"applied_index,omitempty"`
	FirstOffset    *uint64    `json:"first_offset,omitempty"`
	HighWatermark  *uint64    `json:"high_watermark,omitempty"`
	Version        string     `json:"version,omitempty"`
	Healthy        *bool      `json:"healthy,omitempty"`
	StableSince    *time.Time `json:"stable_since,omitempty"`
	State          string     `json:"state,omitempty"`
	CatalogAddress string     `json:"catalog_address,omitempty"`
	Build          string     `json:"build,omitempty"`
	// CertificateExpires is there only with TLS.
	CertificateExpires *time.Time `json:"certificate_expires,omitempty"`
}

func (h *httpServer) servers(w http.ResponseWriter, r *http.Request) {
	list, err := h.cfg.Servers(r.Context())
	if err != nil {
		h.failWith(w, err)
		return
	}
	out := serversListJSON{AnsweredBy: list.Self, Servers: []serverJSON{}}
	for _, n := range list.Servers {
		out.Servers = append(out.Servers, toServerJSON(list.Self, n))
	}
	h.answer(w, http.StatusOK, out)
}

func toServerJSON(self string, n rpc.Server) serverJSON {
	j := serverJSON{
		ID: n.ID, Name: n.Name, Address: n.Address, Role: "nonvoter", Leader: n.Leader, Term: n.Term,
		AppliedIndex: n.AppliedIndex, Version: n.Version, Healthy: n.Healthy, State: n.State, CatalogAddress: n.CatalogAddress, Build: n.Build,
	}
	if n.Voter {
		j.Role = "voter"
	}
	if !n.Leader {
		j.LastContact = contactJSON(n.LastContact)
	}
	if !n.StableSince.IsZero() {
		since := n.StableSince.UTC()
		j.StableSince = &since
	}
	if !n.CertificateExpires.IsZero() {
		expires := n.CertificateExpires.UTC()
		j.CertificateExpires = &expires
	}
	// Else 0 would mean that it is not known.
	if n.ID == self || n.HighWatermark > 0 {
		j.FirstOffset, j.HighWatermark = &n.FirstOffset, &n.HighWatermark
	}
	return j
}

func contactJSON(d time.Duration) string {
	if d < 0 {
		return ""
	}
	return d.Round(time.Millisecond).String()
}
