package logstore

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// Segment headers, checkpoint slots and index files begin alike: eight bytes
// that say what it is, the checksum of everything from byte 12 on, and the
// format version. No version changes that.
const preambleSize = 16

// sealPreamble fills in the first 16 bytes of b, whose others are complete.
func sealPreamble(b []byte, magic string) []byte {
	copy(b, magic)
	binary.LittleEndian.PutUint32(b[12:], formatVersion)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b[12:], castagnoli))
	return b
}

// checkPreamble tells whether b is what sealPreamble made of it; if not, it is
// damage of file, or of a newer format. The checksum comes before the version:
// a flipped bit must not send an operator to look for a newer program.
func checkPreamble(file string, b []byte, magic, what string) error {
	if len(b) < preambleSize || string(b[:8]) != magic {
		return &CorruptError{file, 0, "this is not " + what}
	}
	if sum, got := binary.LittleEndian.Uint32(b[8:]), crc32.Checksum(b[12:], castagnoli); sum != got {
		return &CorruptError{file, 8, fmt.Sprintf("the checksum of %s is %08x, its bytes give %08x", what, sum, got)}
	}
	if v := binary.LittleEndian.Uint32(b[12:]); v != formatVersion {
		return &VersionError{file, v, formatVersion}
	}
	return nil
}
