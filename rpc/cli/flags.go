package cli

import (
	"time"

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
	*p = def
	given := false
	f.Each(func(s string) error {
		if given {
			s = *p + "," + s
		}
		*p, given = s, true
		return nil
	}, "addr", "host:port",
		"Address of any node of the cluster, or of several, with commas between or the option repeated: the next one is used when one cannot be reached. Default "+DefaultAddr+", or what "+envAddr+" says; the port may be left out when it is "+client.DefaultPort+".")
}

// retryFlag is the option of verbs that outlive a node.
func retryFlag(f *flags.Set, p *time.Duration, what string) {
	f.Duration(p, "retry", client.DefaultRetry, what+" 0 gives up at once. Default "+client.DefaultRetry.String()+".")
}

func logFlag(f *flags.Set, p *string) {
	f.Text(p, "log", "name", "", "Name of the log. Default: the default log.")
}
