package replica

import (
	"encoding/json"
	"fmt"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
)

// A log can be given to a new group: where it is restored from a saved snapshot,
// and where a server that is all that is left of a group goes on alone. The
// records stay as they are, with their offsets and times. But the old group's
// configurations and its id are in the log, too, and nobody of the new one may
// ever take them for its own.
//
// So one entry is appended that makes the seam: a configuration with the one
// server that goes on. What comes before it, the new group knows by a snapshot
// of the seam only. Raft cannot read those entries (logStore.GetLog does not find
// them), and a server that lacks them is sent the snapshot, which brings them as
// records to be read and never as entries to be applied. The seam is part of the
// state, and so of every snapshot: a member of the group has either nothing, or
// all that is before the seam.

// sew appends the seam behind the last entry and makes the snapshot of it durable.
// state is that at the last entry; it is changed to that of the new group. The
// files are those of a replica that does not run. It may be repeated after an
// interruption, with the same term.
func sew(cfg *Config, files *files, state *fsmState, term uint64) error {
	log := files.gen.log
	only := raft.Configuration{Servers: []raft.Server{{
		Suffrage: raft.Voter, ID: raft.ServerID(cfg.ID), Address: raft.ServerAddress(cfg.Address),
	}}}
	// The term first: a server whose log is of a later one than it knows might
	// vote twice.
	if err := files.stable.SetUint64(keyCurrentTerm, term); err != nil {
		return err
	}
	encoded := raft.EncodeConfiguration(only)
	if log.LastTerm() < term {
		entry := logstore.Entry{Index: log.LastIndex() + 1, Term: term, Type: uint8(raft.LogConfiguration), Payload: encoded}
		if err := log.Append([]logstore.Entry{entry}); err != nil {
			return err
		}
	}
	if log.LastTerm() != term {
		return fmt.Errorf("the log is of term %d already", log.LastTerm())
	}
	state.ClusterID, state.Seam = cfg.ClusterID, log.LastIndex()
	file := snapshotFile{Index: state.Seam, Term: term, Configuration: encoded, ConfigurationIndex: state.Seam}
	var err error
	if file.State, err = json.Marshal(state); err != nil {
		return err
	}
	before, err := files.gen.snapshots.ids()
	if err != nil {
		return err
	}
	if err := files.gen.snapshots.write(&file); err != nil {
		return err
	}
	// One to fall back to would be one of the old group.
	for _, id := range before {
		if id != snapshotID(file.Index, file.Term) {
			if err := files.gen.snapshots.remove(id); err != nil {
				return err
			}
		}
	}
	return nil
}
