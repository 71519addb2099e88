// Package v1 is Diurna's gRPC contract, package diurna.v1: log.proto and the
// Go code generated from it by `make proto`.
package v1
