# Three nodes on three machines, with certificates from Vault, tokens from
# Consul, and permissions. docs/nomad.md says what has to be there first, with
# the commands, and how to change and drain it; in short:
#
#   scripts/vault-pki.sh       Vault: the CA, and who may log in
#   consul-policy.hcl          Consul: what the nodes' tokens allow
#   volume.hcl                 a folder on each machine for the data
#   policy.csv                 who may produce and consume: yours
#
#   nomad job run -var image=registry.example.com/diurna:v1.2.3 jobs/diurna.nomad.hcl

variable "image" {
  description = "The image. With a tag that names a version: the same tag is no update."
  type        = string
  default     = "diurna:dev"
}

variable "cluster" {
  description = "The cluster's name, as given to scripts/vault-pki.sh."
  type        = string
  default     = "diurna"
}

variable "nodes" {
  description = "How many nodes there are: 1, 3 or 5. So many form the cluster."
  type        = number
  default     = 3
}

variable "rpc_port" {
  description = "Where clients and the other nodes connect, on every machine."
  type        = number
  default     = 8400
}

variable "http_port" {
  description = "Where health, metrics and status are, on every machine."
  type        = number
  default     = 8402
}

variable "consul" {
  description = "The Consul agent of the machine, host:port."
  type        = string
  default     = "127.0.0.1:8500"
}

variable "vault" {
  description = "Vault's URL."
  type        = string
  default     = "https://vault.service.consul:8200"
}

variable "vault_ca_file" {
  description = "Who vouches for Vault: a file on the machine where you submit the job. Empty is for http only, the image has no CAs."
  type        = string
  default     = ""
}

variable "policy_file" {
  description = "Who may do what, see docs/security.md: a file on the machine where you submit the job."
  type        = string
  default     = "jobs/policy.csv"
}

job "diurna" {
  type = "service"

  group "node" {
    count = var.nodes

    constraint {
      operator = "distinct_hosts"
      value    = "true"
    }

    # Each in another datacenter, where there are several.
    spread {
      attribute = "${node.datacenter}"
    }

    # One by one: the next only when the one before is ready, which is when it
    # has caught up, and has stayed so. Ready for longer than
    # membership.stabilization, so that a node that has to join anew, with an
    # empty volume, has its vote before the next one goes.
    update {
      max_parallel      = 1
      health_check      = "checks"
      min_healthy_time  = "20s"
      healthy_deadline  = "30m"
      progress_deadline = "1h"
      # Not by itself: an older binary need not read what a newer one has written.
      auto_revert = false
    }

    # When machines are drained, likewise.
    migrate {
      max_parallel     = 1
      health_check     = "checks"
      min_healthy_time = "20s"
      healthy_deadline = "30m"
    }

    # A machine that Nomad has lost touch with may still be a voter that the
    # others hear well, and if it is not, they are a majority. Its node is not
    # replaced: its data is there, and nowhere else. docs/nomad.md says how to give
    # up one that does not come back.
    disconnect {
      lost_after = "24h"
      replace    = false
      reconcile  = "keep_original"
    }

    # A node that ends is started again where its data is, for as long as it
    # takes.
    restart {
      attempts = 5
      interval = "5m"
      delay    = "10s"
      mode     = "delay"
    }

    # The data. sticky: a node, once it has a volume, gets that one and no other.
    volume "data" {
      type            = "host"
      source          = "diurna-data"
      sticky          = true
      access_mode     = "single-node-single-writer"
      attachment_mode = "file-system"
    }

    # Static, so that diurna.service.consul:8400 is all that clients have to know.
    network {
      port "rpc" {
        static = var.rpc_port
      }
      port "http" {
        static = var.http_port
      }
    }

    # For Nomad only, to know when to go on with the next node. That the nodes
    # are diurna.service.consul they tell Consul themselves: Nomad would take a
    # node out of DNS before each restart, and knows nothing of who leads.
    service {
      provider = "nomad"
      name     = "diurna-ready"
      port     = "http"

      check {
        type            = "http"
        protocol        = "https"
        tls_skip_verify = true # of whether it is ready, not of what it says
        path            = "/v1/health/ready"
        interval        = "5s"
        timeout         = "3s"
      }
    }

    task "diurna" {
      driver = "docker"
      user   = "10001:10001" # as in volume.hcl

      # SIGTERM hands leadership over, ends what is under way, and takes
      # shutdown_timeout at most: 10 s. Clients of Nomad allow 30 s here unless
      # max_kill_timeout says more.
      kill_signal  = "SIGTERM"
      kill_timeout = "30s"

      # Nomad logs in to Consul with this and puts the token into the node's
      # environment. It is also in secrets/consul_token, for root only.
      identity {
        name = "consul_default"
        aud  = ["consul.io"]
        ttl  = "1h"
      }
      consul {}

      # The node logs in to Vault with this, and renews its certificate, by
      # itself. There is no vault block on purpose: Nomad would stop nodes when
      # Vault is down.
      identity {
        name     = "diurna"
        aud      = ["vault.io"]
        file     = true
        filepath = "secrets/diurna.jwt"
        ttl      = "1h"
      }

      config {
        image        = var.image
        network_mode = "host"
        args         = ["agent", "-config-file", "/local/diurna.hcl"]
      }

      volume_mount {
        volume      = "data"
        destination = "/var/lib/diurna"
      }

      template {
        destination = "local/diurna.hcl"
        change_mode = "noop" # it changes with the job only
        data        = <<-HCL
          data_dir = "/var/lib/diurna"
          log_json = true

          node {
            name = "{{ env "node.unique.name" }}"
          }

          cluster {
            name             = "${var.cluster}"
            bootstrap_expect = ${var.nodes}
            zone             = "{{ env "node.datacenter" }}"
          }

          listener {
            rpc  = "{{ env "NOMAD_ADDR_rpc" }}"
            http = "{{ env "NOMAD_ADDR_http" }}"
          }

          discovery {
            type = "consul"
          }

          consul {
            address = "${var.consul}"
            token   = env("CONSUL_HTTP_TOKEN")
          }

          tls {
            source = "vault"
          }

          vault {
            address    = "${var.vault}"
            ca_file    = "${var.vault_ca_file == "" ? "" : "/local/vault-ca.pem"}"
            auth       = "jwt"
            auth_mount = "jwt-nomad"
            auth_role  = "diurna-server"
            jwt_file   = "/secrets/diurna.jwt"
            ca_mounts  = ["pki_diurna_root"]
          }

          acl {
            enabled     = true
            policy_file = "/local/policy.csv"
          }
        HCL
      }

      template {
        destination = "local/policy.csv"
        change_mode = "noop"
        data        = file(var.policy_file)
      }

      dynamic "template" {
        for_each = var.vault_ca_file == "" ? [] : [var.vault_ca_file]
        content {
          destination = "local/vault-ca.pem"
          change_mode = "noop"
          data        = file(template.value)
        }
      }

      # The log is read through the page cache, which counts here too: give it
      # what you can spare.
      resources {
        cpu    = 1000
        memory = 1024
      }
    }
  }
}
