package client

import "time"

// ServersJSON is a ServerList as `diurna servers -json` prints it, and as a node
// answers it over HTTP.
type ServersJSON struct {
	AnsweredBy string       `json:"answered_by"`
	Servers    []ServerJSON `json:"servers"`
}

// ServerJSON is a Server likewise. What is not known is left out.
type ServerJSON struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	Address string `json:"address"`
	// Role is "voter" or "nonvoter".
	Role   string `json:"role"`
	Leader bool   `json:"leader"`
	Term   uint64 `json:"term,omitempty"`
	// LastContact is a duration, as "20ms".
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

// JSON is the list as it is written.
func (l ServerList) JSON() ServersJSON {
	out := ServersJSON{AnsweredBy: l.AnsweredBy, Servers: make([]ServerJSON, 0, len(l.Servers))}
	for _, s := range l.Servers {
		j := ServerJSON{
			ID: s.ID, Name: s.Name, Address: s.Address, Role: "nonvoter", Leader: s.Leader, Term: s.Term,
			AppliedIndex: s.AppliedIndex, Version: s.Version, Healthy: s.Healthy, State: s.State, CatalogAddress: s.CatalogAddress, Build: s.Build,
			StableSince: whenKnown(s.StableSince), CertificateExpires: whenKnown(s.CertificateExpires),
		}
		if s.Voter {
			j.Role = "voter"
		}
		if s.LastContact >= 0 && !s.Leader {
			j.LastContact = s.LastContact.Round(time.Millisecond).String()
		}
		if l.OffsetsKnown(s) {
			j.FirstOffset, j.HighWatermark = &s.FirstOffset, &s.HighWatermark
		}
		out.Servers = append(out.Servers, j)
	}
	return out
}

// OffsetsKnown tells whether the offsets of one of the servers are known: a node
// knows its own, and one that was asked has told them.
func (l ServerList) OffsetsKnown(s Server) bool {
	return s.ID == l.AnsweredBy || s.HighWatermark > 0
}

func whenKnown(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}
