package identity

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"testing"
	"time"
)

func crls(all ...*x509.RevocationList) []*x509.RevocationList { return all }

// TestMerge tells, as a timeline, whom a node trusts that asks again and again.
func TestMerge(t *testing.T) {
	a, b := authorityFor(t, "a"), authorityFor(t, "b")
	start := time.Now()
	const keep = 10 * time.Minute
	var have *trust
	for _, step := range []struct {
		at       time.Duration
		listed   []*authority
		complete bool
		want     []*authority
	}{
		{0, []*authority{a}, true, []*authority{a}},
		{1, []*authority{a, b}, true, []*authority{a, b}},
		{2, []*authority{b}, false, []*authority{a, b}},  // some mount did not answer
		{30, []*authority{b}, false, []*authority{a, b}}, // for long
		{31, []*authority{b}, true, []*authority{a, b}},  // it is gone from now on
		{41, []*authority{b}, true, []*authority{a, b}},
		{42, []*authority{b}, true, []*authority{b}},
		{43, []*authority{a, b}, true, []*authority{a, b}}, // back
		{44, []*authority{a}, true, []*authority{a, b}},
		{50, []*authority{a, b}, true, []*authority{a, b}}, // back in time
		{55, []*authority{a, b}, true, []*authority{a, b}},
		{61, []*authority{a, b}, true, nil}, // all have expired
	} {
		now := start.Add(step.at * time.Minute)
		from := &issuers{complete: step.complete}
		for _, l := range step.listed {
			from.certs = append(from.certs, l.cert)
		}
		next, err := merge(have, from, now, keep)
		if len(step.want) == 0 {
			if next != nil || err == nil {
				t.Errorf("minute %d: %v, error %v", step.at, next, err)
			}
			continue
		}
		if err != nil {
			t.Fatalf("minute %d: %v", step.at, err)
		}
		have = next
		if have.size != len(step.want) {
			t.Errorf("minute %d: %s are trusted, not %d", step.at, have.subjects(), len(step.want))
		}
	}
}

// TestRevocation takes back a leaf, an intermediate, and nothing by somebody
// who may not.
func TestRevocation(t *testing.T) {
	root, stranger := authorityFor(t, "root"), authorityFor(t, "stranger")
	root.cert = reissue(t, root)
	between := under(t, root)
	leaf := between.issue(t, nodeNames("n1"), true, time.Minute, time.Now())
	leaf.above = []*x509.Certificate{between.cert}
	for name, tc := range map[string]struct {
		certs   []*x509.Certificate
		lists   []*x509.RevocationList
		is      error
		problem bool
	}{
		"nothing":                {certs: certs(root, between)},
		"the leaf":               {certs: certs(root, between), lists: crls(between.crl(t, 1, leaf.leaf)), is: ErrRevoked},
		"the leaf, root unknown": {certs: certs(between), lists: crls(between.crl(t, 1, leaf.leaf)), is: ErrRevoked},
		"by another CA":          {certs: certs(root, between), lists: crls(root.crl(t, 1, leaf.leaf))},
		"by a stranger":          {certs: certs(root, between), lists: crls(stranger.crl(t, 1, leaf.leaf)), problem: true},
		"the intermediate":       {certs: certs(root, between), lists: crls(root.crl(t, 1, between.cert)), is: ErrRevoked},
		"intermediate, sent":     {certs: certs(root), lists: crls(root.crl(t, 1, between.cert)), is: ErrRevoked},
		"somebody else":          {certs: certs(root, between), lists: crls(between.crl(t, 1, stranger.cert))},
	} {
		t.Run(name, func(t *testing.T) {
			tr, err := merge(nil, &issuers{certs: tc.certs, crls: tc.lists, complete: true}, time.Now(), time.Hour)
			if tr == nil || (err != nil) != tc.problem {
				t.Fatalf("problem %v", err)
			}
			if err := leaf.check(time.Now(), ServerName("Test"), tr); !errors.Is(err, tc.is) || (err == nil) != (tc.is == nil) {
				t.Errorf("error %v, not %v", err, tc.is)
			}
		})
	}
}

// TestNewestList has a list replace an older one, and an older one not.
func TestNewestList(t *testing.T) {
	ca := authorityFor(t, "ca")
	bad := ca.issue(t, nodeNames("n1"), true, time.Hour, time.Now()).leaf
	old, next := ca.crl(t, 1), ca.crl(t, 2, bad)
	old.ThisUpdate = next.ThisUpdate.Add(-time.Second)
	for _, lists := range [][]*x509.RevocationList{{old, next}, {next, old}} {
		tr, err := newTrust([]anchor{{cert: ca.cert}}, lists)
		if err != nil || len(tr.revoked) != 1 {
			t.Errorf("%d are revoked: %v", len(tr.revoked), err)
		}
	}
}

func certs(all ...*authority) (list []*x509.Certificate) {
	for _, a := range all {
		list = append(list, a.cert)
	}
	return list
}

// reissue makes a root that may have CAs below it.
func reissue(t *testing.T, a *authority) *x509.Certificate {
	t.Helper()
	return sub(t, "root", a, a)
}

// under makes an intermediate.
func under(t *testing.T, by *authority) *authority {
	t.Helper()
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key}
	a.cert = sub(t, "between", a, by)
	return a
}

func sub(t *testing.T, name string, a, by *authority) *x509.Certificate {
	t.Helper()
	number, err := newSerial()
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: number, Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	parent := by.cert
	if a == by {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(nil, tmpl, parent, a.key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestRenewAt has every certificate renewed in its last third.
func TestRenewAt(t *testing.T) {
	from := time.Unix(1_000_000, 0)
	for _, l := range []time.Duration{time.Minute, 24 * time.Hour, 8760 * time.Hour} {
		c := &x509.Certificate{NotBefore: from, NotAfter: from.Add(l)}
		for _, r := range []float64{0, 0.5, 0.999} {
			at := renewAt(c.NotBefore, c, r).Sub(from)
			if at < l*66/100 || at > l*76/100 {
				t.Errorf("a life of %s is renewed after %s", l, at)
			}
		}
	}
}

// TestRetryAfter has failures tried again ever later, but often enough in what
// is left.
func TestRetryAfter(t *testing.T) {
	for _, tc := range []struct {
		n           int
		left        time.Duration
		least, most time.Duration
	}{
		{0, 8 * time.Hour, time.Second, 5 * time.Second},
		{1, 8 * time.Hour, 2 * time.Second, 10 * time.Second},
		{20, 8 * time.Hour, 5 * time.Minute, 5 * time.Minute},
		{1000, 8 * time.Hour, 5 * time.Minute, 5 * time.Minute},
		{20, 20 * time.Second, 2 * time.Second, 2500 * time.Millisecond},
		{20, 0, 2 * time.Second, 2 * time.Second},
		{20, -time.Hour, 2 * time.Second, 2 * time.Second},
	} {
		for _, r := range []float64{0, 0.999} {
			if got := usualTiming.retryAfter(tc.n, tc.left, r); got < tc.least || got > tc.most {
				t.Errorf("failure %d, %s left: %s, not %s to %s", tc.n, tc.left, got, tc.least, tc.most)
			}
		}
	}
	// A certificate of a minute, renewed at the latest, by a Vault that hangs:
	// how many tries are there before it expires?
	left, tries := 15*time.Second, 0
	for ; left > 0; tries++ {
		left -= usualTiming.fetchLimit(left) + usualTiming.retryAfter(tries, left, 0.999)
	}
	if tries < 3 {
		t.Errorf("%d tries in the last 15 s", tries)
	}
}

// TestCausesDiffer logs a trouble once, whatever port it was from.
func TestCausesDiffer(t *testing.T) {
	var c causes
	for k, tc := range []struct {
		text string
		want bool
	}{{"read 127.0.0.1:1234: reset", true}, {"read 127.0.0.1:5678: reset", false}, {"sealed", true}, {"sealed", false}, {"read 127.0.0.1:1: reset", true}} {
		if got := c.isNew(fmt.Errorf("%s", tc.text)); got != tc.want {
			t.Errorf("%d: %q is new: %v", k, tc.text, got)
		}
	}
}
