package rpc

import (
	"context"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

func (s *Service) getServers(ctx context.Context, _ *v1.GetServersRequest) (*v1.GetServersResponse, error) {
	// Whoever may do anything here has to find out where.
	if err := s.permitAny(ctx, DefaultLog, ActionConsume, ActionProduce, ActionAdmin); err != nil {
		return nil, err
	}
	list, err := s.cluster.Servers(ctx)
	if err != nil {
		return nil, err
	}
	resp := &v1.GetServersResponse{
		AnsweredBy: list.Self,
		Servers:    make([]*v1.Server, 0, len(list.Servers)),
	}
	for i := range list.Servers {
		resp.Servers = append(resp.Servers, s.serverMessage(&list, i))
	}
	return resp, nil
}

// serverMessage is server i of a list as clients get it.
func (s *Service) serverMessage(list *ServerList, i int) *v1.Server {
	m := serverMessage(&list.Servers[i])
	if m.Id == list.Self && m.Version == "" {
		m.Version = s.version
	}
	return m
}

func serverMessage(n *Server) *v1.Server {
	m := &v1.Server{
		Id:            n.ID,
		Name:          n.Name,
		Address:       n.Address,
		Role:          v1.Server_ROLE_NONVOTER,
		Leader:        n.Leader,
		Term:          n.Term,
		AppliedIndex:  n.AppliedIndex,
		FirstOffset:   n.FirstOffset,
		HighWatermark: n.HighWatermark,
		Version:       n.Version,

		Healthy:        n.Healthy,
		State:          n.State,
		CatalogAddress: n.CatalogAddress,
		Build:          n.Build,
	}
	if !n.StableSince.IsZero() {
		m.StableSince = timestamppb.New(n.StableSince)
	}
	if !n.CertificateExpires.IsZero() {
		m.CertificateExpires = timestamppb.New(n.CertificateExpires)
	}
	if n.Voter {
		m.Role = v1.Server_ROLE_VOTER
	}
	if n.LastContact >= 0 && !n.Leader {
		m.LastContact = durationpb.New(n.LastContact)
	}
	return m
}
