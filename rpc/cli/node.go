package cli

import (
	"fmt"
	"strconv"

	"github.com/diurnalog/diurna/rpc/cli/flags"
	"github.com/diurnalog/diurna/rpc/client"
)

// The options that say how to secure connections, and the variables that stand
// in for them.
const (
	flagTLS, envTLS               = "tls", "DIURNA_TLS"
	flagCA, envCA                 = "ca-file", "DIURNA_CACERT"
	flagClientCert, envClientCert = "client-cert", "DIURNA_CLIENT_CERT"
	flagClientKey, envClientKey   = "client-key", "DIURNA_CLIENT_KEY"
	flagServerName, envServerName = "tls-server-name", "DIURNA_TLS_SERVER_NAME"
)

// tlsHelp is the example that every verb has which talks to a node.
const tlsHelp = `

  Where the nodes have certificates; the variables save typing:

      $ export DIURNA_CACERT=ca.pem DIURNA_CLIENT_CERT=me.pem DIURNA_CLIENT_KEY=me-key.pem
      $ export DIURNA_TLS_SERVER_NAME=server.<cluster>.diurna
      $ diurna status -addr db1
`

// node is how a verb reaches the cluster: what all verbs share that do.
type node struct {
	*Meta
	addr     string
	useTLS   bool
	tlsFiles client.TLSFiles

	// secure are the options for the client, after parse.
	secure []client.Option
}

// nodeFlags adds the options, with what the environment says as their defaults.
func (n *node) nodeFlags(f *flags.Set) {
	addrFlag(f, n.Meta, &n.addr)
	n.useTLS, n.secure = false, nil
	f.Text(&n.tlsFiles.CAFile, flagCA, "file", n.env(envCA),
		"Connect with TLS, to nodes whose certificate one of the CAs in this file has signed (PEM). Default: what "+envCA+" says.")
	f.Text(&n.tlsFiles.CertFile, flagClientCert, "file", n.env(envClientCert),
		"The certificate to show to nodes (PEM); it goes with -"+flagClientKey+". Default: what "+envClientCert+" says.")
	f.Text(&n.tlsFiles.KeyFile, flagClientKey, "file", n.env(envClientKey),
		"The key to it (PEM). Default: what "+envClientKey+" says.")
	f.Text(&n.tlsFiles.ServerName, flagServerName, "name", n.env(envServerName),
		"The name that a node's certificate must have, if not the host in -addr. server.<cluster>.diurna is in every node's. Default: what "+envServerName+" says.")
	f.Bool(&n.useTLS, flagTLS,
		"Connect with TLS even if none of the options above is given: to nodes whose certificate this machine trusts. "+envTLS+"=1 does the same; -"+flagTLS+"=false connects without TLS whatever the environment says.")
}

func (n *node) env(name string) string {
	if n.LookupEnv == nil {
		return ""
	}
	v, _ := n.LookupEnv(name)
	return v
}

// parse takes the verb's arguments, all of which are options.
func (n *node) parse(f *flags.Set, args []string) error {
	if err := f.Parse(args); err != nil {
		return err
	}
	return n.prepare(f)
}

// parseArgs takes the verb's arguments, and returns those behind the options.
func (n *node) parseArgs(f *flags.Set, args []string) ([]string, error) {
	rest, err := f.ParseArgs(args)
	if err == nil {
		err = n.prepare(f)
	}
	return rest, err
}

// prepare finds out how to connect.
func (n *node) prepare(f *flags.Set) error {
	on, err := n.wantsTLS(f)
	if err != nil || !on {
		return err
	}
	for _, half := range []struct{ given, missing, flag, env, with string }{
		{n.tlsFiles.CertFile, n.tlsFiles.KeyFile, flagClientKey, envClientKey, "the certificate " + n.tlsFiles.CertFile},
		{n.tlsFiles.KeyFile, n.tlsFiles.CertFile, flagClientCert, envClientCert, "the key " + n.tlsFiles.KeyFile},
	} {
		if half.given != "" && half.missing == "" {
			return fmt.Errorf("-%s (or %s) is missing, which %s goes with", half.flag, half.env, half.with)
		}
	}
	n.secure = []client.Option{client.WithTLS(n.tlsFiles)}
	return nil
}

func (n *node) wantsTLS(f *flags.Set) (bool, error) {
	if f.Given(flagTLS) {
		if n.useTLS {
			return true, nil
		}
		for _, name := range []string{flagCA, flagClientCert, flagClientKey, flagServerName} {
			if f.Given(name) {
				return false, fmt.Errorf("-%s=false and -%s cannot be used together", flagTLS, name)
			}
		}
		return false, nil
	}
	if said := n.env(envTLS); said != "" {
		on, err := strconv.ParseBool(said)
		if err != nil {
			return false, fmt.Errorf("%s is %q, want 1 or 0", envTLS, said)
		}
		if on {
			return true, nil
		}
	}
	return n.tlsFiles != client.TLSFiles{}, nil
}

// clientOptions are what flags ask for, then more, then the process's own.
func (n *node) clientOptions(more ...client.Option) []client.Option {
	return append(append(append([]client.Option{}, n.secure...), more...), n.DialOptions...)
}

// withClient dials -addr and runs f.
func (n *node) withClient(f func(*client.Client) int, opts ...client.Option) int {
	c, err := client.Dial(n.addr, n.clientOptions(opts...)...)
	if err != nil {
		n.errorf("%s", err)
		return ExitUsage
	}
	code := f(c)
	if err := c.Close(); err != nil {
		n.errorf("%s", err)
		return max(code, ExitUsage)
	}
	return code
}
