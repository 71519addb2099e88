package peer

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// FuzzBook: what is accepted is what would be written.
func FuzzBook(f *testing.F) {
	f.Add([]byte("diurna-peers 1\n"))
	f.Add([]byte("diurna-peers 1\nnode n1 h:1 7\nnode n2 [::1]:8400 -1\n"))
	f.Add([]byte("diurna-peers 2\nnode\n"))
	f.Add([]byte("diurna-peers 1\nnode crc32c crc32c 0\n"))
	f.Fuzz(func(t *testing.T, body []byte) {
		if _, err := decodeBook(body); err == nil && !bytes.Contains(body, []byte("crc32c ")) {
			t.Error("accepted without a checksum")
		}
		entries, err := decodeBook(append(body[:len(body):len(body)], bookSum(body)...))
		if err != nil {
			return
		}
		for id, e := range entries {
			if !validName(id) || !validName(e.Address) {
				t.Errorf("%q at %q", id, e.Address)
			}
		}
		again, err := decodeBook(encodeBook(entries))
		if err != nil || !maps.EqualFunc(again, entries, func(a, b Entry) bool { return a.Address == b.Address && a.Seen.Equal(b.Seen) }) {
			t.Errorf("%v became %v, %v", entries, again, err)
		}
	})
}

// FuzzHello: a hello that is accepted is printable, comes back the same, and
// nothing of the stream behind it is eaten.
func FuzzHello(f *testing.F) {
	greeting := func(h Hello) []byte {
		var b bytes.Buffer
		if err := writeMessage(&b, magic, h); err != nil {
			f.Fatal(err)
		}
		return b.Bytes()
	}
	f.Add(greeting(Hello{"c1", "n1", "n2"}))
	f.Add(greeting(Hello{"", "n1", "n2"}))
	f.Add([]byte("diurna-raft/2\n\x00\x02{}"))
	f.Add([]byte("diurna-raft/1\n\x00\x20{\"from\":\"a\",\"to\":\"b\",\"to\":null} "))
	f.Add([]byte("diurna-raft/1\n\xff\xff"))
	f.Fuzz(func(t *testing.T, in []byte) {
		hear := func(r io.Reader) (Hello, error) {
			v, err := readMagic(r)
			if err == nil && v != version {
				err = errors.New("version")
			}
			if err != nil {
				return Hello{}, err
			}
			b, err := readMessage(r)
			if err != nil {
				return Hello{}, err
			}
			return decodeHello(b)
		}
		r := bytes.NewReader(in)
		h, err := hear(r)
		slow, slowErr := hear(iotest.OneByteReader(bytes.NewReader(in)))
		if slow != h || (err == nil) != (slowErr == nil) {
			t.Errorf("%v %v at once, %v %v byte by byte", h, err, slow, slowErr)
		}
		if err != nil {
			return
		}
		read := in[:len(in)-r.Len()]
		if want := len(magic) + 2 + int(in[len(magic)])<<8 + int(in[len(magic)+1]); len(read) != want || len(read) > len(magic)+2+helloLimit {
			t.Errorf("read %d bytes, want %d", len(read), want)
		}
		for _, s := range []string{h.From, h.To} {
			if !validName(s) {
				t.Errorf("accepted %q", s)
			}
		}
		if again, err := hear(bytes.NewReader(greeting(h))); err != nil || again != h {
			t.Errorf("%v became %v, %v", h, again, err)
		}
	})
}

// FuzzAnswer: an answer is yes, or no with a reason and a text that can be
// logged.
func FuzzAnswer(f *testing.F) {
	for _, a := range []answer{{OK: true, NodeID: "n1"}, {Reason: ReasonNotMe, Text: "this is n2\n", NodeID: "n2", ClusterID: "c"}, {}} {
		b, err := json.Marshal(a)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"ok":false,"reason":"x","text":"\u0000\ud800"}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		a, err := decodeAnswer(in)
		if err != nil {
			return
		}
		if !a.OK && !validName(string(a.Reason)) {
			t.Errorf("no reason: %+v", a)
		}
		if printable(a.Text) != a.Text || len(a.Text) > textLimit || strings.Contains(a.Text, "\n") {
			t.Errorf("text %q", a.Text)
		}
	})
}

// TestGreetingFits: the largest ids and the longest text fit into one.
func TestGreetingFits(t *testing.T) {
	name := strings.Repeat(`"`, nameLimit) // two bytes each in JSON
	text := printable(strings.Repeat("<\"\u2028", 2*textLimit))
	for _, message := range []any{
		Hello{name, name, name},
		answer{Reason: ReasonOtherCluster, Text: text, ClusterID: name, NodeID: name, Version: version},
	} {
		if err := writeMessage(io.Discard, magic, message); err != nil {
			t.Error(err)
		}
	}
}

func TestCausesAreBounded(t *testing.T) {
	c := newCauses()
	now := time.Unix(0, 0)
	said := 0
	for i := range 10 * causesLimit {
		if c.first("x", fmt.Sprint(i), now) {
			said++
		}
	}
	if said != causesLimit || len(c.last) != causesLimit {
		t.Errorf("said %d, remembers %d", said, len(c.last))
	}
	now = now.Add(causesAgain)
	if !c.first("y", "new", now) || len(c.last) != 1 {
		t.Errorf("remembers %d that are old", len(c.last)-1)
	}
}
