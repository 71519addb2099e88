package identity

import (
	"strings"
	"testing"
	"time"
)

// FuzzPEM reads anything, and what it took it writes as it was.
func FuzzPEM(f *testing.F) {
	ca, err := newCA("ca", time.Hour, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	text, err := ca.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add(text[:len(text)/2])
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n" + string(text)))
	f.Add([]byte("# a comment\n\n" + string(text)))
	f.Add([]byte("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		b, err := parsePEM(text)
		if err != nil {
			if strings.Contains(err.Error(), "PRIVATE") {
				t.Errorf("error %v", err)
			}
			return
		}
		if len(b.certs) != len(b.headers) {
			t.Fatalf("%d certificates, %d headers", len(b.certs), len(b.headers))
		}
		again, err := parsePEM(encodeCerts(b.certs...))
		if err != nil || len(again.certs) != len(b.certs) {
			t.Fatalf("%d certificates became %v (%v)", len(b.certs), again, err)
		}
		for k, c := range b.certs {
			if !c.Equal(again.certs[k]) {
				t.Error("another certificate")
			}
		}
	})
}

// TestPEM never takes a part for the whole.
func TestPEM(t *testing.T) {
	ca := authorityFor(t, "ca")
	one := string(encodeCerts(ca.cert))
	for name, tc := range map[string]struct {
		text  string
		certs int // -1: an error
	}{
		"nothing":      {"", 0},
		"text":         {"nothing here", 0},
		"one":          {one, 1},
		"two":          {one + one, 2},
		"cut off":      {one[:len(one)-30], -1},
		"second cut":   {one + one[:100], -1},
		"first cut":    {one[:100] + "\n" + one, -1},
		"in the midst": {one + strings.Replace(one, "M", "!", 1) + one, -1},
		"too large":    {strings.Repeat(one, maxPEM/len(one)+1), -1},
	} {
		b, err := parsePEM([]byte(tc.text))
		if (err != nil) != (tc.certs < 0) || err == nil && len(b.certs) != tc.certs {
			t.Errorf("%s: %v (%v)", name, b, err)
		}
	}
}
