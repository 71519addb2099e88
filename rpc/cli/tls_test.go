package cli

import (
	"strings"
	"testing"

	"github.com/diurnalog/diurna/agent/peer/peertest"
	"github.com/diurnalog/diurna/rpc/client/clienttest"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// secured is a node behind a port with TLS, and files for its clients.
type secured struct {
	*clienttest.Server
	ca            *peertest.CA
	caFile        string
	cert, key     string // a client's
	wrong, wrongK string // one of another CA
}

func startTLS(t *testing.T) *secured {
	t.Helper()
	s := &secured{Server: clienttest.New(), ca: peertest.NewCA(t, "cluster CA")}
	s.StartTLS(t, peertest.PortTLS(s.ca, "c", s.ca.Server(t, "c", "a")))
	dir := t.TempDir()
	s.caFile = peertest.WriteCA(t, dir, s.ca)
	s.cert, s.key = peertest.WritePair(t, dir, "me", s.ca.Client(t, "c", "alice"))
	s.wrong, s.wrongK = peertest.WritePair(t, dir, "wrong", peertest.NewCA(t, "another CA").Client(t, "c", "alice"))
	return s
}

// TestTLSOptions: options go before the environment, and that before none.
func TestTLSOptions(t *testing.T) {
	s := startTLS(t)
	all := map[string]string{"DIURNA_CACERT": s.caFile, "DIURNA_CLIENT_CERT": s.cert, "DIURNA_CLIENT_KEY": s.key}
	with := func(more ...string) map[string]string {
		env := map[string]string{}
		for k, v := range all {
			env[k] = v
		}
		for i := 0; i < len(more); i += 2 {
			env[more[i]] = more[i+1]
		}
		return env
	}
	for name, tc := range map[string]struct {
		env  map[string]string
		args []string
		code int
		want string // in what it says
	}{
		"options":                 {nil, []string{"-ca-file", s.caFile, "-client-cert", s.cert, "-client-key", s.key}, 0, ""},
		"environment":             {all, nil, 0, ""},
		"options go first":        {with("DIURNA_CACERT", "/nowhere"), []string{"-ca-file", s.caFile}, 0, ""},
		"half of each":            {map[string]string{"DIURNA_CLIENT_KEY": s.key, "DIURNA_CACERT": s.caFile}, []string{"-client-cert", s.cert}, 0, ""},
		"another name":            {all, []string{"-tls-server-name", "server.c.diurna"}, 0, ""},
		"its name in environment": {with("DIURNA_TLS_SERVER_NAME", "server.c.diurna"), nil, 0, ""},
		"told twice":              {with("DIURNA_TLS", "1"), []string{"-tls"}, 0, ""},
		"not told by itself":      {with("DIURNA_TLS", "0"), nil, 0, ""},

		"no TLS":             {nil, nil, 2, "the node speaks TLS, this client plaintext (TLS_FAILED). Connect with TLS. See -ca-file, or DIURNA_CACERT."},
		"no TLS, explicitly": {all, []string{"-tls=false"}, 2, "the node speaks TLS"},
		"machine's roots":    {nil, []string{"-tls"}, 2, `calls itself "CN=cluster CA". See -ca-file or DIURNA_CACERT.`},
		"by environment":     {map[string]string{"DIURNA_TLS": "true"}, nil, 2, "TLS_FAILED"},
		"wrong name":         {all, []string{"-tls-server-name", "db1"}, 2, "not db1"},
		"wrong name's help":  {with("DIURNA_TLS_SERVER_NAME", "db1"), nil, 2, "See -tls-server-name or DIURNA_TLS_SERVER_NAME."},
		"refused":            {all, []string{"-client-cert", s.wrong, "-client-key", s.wrongK}, 2, "the node refused this client's certificate: remote error: tls: unknown certificate authority"},

		"no key":           {nil, []string{"-client-cert", s.cert}, 1, "-client-key (or DIURNA_CLIENT_KEY) is missing, which the certificate " + s.cert + " goes with"},
		"no certificate":   {map[string]string{"DIURNA_CLIENT_KEY": s.key}, nil, 1, "-client-cert (or DIURNA_CLIENT_CERT) is missing, which the key " + s.key + " goes with"},
		"no file":          {nil, []string{"-ca-file", "/nowhere/ca.pem"}, 1, "/nowhere/ca.pem"},
		"both ways":        {nil, []string{"-tls=false", "-ca-file", s.caFile}, 1, "-tls=false and -ca-file cannot be used together"},
		"bad environment":  {map[string]string{"DIURNA_TLS": "on"}, nil, 1, `DIURNA_TLS is "on", want 1 or 0`},
		"unused if it is ": {map[string]string{"DIURNA_TLS": "on"}, []string{"-ca-file", s.caFile}, 1, "DIURNA_TLS"},
	} {
		t.Run(name, func(t *testing.T) {
			sh := newShell(nil, nil)
			for k, v := range tc.env {
				sh.env[k] = v
			}
			code := sh.run(append([]string{"servers", "-addr", s.Addr(), "-local"}, tc.args...)...)
			if code != tc.code || !strings.Contains(sh.err.String(), tc.want) {
				t.Errorf("exit %d, want %d with %q: %s%s", code, tc.code, tc.want, sh.out.String(), sh.err.String())
			}
		})
	}
}

// TestTLSVerbs: every verb that talks to a node takes the options, shows an
// example of them, and gets through.
func TestTLSVerbs(t *testing.T) {
	s := startTLS(t)
	for _, args := range [][]string{
		{"produce"}, {"consume"}, {"servers"}, {"status"},
		{"operator", "raft", "list-peers"},
		{"operator", "raft", "add-peer", "-peer-id", "id-b", "-peer-address", "b:1"},
		{"operator", "raft", "remove-peer", "-peer-id", "a"},
		{"operator", "raft", "transfer-leadership", "-peer-id", "a"},
		{"leave"},
	} {
		sh := newShell(nil, strings.NewReader("a record\n"))
		at := append(args, "-addr", s.Addr(), "-ca-file", s.caFile, "-client-cert", s.cert, "-client-key", s.key)
		if code := sh.run(at...); code != 0 {
			t.Errorf("%q: exit %d: %s", args, code, sh.err.String())
		}
		var verb []string
		for _, a := range args {
			if strings.HasPrefix(a, "-") {
				break
			}
			verb = append(verb, a)
		}
		sh = newShell(nil, nil)
		sh.run(append(verb, "-help")...)
		contains(t, strings.Join(verb, " ")+" -help", sh.out.String()+sh.err.String(),
			"-ca-file=<file>", "DIURNA_CACERT", "-client-cert=<file>", "DIURNA_CLIENT_CERT", "-client-key=<file>", "DIURNA_CLIENT_KEY",
			"-tls-server-name=<name>", "DIURNA_TLS_SERVER_NAME", "DIURNA_TLS=1", "$ export DIURNA_CACERT=")
	}
}

// TestTLSOthers: the nodes that are asked besides are reached as the first.
func TestTLSOthers(t *testing.T) {
	s := startTLS(t)
	other := clienttest.New()
	other.StartTLS(t, peertest.PortTLS(s.ca, "c", s.ca.Server(t, "c", "b")))
	s.SetNodes(twoNodes(s.Addr(), other.Addr(), "a"))
	other.SetNodes(twoNodes(s.Addr(), other.Addr(), "b"))
	sh := newShell(nil, nil)
	sh.env["DIURNA_CACERT"], sh.env["DIURNA_CLIENT_CERT"], sh.env["DIURNA_CLIENT_KEY"] = s.caFile, s.cert, s.key
	if code := sh.run("servers", "-addr", s.Addr()); code != 0 {
		t.Fatalf("exit %d: %s", code, sh.err.String())
	}
	if got := sh.out.String(); !strings.Contains(got, "says b") {
		t.Errorf("the other node was not asked:\n%s", got)
	}
}

// twoNodes is what the node self says of a and b; only it knows its version.
func twoNodes(a, b, self string) *v1.GetServersResponse {
	nodes := &v1.GetServersResponse{AnsweredBy: self, Servers: []*v1.Server{{Id: "a", Address: a}, {Id: "b", Address: b}}}
	for _, n := range nodes.Servers {
		if n.Id == self {
			n.Version = "says " + self
		}
	}
	return nodes
}
