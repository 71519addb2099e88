package cli

import (
	"bytes"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/diurnalog/diurna/rpc/client"
)

var now = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

func TestParseFrom(t *testing.T) {
	for in, want := range map[string]client.Start{
		"earliest":                       client.Earliest(),
		"latest":                         client.Latest(),
		"0":                              client.AtOffset(0),
		"17":                             client.AtOffset(17),
		"18446744073709551615":           client.AtOffset(1<<64 - 1),
		"offset:5":                       client.AtOffset(5),
		"last:100":                       client.Last(100),
		"10m":                            client.AtTime(now.Add(-10 * time.Minute)),
		"1h30m":                          client.AtTime(now.Add(-90 * time.Minute)),
		"2d":                             client.AtTime(now.Add(-48 * time.Hour)),
		"2026-01-31T12:00:00Z":           client.AtTime(time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)),
		"2026-01-31T12:00:00.123456789Z": client.AtTime(time.Date(2026, 1, 31, 12, 0, 0, 123456789, time.UTC)),
	} {
		if got, err := parseFrom(in, now); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		"":                     "want earliest",
		"-5":                   "say last:5",
		"-10m":                 "want earliest",
		"last:":                "not a number",
		"last:-3":              "not a number",
		"offset:x":             "not a number",
		"18446744073709551616": "want earliest",
		"99999d":               "want earliest",
		"lastest":              "Did you mean latest?",
		"2026-01-31":           "a time like 2026-01-31T12:00:00Z",
	} {
		if got, err := parseFrom(in, now); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v; want %q", in, got, err, want)
		}
	}
}

func FuzzParseFrom(f *testing.F) {
	for _, s := range []string{"earliest", "17", "last:3", "10m", "2d", "2026-01-31T12:00:00Z", "-1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		start, err := parseFrom(s, now)
		if err != nil && start != (client.Start{}) {
			t.Errorf("%q: an error and %+v", s, start)
		}
	})
}

func TestParseLine(t *testing.T) {
	for in, want := range map[string]*client.Record{
		`{}`:                                    {},
		` {"value" : "v"} `:                     {Value: []byte("v")},
		`{"value":null,"headers":null}`:         {},
		`{"value":"\u00e4\ud83d\ude00\ufffd"}`:  {Value: []byte("ä😀\ufffd")},
		`{"value":"\\ud800"}`:                   {Value: []byte(`\ud800`)},
		`{"value":"�"}`:                         {Value: []byte("\ufffd")},
		`{"headers":{"b":"1","a":"2","b":"3"}}`: {Headers: []*client.Header{{Name: "b", Value: []byte("1")}, {Name: "a", Value: []byte("2")}, {Name: "b", Value: []byte("3")}}},
		`{"headers":[{"name":"n","value_base64":"/w=="}]}`: {Headers: []*client.Header{{Name: "n", Value: []byte("\xff")}}},
	} {
		var got client.Record
		if err := parseLine([]byte(in), &got); err != nil || !proto.Equal(&got, want) {
			t.Errorf("%s: %v, %v", in, &got, err)
		}
	}
	for in, want := range map[string]string{
		`x`:                                     "invalid character",
		`{`:                                     "does not end",
		`{"value":"v`:                           "does not end",
		`[]`:                                    "want a JSON object, not a array",
		`{} {}`:                                 "something after",
		`{"value":1}`:                           `field "value" must not be a number`,
		`{"vlaue":""}`:                          `unknown field "vlaue"`,
		`{"value":"","value_base64":""}`:        "both value and value_base64",
		`{"key":"","key_base64":""}`:            "both key and key_base64",
		`{"value_base64":"?"}`:                  "value_base64: illegal base64",
		"{\"value\":\"\xff\"}":                  "not valid UTF-8",
		`{"value":"\ud800"}`:                    "surrogate",
		`{"value":"\ud800\u0041 � \ufffd"}`:     "surrogate",
		`{"headers":{"a":1}}`:                   `the value of "a" is not a string`,
		`{"headers":{"a":{}}}`:                  `the value of "a" is not a string`,
		`{"headers":{"a":"\udc00"}}`:            "surrogate",
		`{"headers":[{"value":"v"}]}`:           "position 0 has no name",
		`{"headers":[{"name":"n","valve":""}]}`: `headers: unknown field "valve"`,
		`{"headers":"x"}`:                       "headers:",
	} {
		var got client.Record
		if err := parseLine([]byte(in), &got); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
	}
	// Nothing stays of the line before.
	var r client.Record
	for _, in := range []string{`{"key":"k","value":"v","headers":{"a":"b"}}`, `{}`} {
		if err := parseLine([]byte(in), &r); err != nil {
			t.Fatal(err)
		}
	}
	if !proto.Equal(&r, &client.Record{}) {
		t.Errorf("left over: %v", &r)
	}
}

// What is accepted is written so that it is read back the same.
func FuzzParseLine(f *testing.F) {
	f.Add([]byte(`{"key":"k","value_base64":"/w==","headers":[{"name":"a","value":"b"}]}`))
	f.Add([]byte(`{"offset":1,"time":"x","headers":{"a":"\ufffd"}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		var r client.Record
		if parseLine(line, &r) != nil {
			return
		}
		read := &client.ConsumedRecord{Key: r.Key, Value: r.Value}
		for _, h := range r.Headers {
			if !utf8.ValidString(h.Name) {
				t.Fatalf("header name %q", h.Name)
			}
			read.Headers = append(read.Headers, client.ConsumedHeader{Name: h.Name, Value: h.Value})
		}
		written := appendLine(nil, read)
		if bytes.IndexByte(written, '\n') != len(written)-1 {
			t.Fatalf("not one line: %q", written)
		}
		var again client.Record
		if err := parseLine(written, &again); err != nil || !proto.Equal(&again, &r) {
			t.Fatalf("%q became %q: %v", line, written, err)
		}
	})
}
