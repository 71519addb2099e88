package consul

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
)

func TestConfig(t *testing.T) {
	const secret = "s3cret"
	for name, tc := range map[string]struct {
		cfg  Config
		want string // empty: fine
	}{
		"minimal":        {Config{}, ""},
		"prefix":         {Config{KVPrefix: "x"}, ""},
		"cluster":        {Config{Cluster: "a/b"}, "not a cluster's name"},
		"service":        {Config{Service: "a.b"}, "DNS"},
		"password":       {Config{Address: "http://me:" + secret + "@h:8500"}, "must not hold a user"},
		"bad password":   {Config{Address: "%%me:" + secret + "@h:8500"}, "must not hold a user"},
		"key":            {Config{KVPrefix: "/x"}, "must not begin"},
		"scheme":         {Config{Scheme: "ftp"}, "neither http"},
		"two tokens":     {Config{Token: secret, TokenFile: "x"}, "keep one"},
		"half a pair":    {Config{CertFile: "x"}, "both"},
		"TTL":            {Config{Timing: Timing{TTL: time.Second}}, "expire"},
		"role as a tag":  {Config{Tags: []string{"leader"}}, "cannot be given"},
		"no token file":  {Config{TokenFile: "/nowhere/token"}, "/nowhere/token"},
		"no CA":          {Config{Scheme: "https", CAFile: "/nowhere/ca"}, "TLS files"},
		"unknown scheme": {Config{Address: "ftp://h"}, "ftp"},
	} {
		if tc.cfg.Cluster == "" {
			tc.cfg.Cluster = "test"
		}
		_, err := New(tc.cfg)
		switch {
		case tc.want == "" && err != nil, tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: want %q, got %v", name, tc.want, err)
		case err != nil && strings.Contains(err.Error(), secret):
			t.Errorf("%s: the error tells a secret: %v", name, err)
		}
	}
	d, err := New(Config{Cluster: "prod", KVPrefix: "teams/x"})
	if err != nil || d.record.key != "teams/x/prod/bootstrap" {
		t.Errorf("%+v, %v", d, err)
	}
	if d, err = New(Config{Cluster: "prod"}); err != nil || d.record.key != "diurna/prod/bootstrap" || d.cfg.Address != "127.0.0.1:8500" {
		t.Errorf("%+v, %v", d, err)
	}
	if _, err := New(Config{}); err == nil {
		t.Error("no cluster")
	}
}

// TestTokenSources takes tokens from wherever Consul's users put them; what is
// configured wins.
func TestTokenSources(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(" from-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cfg  Config
		env  map[string]string
		want string
		has  bool
	}{
		"none":                     {Config{}, nil, "", false},
		"token":                    {Config{Token: "t"}, nil, "t", true},
		"file":                     {Config{TokenFile: file}, nil, "from-file", true},
		"env":                      {Config{}, map[string]string{api.HTTPTokenEnvName: "env"}, "", true}, // the API adds it
		"env file":                 {Config{}, map[string]string{api.HTTPTokenFileEnvName: file}, "from-file", true},
		"token before env":         {Config{Token: "t"}, map[string]string{api.HTTPTokenEnvName: "env"}, "t", true},
		"file before env":          {Config{TokenFile: file}, map[string]string{api.HTTPTokenEnvName: "env"}, "from-file", true},
		"token before env's file":  {Config{Token: "t"}, map[string]string{api.HTTPTokenFileEnvName: "/nowhere"}, "t", true},
		"file before another file": {Config{TokenFile: file}, map[string]string{api.HTTPTokenFileEnvName: "/nowhere"}, "from-file", true},
	} {
		t.Run(name, func(t *testing.T) {
			for k, v := range tc.env {
				t.Setenv(k, v)
			}
			tc.cfg.Cluster = "test"
			d, err := New(tc.cfg)
			if err != nil {
				t.Fatal(err)
			}
			if got := d.c.currentToken(); got != tc.want || d.c.hasToken() != tc.has {
				t.Errorf("want %q, got %q, has one: %t", tc.want, got, d.c.hasToken())
			}
		})
	}
	t.Run("address", func(t *testing.T) {
		t.Setenv(api.HTTPAddrEnvName, "192.0.2.1:1")
		if d, err := New(Config{Cluster: "test"}); err != nil || d.cfg.Address != "192.0.2.1:1" {
			t.Errorf("%+v, %v", d, err)
		}
	})

	// A file that is gone or empty for a moment changes nothing.
	d, err := New(Config{Cluster: "test", TokenFile: file})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", "\n"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if changed, err := d.c.rereadToken(); changed || err == nil || d.c.currentToken() != "from-file" {
			t.Errorf("an empty file: %t, %v", changed, err)
		}
	}
}
