#!/usr/bin/env bash
# Brings the stack in compose/ up, waits until all three nodes have a vote and are
# well, and prints what to try. `make compose-up` builds the images first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
compose=scripts/compose.sh

die() {
  echo "Error: $*" >&2
  exit 1
}

docker info >/dev/null 2>&1 || die "there is no Docker engine that answers: docker info says why"
"$compose" up -d

echo "==> waiting for three voters" >&2
start=$SECONDS
while true; do
  well=0
  for n in n1 n2 n3; do
    if "$compose" exec -T "$n" /bin/diurna status -json 2>/dev/null </dev/null | grep -q '"voters": 3'; then well=$((well + 1)); fi
  done
  if [ "$well" = 3 ]; then break; fi
  if [ $((SECONDS - start)) -ge 120 ]; then
    "$compose" ps >&2
    "$compose" logs --tail=20 >&2
    die "the nodes were not ready after two minutes, see above"
  fi
  sleep 1
done

"$compose" run --rm -T cli servers </dev/null
cat <<'T'

Ready. To try:

    seq 1 100000 | scripts/compose.sh run --rm -T cli produce
    scripts/compose.sh run --rm -T cli consume | tail -n 1
    scripts/compose.sh --profile example up -d    # a producer and a consumer
    scripts/compose.sh logs -f consumer
    scripts/compose.sh restart vault              # or consul, or n1

docs/compose.md says more. To stop it: make compose-down
T
