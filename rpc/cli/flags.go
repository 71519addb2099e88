package cli

import (
	"github.com/diurnalog/diurna/rpc/cli/flags"
	"github.com/diurnalog/diurna/rpc/client"
)

// DefaultAddr is where verbs look for a node when told nothing else.
const DefaultAddr = "127.0.0.1:8400"

// envAddr overrides DefaultAddr.
const envAddr = "DIURNA_ADDR"

// addrFlag is the option that every verb has which talks to a node.
func addrFlag(f *flags.Set, m *Meta, p *string) {
	def := DefaultAddr
	if m.LookupEnv != nil {
		if v, ok := m.LookupEnv(envAddr); ok && v != "" {
			def = v
		}
	}
	f.Text(p, "addr", "host:port", def,
		"Address of any node of the cluster. Default "+DefaultAddr+", or what "+envAddr+" says; the port may be left out when it is "+client.DefaultPort+".")
}

func logFlag(f *flags.Set, p *string) {
	f.Text(p, "log", "name", "", "Name of the log. Default: the default log.")
}
