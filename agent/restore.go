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

	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/rpc"
)

// restoringDir is what a restore fills; it becomes logsDir when it is complete.
const restoringDir = "restoring"

// nowhere stands for the address of a node that has yet to say where it is. It is
// in a domain that never resolves; the node replaces it once it leads.
const nowhere = "restored.invalid:1"

// restore makes a data directory of a saved snapshot: that of a node which is the
// only one of a new cluster. The directory must be missing or empty. The snapshot
// is read twice: nothing is touched before all of it has been checked.
//
// The node's file comes last. Until then the directory is not a node's, and a
// restore that was interrupted can be done again.
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
	staging := filepath.Join(path, restoringDir)
	if err := vfs.RemoveAll(fsys, staging); err != nil {
		return id, info, err
	}
	id = identity{node: uuid.NewString(), cluster: uuid.NewString(), lives: 1}
	again, err := replica.Restore(replica.Config{
		Dir: filepath.Join(staging, rpc.DefaultLog), FS: fsys, ID: id.node, Address: nowhere, ClusterID: id.cluster,
	}, interruptible{ctx, file})
	if err == nil && again != info {
		err = errors.New("the snapshot was changed while it was read")
	}
	if err != nil {
		return id, info, errors.Join(err, vfs.RemoveAll(fsys, staging))
	}
	if err := fsys.Rename(staging, filepath.Join(path, logsDir)); err != nil {
		return id, info, err
	}
	if err := fsys.SyncDir(path); err != nil {
		return id, info, err
	}
	return id, info, writeNodeFile(fsys, path, id)
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
	case slices.Contains(names, nodeFile):
		return fmt.Errorf("%s holds a node's data already: a snapshot is restored into an empty -data-dir", path)
	}
	for _, name := range names {
		if !beginsDataDir(name) && name != restoringDir {
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
