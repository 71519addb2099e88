package config

import (
	"net"
	"net/url"
	"regexp"
)

var dnsName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$`)

// checkSecurity looks at whether it is said who is trusted, and how.
func (l *loader) checkSecurity(c *Config) {
	if l.bad["tls.source"] || l.unread {
		return
	}
	switch c.TLS.Source {
	case "":
		l.fail("tls.source", "Missing tls.source",
			`It has to be said how connections are secured: tls { source = "vault" } or "files". "none" is plaintext, in which whoever reaches the port may do everything.`)
		return
	case TLSFiles:
		for _, k := range []struct{ key, value string }{{"tls.cert_file", c.TLS.CertFile}, {"tls.key_file", c.TLS.KeyFile}, {"tls.ca_file", c.TLS.CAFile}} {
			l.need(k.key, k.value, `tls.source = "files" needs it.`)
		}
	case TLSVault:
		l.checkVault(c)
	}
	if c.TLS.Source != TLSNone && !l.bad["cluster.name"] && !dnsName.MatchString(c.Cluster.Name) {
		l.fail("cluster.name", "Invalid value for cluster.name",
			"Certificates hold it as part of a DNS name, and %q cannot be that: letters, digits, dots and hyphens.", c.Cluster.Name)
	}
	l.checkNames(c)
	if l.bad["acl.enabled"] || !c.ACL.Enabled {
		return
	}
	if c.TLS.Source == TLSNone {
		l.fail("acl.enabled", "Values do not fit together", `acl.enabled needs certificates to know people by, and tls.source is "none".`)
	}
	l.need("acl.policy_file", c.ACL.PolicyFile, "acl.enabled needs it: without rules nobody may do anything.")
}

// need reports a key that has to have a value.
func (l *loader) need(name, value, why string) {
	if value == "" && !l.bad[name] {
		l.fail(name, "Missing "+name, "%s", why)
	}
}

func (l *loader) checkVault(c *Config) {
	v := &c.Vault
	if u, err := url.Parse(v.Address); !l.bad["vault.address"] && (err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
		l.fail("vault.address", "Invalid value for vault.address", "%q is not a URL such as https://vault.service.consul:8200.", v.Address)
	}
	if l.bad["vault.auth"] {
		return
	}
	why := "vault.auth = \"" + v.Auth + "\" needs it."
	switch v.Auth {
	case VaultToken:
		l.need("vault.token", v.Token, why+` It may be env("VAULT_TOKEN").`)
	case VaultTokenFile:
		l.need("vault.token_file", v.TokenFile, why)
	case VaultAppRole:
		l.need("vault.role_id", v.RoleID, why)
		switch {
		case v.SecretID == "" && v.SecretIDFile == "" && !l.bad["vault.secret_id"] && !l.bad["vault.secret_id_file"]:
			l.fail("vault.secret_id", "Missing vault.secret_id", "%s Or vault.secret_id_file.", why)
		case v.SecretID != "" && v.SecretIDFile != "":
			l.fail("vault.secret_id_file", "Values do not fit together", "There is a vault.secret_id already: give one of the two.")
		}
	case VaultKubernetes:
		l.need("vault.auth_role", v.AuthRole, why)
	case VaultJWT:
		l.need("vault.auth_role", v.AuthRole, why)
		l.need("vault.jwt_file", v.JWTFile, why)
	}
}

// checkNames refuses what no certificate can hold.
func (l *loader) checkNames(c *Config) {
	if l.bad["tls.names"] {
		return
	}
	for _, name := range c.TLS.Names {
		if net.ParseIP(name) == nil && !nodeName.MatchString(name) {
			l.fail("tls.names", "Invalid value for tls.names", "%q is neither a DNS name nor an IP address.", name)
			return
		}
	}
}
