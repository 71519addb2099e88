package replica

import (
	"encoding/json"
	"errors"
	"fmt"
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

// snapshotDir is a directory of local snapshots. They are metadata: index, term,
// membership and the state machine's few numbers. One says that the log up to
// its index need not be applied again; the log itself stays.
type snapshotDir struct {
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

func openSnapshots(fsys vfs.FS, dir string) (*snapshotDir, error) {
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
	return &snapshotDir{fsys, dir}, nil
}

func snapshotID(index, term uint64) string { return fmt.Sprintf("%020d-%d", index, term) }

// ids returns the snapshots' ids, newest first.
func (s *snapshotDir) ids() ([]string, error) {
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

func (s *snapshotDir) path(id string) string { return filepath.Join(s.dir, id+snapshotSuffix) }

func (s *snapshotDir) read(id string) (*snapshotFile, error) {
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

func encodeSnapshot(f *snapshotFile) ([]byte, error) { return seal(snapshotMagic, f) }

func parseSnapshot(file string, b []byte) (*snapshotFile, error) {
	var f snapshotFile
	if err := unseal(file, snapshotMagic, "a snapshot", b, &f); err != nil {
		return nil, err
	}
	if err := checkConfiguration(f.Configuration); err != nil {
		return nil, &CorruptError{file, err.Error()}
	}
	return &f, nil
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
func (s *snapshotDir) newest() (f *snapshotFile, damage, err error) {
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

// write makes a snapshot durable and removes old ones.
func (s *snapshotDir) write(f *snapshotFile) error {
	id := snapshotID(f.Index, f.Term)
	b, err := encodeSnapshot(f)
	if err != nil {
		return err
	}
	ids, err := s.ids()
	if err != nil {
		return err
	}
	if len(ids) > 0 && ids[0] > id {
		// Raft can take one while it installs a newer one.
		return fmt.Errorf("snapshot %s is older than %s", id, ids[0])
	}
	if err := vfs.WriteFile(s.fs, s.path(id), b); err != nil {
		return err
	}
	kept := 1
	for _, old := range ids {
		if old == id {
			continue
		}
		if kept < snapshotsKept {
			// A damaged one is nothing to fall back to.
			if _, err := s.read(old); err == nil {
				kept++
				continue
			}
		}
		if err := vfs.RemoveIfThere(s.fs, s.path(old)); err != nil {
			return err
		}
	}
	return nil
}

func (s *snapshotDir) remove(id string) error { return vfs.RemoveIfThere(s.fs, s.path(id)) }
