package discovery_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/diurnalog/diurna/discovery"
)

func TestStatic(t *testing.T) {
	s, err := discovery.NewStatic([]string{"b@h2:8400", "[::1]:1", "a@192.0.2.1:65535"})
	if err != nil {
		t.Fatal(err)
	}
	want := []discovery.Node{{Address: "[::1]:1"}, {ID: "a", Address: "192.0.2.1:65535"}, {ID: "b", Address: "h2:8400"}}
	got := s.Latest()
	if !got.Same(discovery.Snapshot{Nodes: want, Why: got.Why}) || got.Why == "" || got.Trusted {
		t.Errorf("%+v", got)
	}
	got.Nodes[0].ID = "changed"
	if s.Latest().Nodes[0].ID != "" {
		t.Error("snapshots share their nodes")
	}
	if n, ok := s.Latest().Find("b"); !ok || n.Address != "h2:8400" {
		t.Errorf("%+v, %t", n, ok)
	}
	if _, ok := s.Latest().Find("c"); ok {
		t.Error("found who is not there")
	}
	if s.Bootstrap() != nil {
		t.Error("a list keeps a record")
	}
	s.Announce(discovery.Registration{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Error(err)
	}
	if _, err := discovery.Wait(ctx, s, func(s discovery.Snapshot) bool { return s.Trusted }); !errors.Is(err, context.Canceled) {
		t.Errorf("waited for trust: %v", err)
	}
	if s, err := discovery.NewStatic(nil); err != nil || len(s.Latest().Nodes) != 0 {
		t.Errorf("nobody: %v", err)
	}
}

func TestStaticMistakes(t *testing.T) {
	for text, want := range map[string]string{
		"":               "host:port",
		"h":              "host:port",
		"h:":             "not a port",
		"h:0":            "not a port",
		"h:+1":           "not a port",
		"h:65536":        "not a port",
		":8400":          "nobody can dial",
		"0.0.0.0:8400":   "nobody can dial",
		"[::]:8400":      "nobody can dial",
		"a b:8400":       "not a host",
		"@h:8400":        "not a node's id",
		"a b@h:8400":     "not a node's id",
		"a@b@h:8400":     "not a host",
		"http://h:8400":  "host:port",
		"h:1,h:1":        "twice",
		"a@h:1,b@h:1":    "another id",
		"a@h:1,h:1":      "another id",
		"a@h:1,a@h:2":    "at h:1 too",
		"a@h:1,x,a@h:13": `"x"`,
	} {
		_, err := discovery.NewStatic(strings.Split(text, ","))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: want %q, got %v", text, want, err)
		}
	}
}

func FuzzStatic(f *testing.F) {
	f.Add("a@h:1")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := discovery.NewStatic([]string{text})
		if err != nil {
			return
		}
		n := s.Latest().Nodes[0]
		if err := discovery.CheckAddress(n.Address); err != nil || n.ID != "" && n.ID+"@"+n.Address != text {
			t.Errorf("%q: %+v, %v", text, n, err)
		}
	})
}
