#!/usr/bin/env bash
# Prints the path of a nomad to use. One that is named by DIURNA_NOMAD or lies on
# the PATH is used as it is; else the pinned version is built into .tools/bin,
# once: some minutes with a cold cache. Progress goes to stderr.
#
#   nomad=$(scripts/nomad.sh)
#
# Needs Go, and for the first build network for modules.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/tool.sh"
tool nomad github.com/hashicorp/nomad
