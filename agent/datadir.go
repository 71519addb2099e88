package agent

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/uuid"

	"github.com/diurnalog/diurna/logstore/vfs"
)

const (
	nodeFile = "node"
	lockFile = "lock"
	logsDir  = "logs"

	// dataFormat is the version of the data directory as a whole.
	dataFormat    = 1
	nodeFileLimit = 4 << 10
)

// ErrForeign: a data directory holds something that Diurna did not put there.
var ErrForeign = errors.New("not a Diurna data directory")

// dataDir is a data directory that this process holds the lock of.
//
//	node    format version and node id
//	lock    held by the process that uses the directory
//	logs/   one directory for each log, see package replica
type dataDir struct {
	path   string
	nodeID string
	lock   io.Closer
}

// openDataDir takes the directory, making it if it is missing or empty. A
// directory that is not ours, or of a newer format, is left as it was.
func openDataDir(fsys vfs.FS, path string) (d *dataDir, err error) {
	fresh, err := inspectDataDir(fsys, path)
	if err != nil {
		return nil, err
	}
	if fresh {
		if err := fsys.MkdirAll(path); err != nil {
			return nil, fmt.Errorf("make data directory: %w", advise(err))
		}
	}
	lock, err := fsys.Lock(filepath.Join(path, lockFile))
	if errors.Is(err, vfs.ErrLocked) {
		return nil, fmt.Errorf("data directory %s is in use by another process: stop that one, or choose another -data-dir", path)
	}
	if err != nil {
		return nil, fmt.Errorf("data directory %s: %w", path, advise(err))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	// Again, now that nobody else can be making it.
	if fresh, err = inspectDataDir(fsys, path); err != nil {
		return nil, err
	}
	if fresh {
		if err := writeNodeFile(fsys, path, uuid.NewString()); err != nil {
			return nil, fmt.Errorf("make data directory: %w", advise(err))
		}
	}
	id, err := readNodeFile(fsys, path)
	if err != nil {
		return nil, err
	}
	return &dataDir{path: path, nodeID: id, lock: lock}, nil
}

func (d *dataDir) log(name string) string { return filepath.Join(d.path, logsDir, name) }

func (d *dataDir) Close() error { return d.lock.Close() }

// inspectDataDir tells whether there is nothing yet, or something of ours;
// anything else is an error.
func inspectDataDir(fsys vfs.FS, path string) (fresh bool, err error) {
	names, err := fsys.List(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("data directory: %w", advise(err))
	case slices.Contains(names, nodeFile):
		_, err := readNodeFile(fsys, path)
		return false, err
	}
	for _, name := range names {
		// lost+found is what a new filesystem has; the others are what a crash
		// in the making leaves.
		if name != "lost+found" && name != lockFile && name != nodeFile+vfs.TempSuffix {
			return false, fmt.Errorf("%s: %w: it has %q in it, but no file %q; choose an empty -data-dir", path, ErrForeign, name, nodeFile)
		}
	}
	return true, nil
}

// advise says what to do about the mistakes that one makes with a path.
func advise(err error) error {
	switch {
	case errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("%w: choose a -data-dir that is a folder, or is not there yet", err)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: make it writable for the user that runs the node, or choose another -data-dir", err)
	}
	return err
}

func writeNodeFile(fsys vfs.FS, path, id string) error {
	body := fmt.Sprintf("diurna-data %d\nnode_id %s\n", dataFormat, id)
	return vfs.WriteFile(fsys, filepath.Join(path, nodeFile), []byte(body+nodeSum(body)))
}

func nodeSum(body string) string {
	return fmt.Sprintf("crc32c %08x\n", crc32.Checksum([]byte(body), crc32.MakeTable(crc32.Castagnoli)))
}

func readNodeFile(fsys vfs.FS, path string) (id string, err error) {
	name := filepath.Join(path, nodeFile)
	b, err := vfs.ReadFile(fsys, name, nodeFileLimit)
	if err != nil {
		return "", fmt.Errorf("data directory: %w", advise(err))
	}
	return parseNodeFile(name, string(b))
}

func parseNodeFile(name, content string) (id string, err error) {
	damaged := fmt.Errorf("%s is damaged: it is not what Diurna wrote; the node's id is in it, so the directory cannot be used: restore the file, or start with an empty -data-dir as a new node", name)
	at := strings.LastIndex(content, "crc32c ")
	if at < 0 || nodeSum(content[:at]) != content[at:] {
		return "", damaged
	}
	lines := strings.Split(content[:at], "\n")
	version, ok := strings.CutPrefix(lines[0], "diurna-data ")
	format, err := strconv.ParseUint(version, 10, 32)
	if !ok || err != nil {
		return "", damaged
	}
	if format != dataFormat {
		return "", fmt.Errorf("%s: the data directory has format version %d, this program knows version %d: use a newer Diurna", name, format, dataFormat)
	}
	for _, line := range lines[1:] {
		if id, ok := strings.CutPrefix(line, "node_id "); ok {
			// Only as it was written: Raft compares ids as text.
			if u, err := uuid.Parse(id); err != nil || u.String() != id {
				return "", damaged
			}
			return id, nil
		}
	}
	return "", damaged
}
