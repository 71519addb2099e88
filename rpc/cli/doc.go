// Package cli is the command line of Diurna's clients, on hashicorp/cli: the
// verbs produce, consume, servers, status, version, and for operators leave and
// those under operator raft.
//
// A program is one call:
//
//	os.Exit(cli.Run(os.Args[1:], more))
//
// where more holds the verbs of other packages. Everything a verb touches of
// the process it runs in is in [Meta], so that tests run verbs against pipes.
//
// Standard output carries what was asked for and nothing else. Progress goes
// to standard error, and only where that is a terminal. Verbs exit 0 when all
// is well, 1 for a mistake in how they were called or something local, and 2
// when the server said no, is not healthy or cannot be reached.
package cli
