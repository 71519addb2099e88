// Nothing of ours: it names the Nomad that tests and demos use, and go.sum
// fixes every module that goes into it. ../nomad.sh builds it.
module github.com/diurnalog/diurna/scripts/nomad

go 1.26.0

require (
	github.com/hashicorp/nomad v1.11.2
	github.com/hashicorp/nomad/api v0.0.0-20260907080526-08ef8f3d26da
)

// As in Nomad's own go.mod, which counts only where it is the main module.
replace github.com/Microsoft/go-winio => github.com/endocrimes/go-winio v0.4.13-0.20190628114223-fb47a8b41948

replace github.com/hashicorp/hcl => github.com/hashicorp/hcl v1.0.1-nomad-1
