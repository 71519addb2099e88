package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/rpc"
)

// recoveringFile says, while it is there, that the node is about to be made the
// only one of its cluster, and of which: a node does not start then. Its log and
// its own file have to change together, and a crash may come between.
const recoveringFile = "recovering"

// recoveryPlan is its content: JSON, behind a line with its checksum.
type recoveryPlan struct {
	From  string `json:"from"`  // the cluster as it was
	To    string `json:"to"`    // as it will be
	After uint64 `json:"after"` // the index of the last entry, before
}

// stopped is the data directory of a node that does not run.
type stopped struct {
	data *dataDir
	plan *recoveryPlan // nil: no recovery was begun
}

// openStopped takes the directory of a node that was part of a cluster.
func openStopped(fsys vfs.FS, path string) (*stopped, error) {
	fresh, err := inspectDataDir(fsys, path)
	if err != nil {
		return nil, err
	}
	if fresh {
		return nil, fmt.Errorf("%s holds no node's data: name the -data-dir of one", path)
	}
	lock, err := lockDataDir(fsys, path)
	if err != nil {
		return nil, err
	}
	s := &stopped{data: newDataDir(fsys, path, lock)}
	id, err := readNodeFile(fsys, path)
	if err == nil {
		s.data.id.Store(&id)
		s.plan, err = readRecoveryPlan(fsys, path)
	}
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return s, nil
}

func (s *stopped) Close() error { return s.data.Close() }

func (s *stopped) config(cluster string) replica.Config {
	return replica.Config{
		Dir: s.data.log(rpc.DefaultLog), FS: s.data.fs, ID: s.data.nodeID(), Address: nowhere(s.data.nodeID()), ClusterID: cluster,
	}
}

// survey tells what the node holds.
func (s *stopped) survey() (replica.Holding, error) { return replica.Survey(s.config("")) }

// recover makes the node the only voter of a cluster with another id: nodes of
// the old one, which may be more than half of that, are refused by it. before is
// what survey has said. It returns where the files are that were replaced.
func (s *stopped) recover(before *replica.Holding) (kept string, err error) {
	d := s.data
	if s.plan == nil {
		if before.ClusterID == "" || before.ClusterID != d.identity().cluster {
			return "", fmt.Errorf("the log is that of cluster %q, the node that of %q: a node can be recovered once it has been a full member", before.ClusterID, d.identity().cluster)
		}
		plan := &recoveryPlan{From: before.ClusterID, To: uuid.NewString(), After: before.LastIndex}
		if kept, err = s.keep(plan); err != nil {
			return kept, fmt.Errorf("keep a copy of what is about to be changed: %w", err)
		}
		if err := writeRecoveryPlan(d.fs, d.path, plan); err != nil {
			return kept, err
		}
		s.plan = plan
	}
	kept = s.keepDir(s.plan)
	cfg := s.config(s.plan.To)
	for _, v := range before.Servers {
		if v.ID == cfg.ID {
			cfg.Address = v.Address
		}
	}
	if _, err := replica.Recover(cfg, s.plan.After); err != nil {
		return kept, err
	}
	id := d.identity()
	id.cluster = s.plan.To
	if err := d.become(id); err != nil {
		return kept, err
	}
	if err := d.fs.Remove(filepath.Join(d.path, recoveringFile)); err != nil {
		return kept, err
	}
	return kept, d.fs.SyncDir(d.path)
}

func (s *stopped) keepDir(plan *recoveryPlan) string {
	return filepath.Join(s.data.path, fmt.Sprintf("before-recovery-%d", plan.After))
}

// keep copies the files that will be replaced. The log is only added to.
func (s *stopped) keep(plan *recoveryPlan) (dir string, err error) {
	const most = 16 << 20 // as large as a snapshot may be
	fsys, dir := s.data.fs, s.keepDir(plan)
	if err := fsys.MkdirAll(dir); err != nil {
		return dir, err
	}
	log := s.data.log(rpc.DefaultLog)
	files := []string{filepath.Join(s.data.path, nodeFile), filepath.Join(log, "CURRENT"), filepath.Join(log, "vote")}
	generations, err := fsys.List(log)
	if err != nil {
		return dir, err
	}
	for _, gen := range generations {
		snapshots := filepath.Join(log, gen, "snapshots")
		names, err := fsys.List(snapshots)
		if err != nil {
			continue // not a generation
		}
		for _, name := range names {
			files = append(files, filepath.Join(snapshots, name))
		}
	}
	for _, name := range files {
		b, err := vfs.ReadFile(fsys, name, most)
		if err == nil {
			err = vfs.WriteFile(fsys, filepath.Join(dir, filepath.Base(name)), b)
		}
		if err != nil {
			return dir, err
		}
	}
	return dir, nil
}

func writeRecoveryPlan(fsys vfs.FS, path string, plan *recoveryPlan) error {
	body, err := json.Marshal(plan)
	if err != nil {
		return err
	}
	return vfs.WriteFile(fsys, filepath.Join(path, recoveringFile), fmt.Appendf(nil, "%08x\n%s\n", crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)), body))
}

// readRecoveryPlan returns nil where there is none.
func readRecoveryPlan(fsys vfs.FS, path string) (*recoveryPlan, error) {
	name := filepath.Join(path, recoveringFile)
	b, err := vfs.ReadFile(fsys, name, nodeFileLimit)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	sum, body, _ := bytes.Cut(b, []byte("\n"))
	body = bytes.TrimSuffix(body, []byte("\n"))
	plan := new(recoveryPlan)
	if fmt.Sprintf("%08x", crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli))) != string(sum) || json.Unmarshal(body, plan) != nil || plan.To == "" {
		return nil, fmt.Errorf("%s is damaged, so that a recovery that was begun cannot be finished: recover another node, or restore a snapshot", name)
	}
	return plan, nil
}

// survivor is what a node that does not run holds, as JSON.
type survivor struct {
	NodeID          string           `json:"node_id"`
	ClusterID       string           `json:"cluster_id"`
	LastTerm        uint64           `json:"last_term"`
	LastIndex       uint64           `json:"last_index"`
	Term            uint64           `json:"term"`
	CommittedIndex  uint64           `json:"committed_index"`
	CommittedOffset uint64           `json:"committed_offset"`
	FirstOffset     uint64           `json:"first_offset"`
	NextOffset      uint64           `json:"next_offset"`
	LastAppendTime  string           `json:"last_append_time,omitempty"`
	Servers         []survivorServer `json:"servers"`
	Removed         bool             `json:"removed,omitempty"`
	Begun           bool             `json:"recovery_begun,omitempty"`
	// After a recovery:
	NewClusterID string `json:"new_cluster_id,omitempty"`
	Kept         string `json:"kept,omitempty"`
}

type survivorServer struct {
	ID      string `json:"id"`
	Address string `json:"address"`
	Voter   bool   `json:"voter"`
}

func (s *stopped) describe(h *replica.Holding) survivor {
	id := s.data.identity()
	v := survivor{
		NodeID: id.node, ClusterID: id.cluster, LastTerm: h.LastTerm, LastIndex: h.LastIndex, Term: h.Term,
		CommittedIndex: h.Committed, CommittedOffset: h.CommittedOffset, FirstOffset: h.FirstOffset, NextOffset: h.NextOffset,
		LastAppendTime: timeJSON(h.LastAppendTime), Removed: h.Removed, Begun: s.plan != nil,
	}
	for _, m := range h.Servers {
		v.Servers = append(v.Servers, survivorServer{m.ID, m.Address, m.Voter})
	}
	return v
}

// fullest returns the survivor that has what was acknowledged most surely: what a
// leader acknowledged stands in the logs of a majority, and of two logs the one
// whose last entry is of the later term, or of the same term and longer, has all
// that can have been acknowledged of the other.
func fullest(all []survivor) (best survivor, same int, err error) {
	for _, s := range all {
		if s.ClusterID != all[0].ClusterID {
			return best, 0, fmt.Errorf("node %s is of cluster %s, node %s of %s: only nodes of one cluster can be compared", all[0].NodeID, all[0].ClusterID, s.NodeID, s.ClusterID)
		}
	}
	order := func(a, b survivor) int {
		switch {
		case a.LastTerm != b.LastTerm && a.LastTerm > b.LastTerm, a.LastTerm == b.LastTerm && a.LastIndex > b.LastIndex:
			return -1
		case a.LastTerm == b.LastTerm && a.LastIndex == b.LastIndex:
			return strings.Compare(a.NodeID, b.NodeID)
		}
		return 1
	}
	sorted := slices.Clone(all)
	slices.SortFunc(sorted, order)
	best = sorted[0]
	for _, s := range sorted {
		if s.LastTerm == best.LastTerm && s.LastIndex == best.LastIndex {
			same++
		}
	}
	return best, same, nil
}

// readSurvivor reads what -json has printed.
func readSurvivor(r io.Reader) (s survivor, err error) {
	if err := json.NewDecoder(io.LimitReader(r, 1<<20)).Decode(&s); err != nil {
		return s, err
	}
	if s.NodeID == "" || s.ClusterID == "" || s.LastIndex == 0 {
		return s, errors.New("this is not what `diurna operator raft recover -json` prints")
	}
	return s, nil
}
