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
	"sync/atomic"
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
//	node    format version, and who the node is
//	peers   where the others were last seen
//	lock    held by the process that uses the directory
//	restoring          a restore that is under way or was interrupted, see restore.go
//	recovering         a recovery that was begun and not finished, see recover.go
//	before-recovery-*/ what a recovery has replaced
//	logs/   one directory for each log, see package replica; logs-2/, logs-3/ …
//	        where the node had to begin anew, see renew
type dataDir struct {
	fs   vfs.FS
	path string
	lock io.Closer

	// id is what is on disk. Whoever asks for it does not wait for a disk that
	// is being written.
	id atomic.Pointer[identity]
	// writing holds a token while who the node is changes.
	writing chan struct{}
}

// identity is who the node is. It is written as a whole, atomically: which
// directory counts and whose it is can never disagree.
type identity struct {
	node string // a UUID, drawn when the directory was made or renewed
	// cluster is the id of the cluster that the node belongs to, empty before
	// it does. It is never changed afterwards, but where an operator has the
	// node go on without the others, see recover.go.
	cluster string
	// former are the node's earlier ids, the last one first, up to formerKept.
	former []string
	// lives counts the ids that it has had, from 1.
	lives int
}

const formerKept = 16

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
	lock, err := lockDataDir(fsys, path)
	if err != nil {
		return nil, err
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
		if err := writeNodeFile(fsys, path, identity{node: uuid.NewString(), lives: 1}); err != nil {
			return nil, fmt.Errorf("make data directory: %w", advise(err))
		}
	}
	id, err := readNodeFile(fsys, path)
	if err != nil {
		return nil, err
	}
	switch plan, err := readRecoveryPlan(fsys, path); {
	case err != nil:
		return nil, err
	case plan != nil:
		return nil, fmt.Errorf("%s: a recovery was begun and not finished: run `diurna operator raft recover -data-dir %s -confirm` again", path, path)
	}
	d = newDataDir(fsys, path, lock)
	d.id.Store(&id)
	return d, nil
}

func newDataDir(fsys vfs.FS, path string, lock io.Closer) *dataDir {
	return &dataDir{fs: fsys, path: path, lock: lock, writing: make(chan struct{}, 1)}
}

func lockDataDir(fsys vfs.FS, path string) (io.Closer, error) {
	lock, err := fsys.Lock(filepath.Join(path, lockFile))
	if errors.Is(err, vfs.ErrLocked) {
		return nil, fmt.Errorf("data directory %s is in use by another process: stop that one, or choose another -data-dir", path)
	}
	if err != nil {
		return nil, fmt.Errorf("data directory %s: %w", path, advise(err))
	}
	return lock, nil
}

func (d *dataDir) identity() identity { return *d.id.Load() }

// nodeID is the node's id.
func (d *dataDir) nodeID() string { return d.identity().node }

// log is where the log of a name lies.
func (d *dataDir) log(name string) string {
	return filepath.Join(d.path, d.identity().logs(), name)
}

func (id identity) logs() string {
	if id.lives == 1 {
		return logsDir
	}
	return fmt.Sprintf("%s-%d", logsDir, id.lives)
}

// join records which cluster the node belongs to. It is durable before it is
// believed, and nothing else can be recorded after it.
func (d *dataDir) join(cluster string) error {
	d.writing <- struct{}{}
	defer func() { <-d.writing }()
	id := d.identity()
	switch {
	case id.cluster == cluster:
		return nil
	case id.cluster != "":
		return &foreignClusterError{ours: id.cluster, theirs: cluster}
	}
	id.cluster = cluster
	return d.become(id)
}

// foreignClusterError: somebody belongs to another cluster.
type foreignClusterError struct{ ours, theirs string }

func (e *foreignClusterError) Error() string {
	return fmt.Sprintf("this node belongs to cluster %s, not to %s", e.ours, e.theirs)
}

// renew gives the node a new id and an empty place for its logs, because what
// it has cannot be trusted any more: under its old id it might vote against
// what it once acknowledged. The old logs stay where they are until discard.
func (d *dataDir) renew() error {
	d.writing <- struct{}{}
	defer func() { <-d.writing }()
	id := d.identity()
	id.former = append([]string{id.node}, id.former...)
	id.former = id.former[:min(len(id.former), formerKept)]
	id.node = uuid.NewString()
	id.lives++
	return d.become(id)
}

// become is called by whoever holds the token.
func (d *dataDir) become(id identity) error {
	if err := writeNodeFile(d.fs, d.path, id); err != nil {
		return fmt.Errorf("write down who the node is: %w", err)
	}
	d.id.Store(&id)
	return nil
}

// discard removes what earlier lives of the node have left.
func (d *dataDir) discard() (removed []string, err error) {
	id := d.identity()
	for life := 1; life < id.lives; life++ {
		old := filepath.Join(d.path, identity{lives: life}.logs())
		if _, err := d.fs.List(old); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := vfs.RemoveAll(d.fs, old); err != nil {
			return removed, err
		}
		removed = append(removed, old)
	}
	return removed, nil
}

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
	case slices.Contains(names, restoringFile):
		return false, fmt.Errorf("%s: a restore into it was interrupted: do it again, or empty it", path)
	case slices.Contains(names, nodeFile):
		_, err := readNodeFile(fsys, path)
		return false, err
	}
	for _, name := range names {
		if !beginsDataDir(name) {
			return false, fmt.Errorf("%s: %w: it has %q in it, but no file %q; choose an empty -data-dir", path, ErrForeign, name, nodeFile)
		}
	}
	return true, nil
}

// beginsDataDir tells whether a name is of what a new filesystem has, or of what a
// crash leaves when a data directory is made.
func beginsDataDir(name string) bool {
	return name == "lost+found" || name == lockFile || name == nodeFile+vfs.TempSuffix || name == restoringFile+vfs.TempSuffix
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

func writeNodeFile(fsys vfs.FS, path string, id identity) error {
	body := fmt.Sprintf("diurna-data %d\nnode_id %s\n", dataFormat, id.node)
	if id.cluster != "" {
		body += "cluster_id " + id.cluster + "\n"
	}
	for _, f := range id.former {
		body += "former_id " + f + "\n"
	}
	if id.lives > 1 {
		body += fmt.Sprintf("lives %d\n", id.lives)
	}
	return vfs.WriteFile(fsys, filepath.Join(path, nodeFile), []byte(body+nodeSum(body)))
}

func nodeSum(body string) string {
	return fmt.Sprintf("crc32c %08x\n", crc32.Checksum([]byte(body), crc32.MakeTable(crc32.Castagnoli)))
}

func readNodeFile(fsys vfs.FS, path string) (identity, error) {
	name := filepath.Join(path, nodeFile)
	b, err := vfs.ReadFile(fsys, name, nodeFileLimit)
	if err != nil {
		return identity{}, fmt.Errorf("data directory: %w", advise(err))
	}
	return parseNodeFile(name, string(b))
}

func parseNodeFile(name, content string) (identity, error) {
	damaged := fmt.Errorf("%s is damaged: it is not what Diurna wrote; the node's id is in it, so the directory cannot be used: restore the file, or start with an empty -data-dir as a new node", name)
	at := strings.LastIndex(content, "crc32c ")
	if at < 0 || nodeSum(content[:at]) != content[at:] {
		return identity{}, damaged
	}
	lines := strings.Split(content[:at], "\n")
	version, ok := strings.CutPrefix(lines[0], "diurna-data ")
	format, err := strconv.ParseUint(version, 10, 32)
	if !ok || err != nil {
		return identity{}, damaged
	}
	if format != dataFormat {
		return identity{}, fmt.Errorf("%s: the data directory has format version %d, this program knows version %d: use a newer Diurna", name, format, dataFormat)
	}
	id := identity{lives: 1}
	for _, line := range lines[1:] {
		key, value, _ := strings.Cut(line, " ")
		switch key {
		case "node_id":
			id.node = value
		case "cluster_id":
			id.cluster = value
		case "former_id":
			id.former = append(id.former, value)
		case "lives":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 || strconv.Itoa(n) != value {
				return identity{}, damaged
			}
			id.lives = n
		}
	}
	// Only as they were written: Raft compares ids as text.
	for _, v := range append([]string{id.node}, id.former...) {
		if u, err := uuid.Parse(v); err != nil || u.String() != v {
			return identity{}, damaged
		}
	}
	if u, err := uuid.Parse(id.cluster); id.cluster != "" && (err != nil || u.String() != id.cluster) || len(id.former) > formerKept {
		return identity{}, damaged
	}
	return id, nil
}
