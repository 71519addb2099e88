package config

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"strings"
	"testing"
)

// FuzzLoad: whatever a file holds, loading it ends in a configuration that
// keeps every promise of this package, or in an error that can be printed.
func FuzzLoad(f *testing.F) {
	reference, err := os.ReadFile("../../config.hcl")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(reference, false)
	f.Add([]byte(`node { name = env("A", trimspace(file("b"))) }`), false)
	f.Add([]byte(`log_level = [for x in ["info"]: x][0]`), false)
	f.Add([]byte(`listener { rpc = "{{ GetAllInterfaces | attr \"address\" }}:1" }`), false)
	f.Add([]byte(`{"limits": {"max_record": "1KiB"}, "listener": [{"rpc": ":1"}], "log_json": "${true}"}`), true)
	f.Add([]byte(`{"limits": null, "log_level": {"a": 1}, "data_dir": 1e400}`), true)

	// No files and no network of the machine that fuzzes. The name of the one
	// file tells its syntax.
	var src []byte
	h := testHost()
	h.expand = func(s string) (string, error) { return strings.ReplaceAll(s, "{{", ""), nil }
	h.isDir = func(string) (bool, error) { return false, nil }
	h.readFile = func(path string) ([]byte, error) {
		if path == "in.hcl" || path == "in.json" {
			return src, nil
		}
		return nil, fs.ErrNotExist
	}
	f.Fuzz(func(t *testing.T, text []byte, json bool) {
		src = text
		path := "in.hcl"
		if json {
			path = "in.json"
		}
		c, err := load(Sources{Dev: true, Files: []string{path}}, h)
		if err != nil {
			var bad *Error
			if !errors.As(err, &bad) || len(bad.Diagnostics) == 0 || err.Error() == "" {
				t.Fatalf("not a list of problems: %#v", err)
			}
			var out strings.Builder
			if err := bad.print(&out, 80, true); err != nil {
				t.Fatal(err)
			}
			return
		}
		for _, k := range keys {
			switch v := k.field(c).(type) {
			case *int:
				if int64(*v) < k.min || int64(*v) > k.max {
					t.Errorf("%s = %d is out of its range", k.name, *v)
				}
			case *int64:
				if (*v < k.min || *v > k.max) && (*v != 0 || !k.empty) {
					t.Errorf("%s = %d is out of its range", k.name, *v)
				}
			}
			k.format(c)
		}
		if c.Limits.MaxRecord+RecordFraming > c.Limits.MaxBatch || c.Limits.MaxBatch > c.Limits.InFlight {
			t.Errorf("limits: %+v", c.Limits)
		}
		if c.Raft.LeaderLeaseTimeout > c.Raft.HeartbeatTimeout || c.Raft.ElectionTimeout < c.Raft.HeartbeatTimeout {
			t.Errorf("raft: %+v", c.Raft)
		}
		for _, addr := range []string{c.Listener.RPC, c.Listener.Advertise} {
			if _, _, err := net.SplitHostPort(addr); err != nil {
				t.Errorf("address %q: %v", addr, err)
			}
		}
		if isWildcard(c.Listener.Advertise) {
			t.Errorf("advertises %s", c.Listener.Advertise)
		}
		if changes := Changes(c, c); changes != nil {
			t.Errorf("differs from itself: %v", changes)
		}
	})
}
