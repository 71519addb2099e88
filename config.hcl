# Every key of a node's configuration with its default, except data_dir, which
# has none. `diurna agent -config-file config.hcl` reads it; a file that says
# only what differs does as well.
#
# -config-file and -config-dir may be given several times: files are read in
# order, those of a folder in the order of their names, and a key in a later
# file replaces the same key in an earlier one. Flags come last. null means the
# default. The same keys as JSON, in a file that ends in .json, are fine too.
#
# Values may call env("X"), env("X", "default"), file("path"), trimspace("...")
# and hostname(). Addresses may be go-sockaddr templates:
# "{{ GetPrivateIP }}:8400". Durations take ms, s, m or h; sizes B, KiB, MiB,
# GiB or TiB.

# Everything the node keeps is in this folder: losing it is losing the node.
# Required, except with -dev.
data_dir = "/var/lib/diurna"

# trace, debug, info, warn or error. A reload applies it at once; every other
# key takes a restart unless it says otherwise.
log_level = "info"

# One JSON object per line, for machines to collect.
log_json = false

# How long a clean stop may take. Calls that are still under way shortly before
# that are cut off, so that the log can be closed in time.
shutdown_timeout = "10s"

node {
  # What people call the node. It may change: the node's identity is an id kept
  # with its data.
  name = hostname()
}

cluster {
  # Nodes with the same name find each other. One registry can know several
  # clusters.
  name = "diurna"

  # How many nodes form the cluster where there is none yet, this one included:
  # the same number, usually 3, on all of them. 1 forms one alone. 0 never forms
  # one: the node waits until an existing cluster adds it. It has to be said
  # where there are others to find. Once the cluster exists it is also the
  # number of voters that dead nodes are never removed below.
  bootstrap_expect = 1

  # Where the node runs, for clients that prefer a near one.
  zone = ""
}

discovery {
  # How nodes find one another: "static", by the list below, or "consul".
  type = "static"

  # The addresses of the other nodes, host:port, for "static". This node's own
  # may be among them, so that all can have the same list.
  peers = []
}

consul {
  # The Consul agent of this machine, as host:port or a URL: always the local
  # one, never a load balancer. Used with discovery.type = "consul" only.
  address = "127.0.0.1:8500"

  # An ACL token, or the file that holds one, which is read again when Consul
  # refuses it.
  token = ""

  # See token.
  token_file = ""

  # For an agent that wants TLS: whom to trust, and who we are.
  ca_file = ""

  # See ca_file.
  cert_file = ""

  # See ca_file.
  key_file = ""

  # The service that nodes register as, and that clients look up:
  # diurna.service.consul.
  service = "diurna"

  # Tags besides the node's role.
  tags = []
}

membership {
  # How long a node that joins must have been healthy before it gets a vote.
  stabilization = "10s"

  # A node that the leader has not heard from for so long is unhealthy.
  last_contact = "1s"

  # A voter that the leader cannot reach and that the catalog does not list
  # either may be replaced after this time ...
  left_after = "10m"

  # ... and one that the leader cannot reach but the catalog still lists, after
  # this. A catalog that is down, or empty, counts for nothing.
  dead_after = "24h"

  # Whether such voters are removed once enough others can take their place.
  cleanup_dead = true
}

listener {
  # Where clients and other nodes connect. The default is reachable from this
  # machine only; "0.0.0.0:8400" is every interface.
  rpc = "127.0.0.1:8400"

  # The address others are told to use. Empty means that of rpc, or a private
  # address of this machine where rpc is a wildcard.
  advertise = ""

  # Where health checks, metrics and the node's status are served by HTTP. The
  # default is reachable from this machine only.
  http = "127.0.0.1:8402"

  # Connections open at a time, so that a flood costs bounded memory.
  max_connections = 4096

  # Calls under way at a time, for the same reason.
  max_streams = 4096
}

tls {
  # How connections are secured, between nodes and with clients. Required,
  # except with -dev, where it is "none".
  #
  # "vault": certificates from Vault's PKI, see below, renewed by themselves.
  # "files": the three files below, read again when they change.
  # "dev": a throw-away CA of the node's own, to try things.
  # "none": plaintext. Whoever reaches the port may do everything.
  source = "none"

  # For "files", PEM: the node's certificate with those that lead to the CA's ...
  cert_file = ""

  # ... its key ...
  key_file = ""

  # ... and the CAs that vouch for nodes and clients.
  ca_file = ""

  # For "dev": a folder with the CA, for nodes of one machine to share. The
  # first of them makes it. Empty is a CA for this node alone, in data_dir.
  dev_dir = ""

  # The oldest version of TLS to speak: "1.2" or "1.3".
  min_version = "1.3"

  # DNS names and IP addresses for the certificate, for "vault" and "dev",
  # besides the node's own.
  names = []
}

vault {
  # Used with tls.source = "vault" only. All paths are read again when a login
  # fails, or the file changes.
  address = "https://127.0.0.1:8200"

  # Who vouches for Vault's own certificate. Empty: the machine's roots.
  ca_file = ""

  # Needs Vault Enterprise.
  namespace = ""

  # How to log in: "token", "token_file", "approle", "kubernetes", or "jwt", as
  # with Nomad's workload identity. What is obtained by logging in is kept
  # alive, and obtained anew when it is lost.
  auth = "token"

  # Where that method is mounted. Empty: its name.
  auth_mount = ""

  # For "kubernetes" and "jwt": the role to log in as.
  auth_role = ""

  # For "token". Better in the environment than here: env("VAULT_TOKEN").
  token = ""

  # For "token_file": the file, which somebody else keeps up to date.
  token_file = ""

  # For "approle".
  role_id = ""

  # For "approle": the secret, or ...
  secret_id = ""

  # ... the file that holds it.
  secret_id_file = ""

  # For "jwt" and "kubernetes": the file with the token to log in with. Empty is
  # where Kubernetes puts it, for "kubernetes".
  jwt_file = ""

  # The PKI engine that signs ...
  pki_mount = "pki_diurna"

  # ... and its role: scripts/vault-pki.sh sets them up.
  pki_role = "diurna-server"

  # Other PKI engines whose issuers are trusted too, such as the root's.
  ca_mounts = []

  # The life to ask for. The role may grant less. A certificate is renewed after
  # about two thirds of its life.
  ttl = "24h"
}

acl {
  # Whether the policy decides who may do what. Without it everybody with a
  # certificate may do everything. Needs tls.
  enabled = false

  # The rules, one on a line: see docs/security.md. Read again on a reload and
  # when it changes; one with an error leaves the old rules in force.
  policy_file = ""

  # How the rules are applied, as a Casbin model. Empty is the built-in one.
  model_file = ""
}

limits {
  # The largest record: key, value and headers, encoded.
  max_record = "1MiB"

  # The largest batch, encoded: one largest record and 10 bytes of framing at
  # least, 3MiB at most, because a batch has to fit into one gRPC message and
  # clients by default accept 4MiB. This is 1MiB and 64KiB.
  max_batch = "1088KiB"

  # Batches waiting for their outcome. Past it producers are told to back off.
  in_flight = "64MiB"
}

log {
  # A new segment file is begun at this size, 1MiB to 1GiB. Old records are
  # deleted by whole segments, so smaller ones free space sooner.
  segment_size = "64MiB"

  # Records are deleted, by whole segments, when the newest of the segment is
  # older than this. Empty keeps them for ever. The leader's setting counts. A
  # reload applies this and the next at once.
  retention_age = ""

  # The oldest segments are deleted while the log is larger than this. Empty
  # means no limit.
  retention_bytes = ""

  # How long one pass of reading everything again takes, which finds damage in
  # records that nobody reads.
  scrub_interval = "24h"
}

disk {
  # With less space than this free, records are refused and leadership goes to
  # another node, so that the disk is never full. 0B only refuses when it is.
  min_free = "256MiB"

  # A disk that takes longer than this for one write is taken for dead: the node
  # ends, so that others go on. Below three times raft.election_timeout, the
  # others elect a leader sooner than they would miss a dead one.
  stall_limit = "2s"
}

raft {
  # How long a follower waits to hear from the leader before it stands for
  # election: three times that at most. Shorter means a shorter pause when a leader
  # dies, longer means patience with slow disks and networks. A node that is
  # tried out alone with -dev takes 100ms for these three.
  heartbeat_timeout = "1s"

  # How long a candidate waits for votes. At least heartbeat_timeout.
  election_timeout = "1s"

  # How long a leader without a quorum stays leader. At most heartbeat_timeout,
  # so that it has stepped down when another stands for election.
  leader_lease_timeout = "1s"

  # How soon, at the latest, an idle leader tells followers what is committed: how
  # late their readers see the last record. Those that keep up hear at once.
  commit_timeout = "50ms"

  # How often the state beside the log is written down. A restart reads again
  # what was appended since.
  snapshot_interval = "5s"
}

telemetry {
  # Whether /debug/pprof/ serves profiles of the process, beside the metrics. With
  # acl they take the action "admin"; without tls, whoever reaches listener.http
  # may have them.
  pprof = false

  # Where to send traces of produce and consume: the host:port of an OpenTelemetry
  # collector that takes OTLP by gRPC, such as "127.0.0.1:4317". Empty traces
  # nothing. A collector that is down costs traces, and nothing else.
  otlp_endpoint = ""

  # Whether to send them in plaintext.
  otlp_insecure = false

  # Else, who vouches for the collector. Empty: the machine's roots.
  otlp_ca_file = ""

  # Of how many calls one is traced. Where the caller has decided it, by a
  # traceparent, that counts.
  sample_one_in = 100
}
