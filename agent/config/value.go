package config

import (
	"fmt"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
)

// valueError says what is wrong with a value, to be put together with the
// place where it is written.
type valueError struct{ summary, detail string }

func (e *valueError) Error() string { return e.summary + ": " + e.detail }

func invalid(detail string, args ...any) error {
	return &valueError{summary: "Invalid value", detail: fmt.Sprintf(detail, args...)}
}

// put checks v, which is not null, and stores it in c's field for k.
func (k key) put(c *Config, v cty.Value, h host) error {
	switch k.kind {
	case kindFlag:
		b, err := convert.Convert(v, cty.Bool)
		if err != nil || b.IsNull() {
			return invalid("Write true or false.")
		}
		*k.field(c).(*bool) = b.True()
		return nil
	case kindCount:
		n, err := k.count(v)
		if err != nil {
			return err
		}
		*k.field(c).(*int) = n
		return nil
	case kindList:
		list, err := k.list(v)
		if err != nil {
			return err
		}
		*k.field(c).(*[]string) = list
		return nil
	}

	sv, err := convert.Convert(v, cty.String)
	if err != nil || sv.IsNull() {
		return invalid("It must be a string%s.", map[kind]string{
			kindSize: ` such as "64MiB"`, kindDuration: ` such as "500ms"`, kindAddress: ` such as "127.0.0.1:8400"`,
		}[k.kind])
	}
	s := sv.AsString()
	if s == "" {
		if k.empty {
			return nil // The default stays.
		}
		return invalid("It must not be empty. Leave the key out for the default.")
	}

	switch k.kind {
	case kindText:
		if i := strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }); i >= 0 {
			return invalid("It holds a control character (%q). If it comes from a file, trimspace(file(...)) drops the newline at its end.", s[i])
		}
		*k.field(c).(*string) = s
	case kindChoice:
		want := strings.ToLower(s)
		if !slices.Contains(k.oneOf, want) {
			return invalid("There is no %q. Choose one of: %s.", s, strings.Join(k.oneOf, ", "))
		}
		*k.field(c).(*string) = want
	case kindSize:
		n, err := parseSize(s)
		if err != nil {
			return err
		}
		if n < k.min || n > k.max {
			return invalid("%s is out of range: from %s up to %s.", s, formatSize(k.min), formatSize(k.max))
		}
		*k.field(c).(*int64) = n
	case kindDuration:
		d, err := parseDuration(s)
		if err != nil {
			return err
		}
		if int64(d) < k.min || int64(d) > k.max {
			return invalid("%s is out of range: from %v up to %v.", s, time.Duration(k.min), time.Duration(k.max))
		}
		*k.field(c).(*time.Duration) = d
	case kindAddress:
		addr, err := parseAddress(s, h)
		if err != nil {
			return err
		}
		*k.field(c).(*string) = addr
	}
	return nil
}

// list reads ["a", "b"], or "a,b", which is how a flag gives it.
func (k key) list(v cty.Value) ([]string, error) {
	var list []string
	if v.Type() == cty.String {
		list = strings.Split(v.AsString(), ",")
		if v.AsString() == "" {
			return nil, nil
		}
	} else {
		lv, err := convert.Convert(v, cty.List(cty.String))
		if err != nil {
			return nil, invalid(`It must be a list of strings, such as ["a", "b"].`)
		}
		for _, e := range lv.AsValueSlice() {
			if e.IsNull() {
				return nil, invalid("An element must not be null.")
			}
			list = append(list, e.AsString())
		}
	}
	for i, s := range list {
		s = strings.TrimSpace(s)
		if s == "" || strings.ContainsFunc(s, unicode.IsControl) {
			return nil, invalid("Element %d (%q) is empty or holds a control character.", i+1, s)
		}
		if slices.Contains(list[:i], s) {
			return nil, invalid("%q stands in it twice.", s)
		}
		list[i] = s
	}
	return list, nil
}

func (k key) count(v cty.Value) (int, error) {
	nv, err := convert.Convert(v, cty.Number)
	if err != nil || nv.IsNull() {
		return 0, invalid("It must be a whole number.")
	}
	n, acc := nv.AsBigFloat().Int64()
	if acc != big.Exact {
		return 0, invalid("It must be a whole number from %d up to %d.", k.min, k.max)
	}
	if n < k.min || n > k.max {
		return 0, invalid("%d is out of range: from %d up to %d.", n, k.min, k.max)
	}
	return int(n), nil
}

// units are the binary ones only: nobody knows which MB is meant.
var units = []struct {
	name  string
	bytes int64
}{{"TiB", gib << 10}, {"GiB", gib}, {"MiB", mib}, {"KiB", kib}, {"B", 1}}

var sizeRE = regexp.MustCompile(`^([+-]?)([0-9]+)(\.[0-9]+)?[ ]*([A-Za-z]*)$`)

// parseSize reads a whole number of bytes with its unit, as "64MiB".
func parseSize(s string) (int64, error) {
	m := sizeRE.FindStringSubmatch(s)
	if m == nil {
		return 0, invalid(`%q is not a size. Write a whole number and its unit, such as "64MiB".`, s)
	}
	sign, digits, fraction, unit := m[1], m[2], m[3], m[4]
	switch {
	case sign == "-":
		return 0, invalid("A size cannot be negative.")
	case fraction != "":
		return 0, invalid("%q is not a whole number. Use a smaller unit: 1MiB is 1024KiB.", s)
	case unit == "":
		return 0, invalid(`The unit is missing. Did you mean "%sMiB"? Units are B, KiB, MiB, GiB and TiB.`, digits)
	}
	for _, u := range units {
		if u.name != unit {
			continue
		}
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil || n > (1<<63-1)/u.bytes {
			return 0, invalid("%q is too large to be a size.", s)
		}
		return n * u.bytes, nil
	}
	for _, u := range units {
		if strings.EqualFold(unit, u.name) || strings.EqualFold(unit, strings.Replace(u.name, "i", "", 1)) || strings.EqualFold(unit, u.name[:1]) {
			return 0, invalid(`There is no unit %q. Did you mean "%s%s"? Units are B, KiB, MiB, GiB and TiB.`, unit, digits, u.name)
		}
	}
	return 0, invalid("There is no unit %q. Units are B, KiB, MiB, GiB and TiB.", unit)
}

// formatSize writes n bytes so that parseSize reads the same.
func formatSize(n int64) string {
	for _, u := range units {
		if n != 0 && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return "0B"
}

// parseDuration reads a duration above zero with its unit, as "500ms".
func parseDuration(s string) (time.Duration, error) {
	if _, err := strconv.ParseFloat(s, 64); err == nil && s != "0" {
		return 0, invalid(`The unit is missing. Did you mean "%ss"? Units are ms, s, m and h.`, strings.TrimLeft(s, "+-"))
	}
	d, err := time.ParseDuration(s)
	switch {
	case err != nil && strings.HasSuffix(s, "d"):
		return 0, invalid(`%q is not a duration: there are no days. Write hours, such as "24h".`, s)
	case err != nil:
		return 0, invalid(`%q is not a duration. Write a number and its unit, such as "500ms", "10s" or "1h30m".`, s)
	case d < 0:
		return 0, invalid("A duration cannot be negative.")
	case d == 0:
		return 0, invalid("It must be longer than zero.")
	}
	return d, nil
}
