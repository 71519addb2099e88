# Where a node of diurna.nomad.hcl keeps its data. Each machine that is to run one
# needs its own:
#
#   nomad volume create jobs/volume.hcl
#
# makes one on a machine that has none yet, so run it as often as there are to be
# nodes. A constraint, or node_id, says on which.
#
# mkdir makes a folder below the client's host_volumes_dir: have that on a disk
# that is large and safe. A plugin of your own can make anything else.
name      = "diurna-data"
type      = "host"
plugin_id = "mkdir"

# Whom the image runs as. Nobody else has any business here.
parameters = {
  mode = "0700"
  uid  = 10001
  gid  = 10001
}

capability {
  access_mode     = "single-node-single-writer"
  attachment_mode = "file-system"
}
