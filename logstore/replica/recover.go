package replica

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
)

// recovered is what opening a replica found.
type recovered struct {
	index uint64 // of the snapshot
	state fsmState
	term  uint64 // the greatest that this server has seen in its log
}

// recoverState reads the newest snapshot, and what Raft will read of the log,
// so that damage there is an error of Open's and not one of Raft's.
func recoverState(cfg *Config, gen *generation) (found recovered, err error) {
	snap, damage, err := gen.snapshots.newest()
	if err != nil {
		return found, err
	}
	if damage != nil {
		cfg.Logger.Warn("a snapshot is damaged; going on from an older one", "error", damage)
	}
	st := gen.log.Stats()
	logDir := filepath.Join(gen.dir, "log")
	state := &found.state
	if snap == nil {
		if st.FirstIndex > 1 {
			return found, &CorruptError{gen.snapshots.dir, fmt.Sprintf("the log starts at index %d, but there is no snapshot of what came before", st.FirstIndex)}
		}
		snap = &snapshotFile{}
	} else {
		file := gen.snapshots.path(snapshotID(snap.Index, snap.Term))
		if err := unmarshalStrictly(snap.State, state); err != nil {
			return found, &CorruptError{file, err.Error()}
		}
		switch {
		case st.LastIndex < snap.Index || st.NextOffset < state.NextOffset:
			return found, &CorruptError{logDir, fmt.Sprintf("the log ends at index %d, offset %d, but up to index %d, offset %d was committed when the snapshot was taken", st.LastIndex, st.NextOffset, snap.Index, state.NextOffset)}
		case st.FirstIndex > snap.Index+1:
			return found, &CorruptError{logDir, fmt.Sprintf("the log starts at index %d, the snapshot is of index %d", st.FirstIndex, snap.Index)}
		case state.FirstOffset > state.NextOffset:
			return found, &CorruptError{file, fmt.Sprintf("it has the first offset %d behind the next one, %d", state.FirstOffset, state.NextOffset)}
		}
		if err := checkSeam(gen, file, snap, state); err != nil {
			return found, err
		}
	}
	if err := checkClusterID(cfg.ClusterID, state.ClusterID); err != nil {
		return found, err
	}
	// Raft reads the last entry even if a snapshot covers it.
	var buf []byte
	for index := max(min(snap.Index+1, st.LastIndex), st.FirstIndex); index <= st.LastIndex; index++ {
		var err error
		if _, buf, err = gen.log.Entry(index, buf); err != nil {
			return found, err
		}
	}
	found.index, found.term = snap.Index, max(snap.Term, gen.log.LastTerm())
	return found, nil
}

// checkSeam compares a snapshot with the entry that it was taken behind, where
// that is kept: a snapshot of another log would move the high watermark to
// where nothing was committed.
func checkSeam(gen *generation, file string, snap *snapshotFile, state *fsmState) error {
	e, _, err := gen.log.Entry(snap.Index, nil)
	switch {
	case errors.Is(err, logstore.ErrNotFound):
		return nil
	case err != nil:
		return err
	}
	if next := e.BaseOffset + uint64(e.Count); e.Term != snap.Term || next != state.NextOffset {
		return &CorruptError{file, fmt.Sprintf("it is of index %d, term %d, next offset %d; the log has term %d, next offset %d there", snap.Index, snap.Term, state.NextOffset, e.Term, next)}
	}
	return nil
}

// bootstrap makes the first configuration where there is no log yet: the term
// first, and an interruption between the two is made up for by the next start.
// What raft.BootstrapCluster would do beside, refuse a server that has seen a
// term, is left out: the entry is the same on all first voters, so that one
// that took part before it had the entry may have it later.
func bootstrap(cfg *Config, files *files, store *logStore) error {
	if len(cfg.Bootstrap) == 0 {
		return clearTerm(files, store)
	}
	configuration, err := firstConfiguration(cfg)
	if err != nil {
		return err
	}
	if last, err := store.LastIndex(); err != nil || last > 0 {
		return err
	}
	if ids, err := files.gen.snapshots.ids(); err != nil || len(ids) > 0 {
		return err
	}
	term, err := files.stable.GetUint64(keyCurrentTerm)
	if err != nil && !errors.Is(err, errKeyNotFound) {
		return err
	}
	if err := files.stable.SetUint64(keyCurrentTerm, max(term, 1)); err != nil {
		return fmt.Errorf("bootstrap: %w", err)
	}
	if err := store.StoreLog(&raft.Log{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(configuration)}); err != nil {
		return fmt.Errorf("bootstrap: %w", err)
	}
	return nil
}

// clearTerm forgets the term of a server that has neither a log nor voted: it
// has promised nothing with it. Raft would take it for a member of a group, and
// so it could not found one: a crash within Found leaves it so.
func clearTerm(files *files, store *logStore) error {
	last, err := store.LastIndex()
	if err != nil || last > 0 {
		return err
	}
	if ids, err := files.gen.snapshots.ids(); err != nil || len(ids) > 0 {
		return err
	}
	if _, err := files.stable.Get(keyLastVoteTerm); !errors.Is(err, errKeyNotFound) {
		return err
	}
	if term, err := files.stable.GetUint64(keyCurrentTerm); errors.Is(err, errKeyNotFound) || err == nil && term == 0 {
		return nil
	} else if err != nil {
		return err
	}
	return files.stable.SetUint64(keyCurrentTerm, 0)
}

// firstConfiguration makes Raft's form of the first voters, in the order given:
// every one of them must store the same bytes.
func firstConfiguration(cfg *Config) (c raft.Configuration, err error) {
	ids, addresses := map[string]bool{}, map[string]bool{}
	for _, s := range cfg.Bootstrap {
		if s.ID == "" || s.Address == "" || ids[s.ID] || addresses[s.Address] {
			return c, fmt.Errorf("first voters: %q at %q has no id or address, or shares it with another one", s.ID, s.Address)
		}
		ids[s.ID], addresses[s.Address] = true, true
		c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(s.ID), Address: raft.ServerAddress(s.Address), Suffrage: raft.Voter})
	}
	if !ids[cfg.ID] {
		return c, fmt.Errorf("first voters: %q, which is this server, is not one of them", cfg.ID)
	}
	return c, nil
}
