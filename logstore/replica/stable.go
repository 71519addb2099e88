package replica

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"path/filepath"
	"slices"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// stableStore keeps Raft's term and vote, in a small file of its own. Neither a
// crash nor a flipped bit may bring an older vote back, for that would be a
// second one in the same term:
//
//   - The file has two slots, each with a checksum over all of its bytes, and
//     every change is written to both, one after the other and each synced,
//     before Set returns. So of two good slots the second is never the newer
//     one, and when either rots the other says the same.
//   - Before it is used, the slot that counts is written over the other one where
//     they differ, see repair: what a crash left half done is done before a
//     flipped bit can make the older slot count.
//   - Slots that no crash can have left are damage: a second slot that is newer
//     than the first, or numbers that are further apart than one change.
//   - All keys are in one slot, so that one that is not in it was never set.
//   - The file has its size from the beginning and gets its name when it is
//     complete: a change needs no space, so that a full disk does not keep a
//     server from voting, and a file without a good slot is damage.
//   - It names the replica that it belongs to, as CURRENT does: one that was
//     made for, or by, another copy is refused.
type stableStore struct {
	file string
	f    vfs.File
	id   replicaID
	// failed is told of writes that failed: Raft would go on after some.
	failed func(error)
	stale  int // number of the slot that does not say what the other does; -1 if both do

	mu     vfs.Mutex
	seq    uint64
	values map[string][]byte
	broken error // the first write that failed; there is no other after it
}

// replicaID tells one copy of a log from all others: random, made with it.
type replicaID [16]byte

func (id replicaID) String() string { return hex.EncodeToString(id[:]) }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// The layout of the file, see docs/FORMAT.md.
const (
	stableName    = "vote"
	stableMagic   = "DIURNVOT"
	stableVersion = 1
	stableHeader  = 64
	stableSlot    = 4096
	stableSlots   = 2
	stableSize    = stableSlots * stableSlot
)

// Raft's keys. It reads them with these names, so they cannot change.
var (
	keyCurrentTerm  = []byte("CurrentTerm")
	keyLastVoteTerm = []byte("LastVoteTerm")
)

// errKeyNotFound has the text by which Raft knows a missing key.
var errKeyNotFound = errors.New("not found")

// stableState is what one slot holds.
type stableState struct {
	id     replicaID
	seq    uint64
	values map[string][]byte
}

func (s *stableState) encode() ([]byte, error) {
	b := make([]byte, stableHeader, stableSlot)
	le := binary.LittleEndian
	copy(b, stableMagic)
	le.PutUint32(b[12:], stableVersion)
	copy(b[16:], s.id[:])
	le.PutUint64(b[32:], s.seq)
	le.PutUint32(b[40:], uint32(len(s.values)))
	for _, key := range slices.Sorted(maps.Keys(s.values)) {
		value := s.values[key]
		if len(key)+len(value)+4 > stableSlot-len(b) {
			return nil, fmt.Errorf("%d bytes of %q do not fit into %d bytes", len(value), key, stableSlot)
		}
		b = le.AppendUint16(b, uint16(len(key)))
		b = le.AppendUint16(b, uint16(len(value)))
		b = append(append(b, key...), value...)
	}
	b = b[:stableSlot] // the rest is zero
	le.PutUint32(b[8:], crc32.Checksum(b[12:], castagnoli))
	return b, nil
}

func parseStable(file string, b []byte) (s stableState, err error) {
	damaged := func(detail string) error { return &CorruptError{file, detail} }
	le := binary.LittleEndian
	switch {
	case len(b) != stableSlot || string(b[:8]) != stableMagic:
		return s, damaged("this is not a term and vote")
	case le.Uint32(b[8:]) != crc32.Checksum(b[12:], castagnoli):
		return s, damaged("the checksum of a slot is wrong")
	case le.Uint32(b[12:]) != stableVersion:
		return s, &VersionError{file, fmt.Sprint("format version ", le.Uint32(b[12:]))}
	}
	copy(s.id[:], b[16:])
	s.seq = le.Uint64(b[32:])
	s.values = map[string][]byte{}
	count, rest := le.Uint32(b[40:]), b[stableHeader:]
	for range count {
		if len(rest) < 4 || int(le.Uint16(rest))+int(le.Uint16(rest[2:])) > len(rest)-4 {
			return s, damaged("a value goes on behind the slot's end")
		}
		key, value := rest[4:4+le.Uint16(rest)], rest[4+le.Uint16(rest):]
		n := le.Uint16(rest[2:])
		if _, twice := s.values[string(key)]; twice {
			return s, damaged("a key is there twice")
		}
		s.values[string(key)] = slices.Clone(value[:n])
		rest = value[n:]
	}
	return s, nil
}

// createStable makes the file of a new replica, complete or not at all.
func createStable(fsys vfs.FS, dir string, id replicaID) error {
	slot, err := (&stableState{id: id}).encode()
	if err != nil {
		return err
	}
	return vfs.WriteFile(fsys, filepath.Join(dir, stableName), slices.Concat(slot, slot))
}

// openStable opens the file in a replica's directory, and changes nothing.
func openStable(fsys vfs.FS, dir string, failed func(error)) (s *stableStore, err error) {
	s = &stableStore{file: filepath.Join(dir, stableName), failed: failed}
	f, err := fsys.OpenReadWrite(s.file)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	s.f = f
	size, err := s.f.Size()
	if err != nil {
		return nil, err
	}
	if size != stableSize {
		return nil, &CorruptError{s.file, fmt.Sprintf("it has %d bytes, not %d", size, stableSize)}
	}
	b := make([]byte, stableSize)
	if _, err := s.f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	first, second := b[:stableSlot], b[stableSlot:]
	counts, stale, err := chooseSlot(s.file, first, second)
	if err != nil {
		return nil, err
	}
	s.id, s.seq, s.values, s.stale = counts.id, counts.seq, counts.values, stale
	return s, nil
}

// repair makes both slots the same. It must come before the first use of what
// was read.
func (s *stableStore) repair() error {
	if s.stale < 0 {
		return nil
	}
	slot, err := (&stableState{id: s.id, seq: s.seq, values: s.values}).encode()
	if err == nil {
		err = s.writeSlot(s.stale, slot)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", s.file, err)
	}
	s.stale = -1
	return nil
}

// chooseSlot returns what counts, and the number of the slot that does not say
// the same; -1 if both do.
func chooseSlot(file string, first, second []byte) (counts stableState, stale int, err error) {
	a, errA := parseStable(file, first)
	b, errB := parseStable(file, second)
	for _, err := range []error{errA, errB} {
		if newer := (*VersionError)(nil); errors.As(err, &newer) {
			return counts, 0, err
		}
	}
	switch {
	case errA != nil && errB != nil:
		return counts, 0, errA
	case errA != nil:
		return b, 0, nil
	case errB != nil:
		return a, 1, nil
	case a.id != b.id:
		return counts, 0, &CorruptError{file, "its slots are of different replicas"}
	case a.seq == b.seq && string(first) == string(second):
		return a, -1, nil
	case a.seq == b.seq+1:
		return a, 1, nil
	default:
		return counts, 0, &CorruptError{file, fmt.Sprintf("its slots, number %d and %d, cannot both have been written last", a.seq, b.seq)}
	}
}

// check tells whether the file can be that of a server whose log is of a term:
// with a term and vote of an earlier time it could vote twice.
func (s *stableStore) check(seen uint64) error {
	known, err := s.GetUint64(keyCurrentTerm)
	if err != nil && !errors.Is(err, errKeyNotFound) {
		return err
	}
	if known < seen {
		return &CorruptError{s.file, fmt.Sprintf("it knows term %d, but the log is of term %d: it is older, and so may be its vote", known, seen)}
	}
	return nil
}

// unused tells whether nothing was ever set.
func (s *stableStore) unused() bool { return s.seq == 0 && len(s.values) == 0 }

func (s *stableStore) writeSlot(n int, slot []byte) error {
	if _, err := s.f.WriteAt(slot, int64(n)*stableSlot); err != nil {
		return err
	}
	return s.f.Sync()
}

// Set implements raft.StableStore.
func (s *stableStore) Set(key, value []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil {
		return s.broken
	}
	if old, ok := s.values[string(key)]; ok && string(old) == string(value) {
		return nil
	}
	next := stableState{id: s.id, seq: s.seq + 1, values: maps.Clone(s.values)}
	next.values[string(key)] = append([]byte{}, value...)
	slot, err := next.encode()
	for n := 0; err == nil && n < stableSlots; n++ { // see stableStore
		err = s.writeSlot(n, slot)
	}
	if err != nil {
		s.broken = fmt.Errorf("write %s: %w", s.file, err)
		s.failed(s.broken)
		return s.broken
	}
	s.seq, s.values = next.seq, next.values
	return nil
}

// Get implements raft.StableStore.
func (s *stableStore) Get(key []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.values[string(key)]
	if !ok {
		return nil, errKeyNotFound // bare: Raft compares the text
	}
	return append([]byte{}, v...), nil
}

// SetUint64 implements raft.StableStore.
func (s *stableStore) SetUint64(key []byte, v uint64) error {
	return s.Set(key, binary.LittleEndian.AppendUint64(nil, v))
}

// GetUint64 implements raft.StableStore.
func (s *stableStore) GetUint64(key []byte) (uint64, error) {
	b, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, &CorruptError{s.file, fmt.Sprintf("the value of %s has %d bytes, not 8", key, len(b))}
	}
	return binary.LittleEndian.Uint64(b), nil
}

func (s *stableStore) Close() error { return s.f.Close() }

var _ raft.StableStore = (*stableStore)(nil)
