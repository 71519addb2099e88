package config

import (
	"flag"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// Sources says where a configuration comes from. Files are read first, in
// their order, then the files of each directory, in the order of their names;
// what is read later replaces what was read before. Overrides come last.
type Sources struct {
	// Files are .hcl or .json files.
	Files []string
	// Dirs are directories of them. Subfolders, hidden files, what editors
	// leave behind and files with other endings are skipped.
	Dirs []string
	// Dev starts from Dev instead of Default.
	Dev bool
	// Overrides are single keys from the command line.
	Overrides []Override
}

// Override is one key given outside of files.
type Override struct {
	// Flag is how the user wrote it, as "-data-dir": errors name it.
	Flag string
	// Key is the key's name, as "data_dir".
	Key string
	// Value is the text of the value. It is taken as it is, not as an
	// expression.
	Value string
}

// Register adds the agent's configuration flags to fs, to be collected in s
// when fs is parsed.
func (s *Sources) Register(fs *flag.FlagSet) {
	list := func(to *[]string) func(string) error {
		return func(v string) error {
			*to = append(*to, v)
			return nil
		}
	}
	override := func(name, key string) func(string) error {
		return func(v string) error {
			s.Overrides = append(s.Overrides, Override{Flag: "-" + name, Key: key, Value: v})
			return nil
		}
	}
	fs.Func("config-file", "read this .hcl or .json `file`; may be repeated", list(&s.Files))
	fs.Func("config-dir", "read the .hcl and .json files of this `folder`, in the order of their names; may be repeated", list(&s.Dirs))
	fs.BoolVar(&s.Dev, "dev", s.Dev, "a node to try things with: no configuration needed, data in a temporary folder unless -data-dir is given")
	for _, f := range []struct{ name, key, usage string }{
		{"data-dir", "data_dir", "keep the node's data in this `folder`"},
		{"node", "node.name", "the node's `name`"},
		{"rpc-addr", "listener.rpc", "listen at this `host:port` for clients and peers"},
		{"http-addr", "listener.http", "listen at this `host:port` for HTTP: health, metrics, status"},
		{"bootstrap-expect", "cluster.bootstrap_expect", "form a cluster with this `number` of nodes, this one included"},
		{"peers", "discovery.peers", "find the other nodes at these addresses (`host:port,...`)"},
		{"discovery", "discovery.type", "find the other nodes by this `type`: static or consul"},
		{"consul-addr", "consul.address", "the machine's Consul agent is at this `host:port`"},
		{"log-level", "log_level", "log this `level` and worse: trace, debug, info, warn or error"},
	} {
		fs.Func(f.name, f.usage, override(f.name, f.key))
	}
	fs.BoolFunc("log-json", "log JSON", override("log-json", "log_json"))
	fs.BoolFunc("tls", "with -dev: secure connections, with certificates of a throw-away CA", func(string) error {
		return override("tls", "tls.source")(TLSDev)
	})
	fs.Func("tls-dir", "share the throw-away CA in this `folder` with other nodes of this machine", override("tls-dir", "tls.dev_dir"))
}

// paths lists the files to read, in order.
func (s Sources) paths(h host) ([]string, hcl.Diagnostics) {
	var diags hcl.Diagnostics
	paths := slices.Clone(s.Files)
	for _, dir := range s.Dirs {
		entries, err := h.readDir(dir)
		if err != nil {
			diags = append(diags, problem(nil, "Cannot read "+dir, "-config-dir %s: %v.", dir, reason(err)))
			continue
		}
		var names []string
		for _, e := range entries {
			if isConfigName(e.Name()) {
				names = append(names, e.Name())
			}
		}
		slices.Sort(names)
		for _, name := range names {
			path := filepath.Join(dir, name)
			// Follows links: Kubernetes and Nomad mount files as links.
			isDir, err := h.isDir(path)
			switch {
			case err != nil:
				diags = append(diags, problem(nil, "Cannot read "+path, "-config-dir %s: %v.", dir, err))
			case !isDir:
				paths = append(paths, path)
			}
		}
	}
	return paths, diags
}

// isConfigName tells a file to read from the others in a directory: hidden
// ones and what editors leave behind (.x.hcl.swp, .#x.hcl, #x.hcl; x.hcl~ and
// #x.hcl# have other endings).
func isConfigName(name string) bool {
	if strings.HasPrefix(name, ".") || strings.HasPrefix(name, "#") {
		return false
	}
	ext := filepath.Ext(name)
	return ext == ".hcl" || ext == ".json"
}
