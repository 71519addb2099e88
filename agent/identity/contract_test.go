package identity

import (
	"crypto/x509"
	"testing"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/agent/identity/identitytest"
)

// backend is a Vault, real or not, of which the same is expected.
type backend interface {
	vault(t *testing.T) config.Vault
	seal(t *testing.T, sealed bool)
	revoke(t *testing.T, cert []byte)
	// empty loses everything, and is set up again with other CAs.
	empty(t *testing.T)
}

type realVault struct {
	*identitytest.Vault
}

func (r realVault) vault(t *testing.T) config.Vault { return r.AppRole(t) }
func (r realVault) revoke(t *testing.T, c []byte)   { r.Revoke(t, c) }
func (r realVault) empty(t *testing.T)              { r.Empty(t, "Test") }
func (r realVault) seal(t *testing.T, sealed bool) {
	if sealed {
		r.Seal(t)
	} else {
		r.Unseal(t)
	}
}

type fakeVault struct{ *identitytest.Fake }

func (f fakeVault) vault(*testing.T) config.Vault { return f.Config() }
func (f fakeVault) seal(_ *testing.T, s bool)     { f.Set(identitytest.Faults{Sealed: s}) }
func (f fakeVault) revoke(t *testing.T, c []byte) { f.Revoke(t, c) }
func (f fakeVault) empty(t *testing.T)            { f.Renew(t) }

func backends(t *testing.T, test func(t *testing.T, b backend)) {
	t.Run("fake", func(t *testing.T) { test(t, fakeVault{identitytest.StartFake(t)}) })
	t.Run("real", func(t *testing.T) {
		v := identitytest.StartVault(t)
		v.Setup(t, "Test")
		test(t, realVault{v})
	})
}

// TestVault is a node's life with Vault, told in order.
func TestVault(t *testing.T) {
	backends(t, func(t *testing.T, b backend) {
		cfg, l := vaultConfig(t, b.vault(t))
		i := mustOpen(t, cfg, hurried())
		s := i.Status()
		if want := "spiffe://test.diurna/server/" + testNode; s.Subject != want {
			t.Errorf("subject %q, not %q", s.Subject, want)
		}
		if len(s.Issuers) < 2 || !s.VaultUp || s.Renewals != 1 || s.LastError != "" {
			t.Errorf("status %+v", s)
		}
		stop := start(t, i)

		// Somebody else of the cluster, who stays as he is.
		other := cfg
		other.Vault, other.NodeID, other.Dir, other.Host = b.vault(t), "c0ffee00-0000-4000-8000-000000000001", t.TempDir(), "node.example"
		if _, real := b.(realVault); real {
			other.Host = "127.0.0.9"
		}
		j := mustOpen(t, other, hurried())
		start(t, j)
		srv := serve(t, i.Server(ALPNRaft, "h2"))
		conn, err := srv.dial(t, j.Peer(ALPNRaft))
		if err != nil {
			t.Fatal(err)
		}
		if c := j.Caller(conn.ConnectionState()); !c.Server || c.NodeID != testNode || c.Subject != s.Subject {
			t.Errorf("caller %+v", c)
		}

		// Renewed at once when told to, with another key.
		if err := i.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		after := i.Status()
		if after.Serial == s.Serial {
			t.Error("the same certificate after a reload")
		}
		if err := echo(conn); err != nil {
			t.Errorf("the old connection: %v", err)
		}
		next, err := srv.dial(t, j.Peer(ALPNRaft))
		if err != nil {
			t.Fatal(err)
		}
		if serialSeen(next) != after.Serial || serialSeen(conn) != s.Serial {
			t.Errorf("new connections see %s, not %s", serialSeen(next), after.Serial)
		}

		// Sealed: everything goes on, and it is said.
		b.seal(t, true)
		if err := i.Reload(t.Context()); err == nil {
			t.Error("a sealed Vault gave a certificate")
		} else {
			noSecrets(t, err.Error(), nil)
		}
		down := await(t, i, "Vault is seen to be down", func(s Status) bool { return !s.VaultUp && s.RenewFailures > 0 })
		if down.Serial != after.Serial || down.LastError == "" {
			t.Errorf("status with a sealed Vault: %+v", down)
		}
		if _, err := srv.dial(t, j.Peer("h2")); err != nil {
			t.Errorf("with a sealed Vault: %v", err)
		}
		b.seal(t, false)
		await(t, i, "it is renewed", func(s Status) bool { return s.VaultUp && s.Renewals > after.Renewals && s.LastError == "" })

		// Revoked: others refuse it, and it gets another.
		bad := i.cur.Load().pair
		b.revoke(t, encodeCerts(bad.leaf))
		await(t, j, "the revocation is known", func(s Status) bool { return s.Revoked > 0 })
		await(t, i, "the revoked one is replaced", func(s Status) bool { return s.Serial != serialOf(bad.leaf) })
		if _, err := srv.dial(t, j.Peer(ALPNRaft)); err != nil {
			t.Errorf("after the revoked one was replaced: %v", err)
		}

		// Vault comes back empty: another root, both trusted, and a new
		// certificate of the new one. The token is lost too.
		before := i.cur.Load()
		b.empty(t)
		if _, real := b.(realVault); real {
			// Its AppRole is another one too. That is a change of configuration.
			v := b.vault(t)
			setCredentials(i, v)
			setCredentials(j, v)
		}
		chained := func(s *state, by *trust) bool {
			_, err := s.pair.verify(i.opts.now(), by.listed)
			return err == nil
		}
		await(t, i, "there is a certificate of the new root", func(Status) bool {
			cur := i.cur.Load()
			return chained(cur, cur.trust) && !chained(before, cur.trust)
		})
		cur := i.cur.Load()
		if _, err := before.pair.verify(i.opts.now(), cur.trust.pool); err != nil {
			t.Errorf("the old root is no longer trusted: %v", err)
		}
		if err := echo(conn); err != nil {
			t.Errorf("the oldest connection: %v", err)
		}
		eventually(t, "the other trusts it", func() bool {
			_, err := srv.dial(t, j.Peer(ALPNRaft))
			return err == nil
		})

		// And a restart needs no Vault.
		stop()
		serial := i.Status().Serial
		b.seal(t, true)
		again := mustOpen(t, cfg, hurried())
		if s := again.Status(); s.Serial != serial || !s.FromCache {
			t.Errorf("after a restart: %+v, not serial %s", s, serial)
		}
		srv = serve(t, again.Server(ALPNRaft))
		if _, err := srv.dial(t, j.Peer(ALPNRaft)); err != nil {
			t.Errorf("with what was cached: %v", err)
		}
		if l.count("no new certificate") == 0 {
			t.Error("nothing is logged of failures")
		}
	})
}

// setCredentials stands for an operator who edits a file.
func setCredentials(i *Identity, v config.Vault) {
	s := i.src.(*vaultSource)
	s.loggingIn <- struct{}{}
	s.mu.Lock()
	s.cfg.RoleID, s.cfg.SecretID = v.RoleID, v.SecretID
	s.mu.Unlock()
	<-s.loggingIn
}

// TestSignedNames checks that a certificate holds everything that others look
// for.
func TestSignedNames(t *testing.T) {
	backends(t, func(t *testing.T, b backend) {
		cfg, _ := vaultConfig(t, b.vault(t))
		i := mustOpen(t, cfg, hurried())
		leaf := i.cur.Load().pair.leaf
		want := serverNames("Test", "diurna", testNode, "127.0.0.1", nil)
		if lacks := want.missing(leaf); lacks != "" {
			t.Errorf("it lacks %s", lacks)
		}
		for _, u := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
			if !allows(leaf, u) {
				t.Errorf("no extended key usage %d", u)
			}
		}
	})
}
