#!/usr/bin/env bash
# Prints the path of a vault to use. One that is named by DIURNA_VAULT or lies on
# the PATH is used as it is; else the pinned version is built into .tools/bin,
# once: some minutes with a cold cache. Progress goes to stderr.
#
#   vault=$(scripts/vault.sh)
#
# Needs Go, and for the first build network for modules.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/tool.sh"
# minimal: without the plugins for clouds and databases.
tool vault github.com/hashicorp/vault -tags minimal
