# Produces, then consumes and compares: an example of a client as a job, and a
# check that a cluster works. It knows the nodes by their name in Consul only.
#
#   nomad job run jobs/example.nomad.hcl

variable "diurna" {
  description = "The binary. Empty: bin/diurna in the folder you are in."
  type        = string
  default     = ""
}

variable "service" {
  description = "The nodes' service in Consul."
  type        = string
  default     = "diurna"
}

variable "records" {
  description = "How many to produce."
  type        = number
  default     = 10000
}

variable "tls_dir" {
  description = "For nodes with tls = true: the folder tls beside their data."
  type        = string
  default     = ""
}

locals {
  diurna = var.diurna != "" ? var.diurna : abspath("bin/diurna")
  env = var.tls_dir == "" ? {} : {
    DIURNA_CACERT      = "${var.tls_dir}/ca.pem"
    DIURNA_CLIENT_CERT = "${var.tls_dir}/client.pem"
    DIURNA_CLIENT_KEY  = "${var.tls_dir}/client-key.pem"
  }
}

job "diurna-example" {
  type = "batch"

  group "example" {
    # What comes twice could be there twice: rather look why it failed.
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "produce" {
      driver = "raw_exec"

      lifecycle {
        hook    = "prestart"
        sidecar = false
      }

      config {
        command = "/bin/sh"
        args    = ["-euc", "seq -f \"$NOMAD_ALLOC_ID %.0f\" ${var.records} | ${local.diurna} produce"]
      }

      # All nodes as Consul lists them now, with their ports. Where these are
      # static, diurna.service.consul:8400 does as well.
      template {
        destination = "local/addr.env"
        env         = true
        change_mode = "noop"
        data        = <<-ENV
          DIURNA_ADDR={{ range $i, $s := service "${var.service}" }}{{ if $i }},{{ end }}{{ $s.Address }}:{{ $s.Port }}{{ end }}
        ENV
      }

      env = local.env

      resources {
        cpu    = 100
        memory = 64
      }
    }

    task "consume" {
      driver = "raw_exec"

      config {
        command = "/bin/sh"
        args = ["-euc", <<-SH
          seq -f "$NOMAD_ALLOC_ID %.0f" ${var.records} >"$NOMAD_TASK_DIR/want"
          ${local.diurna} consume -from 1h -linearizable >"$NOMAD_TASK_DIR/all"
          grep "^$NOMAD_ALLOC_ID " "$NOMAD_TASK_DIR/all" >"$NOMAD_TASK_DIR/got"
          cmp "$NOMAD_TASK_DIR/want" "$NOMAD_TASK_DIR/got"
          echo "consumed what was produced: ${var.records} records"
        SH
        ]
      }

      template {
        destination = "local/addr.env"
        env         = true
        change_mode = "noop"
        data        = <<-ENV
          DIURNA_ADDR={{ range $i, $s := service "${var.service}" }}{{ if $i }},{{ end }}{{ $s.Address }}:{{ $s.Port }}{{ end }}
        ENV
      }

      env = local.env

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
