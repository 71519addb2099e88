package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/cli"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/rpc/client"
)

func tlsCA(out, err *bytes.Buffer) cli.Command   { return newTLSCACommand("diurna", out, err) }
func tlsCert(out, err *bytes.Buffer) cli.Command { return newTLSCertCommand("diurna", out, err) }

// makeTLS runs verbs that have to succeed, and returns what they print.
func makeTLS(t *testing.T, verb func(out, err *bytes.Buffer) cli.Command, args ...string) string {
	t.Helper()
	code, out, errs := runVerb(verb, args...)
	if code != exitOK || errs != "" {
		t.Fatalf("%v: exit %d\n%s%s", args, code, out, errs)
	}
	return out
}

// TestTLSServes: with what the verbs have made, and the configuration and the
// environment that they print, a node serves a client.
func TestTLSServes(t *testing.T) {
	t.Chdir(t.TempDir()) // so that paths have to be made whole
	dir := "it's a ${CA}"
	if out := makeTLS(t, tlsCA, "-dir", dir, "-cluster", "Orders"); !strings.Contains(out, filepath.Join(dir, "ca-key.pem")+"\n") {
		t.Errorf("the key is not told:\n%s", out)
	}
	conf := makeTLS(t, tlsCert, "-dir", dir, "-cluster", "Orders", "-server", "-name", "n1.example.com,10.1.2.3", "-name", "n2")
	for _, want := range []string{"server.orders.diurna", "n1.example.com", "10.1.2.3", "n2", filepath.Join(dir, "server-key.pem") + "\n"} {
		if !strings.Contains(conf, want) {
			t.Errorf("%s is not told:\n%s", want, conf)
		}
	}
	env := makeTLS(t, tlsCert, "-dir", dir, "-cluster", "Orders", "-client", "app")
	if !strings.Contains(env, "spiffe://orders.diurna/client/app") {
		t.Errorf("the subject is not told:\n%s", env)
	}
	for _, name := range []string{"ca.pem", "ca-key.pem", "server.pem", "server-key.pem", "app.pem", "app-key.pem"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}

	file := filepath.Join(t.TempDir(), "node.hcl")
	writeFiles(t, filepath.Dir(file), map[string]string{"node.hcl": regexp.MustCompile(`(?ms)^    .*\{\n.*^    \}\n`).FindString(conf[strings.Index(conf, "where they are"):])})
	cfg, err := config.Load(config.Sources{Files: []string{file}, Dev: true})
	if err != nil {
		t.Fatal(err)
	}
	cfg.DataDir = t.TempDir()
	cfg.Listener.RPC, cfg.Listener.Advertise, cfg.Listener.HTTP = "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"
	cfg.Disk.MinFree = 0
	t.Chdir("/")
	a := startReady(t, cfg, Options{})
	if a.security.identity.Status().Source != config.TLSFiles {
		t.Fatalf("%+v", a.security.identity.Status())
	}
	// The command line, told as is printed.
	export := regexp.MustCompile(`(?m)^ *export .*$`).FindString(env)
	p := startProcess(t, "sh", "-c", export+"\n"+diurna(t)+" status -addr "+a.Address())
	if code := p.wait(t); code != exitOK {
		t.Errorf("%s: exit %d: %s%s", export, code, p.stdout.text(), p.stderr.text())
	}
	// And a client that dials by no name of its own, as in another network.
	c := dialWith(t, a.Address(), client.WithRetry(0), client.WithTLS(client.TLSFiles{
		CAFile: cfg.TLS.CAFile, CertFile: filepath.Join(filepath.Dir(cfg.TLS.CAFile), "app.pem"),
		KeyFile: filepath.Join(filepath.Dir(cfg.TLS.CAFile), "app-key.pem"), ServerName: "n1.example.com",
	}))
	produce(t, c, "x")
	if got := consume(t, c, 0); len(got) != 1 {
		t.Errorf("%d records", len(got))
	}
}

// TestTLSNodeID: a certificate for one node is of no use to another.
func TestTLSNodeID(t *testing.T) {
	dir := t.TempDir()
	makeTLS(t, tlsCA, "-dir", dir)
	out := makeTLS(t, tlsCert, "-dir", dir, "-server", "-node-id", "3D33DA75-9E0D-4612-8163-382CF16E54F2")
	if strings.Contains(out, "cluster {") {
		t.Errorf("the default name is said:\n%s", out)
	}
	cert, err := (&tlsOptions{dir: dir}).made("server.pem")
	if err != nil || len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://diurna.diurna/server/3d33da75-9e0d-4612-8163-382cf16e54f2" {
		t.Errorf("%v, %v", cert.URIs, err)
	}
}

// TestTLSLife: nothing outlives its CA, and what is printed is what is.
func TestTLSLife(t *testing.T) {
	dir := t.TempDir()
	makeTLS(t, tlsCA, "-dir", dir, "-ttl", "48h")
	ca, err := (&tlsOptions{dir: dir}).made("ca.pem")
	if err != nil || time.Until(ca.NotAfter) > 48*time.Hour || time.Until(ca.NotAfter) < 47*time.Hour {
		t.Fatalf("%v, %v", ca.NotAfter, err)
	}
	for _, args := range [][]string{{"-client", "long"}, {"-server"}} {
		if out := makeTLS(t, tlsCert, append(args, "-dir", dir)...); !strings.Contains(out, "good until "+until(ca)) {
			t.Errorf("want %s:\n%s", until(ca), out)
		}
	}
	makeTLS(t, tlsCert, "-dir", dir, "-client", "short", "-ttl", "1h")
	if cert, err := (&tlsOptions{dir: dir}).made("short.pem"); err != nil || time.Until(cert.NotAfter) > time.Hour {
		t.Errorf("%v, %v", cert.NotAfter, err)
	}
}

func TestTLSRefuses(t *testing.T) {
	dir := t.TempDir()
	empty, broken := t.TempDir(), folderWith(t, map[string]string{"ca-key.pem": "rubbish", "ca.pem": "rubbish"})
	makeTLS(t, tlsCA, "-dir", dir)
	makeTLS(t, tlsCert, "-dir", dir, "-server")
	makeTLS(t, tlsCert, "-dir", dir, "-client", "app")
	before := listing(t, dir)
	for name, tc := range map[string]struct {
		verb func(out, err *bytes.Buffer) cli.Command
		args []string
		want string
	}{
		"CA again":            {tlsCA, []string{"-dir", dir}, "ca-key.pem: file already exists. Nothing is overwritten: choose another folder with -dir."},
		"server again":        {tlsCert, []string{"-dir", dir, "-server"}, "server-key.pem: file already exists. Nothing is overwritten: choose another name with -file"},
		"client again":        {tlsCert, []string{"-dir", dir, "-client", "app"}, "app-key.pem: file already exists. Nothing is overwritten: choose another name with -client"},
		"client as a server":  {tlsCert, []string{"-dir", dir, "-client", "server"}, "server-key.pem: file already exists"},
		"no CA":               {tlsCert, []string{"-dir", empty, "-server"}, "there is no CA in " + empty + ": open " + filepath.Join(empty, "ca-key.pem") + ": no such file or directory. Name the CA's folder with -dir, or make a CA there with `diurna tls ca create -dir " + empty + "`."},
		"a broken CA":         {tlsCert, []string{"-dir", broken, "-server"}, filepath.Join(broken, "ca-key.pem")},
		"CA beside rubbish":   {tlsCA, []string{"-dir", broken}, "file already exists"},
		"neither":             {tlsCert, []string{"-dir", dir}, "say whose certificate it is: -server for a node, or -client=<name>"},
		"both":                {tlsCert, []string{"-dir", dir, "-server", "-client", "x"}, "-server and -client cannot be used together"},
		"client's file":       {tlsCert, []string{"-dir", dir, "-client", "x", "-file", "y"}, "-file is for -server"},
		"client's names":      {tlsCert, []string{"-dir", dir, "-client", "x", "-name", "y"}, "-name is for -server"},
		"client's node":       {tlsCert, []string{"-dir", dir, "-client", "x", "-node-id", "y"}, "-node-id is for -server"},
		"client without name": {tlsCert, []string{"-dir", dir, "-client", ""}, `-client: "" is no name`},
		"client's path":       {tlsCert, []string{"-dir", dir, "-client", "../x"}, `-client: "../x" is no name: letters`},
		"the CA's own":        {tlsCert, []string{"-dir", dir, "-server", "-file", "ca"}, `-file: "ca" is the CA's own`},
		"the CA's key":        {tlsCert, []string{"-dir", dir, "-server", "-file", "ca-key"}, "ca-key.pem: file already exists"},
		"node id":             {tlsCert, []string{"-dir", dir, "-server", "-file", "x", "-node-id", "n1"}, `-node-id: "n1" is no node's id`},
		"DNS name":            {tlsCert, []string{"-dir", dir, "-server", "-file", "x", "-name", "a,b_c"}, `"b_c" is neither a DNS name nor an IP address`},
		"DNS name, empty":     {tlsCert, []string{"-dir", dir, "-server", "-file", "x", "-name", "a,"}, `"" is neither a DNS name nor an IP address`},
		"cluster":             {tlsCert, []string{"-dir", dir, "-server", "-file", "x", "-cluster", "a b"}, "-cluster: "},
		"CA's cluster":        {tlsCA, []string{"-dir", empty, "-cluster", ""}, "-cluster: "},
		"no folder":           {tlsCA, []string{"-dir", ""}, "-dir is empty"},
		"a file as folder":    {tlsCA, []string{"-dir", filepath.Join(dir, "ca.pem")}, filepath.Join(dir, "ca.pem")},
		"no life":             {tlsCA, []string{"-dir", empty, "-ttl", "0"}, "-ttl: 0s is no life"},
		"life in days":        {tlsCert, []string{"-dir", dir, "-client", "x", "-ttl", "30d"}, "flag -ttl: want a duration"},
		"option":              {tlsCert, []string{"-dir", dir, "-clint", "x"}, "unknown option -clint. Did you mean -client?"},
		"word":                {tlsCert, []string{"-dir", dir, "-server", "n1"}, "unexpected argument \"n1\""},
	} {
		code, out, errs := runVerb(tc.verb, tc.args...)
		if code != exitUsage || out != "" || !strings.Contains(errs, tc.want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s: exit %d\n%s%s", name, code, out, errs)
		}
	}
	sameListing(t, before, listing(t, dir))
	if entries, err := os.ReadDir(empty); err != nil || len(entries) != 0 {
		t.Errorf("made in vain: %v, %v", entries, err)
	}
}

// TestTLSWarns: forgetting -cluster makes what no node of the cluster takes.
func TestTLSWarns(t *testing.T) {
	dir := t.TempDir()
	makeTLS(t, tlsCA, "-dir", dir, "-cluster", "orders")
	code, out, errs := runVerb(tlsCert, "-dir", dir, "-client", "app")
	if code != exitOK || !strings.Contains(errs, `is for the cluster "diurna", and its CA is called "Diurna CA of orders"`) {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	makeTLS(t, tlsCert, "-dir", dir, "-client", "b", "-cluster", "Orders")
}

func TestTLSHelp(t *testing.T) {
	for name, c := range map[string]cli.Command{"diurna tls ca create [options]": newTLSCACommand("", nil, nil), "diurna tls cert create -server|-client=<name> [options]": newTLSCertCommand("", nil, nil)} {
		for _, want := range []string{"Usage: " + name, "-dir=<folder>", "-cluster=<name>", "-ttl=<duration>", "never overwrites", "Examples:"} {
			if !strings.Contains(c.Help(), want) {
				t.Errorf("the help lacks %q:\n%s", want, c.Help())
			}
		}
		for line := range strings.Lines(c.Help()) {
			if len(line) > 83 {
				t.Errorf("%d columns: %s", len(line), line)
			}
		}
	}
}
