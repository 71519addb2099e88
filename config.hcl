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
# key takes a restart.
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

listener {
  # Where clients and other nodes connect. The default is reachable from this
  # machine only; "0.0.0.0:8400" is every interface.
  rpc = "127.0.0.1:8400"

  # The address others are told to use. Empty means that of rpc, or a private
  # address of this machine where rpc is a wildcard.
  advertise = ""

  # Connections open at a time, so that a flood costs bounded memory.
  max_connections = 4096

  # Calls under way at a time, for the same reason.
  max_streams = 4096
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
}

raft {
  # How long a follower waits to hear from the leader before it stands for
  # election. These three suit one node; nodes that share slow disks or distant
  # networks want seconds.
  heartbeat_timeout = "500ms"

  # How long a candidate waits for votes. At least heartbeat_timeout.
  election_timeout = "500ms"

  # How long a leader without a quorum stays leader. At most heartbeat_timeout,
  # so that it has stepped down when another stands for election.
  leader_lease_timeout = "500ms"

  # How soon an idle leader tells followers what is committed: how late their
  # readers see the last record.
  commit_timeout = "5ms"

  # How often the state beside the log is written down. A restart reads again
  # what was appended since.
  snapshot_interval = "5s"
}
