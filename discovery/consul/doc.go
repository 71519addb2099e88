// Package consul finds nodes through Consul, and registers this one there.
//
// Everything goes through the local Consul agent: registrations and TTL checks
// are that agent's state, so a load balancer in front of several agents will
// not do.
//
// A node is one instance of the service "diurna", with the id
// diurna-<node id>, the node's address and port, its role as a tag (leader,
// follower or nonvoter; none before it has one) beside the configured tags,
// and what else others want to know as meta: node_id, node_name, cluster_name,
// cluster_id, state, expect, raft_term, http_addr, zone, version, protocol. It
// has two checks: a TTL check that this node feeds with what Raft says, and a
// gRPC health check that the agent makes. So diurna.service.consul,
// leader.diurna.service.consul and the SRV name _diurna._leader.service.consul
// resolve. A role tag is a hint: a node that cannot reach its agent cannot take
// its tag back.
//
// With ACLs, the token needs this policy, where prod is the cluster's name:
//
//	service "diurna"              { policy = "write" }
//	node_prefix ""                { policy = "read" }
//	key_prefix "diurna/prod/"     { policy = "write" }
//
// Without node_prefix, Consul leaves instances out of its answers; such answers
// are used to find nodes, but not trusted.
package consul
