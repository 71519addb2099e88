# What the nodes need of Consul: to register themselves, to see one another, and
# to write down, once, who forms the cluster.
service "diurna" {
  policy = "write"
}

node_prefix "" {
  policy = "read"
}

key_prefix "diurna/" {
  policy = "write"
}
