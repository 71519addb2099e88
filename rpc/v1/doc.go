// Package v1 is Diurna's gRPC contract, package diurna.v1, and the Go code
// generated from it by `make proto`: log.proto for clients, admin.proto for
// operators, peer.proto for the nodes among themselves.
package v1
