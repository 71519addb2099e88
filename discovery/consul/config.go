package consul

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/discovery"
)

// Config says which Consul, and what to register there. Only Cluster has to be
// set. What is empty and has no default here is taken from Consul's own
// environment variables (CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN, CONSUL_CACERT and
// so on) if they are set.
type Config struct {
	// Address of the local agent: host:port, http://…, https://… or
	// unix:///path. Default: CONSUL_HTTP_ADDR, else 127.0.0.1:8500.
	Address string
	// TLS to the agent: on with Scheme "https" or an https:// address. Files
	// are PEM and read once.
	Scheme     string
	CAFile     string
	CertFile   string
	KeyFile    string
	ServerName string
	SkipVerify bool

	// Token is sent with every request. TokenFile holds one instead; it is read
	// again regularly and when Consul refuses the token. Set one at most.
	Token     string
	TokenFile string

	// Datacenter, Namespace and Partition are those of the agent and the token
	// unless set; the last two need Consul Enterprise.
	Datacenter string
	Namespace  string
	Partition  string

	// Service is the name to register and to watch. Default: "diurna".
	Service string
	// Cluster names the cluster: nodes of others are not seen, even where they
	// share the service. Letters, digits, dots, hyphens and underscores.
	Cluster string
	// Tags are registered beside the role's tag.
	Tags []string
	// KVPrefix is where keys lie; the cluster's name comes after it. Default:
	// "diurna/".
	KVPrefix string

	// HealthService is what the gRPC check asks for. Default: "diurna.v1.Log".
	HealthService string
	// HealthTLS makes the gRPC check use TLS. Certificates are not verified:
	// the check says who is alive, not who is who.
	HealthTLS bool

	// Timing is how often and how long. Default: see Timing.
	Timing Timing

	// Logger. Default: none. Tokens are never logged.
	Logger hclog.Logger
}

// Timing is how often things are done and how long they may take. Zero fields
// take the default. Intervals vary by up to a tenth, so that nodes that started
// together do not stay in step.
type Timing struct {
	// TTL is how long the TTL check stays as it is without an update: 15 s. It
	// is updated every TTLUpdate: 5 s.
	TTL, TTLUpdate time.Duration
	// The gRPC check is made every GRPCInterval (3 s), takes at most
	// GRPCTimeout (3 s), and turns critical after three failures. Consul makes
	// no check more often than once a second. A node that is well again shows in
	// DNS with the next one.
	GRPCInterval, GRPCTimeout time.Duration
	// DeregisterAfter is how long an instance may be critical before its agent
	// forgets it: 72 h. Consul takes no less than a minute.
	DeregisterAfter time.Duration

	// Reconcile is how often the registration is compared with what the agent
	// has: 30 s. After a failure it is tried again after one, two, three …
	// times RetryStep (1 s), at most RetryMax (30 s).
	Reconcile, RetryStep, RetryMax time.Duration
	// Request is how long a request may take that is answered at once: 10 s.
	Request time.Duration
	// Deregister is how long deregistration may take at the end: 3 s.
	Deregister time.Duration

	// Wait is how long the agent may hold a query while nothing changes: 60 s.
	// When there is no answer WaitGrace (10 s) after it should have come, the
	// connection is taken for dead.
	Wait, WaitGrace time.Duration
	// WatchEvery is how often at most changes are asked for, in the long run:
	// every 2 s. After failures it waits longer, twice as long each time, up to
	// RetryMax.
	WatchEvery time.Duration
	// Settle is how long answers are not trusted after Consul forgot what it
	// knew, because not everybody may have registered again: 90 s.
	Settle time.Duration
}

func (t *Timing) applyDefaults() {
	for _, f := range []struct {
		d *time.Duration
		v time.Duration
	}{
		{&t.TTL, 15 * time.Second}, {&t.TTLUpdate, 5 * time.Second},
		{&t.GRPCInterval, 3 * time.Second}, {&t.GRPCTimeout, 3 * time.Second},
		{&t.DeregisterAfter, 72 * time.Hour},
		{&t.Reconcile, 30 * time.Second}, {&t.RetryStep, time.Second}, {&t.RetryMax, 30 * time.Second},
		{&t.Request, 10 * time.Second}, {&t.Deregister, 3 * time.Second},
		{&t.Wait, time.Minute}, {&t.WaitGrace, 10 * time.Second},
		{&t.WatchEvery, 2 * time.Second}, {&t.Settle, 90 * time.Second},
	} {
		if *f.d == 0 {
			*f.d = f.v
		}
	}
}

// answerBy is how long a blocking query may take. The servers add up to a
// sixteenth to the time they were asked to wait.
func (t *Timing) answerBy() time.Duration { return t.Wait + t.Wait/16 + t.WaitGrace }

var (
	idRE      = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	clusterRE = idRE
	serviceRE = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`)
	roleTags  = []string{string(discovery.Leader), string(discovery.Follower), string(discovery.Nonvoter)}
)

func (c *Config) applyDefaultsAndValidate() error {
	c.Address = cmp.Or(c.Address, os.Getenv(api.HTTPAddrEnvName), "127.0.0.1:8500")
	if c.Token == "" && c.TokenFile == "" {
		c.TokenFile = os.Getenv(api.HTTPTokenFileEnvName)
	}
	c.Service = cmp.Or(c.Service, "diurna")
	c.KVPrefix = cmp.Or(c.KVPrefix, "diurna/")
	if !strings.HasSuffix(c.KVPrefix, "/") {
		c.KVPrefix += "/"
	}
	c.HealthService = cmp.Or(c.HealthService, "diurna.v1.Log")
	c.Tags = slices.Clone(c.Tags)
	c.Timing.applyDefaults()
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}

	// Only the address's form: its text may hold a password.
	if u, err := url.Parse(c.Address); err == nil && u.User != nil || strings.Contains(c.Address, "@") {
		return errors.New("consul: the address must not hold a user or a password: use a token")
	}
	switch {
	case !clusterRE.MatchString(c.Cluster):
		return fmt.Errorf("consul: %q is not a cluster's name: up to 128 letters, digits, dots, hyphens and underscores", c.Cluster)
	case !serviceRE.MatchString(c.Service):
		return fmt.Errorf("consul: %q is not a service's name that DNS can carry: up to 63 letters, digits and hyphens", c.Service)
	case strings.HasPrefix(c.KVPrefix, "/"):
		return fmt.Errorf("consul: the key prefix %q must not begin with a slash", c.KVPrefix)
	case c.Scheme != "" && c.Scheme != "http" && c.Scheme != "https":
		return fmt.Errorf("consul: the scheme %q is neither http nor https", c.Scheme)
	case c.Token != "" && c.TokenFile != "":
		return errors.New("consul: both a token and a token file are given: keep one of them")
	case (c.CertFile == "") != (c.KeyFile == ""):
		return errors.New("consul: a client certificate needs both a certificate's and a key's file")
	case c.Timing.TTLUpdate >= c.Timing.TTL:
		return fmt.Errorf("consul: a TTL check updated every %s would expire after %s", c.Timing.TTLUpdate, c.Timing.TTL)
	}
	for _, tag := range c.Tags {
		if tag == "" || slices.Contains(roleTags, tag) {
			return fmt.Errorf("consul: the tag %q cannot be given: it says what a node is in Raft", tag)
		}
	}
	return nil
}
