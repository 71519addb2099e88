#!/bin/sh
# Sets Vault up for Diurna: CAs, roles, policies and logins. See usage below. Any
# POSIX shell will do, since Vault's own image has no bash.
set -eu

usage() {
  cat <<'U'
Usage: vault-pki.sh [CLUSTER]

Sets a Vault up for a Diurna cluster (default "diurna"), and may be run again at
any time: what is there already is kept or brought up to date. CAs are made only
where there are none.

It makes, in the Vault that VAULT_ADDR and VAULT_TOKEN name:
  pki_diurna_root   a PKI engine with the root CA
  pki_diurna        a PKI engine with the intermediate CA, which signs
  diurna-server     a PKI role, a policy and an AppRole: for nodes
  diurna-client     a PKI role, a policy and an AppRole: for clients
and then has every name of a node signed once, to see that it can be.

In the environment:
  VAULT_ADDR, VAULT_TOKEN   the Vault; the token needs to administer it
  VAULT                     the vault binary (default: vault on the PATH)
  PKI_ROOT, PKI_MOUNT       the engines (default: pki_diurna_root, pki_diurna)
  SERVER_TTL, CLIENT_TTL    life of certificates (default: 24h, 24h)
  SERVICE                   the nodes' service in Consul (default: diurna)
  NAMES                     more DNS names that nodes may have, separated by
                            commas: those at which others reach them
  TOKEN_PERIOD              life of a node's token between renewals (default: 1h)
  JWT_JWKS_URL, JWT_PUBKEYS_FILE
                            turns on logins with a JWT that keys of this JWKS, or
                            of this PEM file, have signed: Nomad's workload
                            identity, for one
  JWT_MOUNT, JWT_AUDIENCE   (default: jwt, vault.io)
  JWT_USER_CLAIM, JWT_BOUND_CLAIMS
                            which claim names the user (default: sub; for Nomad
                            /nomad_job_id), and which must hold, as JSON such as
                            {"nomad_job_id":"diurna"}
  KUBERNETES_HOST           turns on logins of Kubernetes pods: the API server's
                            URL, such as https://kubernetes.default.svc
  KUBERNETES_CA_FILE        its CA (default: that of the pod Vault runs in)
  KUBERNETES_NAMESPACE, KUBERNETES_ACCOUNT
                            who may (default: default, diurna)

Examples:
  VAULT_ADDR=http://127.0.0.1:8200 VAULT_TOKEN=root scripts/vault-pki.sh
  NAMES=n1.example.com,n2.example.com SERVER_TTL=72h scripts/vault-pki.sh prod

  # What a node logs in with, as vault.role_id and vault.secret_id:
  vault read -field=role_id auth/approle/role/diurna-server/role-id
  vault write -f -field=secret_id auth/approle/role/diurna-server/secret-id

  # A client's certificate; the CN is for people, the URI for permissions:
  vault write pki_diurna/issue/diurna-client common_name=billing \
    exclude_cn_from_sans=true uri_sans=spiffe://diurna.diurna/client/billing

  # Whom clients trust:
  vault read -field=certificate pki_diurna_root/cert/ca
U
}

case ${1:-} in
  -h | --help | help) usage; exit ;;
  -*) usage >&2; exit 1 ;;
esac
if [ $# -gt 1 ]; then usage >&2; exit 1; fi

die() {
  echo "Error: $*" >&2
  exit 1
}
say() { echo "==> $*" >&2; }

cluster=${1:-diurna}
case $cluster in
  '' | *[!A-Za-z0-9-]*) die "the cluster's name \"$cluster\" may hold letters, digits and '-'" ;;
esac
[ -n "${VAULT_ADDR:-}" ] || die "VAULT_ADDR has to be set: see $0 -help"
[ -n "${VAULT_TOKEN:-}" ] || die "VAULT_TOKEN has to be set: see $0 -help"
vault=${VAULT:-vault}
unset VAULT # the binary would not mind, but it is not its variable
command -v "$vault" >/dev/null || die "there is no $vault: install Vault, or name its binary in VAULT"

root=${PKI_ROOT:-pki_diurna_root}
mount=${PKI_MOUNT:-pki_diurna}
server_ttl=${SERVER_TTL:-24h}
client_ttl=${CLIENT_TTL:-24h}
service=${SERVICE:-diurna}
period=${TOKEN_PERIOD:-1h}
extra=${NAMES:-}
domain=$(printf %s "$cluster" | tr '[:upper:]' '[:lower:]').diurna
names="server.$domain,localhost,$service.service.consul,leader.$service.service.consul${extra:+,$extra}"

temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT

v() { "$vault" "$@" >/dev/null; }
# has GREPPATTERN COMMAND...: the answer is read whole, so that a vault that fails
# is noticed.
has() {
  local pattern=$1 text
  shift
  text=$("$vault" "$@") || die "vault $* failed"
  printf '%s\n' "$text" | grep -q "$pattern"
}

engine() { # PATH MAX_TTL
  if ! has "\"$1/\"" secrets list -format=json; then
    say "mount the PKI engine $1"
    v secrets enable -path="$1" pki
  fi
  v secrets tune -max-lease-ttl="$2" "$1"
}

login() { # PATH TYPE
  if ! has "\"$1/\"" auth list -format=json; then
    say "mount the login $1"
    v auth enable -path="$1" "$2"
  fi
}

# has_ca tells whether an engine has a CA with its key. Without any, Vault says
# so with status 2.
has_ca() { "$vault" read -field=key_id "$1/issuer/default" 2>/dev/null | grep -q .; }

engine "$root" 87600h
engine "$mount" 43800h
for m in "$root" "$mount"; do
  v write "$m/config/urls" issuing_certificates="$VAULT_ADDR/v1/$m/ca" \
    crl_distribution_points="$VAULT_ADDR/v1/$m/crl"
  # A list that has expired may be refused by others.
  v write "$m/config/crl" expiry=72h auto_rebuild=true auto_rebuild_grace_period=24h enable_delta=false
  v write "$m/config/auto-tidy" enabled=true tidy_cert_store=true tidy_revoked_certs=true
done

if ! has_ca "$root"; then
  say "make the root CA in $root"
  v write "$root/root/generate/internal" common_name="Diurna root CA" \
    key_type=ec key_bits=256 ttl=87600h
fi
if ! has_ca "$mount"; then
  say "make the intermediate CA in $mount"
  "$vault" write -field=csr "$mount/intermediate/generate/internal" common_name="Diurna CA" \
    key_type=ec key_bits=256 >"$temp/csr"
  # With the root beside it, so that ca_chain is whole. It signs leaves only.
  "$vault" write -field=certificate "$root/root/sign-intermediate" csr=@"$temp/csr" \
    common_name="Diurna CA" format=pem_bundle ttl=43800h max_path_length=0 >"$temp/signed"
  v write "$mount/intermediate/set-signed" certificate=@"$temp/signed"
  # The issuer with the key is the one that signs, not the root beside it.
  for id in $("$vault" list -format=json "$mount/issuers" | tr -d '[]", '); do
    if "$vault" read -field=key_id "$mount/issuer/$id" | grep -q .; then
      v write "$mount/config/issuers" default="$id"
    fi
  done
fi
# Near the CA's end certificates get shorter, instead of none at all. patch: a
# write would reset what is not said.
v patch "$mount/issuer/default" leaf_not_after_behavior=truncate

say "roles and policies of the cluster $cluster"
# Only the node's own names, exactly. The server's name is what makes a server.
v write "$mount/roles/diurna-server" \
  allowed_domains="$names" allow_bare_domains=true allow_subdomains=false allow_glob_domains=false \
  allow_any_name=false allow_localhost=true allow_wildcard_certificates=false enforce_hostnames=true \
  allow_ip_sans=true allowed_uri_sans="spiffe://$domain/server/*" \
  server_flag=true client_flag=true code_signing_flag=false email_protection_flag=false \
  key_type=ec key_bits=256 key_usage=DigitalSignature use_csr_sans=true use_csr_common_name=true require_cn=true \
  ttl="$server_ttl" max_ttl="$server_ttl" no_store=true
# No DNS name at all, hence never the server's; any common name, which is not
# looked at where there is a URI.
v write "$mount/roles/diurna-client" \
  allowed_domains="" allow_bare_domains=false allow_subdomains=false allow_glob_domains=false \
  allow_any_name=false allow_localhost=false allow_wildcard_certificates=false enforce_hostnames=true \
  allow_ip_sans=false allowed_uri_sans="spiffe://$domain/client/*" cn_validations=disabled \
  server_flag=false client_flag=true code_signing_flag=false email_protection_flag=false \
  key_type=ec key_bits=256 key_usage=DigitalSignature use_csr_sans=true use_csr_common_name=true require_cn=false \
  ttl="$client_ttl" max_ttl="$client_ttl" no_store=true

v policy write diurna-server - <<P
path "$mount/sign/diurna-server" { capabilities = ["create", "update"] }
path "auth/token/renew-self"     { capabilities = ["update"] }
path "auth/token/lookup-self"    { capabilities = ["read"] }
P
v policy write diurna-client - <<P
path "$mount/sign/diurna-client"  { capabilities = ["create", "update"] }
path "$mount/issue/diurna-client" { capabilities = ["create", "update"] }
path "auth/token/renew-self"      { capabilities = ["update"] }
path "auth/token/lookup-self"     { capabilities = ["read"] }
P

login approle approle
for role in diurna-server diurna-client; do
  v write "auth/approle/role/$role" token_policies="$role" token_period="$period" \
    secret_id_num_uses=0 token_num_uses=0
done

if [ -n "${JWT_JWKS_URL:-}${JWT_PUBKEYS_FILE:-}" ]; then
  jwt=${JWT_MOUNT:-jwt}
  user=${JWT_USER_CLAIM:-sub}
  login "$jwt" jwt
  if [ -n "${JWT_JWKS_URL:-}" ]; then
    v write "auth/$jwt/config" jwks_url="$JWT_JWKS_URL" default_role=diurna-server
  else
    v write "auth/$jwt/config" jwt_validation_pubkeys=@"$JWT_PUBKEYS_FILE" default_role=diurna-server
  fi
  pointer=false
  case $user in /*) pointer=true ;; esac
  bound=${JWT_BOUND_CLAIMS:-}
  for role in diurna-server diurna-client; do
    v write "auth/$jwt/role/$role" - <<J
{"role_type": "jwt", "bound_audiences": ["${JWT_AUDIENCE:-vault.io}"],
 "user_claim": "$user", "user_claim_json_pointer": $pointer,
 "bound_claims": ${bound:-null},
 "token_type": "service", "token_period": "$period", "token_policies": ["$role"]}
J
  done
fi

if [ -n "${KUBERNETES_HOST:-}" ]; then
  login kubernetes kubernetes
  if [ -n "${KUBERNETES_CA_FILE:-}" ]; then
    v write auth/kubernetes/config kubernetes_host="$KUBERNETES_HOST" kubernetes_ca_cert=@"$KUBERNETES_CA_FILE"
  else
    v write auth/kubernetes/config kubernetes_host="$KUBERNETES_HOST"
  fi
  v write auth/kubernetes/role/diurna-server \
    bound_service_account_names="${KUBERNETES_ACCOUNT:-diurna}" \
    bound_service_account_namespaces="${KUBERNETES_NAMESPACE:-default}" \
    token_policies=diurna-server token_period="$period"
fi

# Vault checks a leaf when it signs it. Better here than in a node. issue instead
# of sign: the key is thrown away.
say "sign every name once"
v write "$mount/issue/diurna-server" common_name="server.$domain" alt_names="$names" \
  ip_sans=127.0.0.1,::1 uri_sans="spiffe://$domain/server/self-check" ttl=60s
v write "$mount/issue/diurna-client" common_name=self-check exclude_cn_from_sans=true \
  uri_sans="spiffe://$domain/client/self-check" ttl=60s
if v write "$mount/issue/diurna-client" common_name="server.$domain" 2>/dev/null; then
  die "the role diurna-client gave out the name of a server"
fi
say "done: vault.pki_mount = \"$mount\", vault.pki_role = \"diurna-server\""
