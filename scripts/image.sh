#!/usr/bin/env bash
# Builds Diurna's image from a static binary for Linux that is there already.
#
#   [ROOTFS=bin/image] [VERSION=dev] [REVISION=unknown] scripts/image.sh BINARY TAG...
#
# What goes into the image is laid out in ROOTFS first, and stays there.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

if [ $# -lt 2 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 1
fi
binary=$1
shift
rootfs=${ROOTFS:-bin/image}
mkdir -p "$rootfs/base/bin" "$rootfs/base/tmp" "$rootfs/data/diurna"
chmod 1777 "$rootfs/base/tmp"
chmod 750 "$rootfs/data/diurna"
# By another name first: a container may be running the one that is there.
cp "$binary" "$rootfs/base/bin/.new"
chmod 755 "$rootfs/base/bin/.new"
mv "$rootfs/base/bin/.new" "$rootfs/base/bin/diurna"

tags=()
for tag in "$@"; do tags+=(-t "$tag"); done
output=$(docker build "${tags[@]}" --build-arg "VERSION=${VERSION:-dev}" --build-arg "REVISION=${REVISION:-unknown}" \
  -f "$here/../compose/Dockerfile" "$rootfs" 2>&1) || {
  echo "$output" >&2
  exit 1
}
echo "==> built the image $*" >&2
