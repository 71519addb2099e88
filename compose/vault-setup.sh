#!/bin/sh
# Keeps Vault set up for the stack, until it is stopped. A Vault in development mode
# forgets everything when it restarts, so once is not enough. What others need is in
# two folders, which are volumes:
#
#   /login   for nodes: secret-id, and ca.pem for their health checks
#   /certs   for clients: ca.pem, and producer.pem, consumer.pem and operator.pem,
#            each a certificate, what leads to its CA, and its key
#
# ca.pem has the newest CAs, not only the last: nodes go on with certificates of a CA
# that Vault has forgotten until they get others.
set -eu

role=auth/approle/role/diurna-server
renew=21600 # seconds after which clients get new certificates; they live for 24 h
cas=8       # how many CAs are remembered
owner=10001 # the user of Diurna's image
ready=/tmp/ready

say() { echo "vault-setup: $*"; }

# put FROM TO: a file for Diurna's user alone. Whoever reads it meanwhile finds the
# old one, whole.
put() {
  cp "$1" "$2.new" && chmod 600 "$2.new" && chown "$owner" "$2.new" && mv "$2.new" "$2"
}

# known tells whether Vault knows the secret that nodes log in with. Of one that it
# does not know it says nothing, and no error.
known() {
  [ -s /login/secret-id ] &&
    vault write -format=json "$role/secret-id/lookup" secret_id=@/login/secret-id 2>/dev/null | grep -q secret_id_accessor
}

# remember puts the root CA in front of those in ca.pem, without what is there
# already, and without the oldest.
remember() {
  vault read -field=certificate pki_diurna_root/cert/ca >/tmp/root.pem &&
    echo >>/tmp/root.pem && # Vault ends no file with a newline
    touch /certs/ca.pem &&
    awk -v most="$cas" '
      /BEGIN CERTIFICATE/ { text = "" }
      NF { text = text $0 "\n" }
      /END CERTIFICATE/ && !(text in seen) && n < most { seen[text] = 1; n++; printf "%s", text }
    ' /tmp/root.pem /certs/ca.pem >/tmp/ca.pem &&
    put /tmp/ca.pem /login/ca.pem &&
    put /tmp/ca.pem /certs/ca.pem
}

issue() {
  for client in producer consumer operator; do
    vault write -field=certificate pki_diurna/issue/diurna-client format=pem_bundle \
      common_name="$client" exclude_cn_from_sans=true uri_sans="spiffe://diurna.diurna/client/$client" >/tmp/client.pem &&
      put /tmp/client.pem "/certs/$client.pem" || return 1
  done
  issued=$(date +%s)
}

# The secret comes last: it is how known tells that nothing is missing.
set_up() {
  sh /setup/vault-pki.sh diurna &&
    vault write "$role/role-id" role_id=diurna-compose >/dev/null &&
    remember && issue &&
    vault write -f -field=secret_id "$role/secret-id" >/tmp/secret-id &&
    put /tmp/secret-id /login/secret-id
}

umask 077
rm -f "$ready"
trap 'exit 0' TERM INT
issued=0
while :; do
  if ! known; then
    rm -f "$ready"
    say "setting Vault up"
    if set_up; then say "done"; else say "that did not work; again in two seconds"; fi
  elif [ $(($(date +%s) - issued)) -gt "$renew" ]; then
    say "new certificates for clients"
    if ! remember || ! issue; then say "that did not work; again in two seconds"; fi
  else
    touch "$ready"
  fi
  # A trap waits for a command in the foreground to end, but not for wait.
  sleep 2 &
  wait $!
done
