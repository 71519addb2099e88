// Package config reads a node's configuration: HCL or JSON files, in order,
// then what the command line says, checked as a whole.
//
//	src := config.Sources{Files: []string{"config.hcl"}}
//	cfg, err := config.Load(src)
//	var bad *config.Error
//	if errors.As(err, &bad) {
//		bad.Print(os.Stderr) // every problem, each with its line of source
//	}
//
// Every key is one row of the table in keys.go: its name, its field in Config,
// what it may hold and whether a reload can apply it. The body schema, the
// decoding, the range checks, the list of changes and the check of the
// reference file config.hcl all follow from that table.
//
// Files are read one after the other onto the same keys: a key in a later file
// replaces the one before it, key by key, also inside of a block. Only the
// value that counts in the end is evaluated, so that a later file can replace
// an env("X") that is not set here. null means the default.
//
// Expressions may call env, file, hostname and trimspace; addresses are
// go-sockaddr templates besides. Durations are written "500ms" or "10s", sizes
// "64MiB": units are never guessed.
//
// What this package does not do: it opens no data directory and no socket, so
// a valid configuration may still fail to start.
package config
