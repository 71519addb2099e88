package cli

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/diurnalog/diurna/rpc/cli/flags"
	"github.com/diurnalog/diurna/rpc/client"
)

// parseFrom reads where a read is to start; durations count back from now.
func parseFrom(s string, now time.Time) (client.Start, error) {
	switch s {
	case "earliest":
		return client.Earliest(), nil
	case "latest":
		return client.Latest(), nil
	}
	kind, number, prefixed := strings.Cut(s, ":")
	if prefixed && (kind == "offset" || kind == "last") {
		n, err := strconv.ParseUint(number, 10, 64)
		if err != nil {
			return client.Start{}, fmt.Errorf("-from %s: %q is not a number from 0", s, number)
		}
		if kind == "last" {
			return client.Last(n), nil
		}
		return client.AtOffset(n), nil
	}
	if n, err := strconv.ParseUint(s, 10, 64); err == nil {
		return client.AtOffset(n), nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return client.AtTime(t), nil
	}
	if ago, ok := parseAgo(s); ok {
		return client.AtTime(now.Add(-ago)), nil
	}
	if strings.HasPrefix(s, "-") {
		if _, err := strconv.ParseUint(s[1:], 10, 64); err == nil {
			return client.Start{}, fmt.Errorf("-from %s: for the last %s records, say last:%s", s, s[1:], s[1:])
		}
	}
	return client.Start{}, fmt.Errorf("-from %s: want earliest, latest, an offset, last:N, a time like 2026-01-31T12:00:00Z, or how long ago like 10m or 2d%s",
		s, strings.Replace(flags.DidYouMean(s, []string{"earliest", "latest"}, ""), " Did", ". Did", 1))
}

// parseAgo reads a duration that is not negative; besides what Go knows, it
// takes whole days.
func parseAgo(s string) (time.Duration, bool) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16) // 16 bits of days are below the limit of a Duration
		return time.Duration(n) * 24 * time.Hour, err == nil
	}
	d, err := time.ParseDuration(s)
	return d, err == nil && d >= 0
}
