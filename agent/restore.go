package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/google/uuid"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/rpc"
)

// restoringFile is there as long as a restore fills the directory: the first file
// in it and the last one that is removed. A node does not start then.
const restoringFile = "restoring"

// restore makes a data directory of a saved snapshot: that of a node which is the
// only one of a new cluster. The directory must be missing or empty. The snapshot
// is read twice: nothing is touched before all of it has been checked.
//
// A restore that was interrupted can be done again.
func restore(ctx context.Context, fsys vfs.FS, path string, file io.ReadSeeker) (id identity, info replica.SavedInfo, err error) {
	if err := checkRestorable(fsys, path); err != nil {
		return id, info, err
	}
	if info, err = replica.CheckSaved(interruptible{ctx, file}); err != nil {
		return id, info, err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return id, info, err
	}
	if err := fsys.MkdirAll(path); err != nil {
		return id, info, fmt.Errorf("make data directory: %w", advise(err))
	}
	lock, err := lockDataDir(fsys, path)
	if err != nil {
		return id, info, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	// Again, now that nobody else can be filling it.
	if err := checkRestorable(fsys, path); err != nil {
		return id, info, err
	}
	if err := vfs.WriteFile(fsys, filepath.Join(path, restoringFile), nil); err != nil {
		return id, info, err
	}
	if err := removeRestored(fsys, path); err != nil {
		return id, info, err
	}
	segment := info.SegmentSize
	if segment < logstore.MinSegmentSize || segment > logstore.MaxSegmentSize {
		segment = 0 // the default
	}
	id = identity{node: uuid.NewString(), cluster: uuid.NewString(), lives: 1}
	again, err := replica.Restore(replica.Config{
		Dir: filepath.Join(path, id.logs(), rpc.DefaultLog), FS: fsys, ID: id.node, Address: nowhere(id.node), ClusterID: id.cluster, SegmentSize: segment,
	}, interruptible{ctx, file})
	if err == nil && again != info {
		err = errors.New("the snapshot was changed while it was read")
	}
	if err == nil {
		err = writeNodeFile(fsys, path, id)
	}
	if err != nil {
		err = errors.Join(err, removeRestored(fsys, path))
	}
	// Where what was made is not removed, the file stays, and says so.
	if err == nil || onlyBegun(fsys, path) {
		err = errors.Join(err, vfs.RemoveAll(fsys, filepath.Join(path, restoringFile)))
	}
	return id, info, err
}

// removeRestored removes what a restore has made, but for the file that says so.
func removeRestored(fsys vfs.FS, path string) error {
	for _, name := range []string{nodeFile, logsDir} {
		if err := vfs.RemoveAll(fsys, filepath.Join(path, name)); err != nil {
			return err
		}
	}
	return nil
}

// onlyBegun tells whether nothing is left of a restore.
func onlyBegun(fsys vfs.FS, path string) bool {
	names, err := fsys.List(path)
	return err == nil && !slices.Contains(names, nodeFile) && !slices.Contains(names, logsDir)
}

// checkRestorable refuses a directory that holds anything but what a restore that
// was interrupted leaves.
func checkRestorable(fsys vfs.FS, path string) error {
	names, err := fsys.List(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("data directory: %w", advise(err))
	case slices.Contains(names, restoringFile):
		names = slices.DeleteFunc(names, func(name string) bool { return name == restoringFile || name == nodeFile || name == logsDir })
	case slices.Contains(names, nodeFile):
		return fmt.Errorf("%s holds a node's data already: a snapshot is restored into an empty -data-dir", path)
	}
	for _, name := range names {
		if !beginsDataDir(name) {
			return fmt.Errorf("%s is not empty: it has %q in it; a snapshot is restored into an empty -data-dir", path, name)
		}
	}
	return nil
}

// interruptible ends a read when a context ends.
type interruptible struct {
	ctx context.Context
	r   io.Reader
}

func (i interruptible) Read(p []byte) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, err
	}
	return i.r.Read(p)
}
