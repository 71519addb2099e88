package identity

import "strings"

// globMatch tells whether text is one that pattern stands for. In a pattern
//
//   - stands for any run of characters, also none, other than /
//     ** stands for any run of characters
//
// and everything else for itself. A pattern that is only * stands for
// everything, as ** does.
//
// Two places to go back to are enough. Behind a **, nothing before it matters
// any more. Behind a *, of those since the last **, only that one has to be
// tried further: an earlier one that took more would leave later ones less of
// the same stretch without a /.
func globMatch(pattern, text string) bool {
	if pattern == "*" {
		return true
	}
	p, t := 0, 0
	star, starT := -1, 0 // where to go on in pattern after the last *, and what it has taken so far
	deep, deepT := -1, 0 // likewise for the last **
	for {
		switch {
		case strings.HasPrefix(pattern[p:], "**"):
			p += 2
			deep, deepT, star = p, t, -1
			continue
		case p < len(pattern) && pattern[p] == '*':
			p++
			star, starT = p, t
			continue
		case p < len(pattern) && t < len(text) && pattern[p] == text[t]:
			p++
			t++
			continue
		case p == len(pattern) && t == len(text):
			return true
		}
		switch {
		case star >= 0 && starT < len(text) && text[starT] != '/':
			starT++
			p, t = star, starT
		case deep >= 0 && deepT < len(text):
			deepT++
			p, t, star = deep, deepT, -1
		default:
			return false
		}
	}
}

// Longest that a pattern, and what it is compared with, may be. A subject comes
// from a certificate, whose names are as long as its CA lets them be.
const (
	maxPatternBytes = 512
	maxNameBytes    = 1024
)

// checkGlob says what is wrong with a pattern; nothing if it is good.
func checkGlob(pattern string) string {
	if len(pattern) > maxPatternBytes {
		return "has more than 512 characters"
	}
	if strings.Contains(pattern, "***") {
		return "has three * in a row: * stands for anything without a /, ** for anything"
	}
	for _, r := range pattern {
		switch {
		case strings.ContainsRune(`?[]{}\^$|()"`, r):
			return "has a " + string(r) + ", which has no meaning here: the only wildcards are * (anything without a /) and ** (anything)"
		case r == '#':
			return "has a #: comments have lines of their own"
		case r < ' ' || r == 0x7f || r == '\ufffd':
			return "has characters that cannot be printed"
		}
	}
	return ""
}
