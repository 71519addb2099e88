package peer

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A peer stream begins with
//
//	magic        "diurna-raft/1\n"
//	hello        u16 length, big endian; that many bytes of JSON
//
// from the side that dials, to which the other side answers once
//
//	answer       u16 length, big endian; that many bytes of JSON
//
// and either closes, if the answer is a refusal, or leaves the stream to Raft.
// The answer's form is the same in every version, so that nodes of different
// versions can tell each other why they do not talk. Fields that are not known
// are ignored.
const (
	magicName = "diurna-raft/"
	version   = "1"
	magic     = magicName + version + "\n"

	// magicLimit is how long a magic of another version may be.
	magicLimit = 32
	// helloLimit is the largest hello or answer, in bytes of JSON.
	helloLimit = 4 << 10
	// nameLimit is the longest id, in bytes.
	nameLimit = 256
	// textLimit is the longest explanation, in bytes.
	textLimit = 1 << 10
)

// Hello is what the side that dials says about itself and whom it wants.
type Hello struct {
	// ClusterID is the id of the cluster that the dialling node is a member of;
	// empty if it is in none yet.
	ClusterID string `json:"cluster_id"`
	// From is the dialling node's id.
	From string `json:"from"`
	// To is the id of the node it wants.
	To string `json:"to"`
}

// answer is what the accepting side says.
type answer struct {
	OK bool `json:"ok"`
	// Reason and Text say why not.
	Reason Reason `json:"reason,omitempty"`
	Text   string `json:"text,omitempty"`
	// ClusterID and NodeID are the answering node's.
	ClusterID string `json:"cluster_id"`
	NodeID    string `json:"node_id"`
	// Version is the newest that the answering node speaks.
	Version string `json:"version"`
}

// Reason says why a peer was refused, in a word that programs can compare.
type Reason string

// The reasons. A node of another version may know more.
const (
	// ReasonOtherCluster: the two are members of different clusters.
	ReasonOtherCluster Reason = "other_cluster"
	// ReasonNotMe: another node lives at this address now.
	ReasonNotMe Reason = "not_me"
	// ReasonUnknownNode: the dialling node is not one that this one talks to.
	ReasonUnknownNode Reason = "unknown_node"
	// ReasonSelf: a node was about to talk to itself.
	ReasonSelf Reason = "self"
	// ReasonVersion: the two speak different versions of the protocol.
	ReasonVersion Reason = "version"
	// ReasonMalformed: what was received is not this protocol.
	ReasonMalformed Reason = "malformed"
	// ReasonCertificate: one of the two does not accept the other's certificate,
	// or it is another node's.
	ReasonCertificate Reason = "certificate"
	// ReasonRefused: anything else, see the text.
	ReasonRefused Reason = "refused"
)

// RefusedError says that a peer was reached and does not want to talk, or is
// not the one that was wanted. Trying again helps only once something changes.
type RefusedError struct {
	Reason Reason
	// Text explains it to a person.
	Text string
	// RemoteCluster is the id of the cluster that the refusing node is a member
	// of; empty if it is in none or did not say.
	RemoteCluster string
	// ID and Address are those that were dialled; empty on the side that refuses.
	ID, Address string
}

func (e *RefusedError) Error() string {
	if e.ID == "" {
		return fmt.Sprintf("refused (%s): %s", e.Reason, e.Text)
	}
	return fmt.Sprintf("node %s at %s refused (%s): %s", e.ID, e.Address, e.Reason, e.Text)
}

// Refuse makes the error by which a Check gives its reason.
func Refuse(reason Reason, format string, args ...any) *RefusedError {
	return &RefusedError{Reason: reason, Text: fmt.Sprintf(format, args...)}
}

// Match tells whether a node may be spoken to by a hello: it is meant for this
// node, does not come from it, and neither side is a member of a cluster that
// the other is not in. A side without a cluster matches any. The error is a
// *RefusedError.
func Match(nodeID, clusterID string, hello Hello) error {
	switch {
	case hello.From == nodeID:
		return Refuse(ReasonSelf, "node %s was about to talk to itself: its own address is known as another node's, or its data directory was copied", nodeID)
	case hello.To != nodeID:
		return Refuse(ReasonNotMe, "this is node %s, not %s", nodeID, hello.To)
	case hello.ClusterID != "" && clusterID != "" && hello.ClusterID != clusterID:
		return Refuse(ReasonOtherCluster, "this node is in cluster %s, the other in %s", clusterID, hello.ClusterID)
	}
	return nil
}

// decodeHello takes the JSON of a hello.
func decodeHello(b []byte) (Hello, error) {
	var h Hello
	if err := json.Unmarshal(b, &h); err != nil {
		return Hello{}, fmt.Errorf("hello is not JSON: %w", err)
	}
	switch {
	case h.From == "" || h.To == "":
		return Hello{}, errors.New("hello lacks an id")
	case !validName(h.From) || !validName(h.To) || h.ClusterID != "" && !validName(h.ClusterID):
		return Hello{}, errors.New("hello has an id that is none")
	}
	return h, nil
}

// decodeAnswer takes the JSON of an answer.
func decodeAnswer(b []byte) (answer, error) {
	var a answer
	if err := json.Unmarshal(b, &a); err != nil {
		return answer{}, fmt.Errorf("answer is not JSON: %w", err)
	}
	if a.ClusterID != "" && !validName(a.ClusterID) || a.NodeID != "" && !validName(a.NodeID) {
		return answer{}, errors.New("answer has an id that is none")
	}
	if !a.OK && (a.Reason == "" || !validName(string(a.Reason))) {
		return answer{}, errors.New("answer is neither yes nor no")
	}
	a.Text = printable(a.Text)
	return a, nil
}

// validName tells whether a name, which will be logged, stored and compared, is
// one word of printable text.
func validName(s string) bool {
	if s == "" || len(s) > nameLimit || !utf8.ValidString(s) {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }) < 0
}

// printable makes a text from elsewhere safe to log.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	if len(s) > textLimit {
		s = strings.ToValidUTF8(s[:textLimit], "")
	}
	return s
}

// writeMessage writes a hello or an answer after a prefix, in one write.
func writeMessage(w io.Writer, prefix string, message any) error {
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetEscapeHTML(false) // would make six bytes of some
	if err := enc.Encode(message); err != nil {
		return err
	}
	b := bytes.TrimSuffix(text.Bytes(), []byte("\n"))
	if len(b) > helloLimit {
		return fmt.Errorf("a greeting of %d bytes is too long", len(b))
	}
	out := append([]byte(prefix), 0, 0)
	binary.BigEndian.PutUint16(out[len(prefix):], uint16(len(b)))
	_, err := w.Write(append(out, b...))
	return err
}

// errTooLong: a length that no greeting has, so this is something else.
var errTooLong = errors.New("the message is longer than any greeting")

// readMessage reads what writeMessage wrote after the prefix, and no byte more.
func readMessage(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(length[:]))
	if n > helloLimit {
		return nil, fmt.Errorf("%w: % x", errTooLong, length)
	}
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	return b, err
}

// readMagic reads up to the end of the magic and returns the version in it. It
// stops at the first byte that cannot be part of one, and reads none more.
func readMagic(r io.Reader) (v string, err error) {
	var got []byte
	for len(got) < magicLimit {
		var b [1]byte
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return "", err
		}
		if at := len(got); at < len(magicName) && b[0] != magicName[at] {
			break
		}
		if b[0] == '\n' {
			v = string(got[len(magicName):])
			if !validName(v) {
				break
			}
			return v, nil
		}
		got = append(got, b[0])
	}
	return "", Refuse(ReasonMalformed, "the stream does not begin like one of Diurna's")
}
