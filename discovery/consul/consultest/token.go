package consultest

import (
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
)

// MakeToken makes a token that may do what the rules say. It takes a server with
// ACL.
func (s *Server) MakeToken(t testing.TB, rules string) (secret string) {
	t.Helper()
	secret = uuid.NewString()
	s.MakeTokenAs(t, secret, rules)
	return secret
}

// MakeTokenAs is MakeToken for a secret that is known already.
func (s *Server) MakeTokenAs(t testing.TB, secret, rules string) {
	t.Helper()
	cfg := api.DefaultConfig()
	cfg.Address, cfg.Token = s.HTTP, s.Token
	defer cfg.Transport.CloseIdleConnections()
	c, err := api.NewClient(cfg)
	if err != nil {
		t.Fatal(err)
	}
	policy, _, err := c.ACL().PolicyCreate(&api.ACLPolicy{Name: "p-" + uuid.NewString(), Rules: rules}, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = c.ACL().TokenCreate(&api.ACLToken{SecretID: secret, Policies: []*api.ACLLink{{ID: policy.ID}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
}
