# Where a node of diurna.nomad.hcl keeps its data. Each machine that may run one
# needs its own, made once:
#
#   nomad volume create -node <node id> jobs/volume.hcl
#
# mkdir makes a folder below the client's host_volumes_dir: have that on a disk
# that is large and safe. A plugin of your own can make anything else.
name      = "diurna-data"
type      = "host"
plugin_id = "mkdir"

# Whom the image runs as. Nobody else has any business here.
parameters = {
  mode = "0700"
  uid  = 65532
  gid  = 65532
}

capability {
  access_mode     = "single-node-single-writer"
  attachment_mode = "file-system"
}
