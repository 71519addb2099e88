package config

import (
	"os"
	"time"
)

// Config is a checked configuration. Sizes are bytes.
type Config struct {
	// Dev asks for a throw-away node: DataDir may be empty, which means a
	// temporary directory.
	Dev bool
	// DataDir holds everything the node keeps. Empty only with Dev.
	DataDir string
	// LogLevel is one of trace, debug, info, warn, error.
	LogLevel string
	// LogJSON writes one JSON object per line of log.
	LogJSON bool

	Node       Node
	Cluster    Cluster
	Discovery  Discovery
	Consul     Consul
	Membership Membership
	Listener   Listener
	TLS        TLS
	Vault      Vault
	ACL        ACL
	Limits     Limits
	Log        Log
	Disk       Disk
	Raft       Raft
	Telemetry  Telemetry

	// ShutdownTimeout is how long a clean stop may take. Calls that are still
	// under way shortly before that are cut off.
	ShutdownTimeout time.Duration
}

// Node is what the node is called.
type Node struct {
	// Name is for people. It may change: a node is known by an id that is kept
	// with its data.
	Name string
}

// Cluster is what the node is a part of.
type Cluster struct {
	// Name keeps apart the clusters that one registry knows.
	Name string
	// BootstrapExpect is how many nodes, this one included, form the cluster
	// where there is none yet. 0 never forms one and waits to be added; 1 forms
	// one alone.
	BootstrapExpect int
	// Zone is where the node runs, for those who choose a near one.
	Zone string
}

// Kinds of Discovery.
const (
	DiscoveryStatic = "static"
	DiscoveryConsul = "consul"
)

// Discovery is how nodes find one another.
type Discovery struct {
	// Type is DiscoveryStatic or DiscoveryConsul.
	Type string
	// Peers are the addresses of the other nodes, for DiscoveryStatic. This
	// node's own may be among them.
	Peers []string
}

// Alone tells whether the node has nobody to look for.
func (c *Config) Alone() bool {
	return c.Discovery.Type == DiscoveryStatic && len(c.Discovery.Peers) == 0 && c.Cluster.BootstrapExpect == 1
}

// Consul is how to talk to the machine's Consul agent.
type Consul struct {
	// Address is host:port, or a URL.
	Address string
	// Token, or the file that holds it.
	Token, TokenFile string
	// CAFile, CertFile and KeyFile are for an agent that wants TLS.
	CAFile, CertFile, KeyFile string
	// Service is the name that nodes register under, and that clients look up.
	Service string
	// Tags are added to those that the node gives itself.
	Tags []string
}

// Membership is how the leader treats nodes that come and go.
type Membership struct {
	// Stabilization is how long a new node must have been healthy before it
	// becomes a voter.
	Stabilization time.Duration
	// LastContact is how long ago a healthy node was heard from at most.
	LastContact time.Duration
	// LeftAfter is how long a node must have been out of reach and out of the
	// catalog before it may be replaced.
	LeftAfter time.Duration
	// DeadAfter is how long a node must have been out of reach, whatever the
	// catalog says of it, before it may be replaced.
	DeadAfter time.Duration
	// CleanupDead removes such voters once others took their place.
	CleanupDead bool
}

// Listener is where the node listens. Addresses are host:port.
type Listener struct {
	// RPC is the address to listen at for clients and peers. Its host may be a
	// wildcard or empty, its port 0, which lets the kernel choose one.
	RPC string
	// Advertise is the address at which others reach RPC: never a wildcard.
	// Its port is 0 only where RPC's is and Advertise was not given; the port
	// is then known once the node listens.
	Advertise string
	// HTTP is the address to listen at for health checks, metrics and the like.
	HTTP string
	// MaxConnections is how many connections may be open.
	MaxConnections int
	// MaxStreams is how many calls may be under way.
	MaxStreams int
}

// Kinds of TLS.Source.
const (
	TLSNone  = "none"
	TLSDev   = "dev"
	TLSFiles = "files"
	TLSVault = "vault"
)

// TLS is how connections are secured.
type TLS struct {
	// Source is where the node's certificate comes from: TLSNone for plaintext,
	// TLSDev for a throw-away CA, TLSFiles or TLSVault.
	Source string
	// CertFile, KeyFile and CAFile are PEM, for TLSFiles.
	CertFile, KeyFile, CAFile string
	// DevDir is where nodes that share a throw-away CA find it, for TLSDev.
	// Empty means a folder of the data directory: a CA for this node alone.
	DevDir string
	// MinVersion is "1.2" or "1.3".
	MinVersion string
	// Names are DNS names and IP addresses that the certificate is to hold
	// besides those that every node's has, for TLSDev and TLSVault.
	Names []string
}

// Kinds of Vault.Auth.
const (
	VaultToken      = "token"
	VaultTokenFile  = "token_file"
	VaultAppRole    = "approle"
	VaultKubernetes = "kubernetes"
	VaultJWT        = "jwt"
)

// Vault is how to get certificates from Vault's PKI.
type Vault struct {
	// Address is a URL.
	Address string
	// CAFile is who vouches for Vault's own certificate; empty means the
	// machine's roots.
	CAFile string
	// Namespace needs Vault Enterprise.
	Namespace string
	// Auth is how to log in: see the kinds.
	Auth string
	// AuthMount is where that method is mounted. Empty means its name.
	AuthMount string
	// AuthRole is the role to log in as, for VaultKubernetes and VaultJWT.
	AuthRole string
	// Token is for VaultToken, TokenFile for VaultTokenFile; the file is read
	// again when it changes.
	Token, TokenFile string
	// RoleID and SecretID, or the file that holds it, are for VaultAppRole.
	RoleID, SecretID, SecretIDFile string
	// JWTFile is for VaultJWT and VaultKubernetes.
	JWTFile string
	// PKIMount is where the PKI engine is mounted that signs, with PKIRole.
	PKIMount, PKIRole string
	// CAMounts are PKI engines whose issuers are trusted, besides PKIMount.
	CAMounts []string
	// TTL is the life to ask for; the role may grant less.
	TTL time.Duration
}

// ACL is who may do what.
type ACL struct {
	// Enabled asks the policy before every call. Without it everybody with a
	// certificate may do everything.
	Enabled bool
	// PolicyFile holds the rules, Casbin's CSV.
	PolicyFile string
	// ModelFile replaces the model they are applied by; empty means the
	// built-in one.
	ModelFile string
}

// Limits bounds what clients may ask for.
type Limits struct {
	// MaxRecord is the largest record: key, value and headers, encoded.
	MaxRecord int64
	// MaxBatch is the largest batch of encoded records with their framing: at
	// least MaxRecord + RecordFraming.
	MaxBatch int64
	// InFlight is how many bytes of batches may wait for their outcome.
	InFlight int64
}

// RecordFraming is the most that a batch takes for one record besides the
// encoded record: its tag and length.
const RecordFraming = 10

// Log is how logs are stored.
type Log struct {
	// SegmentSize is the size at which a new segment file is begun.
	SegmentSize int64
	// RetentionAge is how long records are kept at least; 0 for ever.
	RetentionAge time.Duration
	// RetentionBytes is how much of the log is kept; 0 all of it.
	RetentionBytes int64
	// ScrubInterval is how long the node takes to read all of the log again and
	// check it.
	ScrubInterval time.Duration
}

// Disk is what the node expects of the disk.
type Disk struct {
	// MinFree is how much must be free, or records are refused.
	MinFree int64
	// StallLimit is how long one write may take. A node whose disk takes longer
	// gives up its part in the cluster.
	StallLimit time.Duration
}

// Raft is replication's pace.
type Raft struct {
	// HeartbeatTimeout is how long a follower waits to hear from its leader
	// before it stands for election.
	HeartbeatTimeout time.Duration
	// ElectionTimeout is how long a candidate waits for votes.
	ElectionTimeout time.Duration
	// LeaderLeaseTimeout is how long a leader that does not reach a quorum
	// stays one.
	LeaderLeaseTimeout time.Duration
	// CommitTimeout is how soon, at the latest, an idle leader tells a follower
	// what is committed. One that keeps up hears at once.
	CommitTimeout time.Duration
	// SnapshotInterval is how often the state beside the log is written down;
	// a restart reads again what was appended after that.
	SnapshotInterval time.Duration
}

// Telemetry is what the node tells of itself besides metrics.
type Telemetry struct {
	// PProf serves profiles of the process by HTTP.
	PProf bool
	// OTLPEndpoint is the host:port of an OpenTelemetry collector that takes
	// traces by gRPC; empty traces nothing.
	OTLPEndpoint string
	// OTLPInsecure sends them in plaintext.
	OTLPInsecure bool
	// OTLPCAFile holds who vouches for the collector; empty means the machine's
	// roots.
	OTLPCAFile string
	// SampleOneIn is of how many calls one is traced, where the caller does not
	// decide it.
	SampleOneIn int
}

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
	gib = int64(1) << 30
)

// Default returns what holds where nothing is said. It is a valid
// configuration but for DataDir and TLS.Source, which have no default.
func Default() *Config { return defaults(thisHost) }

// Dev returns Default for a throw-away node.
func Dev() *Config {
	c := Default()
	c.forDev()
	return c
}

// forDev makes defaults those of a throw-away node.
func (c *Config) forDev() {
	c.Dev = true
	c.TLS.Source = TLSNone
	c.hurry()
}

// hurry sets the pace of a node that is tried out: it has no peers whose pauses
// it would have to be patient with, and its user waits for it.
func (c *Config) hurry() {
	c.Raft.HeartbeatTimeout = 100 * time.Millisecond
	c.Raft.ElectionTimeout = 100 * time.Millisecond
	c.Raft.LeaderLeaseTimeout = 100 * time.Millisecond
}

func defaults(h host) *Config {
	c := &Config{
		LogLevel: "info",
		Listener: Listener{
			RPC:            "127.0.0.1:8400",
			Advertise:      "127.0.0.1:8400",
			HTTP:           "127.0.0.1:8402",
			MaxConnections: 4096,
			MaxStreams:     4096,
		},
		Limits:    Limits{MaxRecord: mib, MaxBatch: mib + 64*kib, InFlight: 64 * mib},
		Cluster:   Cluster{Name: "diurna", BootstrapExpect: 1},
		Discovery: Discovery{Type: DiscoveryStatic},
		Consul:    Consul{Address: "127.0.0.1:8500", Service: "diurna"},
		Membership: Membership{
			Stabilization: 10 * time.Second,
			LastContact:   time.Second,
			LeftAfter:     10 * time.Minute,
			DeadAfter:     24 * time.Hour,
			CleanupDead:   true,
		},
		TLS: TLS{MinVersion: "1.3"},
		Vault: Vault{
			Address: "https://127.0.0.1:8200", Auth: VaultToken,
			PKIMount: "pki_diurna", PKIRole: "diurna-server", TTL: 24 * time.Hour,
		},
		Log:  Log{SegmentSize: 64 * mib, ScrubInterval: 24 * time.Hour},
		Disk: Disk{MinFree: 256 * mib, StallLimit: 2 * time.Second},
		Raft: Raft{
			HeartbeatTimeout:   time.Second,
			ElectionTimeout:    time.Second,
			LeaderLeaseTimeout: time.Second,
			CommitTimeout:      50 * time.Millisecond,
			SnapshotInterval:   5 * time.Second,
		},
		Telemetry:       Telemetry{SampleOneIn: 100},
		ShutdownTimeout: 10 * time.Second,
	}
	// A machine that does not know its name can still run a node.
	c.Node.Name = "localhost"
	if name, err := h.hostname(); err == nil && name != "" {
		c.Node.Name = name
	}
	return c
}

// host is the part of the machine that a configuration can see. Tests bring
// their own.
type host struct {
	env       func(string) (string, bool)
	hostname  func() (string, error)
	privateIP func() (string, error)
	expand    func(template string) (string, error)
	readFile  func(path string) ([]byte, error)
	readDir   func(path string) ([]os.DirEntry, error)
	isDir     func(path string) (bool, error)
}
