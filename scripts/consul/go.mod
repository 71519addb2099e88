// Nothing of ours: it names the Consul that tests and demos use, and go.sum
// fixes every module that goes into it. ../consul.sh builds it.
module github.com/diurnalog/diurna/scripts/consul

go 1.26.0

require github.com/hashicorp/consul v1.22.5
