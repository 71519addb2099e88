package identity

import (
	"regexp"
	"strings"
	"testing"
	"unsafe"
)

func sameString(a, b string) bool { return unsafe.StringData(a) == unsafe.StringData(b) }

func TestGlob(t *testing.T) {
	for _, tt := range []struct {
		pattern, text string
		want          bool
	}{
		{"*", "", true}, {"*", "a/b", true}, {"**", "a/b", true}, {"", "", true}, {"", "a", false},
		{"a", "a", true}, {"a", "ab", false}, {"ab", "a", false},
		{"a*", "a", true}, {"a*", "abc", true}, {"a*", "ab/c", false}, {"a**", "ab/c", true},
		{"*/b", "a/b", true}, {"*/c", "a/b/c", false}, {"**/c", "a/b/c", true}, {"**/c", "c", false},
		{"a/*/c", "a/b/c", true}, {"a/*/c", "a//c", true}, {"a/*/c", "a/b/b/c", false}, {"a/**/c", "a/b/b/c", true},
		{"**a*b", "xa/ab", true}, {"*a*b", "xa/ab", false}, {"**b*/c", "b/b/c", true}, {"a**b*c", "a/b/bxc", true},
		{"orders.*", "orders.eu.new", true}, {"*.eu", "orders.eu", true}, {"ä*", "äö", true},
	} {
		if got := globMatch(tt.pattern, tt.text); got != tt.want {
			t.Errorf("%q is for %q: %v", tt.pattern, tt.text, got)
		}
	}
}

// FuzzGlob compares with a regular expression that means the same.
func FuzzGlob(f *testing.F) {
	for _, seed := range [][2]string{{"**a*b", "xa/ab"}, {"*", "/"}, {"a**b*c", "a/b/bxc"}, {"**/*/**", "//a/"}, {"*/*a**a", "/aa/a"}} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, pattern, text string) {
		if checkGlob(pattern) != "" || len(text) > maxNameBytes {
			return
		}
		want := pattern == "*"
		if !want {
			quoted := regexp.QuoteMeta(pattern)
			quoted = strings.ReplaceAll(quoted, `\*\*`, `(?s:.*)`)
			quoted = strings.ReplaceAll(quoted, `\*`, `[^/]*`)
			re, err := regexp.Compile(`\A` + quoted + `\z`)
			if err != nil {
				return // not UTF-8
			}
			want = re.MatchString(text)
		}
		if got := globMatch(pattern, text); got != want {
			t.Errorf("%q is for %q: %v, want %v", pattern, text, got, want)
		}
	})
}
