# Three nodes on one machine, to try things:
#
#   make build consul nomad
#   consul agent -dev &
#   sudo nomad agent -dev &
#   nomad job run jobs/diurna-dev.nomad.hcl
#
# The nodes' data is in a folder of the machine, not in Nomad's: it is there
# again after "nomad job stop" and "nomad job run". docs/nomad.md has more; for
# real machines there is diurna.nomad.hcl.

variable "diurna" {
  description = "The binary. Empty: bin/diurna in the folder you are in. Another one is rolled out node by node."
  type        = string
  default     = ""
}

variable "data_dir" {
  description = "Where the nodes' data is, one folder for each."
  type        = string
  default     = "/tmp/diurna-dev"
}

variable "consul" {
  description = "The Consul agent, host:port."
  type        = string
  default     = "127.0.0.1:8500"
}

variable "tls" {
  description = "Certificates of a throw-away CA, whose files are in the folder tls beside the data."
  type        = bool
  default     = false
}

locals {
  diurna = var.diurna != "" ? var.diurna : abspath("bin/diurna")
}

job "diurna-dev" {
  type = "service"

  group "node" {
    count = 3

    # One by one, each only when the one before takes records again and has done
    # so for a while.
    update {
      max_parallel      = 1
      health_check      = "checks"
      min_healthy_time  = "5s"
      healthy_deadline  = "2m"
      progress_deadline = "10m"
    }

    migrate {
      max_parallel     = 1
      health_check     = "checks"
      min_healthy_time = "5s"
      healthy_deadline = "2m"
    }

    # A node that ends is started again where its data is, for as long as it
    # takes.
    restart {
      attempts = 5
      interval = "1m"
      delay    = "2s"
      mode     = "delay"
    }

    network {
      port "rpc" {}
      port "http" {}
    }

    # For Nomad only, to know when to go on with the next node. That the nodes
    # are diurna.service.consul they tell Consul themselves.
    service {
      provider = "nomad"
      name     = "diurna-dev-ready"
      port     = "http"

      check {
        type            = "http"
        protocol        = var.tls ? "https" : "http"
        tls_skip_verify = true
        path            = "/v1/health/ready"
        interval        = "2s"
        timeout         = "2s"
      }
    }

    task "diurna" {
      driver = "raw_exec"

      # SIGTERM hands leadership over, ends what is under way, takes 10 s at most.
      kill_signal  = "SIGTERM"
      kill_timeout = "20s"

      config {
        command = local.diurna
        # The index tells the three apart, here on one machine. Should Nomad ever
        # give one out twice, the second node finds the folder locked, and is
        # tried again until the first has gone.
        args = concat([
          "agent", "-dev",
          "-node", "node-${NOMAD_ALLOC_INDEX}",
          "-data-dir", "${var.data_dir}/node-${NOMAD_ALLOC_INDEX}",
          "-rpc-addr", "${NOMAD_ADDR_rpc}",
          "-http-addr", "${NOMAD_ADDR_http}",
          "-discovery", "consul",
          "-consul-addr", var.consul,
          "-bootstrap-expect", "3",
        ], var.tls ? ["-tls", "-tls-dir", "${var.data_dir}/tls"] : [])
      }

      resources {
        cpu    = 100
        memory = 256
      }
    }
  }
}
