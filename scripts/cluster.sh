#!/usr/bin/env bash
# Runs three nodes and a Consul on this machine, until Ctrl-C ends all of them.
# The data is in a temporary folder, removed at the end, unless CLUSTER_DIR names
# one to keep. With TLS=1 the nodes, and whoever talks to them, have certificates
# of a throw-away CA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

consul=$(scripts/consul.sh)
diurna=bin/diurna
http=${CONSUL_HTTP_PORT:-8500} dns=${CONSUL_DNS_PORT:-8600}
ports=(8400 8410 8420) http_ports=(8402 8412 8422)

keep=${CLUSTER_DIR:-}
dir=${keep:-$(mktemp -d "${TMPDIR:-/tmp}/diurna-cluster-XXXXXX")}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd) # what is printed is for other folders too

pids=()
cleanup() {
  trap '' INT TERM
  # The nodes first, so that Consul hears them go; each by its own id.
  for i in 3 2 1 0; do
    [ -n "${pids[i]:-}" ] || continue
    kill -TERM "${pids[i]}" 2>/dev/null || true
    wait "${pids[i]}" 2>/dev/null || true
  done
  if [ -z "$keep" ]; then rm -rf "$dir"; fi
}
trap cleanup EXIT
trap 'exit 0' INT TERM

die() {
  echo "Error: $*" >&2
  exit 1
}

# What another terminal may have set is not for these nodes.
unset DIURNA_ADDR DIURNA_TLS DIURNA_CACERT DIURNA_CLIENT_CERT DIURNA_CLIENT_KEY DIURNA_TLS_SERVER_NAME
tls=() exports='' curl=curl scheme=http
case ${TLS:-0} in
  0 | '' | false) ;;
  1 | true)
    tls=(-tls "-tls-dir=$dir/tls")
    # The first node makes the files. The variables are for our own questions too.
    export DIURNA_CACERT=$dir/tls/ca.pem DIURNA_CLIENT_CERT=$dir/tls/client.pem DIURNA_CLIENT_KEY=$dir/tls/client-key.pem
    exports="$(printf '    export DIURNA_CACERT=%q DIURNA_CLIENT_CERT=%q DIURNA_CLIENT_KEY=%q' "$DIURNA_CACERT" "$DIURNA_CLIENT_CERT" "$DIURNA_CLIENT_KEY")
"
    # shellcheck disable=SC2016 # for the other terminal's shell
    curl='curl --cacert "$DIURNA_CACERT" --cert "$DIURNA_CLIENT_CERT" --key "$DIURNA_CLIENT_KEY"' scheme=https
    ;;
  *) die "TLS is \"$TLS\", want 1 or 0" ;;
esac

# A port that answers now would be taken for ours.
for port in "$http" "${ports[@]}" "${http_ports[@]}"; do
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    die "port $port is taken: is a cluster, a node or a Consul running already? CONSUL_HTTP_PORT and CONSUL_DNS_PORT choose others for Consul."
  fi
done

# Job control would give each its own process group; without it Ctrl-C reaches
# all of them at once, and Consul would go first. So: setsid.
echo "==> starting Consul at 127.0.0.1:$http, logging to $dir/consul.log" >&2
setsid "$consul" agent -dev -node=local -bind=127.0.0.1 -client=127.0.0.1 \
  -http-port="$http" -dns-port="$dns" -grpc-port=-1 -grpc-tls-port=-1 \
  -log-level=warn >"$dir/consul.log" 2>&1 &
pids+=($!)

# command is that of node i: also what is shown when one ended.
command_of() {
  command=("$diurna" agent -dev "-node=n$1" "-data-dir=$dir/n$1" "-rpc-addr=127.0.0.1:${ports[$1 - 1]}"
    "-http-addr=127.0.0.1:${http_ports[$1 - 1]}" -discovery=consul "-consul-addr=127.0.0.1:$http" -bootstrap-expect=3 ${tls[@]+"${tls[@]}"})
}

for i in 1 2 3; do
  echo "==> starting node n$i at 127.0.0.1:${ports[i - 1]}, HTTP at 127.0.0.1:${http_ports[i - 1]}, logging to $dir/n$i.log" >&2
  command_of "$i"
  setsid "${command[@]}" >"$dir/n$i.log" 2>&1 &
  pids+=($!)
done

show() {
  for f in "$dir"/*.log; do
    echo "--- $f" >&2
    tail -n 20 "$f" >&2
  done
}

for ((tries = 0; ; tries++)); do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null || { show; die "one of the programs ended, see above"; }
  done
  if "$diurna" status -addr "127.0.0.1:${ports[0]}" >/dev/null 2>&1 &&
    "$diurna" status -addr "127.0.0.1:${ports[1]}" >/dev/null 2>&1 &&
    "$diurna" status -addr "127.0.0.1:${ports[2]}" >/dev/null 2>&1; then
    break
  fi
  if [ "$tries" -ge 120 ]; then show; die "the cluster was not ready after a minute, see above"; fi
  sleep 0.5
done

"$diurna" servers -addr "127.0.0.1:${ports[0]}"
cat <<TEXT

Ready. In another terminal:

${exports}    seq 1 100000 | bin/diurna produce -addr 127.0.0.1:${ports[1]}
    bin/diurna consume -addr 127.0.0.1:${ports[2]} | tail -n 1
    dig @127.0.0.1 -p $dns +short SRV diurna.service.consul
    $curl $scheme://127.0.0.1:${http_ports[0]}/v1/status
    $curl $scheme://127.0.0.1:${http_ports[0]}/v1/metrics

Likewise at ports ${http_ports[1]} and ${http_ports[2]}. Consul's page: http://127.0.0.1:$http/ui

Ctrl-C stops all of it.
TEXT
# To kill a node, or have it leave, is what one tries: the others go on.
while true; do
  wait -n "${pids[@]}" || true
  kill -0 "${pids[0]}" 2>/dev/null || { show; die "Consul ended, see above"; }
  for i in 1 2 3; do
    if [ -z "${pids[i]:-}" ] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[i]"
    command_of "$i"
    printf '\n==> node n%d ended with exit code %d, see %s. To start it again:\n\n    %s\n' "$i" "$code" "$dir/n$i.log" "${command[*]}" >&2
  done
  [ "${#pids[@]}" -gt 1 ] || die "all nodes have ended"
done
