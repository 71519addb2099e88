# Sourced by consul.sh, nomad.sh, vault.sh and compose.sh: how a tool of others is
# found or built.
#
#   tool NAME MODULE[:FOLDER] [BUILD FLAG...]
#
# prints the path of the tool NAME. One that is named by DIURNA_NAME, in capitals and
# with _ for -, or lies on the PATH is used as it is; else the version that
# scripts/NAME/go.mod pins is built into .tools/bin, once. Progress goes to stderr.
tool() {
  local name=$1 module=${2%:*} package=${2/://}
  shift 2
  local root tools go named variable version stamp
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  tools=${DIURNA_TOOLS:-$root/.tools}
  go=${GO:-go}

  variable=DIURNA_$(printf %s "$name" | tr '[:lower:]-' '[:upper:]_')
  named=${!variable:-}
  if [ -n "$named" ]; then
    if [ ! -x "$named" ]; then
      echo "$variable names $named, which is not an executable file" >&2
      exit 1
    fi
    echo "$named"
    return
  fi
  if command -v "$name"; then
    return
  fi

  version=$(awk -v module="$module" '{ for (i = 1; i < NF; i++) if ($i == module) { print $(i + 1); exit } }' "$root/scripts/$name/go.mod")
  # The stamp names the version: a new pin builds anew.
  stamp=$tools/$name-$version
  if [ ! -e "$stamp" ] || [ ! -x "$tools/bin/$name" ]; then
    echo "==> building $name $version: some minutes, once" >&2
    mkdir -p "$tools/bin"
    new=$(mktemp "$tools/bin/.$name.XXXXXX") # global: the trap needs it
    trap 'rm -f "$new"' EXIT
    local start=$SECONDS
    # -mod=readonly: exactly what go.sum says, or nothing. Dots while it builds,
    # so that nobody takes it for stuck.
    (cd "$root/scripts/$name" && CGO_ENABLED=0 GOFLAGS= GOWORK=off \
      exec "$go" build -mod=readonly -buildvcs=false "$@" -o "$new" "$package" >&2) &
    build=$!
    trap 'kill "$build" 2>/dev/null || true; rm -f "$new"' EXIT
    while kill -0 "$build" 2>/dev/null; do
      sleep 1
      if [ $(((SECONDS - start) % 10)) = 0 ]; then printf . >&2; fi
    done
    echo >&2
    wait "$build"
    chmod 755 "$new" # mktemp made it private
    mv "$new" "$tools/bin/$name"
    rm -f "$tools/$name"-v*
    touch "$stamp"
    echo "==> built $name $version after $((SECONDS - start)) s" >&2
  fi
  echo "$tools/bin/$name"
}
