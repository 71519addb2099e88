package replica

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore/vfs"
)

const (
	snapshotSuffix = ".snap"
	snapshotMagic  = "diurna-snapshot 1"
	// snapshotsKept: the newest, and one to fall back to when it is damaged.
	snapshotsKept = 2
	snapshotLimit = 16 << 20
)

// snapshotStore is a raft.SnapshotStore of metadata: index, term, membership
// and the state machine's few numbers. A snapshot says that the log up to its
// index need not be applied again; the log itself stays.
type snapshotStore struct {
	fs  vfs.FS
	dir string
}

// snapshotFile is the content of a file, as JSON, behind a line with the magic
// and one with the checksum of what follows.
type snapshotFile struct {
	Index              uint64          `json:"index"`
	Term               uint64          `json:"term"`
	Configuration      []byte          `json:"configuration"` // raft.EncodeConfiguration
	ConfigurationIndex uint64          `json:"configuration_index"`
	State              json.RawMessage `json:"state"`
}

func openSnapshots(fsys vfs.FS, dir string) (*snapshotStore, error) {
	if err := fsys.MkdirAll(dir); err != nil {
		return nil, err
	}
	names, err := fsys.List(dir)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if strings.HasSuffix(name, vfs.TempSuffix) {
			if err := vfs.RemoveIfThere(fsys, filepath.Join(dir, name)); err != nil {
				return nil, err
			}
		}
	}
	return &snapshotStore{fsys, dir}, nil
}

func snapshotID(index, term uint64) string { return fmt.Sprintf("%020d-%d", index, term) }

// ids returns the snapshots' ids, newest first.
func (s *snapshotStore) ids() ([]string, error) {
	names, err := s.fs.List(s.dir)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, name := range names {
		if id, ok := strings.CutSuffix(name, snapshotSuffix); ok {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	slices.Reverse(ids)
	return ids, nil
}

func (s *snapshotStore) path(id string) string { return filepath.Join(s.dir, id+snapshotSuffix) }

func (s *snapshotStore) read(id string) (*snapshotFile, error) {
	b, err := vfs.ReadFile(s.fs, s.path(id), snapshotLimit)
	if err != nil {
		return nil, err
	}
	f, err := parseSnapshot(s.path(id), b)
	if err != nil {
		return nil, err
	}
	if in := snapshotID(f.Index, f.Term); in != id {
		return nil, &CorruptError{s.path(id), "it is snapshot " + in}
	}
	return f, nil
}

func encodeSnapshot(f *snapshotFile) ([]byte, error) {
	body, err := json.Marshal(f)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%s\n%08x\n%s\n", snapshotMagic, crc32.Checksum(body, stableTable), body), nil
}

func parseSnapshot(file string, b []byte) (*snapshotFile, error) {
	lines := bytes.SplitN(b, []byte("\n"), 3)
	if len(lines) != 3 || string(lines[0]) != snapshotMagic {
		return nil, &CorruptError{file, "this is not a snapshot that this version knows"}
	}
	body, ok := bytes.CutSuffix(lines[2], []byte("\n"))
	if sum := fmt.Sprintf("%08x", crc32.Checksum(body, stableTable)); !ok || sum != string(lines[1]) {
		return nil, &CorruptError{file, fmt.Sprintf("its checksum is %q, its bytes give %s", lines[1], sum)}
	}
	var f snapshotFile
	if err := unmarshalStrictly(body, &f); err != nil {
		return nil, &CorruptError{file, err.Error()}
	}
	if err := checkConfiguration(f.Configuration); err != nil {
		return nil, &CorruptError{file, err.Error()}
	}
	return &f, nil
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

// checkConfiguration tells whether Raft can decode one, which panics otherwise.
func checkConfiguration(b []byte) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("configuration: %v", p)
		}
	}()
	raft.DecodeConfiguration(b)
	return nil
}

// newest returns the newest snapshot that can be read, nil if there is none at
// all, and what is wrong with newer ones. Damage of all of them is an error:
// the log's start may depend on them.
func (s *snapshotStore) newest() (f *snapshotFile, damage, err error) {
	ids, err := s.ids()
	if err != nil {
		return nil, nil, err
	}
	for _, id := range ids {
		f, err := s.read(id)
		if err == nil {
			return f, damage, nil
		}
		damage = errors.Join(damage, err)
	}
	return nil, nil, damage
}

func (f *snapshotFile) meta() *raft.SnapshotMeta {
	return &raft.SnapshotMeta{
		Version:            raft.SnapshotVersionMax,
		ID:                 snapshotID(f.Index, f.Term),
		Index:              f.Index,
		Term:               f.Term,
		Configuration:      raft.DecodeConfiguration(f.Configuration),
		ConfigurationIndex: f.ConfigurationIndex,
		Size:               int64(len(f.State)),
	}
}

// List implements raft.SnapshotStore. Damaged snapshots are left out, as long
// as there is another one.
func (s *snapshotStore) List() ([]*raft.SnapshotMeta, error) {
	f, _, err := s.newest()
	if err != nil || f == nil {
		return nil, err
	}
	return []*raft.SnapshotMeta{f.meta()}, nil
}

// Open implements raft.SnapshotStore.
func (s *snapshotStore) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	f, err := s.read(id)
	if err != nil {
		return nil, nil, err
	}
	return f.meta(), io.NopCloser(bytes.NewReader(f.State)), nil
}

// Create implements raft.SnapshotStore.
func (s *snapshotStore) Create(_ raft.SnapshotVersion, index, term uint64, c raft.Configuration, configIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	return &snapshotSink{store: s, file: snapshotFile{
		Index: index, Term: term, Configuration: raft.EncodeConfiguration(c), ConfigurationIndex: configIndex,
	}}, nil
}

type snapshotSink struct {
	store *snapshotStore
	file  snapshotFile
	state bytes.Buffer
	done  bool
}

func (k *snapshotSink) ID() string                  { return snapshotID(k.file.Index, k.file.Term) }
func (k *snapshotSink) Write(p []byte) (int, error) { return k.state.Write(p) }

func (k *snapshotSink) Cancel() error {
	k.done = true
	return nil
}

// Close makes the snapshot durable and removes old ones. It does nothing the
// second time.
func (k *snapshotSink) Close() error {
	if k.done {
		return nil
	}
	k.done = true
	k.file.State = k.state.Bytes()
	b, err := encodeSnapshot(&k.file)
	if err != nil {
		return err
	}
	ids, err := k.store.ids()
	if err != nil {
		return err
	}
	if len(ids) > 0 && ids[0] > k.ID() {
		// Raft can take one while it installs a newer one.
		return fmt.Errorf("snapshot %s is older than %s", k.ID(), ids[0])
	}
	if err := vfs.WriteFile(k.store.fs, k.store.path(k.ID()), b); err != nil {
		return err
	}
	kept := 1
	for _, id := range ids {
		if id == k.ID() {
			continue
		}
		if kept < snapshotsKept {
			// A damaged one is nothing to fall back to.
			if _, err := k.store.read(id); err == nil {
				kept++
				continue
			}
		}
		if err := vfs.RemoveIfThere(k.store.fs, k.store.path(id)); err != nil {
			return err
		}
	}
	return nil
}

var _ raft.SnapshotStore = (*snapshotStore)(nil)
