package agent

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/cli"

	"github.com/diurnalog/diurna/agent/config"
	ident "github.com/diurnalog/diurna/agent/identity"
	"github.com/diurnalog/diurna/rpc/cli/flags"
)

// Lives of what is made by hand, and so renewed by hand.
const (
	caLife   = 10 * 365 * 24 * time.Hour
	certLife = 365 * 24 * time.Hour
)

// tlsOptions are what both verbs take.
type tlsOptions struct {
	// program is how the user called it.
	program        string
	stdout, stderr io.Writer

	dir, cluster string
	ttl          time.Duration
}

func (o *tlsOptions) register(f *flags.Set, dir string, ttl time.Duration, life string) {
	f.Text(&o.dir, "dir", "folder", ".", dir+" Default: this one.")
	f.Text(&o.cluster, "cluster", "name", config.Default().Cluster.Name, "The cluster's name, as in the nodes' cluster.name. Default: "+config.Default().Cluster.Name+".")
	f.Duration(&o.ttl, "ttl", ttl, life)
}

// dnsName is what a certificate can hold.
var dnsName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$`)

func (o *tlsOptions) check() error {
	switch {
	case o.dir == "":
		return errors.New("-dir is empty: it names the folder")
	case !dnsName.MatchString(o.cluster):
		return fmt.Errorf("-cluster: certificates hold it as part of a DNS name, and %q cannot be that: letters, digits, dots and hyphens", o.cluster)
	case o.ttl < time.Minute:
		return fmt.Errorf("-ttl: %s is no life for a certificate: a minute at least", o.ttl)
	}
	return nil
}

// fail tells why files were not made, and how to get them.
func (o *tlsOptions) fail(err error, rename string) int {
	text := sentence(err)
	switch {
	case errors.Is(err, fs.ErrExist):
		text += " Nothing is overwritten: " + rename + "."
	case errors.Is(err, fs.ErrNotExist):
		text += fmt.Sprintf(" Name the CA's folder with -dir, or make a CA there with `%s tls ca create -dir %s`.", o.program, shellWord(o.dir))
	case errors.Is(err, ident.ErrExpired):
		text += " Make another CA, in another folder."
	}
	say(o.stderr, "Error: %s\n", text)
	return exitUsage
}

// file is where a file of the folder is, for people.
func (o *tlsOptions) file(name string) string { return filepath.Join(o.dir, name) }

// path is where it is, for other folders' use.
func (o *tlsOptions) path(name string) string { return absolute(o.file(name)) }

func absolute(name string) string {
	if abs, err := filepath.Abs(name); err == nil {
		return abs
	}
	return name // as good as it gets where the working directory is gone
}

// made reads what was made: the CA may have shortened its life.
func (o *tlsOptions) made(name string) (*x509.Certificate, error) {
	text, err := os.ReadFile(o.file(name))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s holds no certificate", o.file(name))
	}
	return x509.ParseCertificate(block.Bytes)
}

// checkCA warns of what is most easily forgotten.
func (o *tlsOptions) checkCA(made *x509.Certificate) {
	if ca := made.Issuer.CommonName; !strings.EqualFold(ca, ident.CAName(o.cluster)) {
		say(o.stderr, "Warning: this certificate is for the cluster %q, and its CA is called %q. If that is not meant, remove the files and give -cluster.\n", o.cluster, ca)
	}
}

func until(c *x509.Certificate) string { return c.NotAfter.UTC().Format("2006-01-02 15:04 MST") }

// exports is the line that has the command line use a client's files.
func exports(ca, cert, key string) string {
	return fmt.Sprintf("export DIURNA_CACERT=%s DIURNA_CLIENT_CERT=%s DIURNA_CLIENT_KEY=%s", shellWord(ca), shellWord(cert), shellWord(key))
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// shellWord quotes what a shell would not take as one word.
func shellWord(s string) string {
	if plainWord.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// hclText is a string as a configuration writes it.
func hclText(s string) string {
	return strings.NewReplacer("${", "$${", "%{", "%%{").Replace(strconv.Quote(s))
}

// tlsCACommand makes a CA.
type tlsCACommand struct{ tlsOptions }

func newTLSCACommand(program string, stdout, stderr io.Writer) cli.Command {
	return &tlsCACommand{tlsOptions{program: program, stdout: stdout, stderr: stderr}}
}

func (c *tlsCACommand) options() *flags.Set {
	f := flags.New()
	c.register(f, "Where to put the files. It is made if it is not there.", caLife,
		"How long the CA is good for; nothing that it signs is good for longer. Default: "+hours(caLife)+", ten years.")
	return f
}

func hours(d time.Duration) string { return fmt.Sprintf("%dh", int(d/time.Hour)) }

// Synopsis implements cli.Command.
func (c *tlsCACommand) Synopsis() string { return "Make a CA, for clusters without Vault" }

// Help implements cli.Command.
func (c *tlsCACommand) Help() string {
	return (&tlsCACommand{}).options().Help("diurna tls ca create [options]", `
Makes a certificate authority: ca.pem, which says whom to trust and goes to
every node and client, and ca-key.pem, which "diurna tls cert create" signs
with. Whoever has ca-key.pem can pass for any node and any client: keep it
where no node runs.

With Vault, nodes get and renew their certificates by themselves, and this is
not needed: see vault in config.hcl.

Exits 0 when both files were made. It never overwrites a file.
`, `
Examples:

  A CA for the cluster "orders", and certificates for a node and a client:

      $ diurna tls ca create -dir ca -cluster orders
      $ diurna tls cert create -dir ca -cluster orders -server -name 10.0.0.1
      $ diurna tls cert create -dir ca -cluster orders -client billing
`)
}

// Run implements cli.Command.
func (c *tlsCACommand) Run(args []string) int {
	const verb = "tls ca create"
	if err := c.options().Parse(args); err != nil {
		return usageError(c.stderr, verb, err)
	}
	if err := c.check(); err != nil {
		return usageError(c.stderr, verb, err)
	}
	err := ident.CreateCA(c.dir, c.cluster, c.ttl)
	var cert *x509.Certificate
	if err == nil {
		cert, err = c.made(ident.CAFile)
	}
	if err != nil {
		return c.fail(err, "choose another folder with -dir")
	}
	sign := fmt.Sprintf("%s tls cert create -dir %s -cluster %s", c.program, shellWord(c.dir), c.cluster)
	say(c.stdout, `Made a CA for the cluster %q, good until %s:

    %s
        whom to trust; a copy goes to every node and every client
    %s
        who has it can pass for anybody: keep it where no node runs

Next, a certificate for each node, with the names and addresses by which it is
reached, and one for each client:

    %[5]s -server -file n1 -name 10.0.0.1,n1.example.com
    %[5]s -client app
`, c.cluster, until(cert), c.file(ident.CAFile), c.file(ident.CAKeyFile), sign)
	return exitOK
}

// tlsCertCommand makes a certificate.
type tlsCertCommand struct {
	tlsOptions

	server               bool
	names                []string
	nodeID, name, client string
}

func newTLSCertCommand(program string, stdout, stderr io.Writer) cli.Command {
	return &tlsCertCommand{tlsOptions: tlsOptions{program: program, stdout: stdout, stderr: stderr}}
}

func (c *tlsCertCommand) options() *flags.Set {
	f := flags.New()
	f.Bool(&c.server, "server", "Make a node's certificate.")
	f.Text(&c.client, "client", "name", "", "Make a client's certificate. The files are named after it, and permissions are given to spiffe://<cluster>.diurna/client/<name>.")
	f.Each(func(s string) error {
		for name := range strings.SplitSeq(s, ",") {
			if net.ParseIP(name) == nil && !dnsName.MatchString(name) {
				return fmt.Errorf("%q is neither a DNS name nor an IP address", name)
			}
			c.names = append(c.names, name)
		}
		return nil
	}, "name", "name,...", "With -server: DNS names and IP addresses by which clients reach the node, besides localhost and those of Consul. May be repeated.")
	f.Text(&c.nodeID, "node-id", "id", "", "With -server: the certificate is for the node with this id only, which `diurna status` tells. Default: for any node.")
	f.Text(&c.name, "file", "name", "server", "With -server: the files are named after it. Default: server.")
	c.register(f, "Where the CA is, and where the files are put.", certLife,
		"How long it is good for, but no longer than the CA. Default: "+hours(certLife)+", a year.")
	return f
}

// Synopsis implements cli.Command.
func (c *tlsCertCommand) Synopsis() string { return "Make a node's or a client's certificate" }

// Help implements cli.Command.
func (c *tlsCertCommand) Help() string {
	return (&tlsCertCommand{}).options().Help("diurna tls cert create -server|-client=<name> [options]", `
Makes a certificate and its key, NAME.pem and NAME-key.pem, with the CA that
"diurna tls ca create" has made, and tells how to use them.

A node's certificate makes its holder a node of the cluster, so each goes to one
node and to nobody else. It is not renewed by itself: make another in time, and
put its files in the place of the old ones, which a running node notices.

Exits 0 when both files were made. It never overwrites a file.
`, `
Examples:

  For a node of the cluster "orders" that is reached by a name and an address:

      $ diurna tls cert create -dir ca -cluster orders -server -file n1 \
          -name n1.example.com,10.0.0.1

  For a client, for a month:

      $ diurna tls cert create -dir ca -cluster orders -client billing -ttl 720h
`)
}

// Run implements cli.Command.
func (c *tlsCertCommand) Run(args []string) int {
	const verb = "tls cert create"
	c.names = nil
	f := c.options()
	err := f.Parse(args)
	if err == nil {
		err = c.checkCert(f)
	}
	if err != nil {
		return usageError(c.stderr, verb, err)
	}
	if c.client != "" {
		return c.makeClient()
	}
	return c.makeServer()
}

func (c *tlsCertCommand) checkCert(f *flags.Set) error {
	client := f.Given("client")
	switch {
	case c.server && client:
		return f.Exclusive("server", "client")
	case !c.server && !client:
		return errors.New("say whose certificate it is: -server for a node, or -client=<name>")
	case client:
		for _, name := range []string{"name", "node-id", "file"} {
			if f.Given(name) {
				return fmt.Errorf("-%s is for -server: a client's certificate holds its name, after which its files are named too", name)
			}
		}
		if err := checkFile("client", c.client); err != nil {
			return err
		}
	default:
		if err := checkFile("file", c.name); err != nil {
			return err
		}
	}
	if c.nodeID != "" {
		id, err := uuid.Parse(c.nodeID)
		if err != nil {
			return fmt.Errorf("-node-id: %q is no node's id, which looks like 3d33da75-9e0d-4612-8163-382cf16e54f2", c.nodeID)
		}
		c.nodeID = id.String() // in one of the ways to write it
	}
	return c.check()
}

// checkFile tells what is wrong with a name with the option that gave it.
func checkFile(option, name string) error {
	if err := ident.CheckName(name); err != nil {
		return fmt.Errorf("-%s: %w", option, err)
	}
	return nil
}

func (c *tlsCertCommand) makeServer() int {
	err := ident.CreateServer(c.dir, ident.ServerCert{Cluster: c.cluster, NodeID: c.nodeID, Names: c.names, File: c.name, TTL: c.ttl})
	cert, key := c.name+".pem", c.name+"-key.pem"
	var made *x509.Certificate
	if err == nil {
		made, err = c.made(cert)
	}
	if err != nil {
		return c.fail(err, "choose another name with -file, or remove that file")
	}
	c.checkCA(made)
	names := made.DNSNames
	for _, ip := range made.IPAddresses {
		names = append(names, ip.String())
	}
	clusterBlock := ""
	if c.cluster != config.Default().Cluster.Name {
		clusterBlock = fmt.Sprintf("    cluster {\n      name = %s\n    }\n", hclText(c.cluster))
	}
	say(c.stdout, `Made a node's certificate for the cluster %q, good until %s:

    %s
        for %s
    %s
        its key, for this node only

Copy both, and %s, to the node, and say in its configuration where they are:

%s    tls {
      source    = "files"
      cert_file = %s
      key_file  = %s
      ca_file   = %s
    }
`, c.cluster, until(made), c.file(cert), strings.Join(names, ", "), c.file(key), c.file(ident.CAFile),
		clusterBlock, hclText(c.path(cert)), hclText(c.path(key)), hclText(c.path(ident.CAFile)))
	return exitOK
}

func (c *tlsCertCommand) makeClient() int {
	err := ident.CreateClient(c.dir, c.cluster, c.client, c.ttl)
	cert, key := c.client+".pem", c.client+"-key.pem"
	var made *x509.Certificate
	if err == nil {
		made, err = c.made(cert)
	}
	if err != nil {
		return c.fail(err, "choose another name with -client, or remove that file")
	}
	c.checkCA(made)
	say(c.stdout, `Made a client's certificate for the cluster %q, good until %s:

    %s
        for %s, which is who permissions are given to
    %s
        its key, for this client only

Where the client runs, with both and a copy of %s:

    %s
    %s status
`, c.cluster, until(made), c.file(cert), made.URIs[0], c.file(key), c.file(ident.CAFile),
		exports(c.path(ident.CAFile), c.path(cert), c.path(key)), c.program)
	return exitOK
}
