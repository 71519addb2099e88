# What all three nodes of the stack run with; config.hcl at the top of the
# repository explains every key.

data_dir = "/var/lib/diurna"

cluster {
  name             = "diurna"
  bootstrap_expect = 3
}

discovery {
  type = "consul"
}

consul {
  # One agent for all three: on machines, each would have its own.
  address = "consul:8500"
}

listener {
  rpc  = "0.0.0.0:8400"
  http = "0.0.0.0:8402"
}

tls {
  source = "vault"
  names  = [hostname()]
}

vault {
  address = "http://vault:8200"
  auth    = "approle"
  # vault-setup.sh has Vault use this id, and keeps the secret in the file good.
  role_id        = "diurna-compose"
  secret_id_file = "/run/diurna/secret-id"
  ca_mounts      = ["pki_diurna_root"]
}

acl {
  enabled     = true
  policy_file = "/etc/diurna.d/policy.csv"
}
