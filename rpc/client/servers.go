package client

import (
	"context"
	"time"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// Server is one node of the cluster. Zero values mean unknown.
type Server struct {
	ID, Name string
	// Address is where the node serves, as host:port.
	Address string
	// Voter says that the node takes part in elections and quorums.
	Voter  bool
	Leader bool
	// Term is the Raft term the answering node is in.
	Term uint64
	// LastContact is since the leader last heard from the node; negative where
	// unknown and on the leader itself.
	LastContact time.Duration
	// AppliedIndex is the last Raft index the node has applied.
	AppliedIndex uint64
	// FirstOffset and HighWatermark bound what can be read of the default
	// log: from the first, up to and not including the second. Known only of
	// the answering node.
	FirstOffset, HighWatermark uint64
	Version                    string
	// Healthy is whether the leader finds that the node keeps up; nil where
	// that is not known. StableSince is since when it is what it is.
	Healthy     *bool
	StableSince time.Time
	// State is what the node says of its own membership: "fresh", "member",
	// "leaving" or "removed".
	State string
	// CatalogAddress is where the discovery says that the node is.
	CatalogAddress string
	// Build is what the node's program was built from.
	Build string
	// CertificateExpires is when the node's certificate does; zero where it has
	// none, and where that is not known.
	CertificateExpires time.Time
}

// ServerList is the answering node's view of the cluster.
type ServerList struct {
	// AnsweredBy is the ID of the node that answered.
	AnsweredBy string
	Servers    []Server
}

// Voters counts the nodes that take part in elections and quorums.
func (l ServerList) Voters() int {
	n := 0
	for _, s := range l.Servers {
		if s.Voter {
			n++
		}
	}
	return n
}

// Self is the entry of the node that answered.
func (l ServerList) Self() (Server, bool) {
	return l.find(func(s Server) bool { return s.ID == l.AnsweredBy })
}

// Leader is the entry of the node that leads, if one is known.
func (l ServerList) Leader() (Server, bool) {
	return l.find(func(s Server) bool { return s.Leader })
}

func (l ServerList) find(match func(Server) bool) (Server, bool) {
	for _, s := range l.Servers {
		if match(s) {
			return s, true
		}
	}
	return Server{}, false
}

// Servers lists the nodes of the cluster as the answering node knows them.
func (c *Client) Servers(ctx context.Context) (ServerList, error) {
	var resp v1.GetServersResponse
	if err := c.ask(ctx, v1.Log_GetServers_FullMethodName, &v1.GetServersRequest{}, &resp); err != nil {
		return ServerList{}, err
	}
	return serverList(resp.AnsweredBy, resp.Servers), nil
}

func serverList(answeredBy string, servers []*v1.Server) ServerList {
	list := ServerList{AnsweredBy: answeredBy, Servers: make([]Server, 0, len(servers))}
	for _, s := range servers {
		contact := time.Duration(-1)
		if s.LastContact != nil {
			contact = s.LastContact.AsDuration()
		}
		list.Servers = append(list.Servers, Server{
			ID: s.Id, Name: s.Name, Address: s.Address,
			Voter: s.Role == v1.Server_ROLE_VOTER, Leader: s.Leader,
			Term: s.Term, LastContact: contact, AppliedIndex: s.AppliedIndex,
			FirstOffset: s.FirstOffset, HighWatermark: s.HighWatermark, Version: s.Version,
			Healthy: s.Healthy, State: s.State, CatalogAddress: s.CatalogAddress, Build: s.Build,
		})
		if s.StableSince != nil {
			list.Servers[len(list.Servers)-1].StableSince = s.StableSince.AsTime()
		}
		if s.CertificateExpires != nil {
			list.Servers[len(list.Servers)-1].CertificateExpires = s.CertificateExpires.AsTime()
		}
	}
	return list
}

// Health asks the node, through the standard gRPC health service, whether it
// serves. The status is SERVING, NOT_SERVING or UNKNOWN.
func (c *Client) Health(ctx context.Context) (serving bool, status string, err error) {
	var resp healthpb.HealthCheckResponse
	if err := c.ask(ctx, healthpb.Health_Check_FullMethodName, &healthpb.HealthCheckRequest{}, &resp); err != nil {
		return false, "", err
	}
	return resp.Status == healthpb.HealthCheckResponse_SERVING, resp.Status.String(), nil
}
