package replica

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs"
)

// Restore makes a replica's directory of a saved snapshot: that of the only
// member of a new group, with the id cfg.ClusterID, which has every record of the
// snapshot at its offset, with its append time. Of cfg, Dir, ID, Address,
// ClusterID, FS and SegmentSize count; that had best be the snapshot's, since
// retention deletes whole segments. Dir must be missing or empty.
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
		stats, err := logstore.Import(filepath.Join(dir, "log"), logOptions(&cfg), log)
		if err == nil {
			err = trim(cfg.FS, filepath.Join(dir, "log"))
		}
		return stats, err
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
	// The seam gets a segment of its own, of no size to speak of.
	small := *cfg
	small.SegmentSize = logstore.MinSegmentSize
	if opened.gen, err = openGeneration(&small, 1); err != nil {
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

// trim cuts off what the last segment of a log that is closed has reserved behind
// its end. Retention counts files as large as they are: with a segment's worth of
// nothing in it, the log might be taken for one of which something has to go.
func trim(fsys vfs.FS, dir string) (err error) {
	names, err := fsys.List(dir)
	if err != nil {
		return err
	}
	names = slices.DeleteFunc(names, func(name string) bool { return !strings.HasSuffix(name, ".log") })
	if len(names) == 0 {
		return fmt.Errorf("%s has no segments", dir)
	}
	last := filepath.Join(dir, names[len(names)-1])
	report, err := logstore.Inspect(fsys, last, func(logstore.Frame) error { return nil })
	if err != nil {
		return err
	}
	f, err := fsys.OpenReadWrite(last)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(report.Position); err != nil {
		return err
	}
	return f.Sync()
}
