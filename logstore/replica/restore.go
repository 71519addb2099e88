package replica

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs"
)

// Restore makes a replica's directory of a saved snapshot: that of the only
// member of a new group, with the id cfg.ClusterID, which has every record of the
// snapshot at its offset, with its append time. Of cfg, Dir, ID, Address,
// ClusterID, FS and SegmentSize count. Dir must be missing or empty.
//
// All is durable when it returns, and checked. Whatever goes wrong, it removes
// what it has made, as well as it can.
//
// Errors: as of CheckSaved; logstore.ErrNotEmpty; logstore.ErrFull for want of
// space.
func Restore(cfg Config, r io.Reader) (info SavedInfo, err error) {
	if err := cfg.applyDefaultsAndValidate(); err != nil {
		return info, err
	}
	if cfg.ClusterID == "" {
		return info, errors.New("a restored log needs the id of its new cluster")
	}
	names, err := cfg.FS.List(cfg.Dir)
	if err == nil && len(names) > 0 {
		return info, fmt.Errorf("%s: %w: it holds %s", cfg.Dir, logstore.ErrNotEmpty, names[0])
	}
	made := false
	defer func() {
		if err != nil && made {
			err = errors.Join(err, vfs.RemoveAll(cfg.FS, cfg.Dir))
		}
	}()
	dir := generationDir(cfg.Dir, 1)
	var snapshot *snapshotFile
	var state *fsmState
	info, err = readSaved(r, func(f *snapshotFile, s *fsmState, log io.Reader) (logstore.ImportStats, error) {
		snapshot, state = f, s
		made = true
		if err := cfg.FS.MkdirAll(dir); err != nil {
			return logstore.ImportStats{}, err
		}
		return logstore.Import(filepath.Join(dir, "log"), logOptions(&cfg), log)
	})
	if err != nil {
		return info, err
	}
	return info, found(&cfg, snapshot, state)
}

// found makes a replica of the log that was imported as its first generation.
func found(cfg *Config, snapshot *snapshotFile, state *fsmState) (err error) {
	var id replicaID
	rand.Read(id[:]) // never fails
	if err := createStable(cfg.FS, cfg.Dir, id); err != nil {
		return err
	}
	opened := &files{}
	defer func() { err = errors.Join(err, opened.close()) }()
	if opened.stable, err = openStable(cfg.FS, cfg.Dir, func(error) {}); err != nil {
		return err
	}
	if opened.gen, err = openGeneration(cfg, 1); err != nil {
		return err
	}
	// Who was removed from the old group is nothing to the new one.
	state.Tombstones, state.Supersedes = nil, ""
	if err := sew(cfg, opened, state, snapshot.Term+1); err != nil {
		return err
	}
	// Last: without it, the directory is not a replica's.
	return writeCurrent(cfg.FS, cfg.Dir, id, opened.gen)
}
