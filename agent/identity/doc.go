// Package identity is who a node is, whom it trusts, and who calls it: the
// certificates of both sides, from wherever they come, kept up to date.
//
//	id, err := identity.Open(ctx, identity.Config{TLS: cfg.TLS, Vault: cfg.Vault, Cluster: "diurna", ...})
//	go id.Run(ctx) // renews, until ctx ends
//
//	l = tls.NewListener(l, id.Server("h2", identity.ALPNRaft))
//	conn := tls.Client(raw, id.Peer(identity.ALPNRaft)) // made anew for each dial
//	who := id.Caller(conn.ConnectionState())
//
// Whoever makes handshakes gives the error of one that failed to
// HandshakeFailed: it may be that a CA is new.
//
// # Who is who
//
// A cluster called C has the trust domain C.diurna, in lower case. A
// certificate with exactly the DNS name server.C.diurna is that of a server;
// nobody else gets one. It also names the node: spiffe://C.diurna/server/ID. A
// client's certificate names spiffe://C.diurna/client/NAME.
//
// Server takes callers without a certificate, who are "anonymous"; it is for
// others to refuse them. A certificate that is shown has to be good: of a
// trusted CA, within its life, not revoked. Raft streams and the servers that
// Peer dials have to be servers of the same cluster. That is checked at the end
// of each handshake, and there are no session tickets that would outlive it.
// Connections that are open stay open, whatever happens to certificates.
//
// # Where certificates come from
//
// A source, chosen by tls.source, of which there are three.
//
// "vault": a new key for each certificate, which never leaves the node, signed
// by Vault's PKI. It is renewed after 66 to 76 % of its life. Failing is logged
// once per cause and tried again, at least eight times in what is left of a
// life, for ever; the certificate in use is never dropped. What was obtained is
// cached in Config.Dir, so that a restart needs no Vault: node.pem with key and
// certificate, issuers.pem with whom to trust. A cache that others can read is
// not used.
//
// Trusted are all issuers of vault.pki_mount and vault.ca_mounts. They, and the
// certificates that they revoked, are asked for every five minutes, with each
// renewal, and when a handshake fails because of an unknown CA. An issuer that
// is no longer listed is trusted for one more life of a certificate. A new root
// is so trusted beside the old, and a node whose issuer is gone, or whose
// certificate is revoked, gets another at once. Delta lists are not asked for.
//
// Tokens that a login gave are renewed, and obtained anew when they are lost.
// One that is configured, or comes from a file, is for others to keep alive.
// VAULT_ variables of the environment do not count; HTTPS_PROXY and the like
// do.
//
// "files": a pair and its CAs that somebody else keeps up to date. They are
// looked at every two seconds; what does not fit together changes nothing. The
// CA file may hold revocation lists too. Nothing but what it holds is trusted.
//
// "dev": a throw-away CA, which nodes of one machine share by its folder. There
// are a client's certificate and key beside it, for the command line.
//
// CreateCA, CreateServer and CreateClient make files for people who have no
// other PKI.
//
// # Layout
//
//	identity.go  Open, and how a new certificate comes into use
//	run.go       what goes on while Run runs
//	tls.go       configurations of handshakes
//	names.go     who a certificate makes of its holder
//	pair.go      a certificate with its key; what can be wrong with it
//	trust.go     CAs and what they revoked
//	schedule.go  when, and how often
//	vault*.go    the source "vault"; files.go, dev.go the others
//	cache.go     what a restart finds
//	ca.go        a CA of one's own
package identity
