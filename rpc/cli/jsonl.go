package cli

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/diurnalog/diurna/rpc/client"
)

// A record as one line of JSON. Bytes that are valid UTF-8 travel as a string,
// others as base64 under a name of their own; consume adds offset and time,
// which produce reads over.
type lineJSON struct {
	Offset      json.RawMessage `json:"offset"`
	Time        json.RawMessage `json:"time"`
	Key         *string         `json:"key"`
	KeyBase64   *string         `json:"key_base64"`
	Value       *string         `json:"value"`
	ValueBase64 *string         `json:"value_base64"`
	Headers     json.RawMessage `json:"headers"`
}

type headerJSON struct {
	Name        *string `json:"name"`
	Value       *string `json:"value"`
	ValueBase64 *string `json:"value_base64"`
}

// parseLine reads one line of JSON into r.
func parseLine(line []byte, r *client.Record) error {
	// encoding/json would replace what is not UTF-8, and say nothing.
	if !utf8.Valid(line) {
		return errors.New("it is not valid UTF-8; put bytes into value_base64")
	}
	if err := checkSurrogates(line); err != nil {
		return err
	}
	var in lineJSON
	if err := decodeStrict(line, &in); err != nil {
		return err
	}
	var err error
	if r.Key, err = oneOf("key", in.Key, in.KeyBase64); err != nil {
		return err
	}
	if r.Value, err = oneOf("value", in.Value, in.ValueBase64); err != nil {
		return err
	}
	r.Headers, err = parseHeaders(in.Headers)
	return err
}

func decodeStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		var wrong *json.UnmarshalTypeError
		switch {
		case errors.As(err, &wrong) && wrong.Field != "":
			return fmt.Errorf("field %q must not be a %s", wrong.Field, wrong.Value)
		case errors.As(err, &wrong):
			return fmt.Errorf("want a JSON object, not a %s", wrong.Value)
		case errors.Is(err, io.ErrUnexpectedEOF):
			return errors.New("the JSON object does not end")
		}
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is something after the JSON object")
	}
	return nil
}

// checkSurrogates refuses \ud800 and its like without their other half, which
// encoding/json turns into U+FFFD, and says nothing.
func checkSurrogates(line []byte) error {
	escape := func(b []byte) (rune, bool) { // of \uXXXX at the front of b
		if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
			return 0, false
		}
		n, err := strconv.ParseUint(string(b[2:6]), 16, 16)
		return rune(n), err == nil
	}
	for {
		i := bytes.IndexByte(line, '\\')
		if i < 0 {
			return nil
		}
		line = line[i:]
		r, ok := escape(line)
		switch {
		case !ok:
			line = line[min(2, len(line)):]
		case !utf16.IsSurrogate(r):
			line = line[6:]
		default:
			other, _ := escape(line[6:])
			if utf16.DecodeRune(r, other) == utf8.RuneError {
				return errors.New("it has half of a surrogate pair, which is no character")
			}
			line = line[12:]
		}
	}
}

func oneOf(name string, text, coded *string) ([]byte, error) {
	switch {
	case text != nil && coded != nil:
		return nil, fmt.Errorf("it has both %s and %s_base64", name, name)
	case text != nil:
		return []byte(*text), nil
	case coded != nil:
		b, err := base64.StdEncoding.DecodeString(*coded)
		if err != nil {
			return nil, fmt.Errorf("%s_base64: %w", name, err)
		}
		return b, nil
	}
	return nil, nil
}

// parseHeaders takes a list of {name, value}, or for what is written by hand an
// object of names and values.
func parseHeaders(b json.RawMessage) ([]*client.Header, error) {
	if len(b) == 0 || string(b) == "null" {
		return nil, nil
	}
	if b[0] == '{' {
		return parseHeaderObject(b)
	}
	var list []headerJSON
	if err := decodeStrict(b, &list); err != nil {
		return nil, fmt.Errorf("headers: %w", err)
	}
	headers := make([]*client.Header, 0, len(list))
	for i, h := range list {
		if h.Name == nil {
			return nil, fmt.Errorf("headers: the one at position %d has no name", i)
		}
		value, err := oneOf("value", h.Value, h.ValueBase64)
		if err != nil {
			return nil, fmt.Errorf("header %q: %w", *h.Name, err)
		}
		headers = append(headers, &client.Header{Name: *h.Name, Value: value})
	}
	return headers, nil
}

// parseHeaderObject keeps the order, and names that repeat.
func parseHeaderObject(b []byte) ([]*client.Header, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	if _, err := d.Token(); err != nil {
		return nil, fmt.Errorf("headers: %w", err)
	}
	var headers []*client.Header
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("headers: %w", err)
		}
		value, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("headers: %w", err)
		}
		n, ok1 := name.(string)
		v, ok2 := value.(string)
		if !ok1 || !ok2 {
			return nil, fmt.Errorf("headers: the value of %q is not a string", n)
		}
		headers = append(headers, &client.Header{Name: n, Value: []byte(v)})
	}
	return headers, nil
}

// appendLine writes r as one line that parseLine reads.
func appendLine(b []byte, r *client.ConsumedRecord) []byte {
	b = append(b, `{"offset":`...)
	b = strconv.AppendUint(b, r.Offset, 10)
	b = append(b, `,"time":"`...)
	b = r.Time.AppendFormat(b, time.RFC3339Nano)
	b = append(b, '"')
	if len(r.Key) > 0 {
		b = append(b, ',')
		b = appendBytes(b, "key", r.Key)
	}
	b = append(b, ',')
	b = appendBytes(b, "value", r.Value)
	if len(r.Headers) > 0 {
		b = append(b, `,"headers":[`...)
		for i, h := range r.Headers {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(b, `{"name":`...)
			b = appendString(b, []byte(h.Name))
			b = append(b, ',')
			b = appendBytes(b, "value", h.Value)
			b = append(b, '}')
		}
		b = append(b, ']')
	}
	return append(b, "}\n"...)
}

func appendBytes(b []byte, name string, value []byte) []byte {
	b = append(b, '"')
	b = append(b, name...)
	if utf8.Valid(value) {
		b = append(b, `":`...)
		return appendString(b, value)
	}
	b = append(b, `_base64":"`...)
	b = base64.StdEncoding.AppendEncode(b, value)
	return append(b, '"')
}

// appendString writes text, which is valid UTF-8, as a JSON string.
func appendString(b, text []byte) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	start := 0
	for i, c := range text {
		if c >= 0x20 && c != '"' && c != '\\' && c != 0x7f {
			continue
		}
		b = append(b, text[start:i]...)
		start = i + 1
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, `\n`...)
		case '\r':
			b = append(b, `\r`...)
		case '\t':
			b = append(b, `\t`...)
		default:
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		}
	}
	b = append(b, text[start:]...)
	return append(b, '"')
}
