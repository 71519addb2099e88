package rpc

import (
	"net"
	"strconv"
)

// The longest id and address that are taken from outside. A UUID has 36
// characters, a DNS name at most 253.
const (
	maxIDBytes      = 128
	maxAddressBytes = 253 + len(":65535")
)

// checkID refuses what cannot be a node's id. Ids go into logs, tables and file
// names of others: printable ASCII without spaces.
func checkID(field, id string) error {
	switch {
	case id == "":
		return &InvalidArgumentError{Field: field, Detail: "is empty"}
	case len(id) > maxIDBytes:
		return &InvalidArgumentError{Field: field, Detail: "has more than 128 characters"}
	}
	for i := range len(id) {
		if id[i] <= ' ' || id[i] > '~' {
			return &InvalidArgumentError{Field: field, Detail: "has characters other than printable ASCII"}
		}
	}
	return nil
}

// checkAddress refuses what cannot be dialled from another machine.
func checkAddress(field, address string) error {
	if len(address) > maxAddressBytes {
		return &InvalidArgumentError{Field: field, Detail: "is too long"}
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" {
		return &InvalidArgumentError{Field: field, Detail: "is not host:port"}
	}
	for i := range len(host) {
		if host[i] <= ' ' || host[i] > '~' || host[i] == '/' {
			return &InvalidArgumentError{Field: field, Detail: "has a host that is neither a name nor an IP address"}
		}
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		return &InvalidArgumentError{Field: field, Detail: "is an address to listen on, not one that others can reach"}
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return &InvalidArgumentError{Field: field, Detail: "has a port that is not a number from 1 to 65535"}
	}
	return nil
}
