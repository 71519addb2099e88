package replica

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// stableStore keeps Raft's term and vote in BoltDB. A flipped bit there must
// not become a second vote, and BoltDB checks only its meta pages:
//
//   - All values are one record with a checksum, which is there from the
//     beginning. So a key that is not in it was never set, and one that
//     cannot be found because a page, a name or a length is damaged is damage.
//   - The record is written by two transactions. When the newer meta page is
//     damaged, BoltDB silently goes on with the older one, which stands for the
//     transaction before the last: it must say the same.
//   - The file gets its name when it is complete, so that one without a record
//     is never taken for one that a crash left half made.
//   - The whole file is checked before BoltDB opens it, see checkBolt, and what
//     was read then is kept: damage is an error of opening, not a panic later.
type stableStore struct {
	file string
	// failed is told of writes that failed: Raft would go on after some.
	failed func(error)
	bolt   *raftboltdb.BoltStore

	mu     sync.Mutex
	values map[string][]byte
}

var stableTable = crc32.MakeTable(crc32.Castagnoli)

// stableLimit is far more than the file ever takes.
const stableLimit = 16 << 20

// recordKey is the only key in the file.
var recordKey = []byte("diurna-stable 1")

// Raft's keys. It reads them with these names, so they cannot change.
var (
	keyCurrentTerm  = []byte("CurrentTerm")
	keyLastVoteTerm = []byte("LastVoteTerm")
	keyLastVoteCand = []byte("LastVoteCand")
)

// openStable opens the store of a server that has seen a term. Only for one
// that has seen none it makes the file: without its term and vote, or with
// those of an earlier time, a server could vote twice.
func openStable(file string, seen uint64, failed func(error)) (*stableStore, error) {
	s := &stableStore{file: file, failed: failed}
	if err := s.prepare(seen == 0); err != nil {
		return nil, err
	}
	b, err := vfs.ReadFile(vfs.OS, file, stableLimit)
	if err != nil {
		return nil, err
	}
	sealed, err := checkBolt(b, "conf", string(recordKey))
	if err == nil {
		s.values, err = parseRecord(sealed)
	}
	if err != nil {
		return nil, &CorruptError{file, err.Error()}
	}
	if known, err := s.GetUint64(keyCurrentTerm); err != nil && !isKeyNotFound(err) {
		return nil, err
	} else if known < seen {
		return nil, &CorruptError{file, fmt.Sprintf("it knows term %d, but the log is of term %d: it is older, and so may be its vote", known, seen)}
	}
	if s.values[string(keyLastVoteTerm)] != nil && seen == 0 {
		// A voter that has forgotten what it acknowledged.
		return nil, &CorruptError{file, "it holds a vote, but there is neither a log nor a snapshot: they are lost"}
	}
	s.bolt, err = raftboltdb.New(raftboltdb.Options{Path: file, BoltOptions: &bbolt.Options{
		// The data directory's lock is held: nobody else has it for long.
		Timeout: 5 * time.Second,
	}})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", file, err)
	}
	if got, err := s.bolt.Get(recordKey); err != nil || !bytes.Equal(got, sealed) {
		return nil, errors.Join(&CorruptError{file, "boltdb reads another value than its pages hold"}, err, s.bolt.Close())
	}
	return s, nil
}

// prepare makes the file if it may be missing.
func (s *stableStore) prepare(isNew bool) error {
	f, err := vfs.OS.Open(s.file)
	if err == nil {
		return f.Close()
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if !isNew {
		return &CorruptError{s.file, "it is missing, and with it this server's term and vote"}
	}
	temp := s.file + vfs.TempSuffix
	if err := vfs.RemoveIfThere(vfs.OS, temp); err != nil {
		return err
	}
	if err := s.create(temp); err != nil {
		return fmt.Errorf("create %s: %w", temp, err)
	}
	if err := vfs.OS.Rename(temp, s.file); err != nil {
		return err
	}
	return vfs.OS.SyncDir(filepath.Dir(s.file))
}

func (s *stableStore) create(name string) (err error) {
	bolt, err := raftboltdb.New(raftboltdb.Options{Path: name})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bolt.Close()) }()
	return writeRecord(bolt, map[string][]byte{})
}

func parseRecord(sealed []byte) (values map[string][]byte, err error) {
	n := len(sealed) - 4
	if n < 0 || binary.LittleEndian.Uint32(sealed[n:]) != crc32.Checksum(sealed[:n], stableTable) {
		return nil, errors.New("the record's checksum is wrong")
	}
	if err := json.Unmarshal(sealed[:n], &values); err != nil {
		return nil, err
	}
	return values, nil
}

func writeRecord(bolt *raftboltdb.BoltStore, values map[string][]byte) error {
	b, err := json.Marshal(values)
	if err != nil {
		return err
	}
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, stableTable))
	for range 2 { // see stableStore
		if err := bolt.Set(recordKey, b); err != nil {
			return err
		}
	}
	return nil
}

// Raft knows a missing key by its error's text.
func isKeyNotFound(err error) bool { return errors.Is(err, raftboltdb.ErrKeyNotFound) }

// Set implements raft.StableStore.
func (s *stableStore) Set(key, value []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	values := map[string][]byte{string(key): append([]byte{}, value...)}
	for k, v := range s.values {
		if k != string(key) {
			values[k] = v
		}
	}
	if err := writeRecord(s.bolt, values); err != nil {
		err = fmt.Errorf("write %s: %w", s.file, err)
		s.failed(err)
		return err
	}
	s.values = values
	return nil
}

// Get implements raft.StableStore.
func (s *stableStore) Get(key []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.values[string(key)]
	if !ok {
		return nil, raftboltdb.ErrKeyNotFound // bare: see isKeyNotFound
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

func (s *stableStore) Close() error { return s.bolt.Close() }

var _ raft.StableStore = (*stableStore)(nil)
