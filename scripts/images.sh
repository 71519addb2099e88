#!/usr/bin/env bash
# Has the images of Consul and Vault that compose/compose.yaml names. Those that are
# there are left alone; else they are pulled. Where that cannot be done, as on a
# machine without the Internet, stand-ins are built under the same names, from the
# binaries that consul.sh and vault.sh give, and busybox for a shell: good enough for
# the stack, and nothing else.
#
# In the environment:
#   DIURNA_PULL=0     do not try to pull
#   DIURNA_BUSYBOX    a static busybox (default: one on the PATH, or Debian's
#                     busybox-static, downloaded)
#
# To go back to the official ones: docker rmi NAME, and run this again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "==> $*" >&2; }
die() {
  echo "Error: $*" >&2
  exit 1
}

temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT

# An image with this label is a stand-in; its value says what it was built from.
label=org.diurna.stand-in

# static_busybox prints the path of a static busybox.
static_busybox() {
  local tools=${DIURNA_TOOLS:-$PWD/.tools} path
  if [ -n "${DIURNA_BUSYBOX:-}" ]; then
    [ -x "$DIURNA_BUSYBOX" ] || die "DIURNA_BUSYBOX names $DIURNA_BUSYBOX, which is not an executable file"
    echo "$DIURNA_BUSYBOX"
    return
  fi
  # ldd fails for what needs no libraries.
  if path=$(command -v busybox) && ! ldd "$path" >/dev/null 2>&1; then
    echo "$path"
    return
  fi
  if [ ! -x "$tools/bin/busybox" ]; then
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
      die "there is no static busybox, and no apt-get to download Debian's: name one in DIURNA_BUSYBOX"
    # An image of Debian has no lists to start with.
    (cd "$temp" && { apt-get download busybox-static || { apt-get update && apt-get download busybox-static; }; } &&
      dpkg-deb -x busybox-static_*.deb busybox) >"$temp/apt.log" 2>&1 ||
      { cat "$temp/apt.log" >&2; die "Debian's busybox-static cannot be downloaded: name a static busybox in DIURNA_BUSYBOX"; }
    mkdir -p "$tools/bin"
    cp "$temp/busybox/bin/busybox" "$tools/bin/.busybox.$$"
    mv "$tools/bin/.busybox.$$" "$tools/bin/busybox"
  fi
  echo "$tools/bin/busybox"
}

# stand_in IMAGE NAME: has a stand-in for an image, from the tool of that name.
stand_in() {
  local image=$1 name=$2 binary box inputs root
  binary=$("scripts/$name.sh")
  box=$(static_busybox)
  inputs=$(cat "$binary" "$box" "${BASH_SOURCE[0]}" | sha256sum | cut -c1-16)
  if [ "$(docker image inspect -f "{{ index .Config.Labels \"$label\" }}" "$image" 2>/dev/null || true)" = "$inputs" ]; then
    say "$image: the stand-in that is there, not the official image"
    return
  fi
  root=$temp/$name/root
  mkdir -p "$root/bin" "$root/etc" "$root/tmp"
  chmod 1777 "$root/tmp"
  cp "$binary" "$root/bin/$name"
  cp "$box" "$root/bin/busybox"
  "$box" --list | while read -r applet; do
    if [ "$applet" != busybox ]; then ln -s busybox "$root/bin/$applet"; fi
  done
  echo 'root:x:0:0:root:/:/bin/sh' >"$root/etc/passwd"
  cat >"$temp/$name/Dockerfile" <<D
FROM scratch
COPY root/ /
ENV PATH=/bin:/usr/local/bin
LABEL $label="$inputs"
ENTRYPOINT ["/bin/$name"]
D
  docker build -q -t "$image" "$temp/$name" >"$temp/build.log" 2>&1 || { cat "$temp/build.log" >&2; die "the stand-in for $image cannot be built, see above"; }
  say "$image: a stand-in, built from $binary ($("$binary" version | head -n 1)); it is not the official image"
}

for image in $(sed -n 's/.*image: \(hashicorp\/[a-z]*:[0-9.]*\).*/\1/p' compose/compose.yaml | sort -u); do
  name=${image#*/}
  name=${name%:*}
  there=$(docker image inspect -f "{{ index .Config.Labels \"$label\" }}" "$image" 2>/dev/null) || there=missing
  case $there in
    '' | '<no value>') ;; # the official one
    missing)
      if [ "${DIURNA_PULL:-1}" != 0 ] && timeout 300 docker pull -q "$image" >"$temp/pull.log" 2>&1; then
        say "$image: pulled"
      else
        [ "${DIURNA_PULL:-1}" = 0 ] || say "$image cannot be pulled: $(tail -n 1 "$temp/pull.log")"
        stand_in "$image" "$name"
      fi
      ;;
    *) stand_in "$image" "$name" ;; # again, if what it is built from has changed
  esac
done
