#!/usr/bin/env bash
# Runs Compose for the stack in compose/, from any folder:
#
#   scripts/compose.sh ps
#   scripts/compose.sh run --rm cli servers
#
# It takes `docker compose` where Docker has it, else docker-compose: the one on the
# PATH, or one built into .tools. DIURNA_DOCKER_COMPOSE names another.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [ -z "${DIURNA_DOCKER_COMPOSE:-}" ] && docker compose version >/dev/null 2>&1; then
  compose=(docker compose)
else
  . "$here/tool.sh"
  found=$(tool docker-compose github.com/docker/compose/v2:cmd -trimpath -ldflags '-s -w')
  compose=("$found")
fi
exec "${compose[@]}" -p "${COMPOSE_PROJECT_NAME:-diurna}" -f "$here/../compose/compose.yaml" "$@"
