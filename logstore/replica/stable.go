package replica

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
)

// stableStore keeps Raft's term and vote in BoltDB, each value with a checksum
// of its own, because BoltDB checks only its meta pages: a flipped bit in a
// vote must not become a second vote.
type stableStore struct {
	file string
	bolt *raftboltdb.BoltStore
}

var stableTable = crc32.MakeTable(crc32.Castagnoli)

// Raft's keys. It reads them with these names, so they cannot change.
var (
	keyCurrentTerm  = []byte("CurrentTerm")
	keyLastVoteTerm = []byte("LastVoteTerm")
	keyLastVoteCand = []byte("LastVoteCand")
)

// openStable opens or makes the store and reads all that Raft will: a damaged
// value is found now, as an error, not later, as a panic of Raft's.
func openStable(file string) (s *stableStore, err error) {
	// BoltDB's own checks of its pages are panics.
	defer func() {
		if p := recover(); p != nil {
			s, err = nil, &CorruptError{file, fmt.Sprint(p)}
		}
	}()
	bolt, err := raftboltdb.New(raftboltdb.Options{Path: file, BoltOptions: &bbolt.Options{
		// The data directory's lock is held: nobody else has it for long.
		Timeout: 5 * time.Second,
	}})
	switch {
	case errors.Is(err, bbolterrors.ErrInvalid), errors.Is(err, bbolterrors.ErrChecksum), errors.Is(err, bbolterrors.ErrVersionMismatch):
		return nil, &CorruptError{file, err.Error()}
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", file, err)
	}
	s = &stableStore{file: file, bolt: bolt}
	for _, key := range [][]byte{keyCurrentTerm, keyLastVoteTerm, keyLastVoteCand} {
		if _, err := s.Get(key); err != nil && !isKeyNotFound(err) {
			return nil, errors.Join(err, bolt.Close())
		}
	}
	return s, nil
}

// Raft knows a missing key by its error's text.
func isKeyNotFound(err error) bool { return errors.Is(err, raftboltdb.ErrKeyNotFound) }

func stableSum(key, value []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, stableTable), stableTable, value)
}

// Set implements raft.StableStore.
func (s *stableStore) Set(key, value []byte) error {
	sealed := binary.LittleEndian.AppendUint32(append([]byte(nil), value...), stableSum(key, value))
	if err := s.bolt.Set(key, sealed); err != nil {
		return fmt.Errorf("write %s: %w", s.file, err)
	}
	return nil
}

// Get implements raft.StableStore.
func (s *stableStore) Get(key []byte) ([]byte, error) {
	sealed, err := s.bolt.Get(key)
	if err != nil {
		return nil, err // bare: see isKeyNotFound
	}
	n := len(sealed) - 4
	if n < 0 || binary.LittleEndian.Uint32(sealed[n:]) != stableSum(key, sealed[:n]) {
		return nil, &CorruptError{s.file, fmt.Sprintf("the value of %s has a wrong checksum", key)}
	}
	return sealed[:n], nil
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

func (s *stableStore) Close() error { return s.bolt.Close() }

var _ raft.StableStore = (*stableStore)(nil)
