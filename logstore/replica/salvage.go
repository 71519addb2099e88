package replica

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
)

// Holding is what a replica that does not run has on its disk.
type Holding struct {
	// ClusterID is the id of its group; Supersedes that of the one that it was
	// recovered from.
	ClusterID, Supersedes string
	// LastTerm and LastIndex are those of its last entry: of two servers, the one
	// with the higher LastTerm has what was acknowledged more surely, and with the
	// same LastTerm the one with the higher LastIndex.
	LastTerm, LastIndex uint64
	// Term is the one that it has taken part in last.
	Term uint64
	// Committed is up to which index it knows for sure that entries are committed,
	// CommittedOffset the offset after the last such record. What follows may be.
	Committed, CommittedOffset uint64
	// FirstOffset is that of its first record, NextOffset that after its last one.
	FirstOffset, NextOffset uint64
	// LastAppendTime is that of its last record, in nanoseconds since 1970 UTC.
	LastAppendTime int64
	// Servers are the members of its group, as it knows them: their ids, addresses
	// and votes.
	Servers []Server
	// Removed: the group has removed this server, as far as this server knows.
	Removed bool
}

// Survey tells what the directory of a replica that does not run holds, and
// checks as much of it as opening it would. As opening does, it cuts off a write
// that a crash interrupted. Of cfg, Dir, ID, Address and FS count.
//
// Errors: ErrDamaged for damage, ErrNoReplica where there is no replica.
func Survey(cfg Config) (Holding, error) {
	var found Holding
	err := salvage(cfg, func(cfg *Config, files *files) error {
		var err error
		found, _, err = surveyFiles(cfg, files)
		return err
	})
	return found, err
}

// Recover makes the server whose directory it is, and which does not run, the
// only member of its group, under the id cfg.ClusterID: for a group that has lost
// its quorum for good. All that the server has in its log becomes committed, what
// only others had is lost. It returns what the server had before.
//
// after is Holding.LastIndex as it was before: nothing is done where it is another
// one, unless an earlier call with the same arguments was interrupted, or has
// done all of it. So Recover can be repeated until it returns nil.
//
// Of cfg, Dir, ID, Address, ClusterID and FS count. Errors are those
// of Survey.
func Recover(cfg Config, after uint64) (Holding, error) {
	var found Holding
	if cfg.ClusterID == "" {
		return found, errors.New("a recovered log needs the id of its new cluster")
	}
	err := salvage(cfg, func(cfg *Config, files *files) error {
		var state fsmState
		var err error
		if found, state, err = surveyFiles(cfg, files); err != nil {
			return err
		}
		begun := found.LastIndex == after+1 && len(found.Servers) == 1 && found.Servers[0].ID == cfg.ID
		switch {
		case begun && found.ClusterID == cfg.ClusterID:
			return sew(cfg, files, &state, found.LastTerm)
		case begun:
			return sew(cfg, files, recoveredState(cfg, state), found.LastTerm)
		case found.LastIndex != after:
			return fmt.Errorf("the log ends at index %d; when it was looked at it was index %d", found.LastIndex, after)
		}
		return sew(cfg, files, recoveredState(cfg, state), max(found.Term, found.LastTerm)+1)
	})
	return found, err
}

func recoveredState(cfg *Config, state fsmState) *fsmState {
	state.Supersedes = state.ClusterID
	state.Tombstones = slices.DeleteFunc(slices.Clone(state.Tombstones), func(t Tombstone) bool { return t.ID == cfg.ID })
	return &state
}

// salvage opens the files of a replica that does not run.
func salvage(cfg Config, do func(*Config, *files) error) (err error) {
	if err := cfg.applyDefaultsAndValidate(); err != nil {
		return err
	}
	// Or opening would make one.
	if names, err := cfg.FS.List(cfg.Dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	} else if !slices.Contains(names, currentName) && !slices.Contains(names, stableName) {
		return fmt.Errorf("%s: %w", cfg.Dir, ErrNoReplica)
	}
	if cfg.SegmentSize, err = largestSegment(&cfg); err != nil {
		return err
	}
	files, err := openFiles(&cfg, func(error) {})
	if err == nil {
		err = errors.Join(do(&cfg, files), files.close())
	}
	if isDamage(err) && !errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return err
}

// largestSegment returns the size of the largest segment that there is. With that,
// opening reserves no more than there is already, and an entry that is appended
// does not end the active segment before its time: retention might take it then.
func largestSegment(cfg *Config) (largest int64, err error) {
	largest = logstore.MinSegmentSize
	generations, err := cfg.FS.List(cfg.Dir)
	if err != nil {
		return 0, err
	}
	for _, gen := range generations {
		dir := filepath.Join(cfg.Dir, gen, "log")
		names, err := cfg.FS.List(dir)
		if err != nil {
			continue // not a generation, or one that opening complains of
		}
		for _, name := range names {
			if !strings.HasSuffix(name, ".log") {
				continue
			}
			f, err := cfg.FS.Open(filepath.Join(dir, name))
			if err != nil {
				return 0, err
			}
			size, err := f.Size()
			if err := errors.Join(err, f.Close()); err != nil {
				return 0, err
			}
			largest = max(largest, size)
		}
	}
	return min(largest, logstore.MaxSegmentSize), nil
}

// ErrNoReplica: the directory does not hold a replica.
var ErrNoReplica = errors.New("there is no log")

// surveyFiles also returns the state at the last entry, as it is if all entries
// are committed.
func surveyFiles(cfg *Config, files *files) (h Holding, state fsmState, err error) {
	// Its id is compared by the caller, who may be about to change it.
	any := *cfg
	any.ClusterID = ""
	found, err := recoverState(&any, files.gen)
	if err != nil {
		return h, state, err
	}
	if err := files.stable.check(found.term); err != nil {
		return h, state, err
	}
	if err := files.stable.repair(); err != nil {
		return h, state, err
	}
	state = found.state
	log := files.gen.log
	st := log.Stats()
	h = Holding{
		LastTerm: log.LastTerm(), LastIndex: st.LastIndex, Committed: found.index, CommittedOffset: state.NextOffset,
		NextOffset: st.NextOffset, LastAppendTime: log.LastAppendTime(),
	}
	if h.Term, err = files.stable.GetUint64(keyCurrentTerm); err != nil && !errors.Is(err, errKeyNotFound) {
		return h, state, err
	}
	configuration, err := replay(files.gen, found.index, &state)
	if err != nil {
		return h, state, err
	}
	for _, s := range configuration.Servers {
		h.Servers = append(h.Servers, Server{ID: string(s.ID), Address: string(s.Address), Voter: s.Suffrage == raft.Voter})
	}
	h.ClusterID, h.Supersedes = state.ClusterID, state.Supersedes
	h.FirstOffset = max(state.FirstOffset, log.FirstOffset())
	h.Removed = slices.ContainsFunc(state.Tombstones, func(t Tombstone) bool { return t.ID == cfg.ID })
	return h, state, nil
}

// replay applies the entries behind a snapshot's index to its state, and returns
// the last configuration.
func replay(gen *generation, index uint64, state *fsmState) (c raft.Configuration, err error) {
	snap, _, err := gen.snapshots.newest()
	if err != nil {
		return c, err
	}
	if snap != nil {
		c = raft.DecodeConfiguration(snap.Configuration)
	}
	st := gen.log.Stats()
	var buf []byte
	for index := max(index+1, st.FirstIndex); index <= st.LastIndex; index++ {
		var e logstore.Entry
		if e, buf, err = gen.log.Entry(index, buf); err != nil {
			return c, err
		}
		if raft.LogType(e.Type) == raft.LogConfiguration {
			if err := checkConfiguration(e.Payload); err != nil {
				return c, &CorruptError{filepath.Join(gen.dir, "log"), fmt.Sprintf("entry %d: %v", index, err)}
			}
			c = raft.DecodeConfiguration(e.Payload)
			continue
		}
		l := raft.Log{Index: e.Index, Type: raft.LogType(e.Type), Data: e.Payload}
		if e.Count > 0 {
			l.Extensions = encodeExtensions(e.BaseOffset, e.Count, e.AppendTime)
		}
		if _, _, err := apply(state, &l); err != nil {
			return c, err
		}
	}
	return c, nil
}
