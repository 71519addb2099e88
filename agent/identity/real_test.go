package identity

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"testing"

	"github.com/diurnalog/diurna/agent/identity/identitytest"
)

// TestRealClient gets a client's certificate as the help of
// scripts/vault-pki.sh says, and shows it to a node.
func TestRealClient(t *testing.T) {
	vault := identitytest.StartVault(t)
	vault.Setup(t, "Test")
	cfg, _ := vaultConfig(t, vault.AppRole(t))
	i := mustOpen(t, cfg, hurried())

	var out struct {
		Data struct {
			Certificate string   `json:"certificate"`
			Key         string   `json:"private_key"`
			Chain       []string `json:"ca_chain"`
		} `json:"data"`
	}
	text := vault.Run(t, "write", "-format=json", "pki_diurna/issue/diurna-client", "common_name=billing",
		"exclude_cn_from_sans=true", "uri_sans=spiffe://test.diurna/client/billing")
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair([]byte(out.Data.Certificate+"\n"+out.Data.Chain[0]), []byte(out.Data.Key))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(vault.Run(t, "read", "-field=certificate", "pki_diurna_root/cert/ca"))) {
		t.Fatal("no root")
	}
	srv := serve(t, i.Server("h2", ALPNRaft))
	client := func(proto string) *tls.Config {
		return &tls.Config{RootCAs: roots, ServerName: ServerName("Test"), Certificates: []tls.Certificate{cert}, NextProtos: []string{proto}}
	}
	conn, err := srv.handshake(t, client("h2"))
	if err != nil {
		t.Fatal(err) // also if the node does not send what leads to the root
	}
	if c := i.Caller(conn.ConnectionState()); c != (Caller{Subject: "spiffe://test.diurna/client/billing"}) {
		t.Errorf("caller %+v", c)
	}
	if _, err := srv.handshake(t, client(ALPNRaft)); !errors.Is(err, ErrWrongRole) {
		t.Errorf("a client that speaks Raft: %v", err)
	}
}
