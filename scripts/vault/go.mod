// Nothing of ours: it names the Vault that tests and demos use, and go.sum
// fixes every module that goes into it. ../vault.sh builds it.
module github.com/diurnalog/diurna/scripts/vault

go 1.26.0

require github.com/hashicorp/vault v1.21.0

// As in Vault's own go.mod, which counts only where it is the main module.
replace github.com/99designs/keyring => github.com/Jeffail/keyring v1.2.3

replace github.com/ma314smith/signedxml v1.1.1 => github.com/moov-io/signedxml v1.1.1
