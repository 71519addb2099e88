#!/usr/bin/env bash
# Prints the path of a consul to use. One that is named by DIURNA_CONSUL or lies
# on the PATH is used as it is; else the pinned version is built into
# .tools/bin, once: some minutes with a cold cache. Progress goes to stderr.
#
#   consul=$(scripts/consul.sh)
#
# Needs Go, and for the first build network for modules.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tools=${DIURNA_TOOLS:-$root/.tools}
go=${GO:-go}

if [ -n "${DIURNA_CONSUL:-}" ]; then
  if [ ! -x "$DIURNA_CONSUL" ]; then
    echo "DIURNA_CONSUL names $DIURNA_CONSUL, which is not an executable file" >&2
    exit 1
  fi
  echo "$DIURNA_CONSUL"
  exit
fi
if found=$(command -v consul); then
  echo "$found"
  exit
fi

version=$(awk '$2 == "github.com/hashicorp/consul" { print $3 }' "$root/scripts/consul/go.mod")
# The stamp names the version: a new pin builds anew.
stamp=$tools/consul-$version
if [ ! -e "$stamp" ] || [ ! -x "$tools/bin/consul" ]; then
  echo "==> building consul $version: some minutes, once" >&2
  mkdir -p "$tools/bin"
  new=$(mktemp "$tools/bin/.consul.XXXXXX")
  trap 'rm -f "$new"' EXIT
  start=$SECONDS
  # -mod=readonly: exactly what go.sum says, or nothing. Dots while it builds,
  # so that nobody takes it for stuck.
  (cd "$root/scripts/consul" && CGO_ENABLED=0 GOFLAGS= GOWORK=off \
    "$go" build -mod=readonly -buildvcs=false -o "$new" github.com/hashicorp/consul >&2) &
  build=$!
  trap 'kill "$build" 2>/dev/null || true; rm -f "$new"' EXIT
  while kill -0 "$build" 2>/dev/null; do
    sleep 1
    if [ $(((SECONDS - start) % 10)) = 0 ]; then printf . >&2; fi
  done
  echo >&2
  wait "$build"
  chmod 755 "$new" # mktemp made it private
  mv "$new" "$tools/bin/consul"
  rm -f "$tools"/consul-v*
  touch "$stamp"
  echo "==> built consul $version after $((SECONDS - start)) s" >&2
fi
echo "$tools/bin/consul"
