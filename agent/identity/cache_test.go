package identity

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/diurnalog/diurna/agent/identity/identitytest"
)

// TestCache restarts a node whose Vault is sealed, with a cache in every
// condition.
func TestCache(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(t *testing.T, dir string, cfg *Config, f *identitytest.Fake)
		says   string // of why it is refused; empty: it is used
		later  time.Duration
	}{
		"as it was": {},
		"world-readable": {change: func(t *testing.T, dir string, _ *Config, _ *identitytest.Fake) { chmod(t, dir, cacheNode, 0o644) },
			says: "has mode 0644: others can read it"},
		"readable by the group": {change: func(t *testing.T, dir string, _ *Config, _ *identitytest.Fake) { chmod(t, dir, cacheNode, 0o640) },
			says: "has mode 0640"},
		"issuers that others can write": {change: func(t *testing.T, dir string, _ *Config, _ *identitytest.Fake) {
			chmod(t, dir, cacheIssuers, 0o666)
		}, says: "has mode 0666"},
		"truncated": {change: func(t *testing.T, dir string, _ *Config, _ *identitytest.Fake) {
			damage(t, filepath.Join(dir, cacheNode))
		}, says: "damaged or cut off"},
		"truncated issuers": {change: func(t *testing.T, dir string, _ *Config, _ *identitytest.Fake) {
			damage(t, filepath.Join(dir, cacheIssuers))
		}, says: "cut off"},
		"empty": {change: func(t *testing.T, dir string, _ *Config, _ *identitytest.Fake) {
			write(t, filepath.Join(dir, cacheNode), "")
		}, says: "holds 0 keys"},
		"no issuers": {change: func(t *testing.T, dir string, _ *Config, _ *identitytest.Fake) {
			remove(t, filepath.Join(dir, cacheIssuers))
		}, says: "no such file"},
		"nothing": {change: func(t *testing.T, dir string, _ *Config, _ *identitytest.Fake) {
			remove(t, filepath.Join(dir, cacheNode))
		}, says: "waiting for a first"},
		"expired": {later: 2 * time.Hour, says: "has expired"},
		"of another node": {change: func(_ *testing.T, _ string, c *Config, _ *identitytest.Fake) { c.NodeID = "other" },
			says: "and this is other"},
		"of another cluster": {change: func(_ *testing.T, _ string, c *Config, _ *identitytest.Fake) { c.Cluster = "Other" },
			says: "it lacks the DNS name server.other.diurna"},
		"a key of another": {change: func(t *testing.T, dir string, _ *Config, _ *identitytest.Fake) {
			key, err := newKey()
			if err != nil {
				t.Fatal(err)
			}
			text, err := encodeKey(key)
			if err != nil {
				t.Fatal(err)
			}
			b, err := loadPEM(filepath.Join(dir, cacheNode))
			if err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, cacheNode), string(text)+string(encodeCerts(b.certs...)))
		}, says: "is for another key"},
		"a folder": {change: func(t *testing.T, dir string, _ *Config, _ *identitytest.Fake) {
			remove(t, filepath.Join(dir, cacheNode))
			if err := os.Mkdir(filepath.Join(dir, cacheNode), 0o700); err != nil {
				t.Fatal(err)
			}
		}, says: "is not a file"},
		"another address": {change: func(_ *testing.T, _ string, c *Config, _ *identitytest.Fake) { c.Host = "10.9.9.9" }},
	} {
		t.Run(name, func(t *testing.T) {
			f := identitytest.StartFake(t)
			cfg, l := vaultConfig(t, f.Config())
			i := mustOpen(t, cfg, hurried())
			private(t, cfg.Dir, cacheNode, cacheIssuers)
			serial := i.Status().Serial

			f.Set(identitytest.Faults{Sealed: true})
			if tc.change != nil {
				tc.change(t, cfg.Dir, &cfg, f)
			}
			opts, c := hurried(), &clock{}
			c.advance(tc.later)
			opts.now = c.now
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if tc.says != "" {
				// It has to be fetched, for which Vault is needed.
				go func() {
					eventually(t, "it waits", func() bool { return l.count("waiting for a first certificate") > 0 })
					f.Lives(24*time.Hour, time.Hour)
					f.Set(identitytest.Faults{})
				}()
			}
			again, err := open(ctx, cfg, opts)
			if err != nil {
				t.Fatal(err)
			}
			if tc.says != "" && (again.Status().FromCache || !strings.Contains(l.String(), tc.says)) {
				t.Errorf("the log does not say %q", tc.says)
			}
			if s := again.Status(); tc.says == "" && (s.Serial != serial || !s.FromCache || s.Renewals != 0) {
				t.Errorf("status %+v", s)
			}
			if name == "another address" {
				f.Set(identitytest.Faults{})
				stop := start(t, again)
				await(t, again, "it is renewed with the new address", func(s Status) bool { return s.Serial != serial })
				stop()
			}
			if name != "a folder" {
				private(t, cfg.Dir, cacheNode, cacheIssuers)
			}
		})
	}
}

// TestCacheKeepsTrust has a restart remember what is revoked, and since when an
// issuer has vanished.
func TestCacheKeepsTrust(t *testing.T) {
	ca, old := authorityFor(t, "ca"), authorityFor(t, "old")
	p := ca.issue(t, nodeNames("n1"), true, time.Hour, time.Now())
	bad := ca.issue(t, nodeNames("n2"), true, time.Hour, time.Now())
	gone := time.Now().Add(-10 * time.Minute)
	tr, err := newTrust([]anchor{{cert: ca.cert}, {cert: old.cert, gone: gone}}, crls(ca.crl(t, 1, bad.leaf)))
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "tls")
	if err := saveCache(dir, p, tr); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "."+cacheNode+".123"), "what a crash left")
	c, err := loadCache(dir, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if !c.trust.same(tr) || len(c.trust.revoked) != 1 || !c.trust.anchors[1].gone.Equal(gone) {
		t.Errorf("trust is %+v, not %+v", c.trust, tr)
	}
	private(t, dir, cacheNode, cacheIssuers)
}

func chmod(t *testing.T, dir, file string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(filepath.Join(dir, file), mode); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, name string) {
	t.Helper()
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
}
