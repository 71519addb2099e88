package replica

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs"
)

// snapshotStore is Raft's snapshot store. A local snapshot is metadata, since
// the log stays where it is. One that is sent to another server is a stream of
// metadata and log, and one that was received is staged as a new generation,
// which the state machine then makes the current one.
type snapshotStore struct {
	cfg     *Config
	id      replicaID
	gens    *generations
	applied *atomic.Uint64
	// clusterID is what this replica believes, or knows; "" if neither.
	clusterID func() string
	broken    func(error)
	damaged   func(error)
	// switched is told of a new generation.
	switched func(*generation)
	streams  streams

	mu     vfs.Mutex // of the current generation's snapshots, of replacing it, and of:
	staged *staged
}

// List implements raft.SnapshotStore. Damaged snapshots are left out, as long
// as there is another one.
func (s *snapshotStore) List() ([]*raft.SnapshotMeta, error) {
	gen := s.gens.use()
	defer s.gens.release(gen)
	f, _, err := gen.snapshots.newest()
	if err != nil || f == nil {
		return nil, err
	}
	return []*raft.SnapshotMeta{f.meta()}, nil
}

// Open implements raft.SnapshotStore: the stream of a local snapshot, for
// another server, or what was just received, for our own state machine.
func (s *snapshotStore) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	s.mu.Lock()
	if st := s.staged; st != nil && st.id() == id {
		s.mu.Unlock()
		return st.file.meta(), st, nil
	}
	s.mu.Unlock()
	gen := s.gens.use()
	f, err := gen.snapshots.read(id)
	if err != nil {
		s.gens.release(gen)
		return nil, nil, err
	}
	s.streams.begin(s.cfg.Now())
	r, err := openStream(gen, f, s.damaged, func() {
		s.streams.end(s.cfg.Now())
		s.gens.release(gen)
	})
	if err != nil {
		s.streams.end(s.cfg.Now())
		s.gens.release(gen)
		s.damaged(err)
		return nil, nil, err
	}
	meta := f.meta()
	meta.Size = r.size
	return meta, r, nil
}

// Create implements raft.SnapshotStore. What becomes of the sink shows in what
// comes: the state machine's snapshot, or a stream.
func (s *snapshotStore) Create(_ raft.SnapshotVersion, index, term uint64, c raft.Configuration, configIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	return &snapshotSink{store: s, file: snapshotFile{
		Index: index, Term: term, Configuration: raft.EncodeConfiguration(c), ConfigurationIndex: configIndex,
	}}, nil
}

// staged is a snapshot that was received, as Raft hands it to the state
// machine: a reader with nothing to read.
type staged struct {
	file  *snapshotFile
	state fsmState
	gen   *generation // nil: the present log holds all of it
	// restart: Raft believes in a longer log than it will have.
	restart bool
}

func (st *staged) id() string            { return snapshotID(st.file.Index, st.file.Term) }
func (*staged) Read([]byte) (int, error) { return 0, io.EOF }
func (*staged) Close() error             { return nil }

// install makes what was staged the current generation. The log and the
// snapshot of it change together, with one rename. Called by the state
// machine, while Raft's main goroutine waits for it.
func (s *snapshotStore) install(st *staged) (fsmState, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.staged == st {
		s.staged = nil
	}
	if st.gen == nil {
		return st.state, nil
	}
	old := s.gens.now.Load()
	if err := writeCurrent(s.cfg.FS, s.cfg.Dir, s.id, st.gen); err != nil {
		// Which one counts is not known any more.
		err = fmt.Errorf("make a received snapshot current: %w", err)
		s.broken(err)
		return fsmState{}, errors.Join(err, st.gen.log.Close())
	}
	st.restart = old.log.LastIndex() >= st.file.Index
	s.gens.replace(st.gen)
	s.switched(st.gen)
	return st.state, nil
}

// drop gives up what was staged and never installed.
func (s *snapshotStore) drop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.staged
	s.staged = nil
	if st == nil || st.gen == nil {
		return nil
	}
	return errors.Join(st.gen.log.Close(), removeGeneration(s.cfg.FS, st.gen.dir))
}

// snapshotSink takes a snapshot: a local one's state, see fsmSnapshot.Persist,
// or a stream by Write.
type snapshotSink struct {
	store *snapshotStore
	file  snapshotFile
	done  bool

	// Of a stream:
	head  []byte // header and metadata, until they are complete
	state fsmState
	begun bool
	in    *importing // nil where the log is kept
}

// importing is an import under way.
type importing struct {
	number uint64
	dir    string
	w      *io.PipeWriter
	done   chan struct{}
	stats  logstore.ImportStats
	err    error
}

var errCancelled = errors.New("the snapshot was given up")

func (k *snapshotSink) ID() string { return snapshotID(k.file.Index, k.file.Term) }

// Write takes a part of a stream.
func (k *snapshotSink) Write(p []byte) (int, error) {
	n := len(p)
	if !k.begun {
		rest, err := k.readHead(p)
		if err != nil {
			return 0, err
		}
		p = rest
	}
	if len(p) == 0 || k.in == nil {
		return n, nil
	}
	if _, err := k.in.w.Write(p); err != nil {
		return 0, err
	}
	return n, nil
}

// readHead takes header and metadata off the stream and decides what to do
// with the rest.
func (k *snapshotSink) readHead(p []byte) (rest []byte, err error) {
	need := streamHeader
	if len(k.head) >= streamHeader {
		meta, err := parseStreamHeader(k.head[:streamHeader])
		if err != nil {
			return nil, err
		}
		need += meta
	}
	n := min(need-len(k.head), len(p))
	k.head, p = append(k.head, p[:n]...), p[n:]
	switch {
	case len(k.head) < need:
		return nil, nil
	case need == streamHeader:
		return k.readHead(p)
	}
	k.begun = true
	return p, k.begin(k.head[streamHeader:])
}

// begin decides, once the metadata is there, whether the log is needed.
func (k *snapshotSink) begin(meta []byte) error {
	f, err := parseSnapshot(streamName, meta)
	if err != nil {
		return err
	}
	if f.Index != k.file.Index || f.Term != k.file.Term || !bytes.Equal(f.Configuration, k.file.Configuration) {
		return &CorruptError{streamName, fmt.Sprintf("it is of index %d, term %d; announced was index %d, term %d", f.Index, f.Term, k.file.Index, k.file.Term)}
	}
	if err := unmarshalStrictly(f.State, &k.state); err != nil {
		return &VersionError{streamName, err.Error()}
	}
	k.file.State = f.State
	s := k.store
	if err := checkClusterID(s.clusterID(), k.state.ClusterID); err != nil {
		s.broken(err)
		return err
	}
	if err := s.drop(); err != nil {
		return err
	}
	keep, err := s.holds(&k.file, &k.state)
	if err != nil || keep {
		return err
	}
	k.in, err = s.startImport()
	return err
}

// holds tells whether the log has all that a snapshot brings: then it keeps its
// log, with entries behind the snapshot that it may have acknowledged.
func (s *snapshotStore) holds(f *snapshotFile, state *fsmState) (bool, error) {
	gen := s.gens.use()
	defer s.gens.release(gen)
	applied := s.applied.Load()
	e, _, err := gen.log.Entry(f.Index, nil)
	switch {
	case errors.Is(err, logstore.ErrNotFound):
		if f.Index > applied {
			return false, nil
		}
		if first := gen.log.FirstIndex(); first > f.Index+1 {
			// Raft would go on from the snapshot, and the entries that follow
			// it are not kept. The leader will have a newer one.
			return false, fmt.Errorf("a snapshot of index %d is older than index %d, where this log starts", f.Index, first)
		}
		return true, nil
	case err != nil:
		s.damaged(err)
		return false, err
	}
	if e.Term != f.Term {
		if f.Index <= applied {
			err := fmt.Errorf("the leader's snapshot has term %d at index %d, but term %d is committed there", f.Term, f.Index, e.Term)
			s.broken(err)
			return false, err
		}
		return false, nil
	}
	if next := e.BaseOffset + uint64(e.Count); next != state.NextOffset {
		err := fmt.Errorf("the leader's snapshot has next offset %d at index %d, term %d, this log has %d", state.NextOffset, f.Index, f.Term, next)
		s.broken(err)
		return false, err
	}
	return true, nil
}

// startImport begins to make the next generation of what is written to it.
func (s *snapshotStore) startImport() (*importing, error) {
	in := &importing{number: s.gens.now.Load().number + 1, done: make(chan struct{})}
	in.dir = generationDir(s.cfg.Dir, in.number)
	if err := removeGeneration(s.cfg.FS, in.dir); err != nil {
		return nil, err
	}
	var r *io.PipeReader
	r, in.w = io.Pipe()
	go func() {
		defer close(in.done)
		in.stats, in.err = logstore.Import(filepath.Join(in.dir, "log"), logOptions(s.cfg), r)
		// What is still to come is refused: then Raft gives up at once.
		_ = r.CloseWithError(in.err) // never fails
	}()
	return in, nil
}

// end waits for the import. Without cause all has been written.
func (in *importing) end(cause error) error {
	_ = in.w.CloseWithError(cause) // never fails
	<-in.done
	return in.err
}

// Cancel implements raft.SnapshotSink.
func (k *snapshotSink) Cancel() error {
	if k.done {
		return nil
	}
	k.done = true
	if k.in == nil {
		return nil
	}
	k.store.judge(k.in.end(errCancelled))
	return removeGeneration(k.store.cfg.FS, k.in.dir)
}

// judge reports a failed import where it was the disk's fault: then, as with
// any other write, nothing can be said of the files.
func (s *snapshotStore) judge(err error) {
	var stream *logstore.StreamError
	var version *logstore.VersionError
	if err != nil && !errors.Is(err, errCancelled) && !errors.As(err, &stream) && !errors.As(err, &version) && !errors.Is(err, logstore.ErrFull) {
		s.broken(fmt.Errorf("receive a snapshot: %w", err))
	}
}

// Close makes the snapshot durable: a local one counts from now on, one that
// was received is staged. It does nothing the second time.
func (k *snapshotSink) Close() error {
	if k.done {
		return nil
	}
	k.done = true
	s := k.store
	if len(k.head) == 0 {
		if k.file.State == nil {
			return errors.New("a snapshot of nothing")
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.gens.now.Load().snapshots.write(&k.file)
	}
	if !k.begun {
		return &CorruptError{streamName, "it ends early"}
	}
	if k.in == nil {
		return s.stage(&staged{file: &k.file, state: k.state})
	}
	err := k.in.end(nil)
	s.judge(err)
	var gen *generation
	if err == nil {
		gen, err = k.verify()
	}
	if err != nil {
		return errors.Join(err, removeGeneration(s.cfg.FS, k.in.dir))
	}
	return s.stage(&staged{file: &k.file, state: k.state, gen: gen})
}

// verify compares the log that was received with the snapshot that it came
// with, and opens it.
func (k *snapshotSink) verify() (gen *generation, err error) {
	st := &k.in.stats
	if st.LastIndex != k.file.Index || st.LastTerm != k.file.Term || st.NextOffset != k.state.NextOffset {
		return nil, &CorruptError{streamName, fmt.Sprintf("it is of index %d, term %d, next offset %d, but its log ends at index %d, term %d, next offset %d",
			k.file.Index, k.file.Term, k.state.NextOffset, st.LastIndex, st.LastTerm, st.NextOffset)}
	}
	gen, err = openGeneration(k.store.cfg, k.in.number)
	if err == nil {
		if err = gen.snapshots.write(&k.file); err != nil {
			err = errors.Join(err, gen.log.Close())
		}
	}
	if err != nil {
		k.store.judge(err)
		return nil, err
	}
	return gen, nil
}

// stage keeps a snapshot until Raft opens it. Where the log is kept, it is a
// local snapshot like any other.
func (s *snapshotStore) stage(st *staged) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.gen == nil {
		snapshots := s.gens.now.Load().snapshots
		ids, err := snapshots.ids()
		if err == nil && (len(ids) == 0 || ids[0] < st.id()) {
			err = snapshots.write(st.file)
		}
		if err != nil {
			return err
		}
	}
	s.staged = st
	return nil
}

var _ raft.SnapshotStore = (*snapshotStore)(nil)
