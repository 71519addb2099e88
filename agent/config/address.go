package config

import (
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// hostRE matches host names; underscores occur in the names of containers.
var hostRE = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?$`)

// parseAddress expands a go-sockaddr template and checks that it is host:port.
func parseAddress(s string, h host) (string, error) {
	template := strings.Contains(s, "{{")
	if template {
		out, err := h.expand(s)
		if err != nil {
			return "", &valueError{summary: "Invalid address template", detail: "go-sockaddr: " + err.Error() + "."}
		}
		s = strings.TrimSpace(out)
	}
	hostPart, port, err := net.SplitHostPort(s)
	if err != nil {
		if template {
			return "", invalid(`The template gives %q, which is not host:port. A port goes after the template, such as "{{ GetPrivateIP }}:8400".`, s)
		}
		return "", invalid(`%q is not host:port. Write it such as "127.0.0.1:8400", "localhost:8400" or "[::1]:8400".`, s)
	}
	if template && hostPart == "" {
		// Would quietly be every interface.
		return "", invalid("The template found no address on this host.")
	}
	if template && strings.ContainsAny(hostPart, " \t\n") {
		return "", invalid("The template gives several addresses (%s). It must give one.", hostPart)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || strconv.FormatUint(n, 10) != port {
		return "", invalid("%q is not a port: it must be a number from 0 up to 65535.", port)
	}
	if hostPart == "" {
		return s, nil
	}
	if ip, err := netip.ParseAddr(hostPart); err == nil {
		if ip.IsMulticast() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
			return "", invalid("%s is not the address of one node.", hostPart)
		}
		return s, nil
	}
	if len(hostPart) > 253 || !hostRE.MatchString(hostPart) || looksNumeric(hostPart) {
		return "", invalid("%q is neither an IP address nor a host name.", hostPart)
	}
	return s, nil
}

// looksNumeric catches a mistyped IPv4 address ("127.0.0.256", "10.0.1"),
// which would pass for a host name and fail much later. No top-level domain
// is all digits.
func looksNumeric(host string) bool {
	host = strings.TrimSuffix(host, ".")
	last := host[strings.LastIndexByte(host, '.')+1:]
	_, err := strconv.ParseUint(last, 10, 64)
	return err == nil
}

// isWildcard tells whether an address that passed parseAddress has a host that
// means every interface.
func isWildcard(addr string) bool {
	hostPart, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	if hostPart == "" {
		return true
	}
	ip, err := netip.ParseAddr(hostPart)
	return err == nil && ip.IsUnspecified()
}
