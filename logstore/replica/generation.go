package replica

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs"
)

// A generation is a log with the snapshots of it, in a directory of its own.
// Installing a snapshot that a leader sent makes the next one; CURRENT names
// the one that counts, and one rename of that file switches log and snapshots
// together. All others are leftovers.
type generation struct {
	number    uint64
	dir       string
	log       *logstore.Log
	snapshots *snapshotDir

	// Guarded by generations.mu.
	users   int
	retired bool
	unused  chan struct{} // closed when it is retired and the last user is gone
}

const (
	currentName     = "CURRENT"
	currentMagic    = "diurna-current 1"
	currentLimit    = 64 << 10
	generationStart = "gen-"
)

// current is the content of CURRENT.
type current struct {
	Generation uint64 `json:"generation"`
	// Replica is what the file with term and vote names, too.
	Replica string `json:"replica"`
	// Log is the id in all of the log's files.
	Log string `json:"log"`
}

func generationDir(dir string, number uint64) string {
	return filepath.Join(dir, generationStart+strconv.FormatUint(number, 10))
}

func writeCurrent(fsys vfs.FS, dir string, id replicaID, gen *generation) error {
	logID := gen.log.ID()
	b, err := seal(currentMagic, &current{Generation: gen.number, Replica: id.String(), Log: hex.EncodeToString(logID[:])})
	if err != nil {
		return err
	}
	return vfs.WriteFile(fsys, filepath.Join(dir, currentName), b)
}

// files is what a replica has on disk.
type files struct {
	stable *stableStore
	gen    *generation
}

func (f *files) close() error {
	var err error
	if f.gen != nil {
		err = f.gen.log.Close()
	}
	if f.stable != nil {
		err = errors.Join(err, f.stable.Close())
	}
	return err
}

// openFiles opens, or makes, what a replica's directory holds. A new one comes
// to be in an order in which every interruption can be told from a loss: term
// and vote, with nothing in it; the log; CURRENT.
func openFiles(cfg *Config, failed func(error)) (f *files, err error) {
	if err := cfg.FS.MkdirAll(cfg.Dir); err != nil {
		return nil, err
	}
	names, err := cfg.FS.List(cfg.Dir)
	if err != nil {
		return nil, err
	}
	if slices.Contains(names, "raft.db") {
		return nil, fmt.Errorf("%s was written by a version before the first release, which this one cannot read: "+
			"start with an empty directory, or use that version", filepath.Join(cfg.Dir, "raft.db"))
	}
	hasStable, hasCurrent := slices.Contains(names, stableName), slices.Contains(names, currentName)
	switch {
	case hasCurrent && !hasStable:
		return nil, &CorruptError{filepath.Join(cfg.Dir, stableName), "it is missing, and with it this server's term and vote"}
	case !hasCurrent && !hasStable:
		if slices.ContainsFunc(names, isGeneration) {
			return nil, &CorruptError{filepath.Join(cfg.Dir, currentName), "it is missing, and so are term and vote, but there is a log"}
		}
		for _, name := range names {
			if !strings.HasSuffix(name, vfs.TempSuffix) {
				return nil, fmt.Errorf("%s is neither a replica's directory nor empty: it holds %s", cfg.Dir, name)
			}
		}
		var id replicaID
		rand.Read(id[:]) // never fails
		if err := createStable(cfg.FS, cfg.Dir, id); err != nil {
			return nil, err
		}
	}

	opened := &files{}
	f = opened
	defer func() {
		if err != nil {
			f, err = nil, errors.Join(err, opened.close())
		}
	}()
	if f.stable, err = openStable(cfg.FS, cfg.Dir, failed); err != nil {
		return nil, err
	}
	if hasCurrent {
		f.gen, err = openCurrent(cfg, f.stable.id)
		return f, err
	}
	if !f.stable.unused() {
		return nil, &CorruptError{filepath.Join(cfg.Dir, currentName), "it is missing, and with it the log, but this server has a term"}
	}
	if err := removeGeneration(cfg.FS, generationDir(cfg.Dir, 1)); err != nil {
		return nil, err
	}
	if f.gen, err = openGeneration(cfg, 1); err != nil {
		return nil, err
	}
	return f, writeCurrent(cfg.FS, cfg.Dir, f.stable.id, f.gen)
}

// openCurrent opens the generation that CURRENT names.
func openCurrent(cfg *Config, id replicaID) (*generation, error) {
	file := filepath.Join(cfg.Dir, currentName)
	b, err := vfs.ReadFile(cfg.FS, file, currentLimit)
	if err != nil {
		return nil, err
	}
	var c current
	if err := unseal(file, currentMagic, "a pointer", b, &c); err != nil {
		return nil, err
	}
	if c.Replica != id.String() {
		return nil, &CorruptError{filepath.Join(cfg.Dir, stableName), fmt.Sprintf("it belongs to another copy, %s; this is %s", id, c.Replica)}
	}
	// Or opening would make a new log in the place of one that was lost.
	logDir := filepath.Join(generationDir(cfg.Dir, c.Generation), "log")
	if names, err := cfg.FS.List(logDir); err != nil || !slices.Contains(names, "checkpoint") {
		return nil, errors.Join(&CorruptError{logDir, "the log is gone"}, err)
	}
	gen, err := openGeneration(cfg, c.Generation)
	if err != nil {
		return nil, err
	}
	if logID := gen.log.ID(); hex.EncodeToString(logID[:]) != c.Log {
		return nil, errors.Join(&CorruptError{logDir, fmt.Sprintf("it is the log %x; it should be %s", logID, c.Log)}, gen.log.Close())
	}
	return gen, nil
}

func logOptions(cfg *Config) logstore.Options {
	return logstore.Options{FS: cfg.FS, SegmentSize: cfg.SegmentSize, Observer: cfg.Observer.Log}
}

func openGeneration(cfg *Config, number uint64) (gen *generation, err error) {
	gen = &generation{number: number, dir: generationDir(cfg.Dir, number), unused: make(chan struct{})}
	if gen.log, err = logstore.Open(filepath.Join(gen.dir, "log"), logOptions(cfg)); err != nil {
		return nil, err
	}
	if rec := gen.log.Recovery(); rec.Torn != "" {
		cfg.Logger.Warn("cut off a write that a crash interrupted; nothing in it was acknowledged", "file", rec.Torn, "position", rec.Position, "bytes", rec.Bytes)
	}
	if gen.snapshots, err = openSnapshots(cfg.FS, filepath.Join(gen.dir, "snapshots")); err != nil {
		return nil, errors.Join(err, gen.log.Close())
	}
	return gen, nil
}

func isGeneration(name string) bool {
	_, err := strconv.ParseUint(strings.TrimPrefix(name, generationStart), 10, 64)
	return err == nil && strings.HasPrefix(name, generationStart)
}

// removeLeftovers removes all generations but one: those that were not made
// current before a crash, and those that were current before.
func removeLeftovers(fsys vfs.FS, dir string, keep uint64) error {
	names, err := fsys.List(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		path := filepath.Join(dir, name)
		switch {
		case isGeneration(name) && path != generationDir(dir, keep):
			err = errors.Join(err, removeGeneration(fsys, path))
		case strings.HasSuffix(name, vfs.TempSuffix):
			err = errors.Join(err, vfs.RemoveIfThere(fsys, path))
		}
	}
	return err
}

// removeGeneration removes a generation's files and directories. It need not be
// durable: what a crash brings back is removed again.
func removeGeneration(fsys vfs.FS, dir string) error {
	for _, sub := range []string{filepath.Join(dir, "log"), filepath.Join(dir, "snapshots"), dir} {
		names, err := fsys.List(sub)
		if err != nil {
			continue // there is none
		}
		for _, name := range names {
			if err := vfs.RemoveIfThere(fsys, filepath.Join(sub, name)); err != nil {
				return err
			}
		}
		if err := vfs.RemoveIfThere(fsys, sub); err != nil {
			return err
		}
	}
	return nil
}

// generations gives access to the one that is current, whose log may be
// replaced at any time. Whoever reads or writes the log's files holds it with
// use meanwhile: a generation that was replaced stays until its last user is
// gone. The numbers of log(), which needs no files, may be asked for freely.
type generations struct {
	now atomic.Pointer[generation]

	mu  sync.Mutex // of users, retired
	old []*generation
}

func newGenerations(first *generation) *generations {
	g := &generations{}
	g.now.Store(first)
	return g
}

// log returns the current log, for its numbers.
func (g *generations) log() *logstore.Log { return g.now.Load().log }

// Stats, NextOffset and LastAppendTime are the current log's.
func (g *generations) Stats() logstore.Stats { return g.log().Stats() }
func (g *generations) LastIndex() uint64     { return g.log().LastIndex() }
func (g *generations) NextOffset() uint64    { return g.log().NextOffset() }
func (g *generations) LastAppendTime() int64 { return g.log().LastAppendTime() }

// use takes hold of the current generation until release.
func (g *generations) use() *generation {
	g.mu.Lock()
	defer g.mu.Unlock()
	gen := g.now.Load()
	gen.users++
	return gen
}

func (g *generations) release(gen *generation) {
	g.mu.Lock()
	defer g.mu.Unlock()
	gen.users--
	gen.settle()
}

// settle is called with generations.mu held.
func (gen *generation) settle() {
	if gen.retired && gen.users == 0 {
		close(gen.unused)
	}
}

// replace makes next the current generation.
func (g *generations) replace(next *generation) {
	g.mu.Lock()
	defer g.mu.Unlock()
	was := g.now.Swap(next)
	g.old = append(g.old, was)
	was.retired = true
	was.settle()
}

// remove closes a retired generation that nobody uses and removes its files.
func (g *generations) remove(fsys vfs.FS, gen *generation) error {
	g.mu.Lock()
	g.old = slices.DeleteFunc(g.old, func(o *generation) bool { return o == gen })
	g.mu.Unlock()
	return errors.Join(gen.log.Close(), removeGeneration(fsys, gen.dir))
}

// close closes all logs. Reads that are under way finish.
func (g *generations) close() error {
	g.mu.Lock()
	old := g.old
	g.old = nil
	g.mu.Unlock()
	var err error
	for _, gen := range append(old, g.now.Load()) {
		err = errors.Join(err, gen.log.Close())
	}
	return err
}
