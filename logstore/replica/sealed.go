package replica

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Small files that are written as a whole are JSON, behind a line that says
// what it is, with its version, and one with the checksum of what follows.

func seal(magic string, v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%s\n%08x\n%s\n", magic, crc32.Checksum(body, castagnoli), body), nil
}

// unseal reads what seal made into v; what is the name of it for people.
func unseal(file, magic, what string, b []byte, v any) error {
	lines := bytes.SplitN(b, []byte("\n"), 3)
	if len(lines) != 3 || string(lines[0]) != magic {
		return &CorruptError{file, "this is not " + what + " that this version knows"}
	}
	body, ok := bytes.CutSuffix(lines[2], []byte("\n"))
	if sum := fmt.Sprintf("%08x", crc32.Checksum(body, castagnoli)); !ok || sum != string(lines[1]) {
		return &CorruptError{file, fmt.Sprintf("its checksum is %q, its bytes give %s", lines[1], sum)}
	}
	if err := unmarshalStrictly(body, v); err != nil {
		return &CorruptError{file, err.Error()}
	}
	return nil
}

// unmarshalStrictly refuses what this version does not know: it may be a
// promise that it cannot keep.
func unmarshalStrictly(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the value")
	}
	return nil
}
