package replica

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// TestRestartAppliesNothing: a clean close leaves a snapshot of the last entry.
func TestRestartAppliesNothing(t *testing.T) {
	dir := t.TempDir()
	for round := range uint64(3) {
		r := mustOpen(t, testConfig(t, dir))
		for range 20 {
			mustPropose(t, r, "0123456789abcdef", 1)
		}
		last := r.gens.log().LastIndex()
		mustClose(t, r)

		metas, err := r.snapshots.List()
		if err != nil || len(metas) != 1 || metas[0].Index != last {
			t.Fatalf("snapshots %v (%v), want one of index %d", metas, err, last)
		}
		// Before anybody leads, so before Raft could apply anything.
		cfg := testConfig(t, dir)
		cfg.HeartbeatTimeout, cfg.ElectionTimeout = 3600e9, 3600e9
		r, err = Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, watermark, _ := r.Bounds(); watermark != 20*(round+1) || r.applied.Load() != last || r.raft.AppliedIndex() != last {
			t.Errorf("watermark %d, applied %d and %d, want %d and %d", watermark, r.applied.Load(), r.raft.AppliedIndex(), 20*(round+1), last)
		}
		if !r.gens.log().Recovery().Clean {
			t.Error("the log was not closed")
		}
		mustClose(t, r)
	}
}

// TestBootstrapInterrupted: the term is written before the first configuration.
// A server may also have voted before it had any entry.
func TestBootstrapInterrupted(t *testing.T) {
	for _, v := range []vote{{term: 1}, {5, 4, "b:1"}} {
		fs := vfstest.New()
		waiting := memConfig("data", fs)
		waiting.Bootstrap = nil
		r, err := Open(waiting)
		if err != nil {
			t.Fatal(err)
		}
		if err := v.write(r.stable); err != nil {
			t.Fatal(err)
		}
		mustClose(t, r)
		r = mustOpen(t, memConfig("data", fs))
		mustPropose(t, r, string(batchOf(1, 1).Records), 1)
		if got, err := readVote(r.stable); err != nil || got.term <= v.term || got.voteTerm < v.voteTerm {
			t.Errorf("%+v (%v), was %+v", got, err, v)
		}
		if e, _, err := r.gens.log().Entry(1, nil); err != nil || e.Term != 1 {
			t.Errorf("first entry %+v (%v)", e, err)
		}
		mustClose(t, r)
	}
}

// TestBootstrapRefuses lists of first voters that the others cannot have.
func TestBootstrapRefuses(t *testing.T) {
	for name, voters := range map[string][]Server{
		"not in it":   {{ID: "b", Address: "b:1"}},
		"no address":  {{ID: "a"}},
		"twice":       {{ID: "a", Address: "a:1"}, {ID: "a", Address: "b:1"}},
		"one address": {{ID: "a", Address: "a:1"}, {ID: "b", Address: "a:1"}},
	} {
		cfg := memConfig("data", vfstest.New())
		cfg.Bootstrap = voters
		if r, err := Open(cfg); err == nil {
			t.Errorf("%s: it opens", name)
			mustClose(t, r)
		}
	}
}

// TestOpenRefuses everything that a crash cannot have made.
func TestOpenRefuses(t *testing.T) {
	const dir = "data"
	fs := vfstest.New()
	cfg := memConfig(dir, fs)
	file := filepath.Join(dir, stableName)
	r := mustOpen(t, cfg)
	for i := range uint64(30) {
		p := batchOf(i, 20)
		mustPropose(t, r, string(p.Records), p.Count)
	}
	older, err := fs.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, r)
	r = mustOpen(t, cfg) // a second term, and a second snapshot
	mustPropose(t, r, string(batchOf(99, 1).Records), 1)
	mustClose(t, r)

	var snaps, segments []string
	for _, name := range fs.Names() {
		switch {
		case strings.HasSuffix(name, ".snap"):
			snaps = append(snaps, name)
		case strings.HasSuffix(name, ".log"):
			segments = append(segments, name)
		}
	}
	if len(snaps) != 2 || len(segments) < 3 {
		t.Fatalf("snapshots %v, segments %v", snaps, segments)
	}
	newest, err := fs.ReadFile(snaps[1])
	if err != nil {
		t.Fatal(err)
	}
	f, err := parseSnapshot(snaps[1], newest)
	if err != nil {
		t.Fatal(err)
	}
	// state gives the newest snapshot another state.
	state := func(change func(f *snapshotFile)) func(*vfstest.Mem) error {
		return func(fs *vfstest.Mem) error {
			changed := *f
			change(&changed)
			b, err := encodeSnapshot(&changed)
			return errors.Join(err, fs.Mutate(snaps[1], func([]byte) []byte { return b }))
		}
	}
	damage := func(name, text string) func(*vfstest.Mem) error {
		return func(fs *vfstest.Mem) error {
			return fs.Mutate(name, func(b []byte) []byte {
				at := len(b) / 2
				if text != "" {
					at = bytes.LastIndex(b, []byte(text))
				}
				b[at] ^= 1
				return b
			})
		}
	}
	remove := func(names ...string) func(*vfstest.Mem) error {
		return func(fs *vfstest.Mem) error {
			var err error
			for _, name := range names {
				err = errors.Join(err, fs.Remove(name))
			}
			return err
		}
	}
	var logFiles []string
	for _, name := range fs.Names() {
		if strings.Contains(name, "/log/") {
			logFiles = append(logFiles, name)
		}
	}
	other := vfstest.New()
	another := mustOpen(t, memConfig(dir, other))
	// Later than ours, so that only the ids tell.
	if err := another.stable.SetUint64(keyCurrentTerm, another.raft.CurrentTerm()+100); err != nil {
		t.Fatal(err)
	}
	mustClose(t, another)
	// take puts another copy's files in the place of these.
	take := func(part string) func(*vfstest.Mem) error {
		return func(fs *vfstest.Mem) error {
			var err error
			for name, b := range other.Snapshot() {
				if strings.HasPrefix(name, filepath.Join(dir, part)) {
					err = errors.Join(err, vfs.RemoveIfThere(fs, name), vfs.WriteFile(fs, name, b))
				}
			}
			return err
		}
	}
	with := func(name string, b []byte) func(*vfstest.Mem) error {
		return func(fs *vfstest.Mem) error { return vfs.WriteFile(fs, name, b) }
	}
	current := filepath.Join(dir, currentName)
	both := func(a, b func(*vfstest.Mem) error) func(*vfstest.Mem) error {
		return func(fs *vfstest.Mem) error { return errors.Join(a(fs), b(fs)) }
	}
	inLog, inReplica := new(*logstore.CorruptError), new(*CorruptError)
	for name, tc := range map[string]struct {
		change func(*vfstest.Mem) error
		want   any // nil: it opens
	}{
		"as it was":                 {func(*vfstest.Mem) error { return nil }, nil},
		"newest snapshot damaged":   {damage(snaps[1], ""), nil},
		"no snapshots":              {remove(snaps...), nil}, // all is applied again
		"both snapshots damaged":    {both(damage(snaps[0], ""), damage(snaps[1], "")), inReplica},
		"unknown state":             {state(func(f *snapshotFile) { f.State = []byte(`{"next_offset":601,"cursors":{}}`) }), inReplica},
		"watermark too high":        {state(func(f *snapshotFile) { f.State = []byte(`{"next_offset":900}`) }), inReplica},
		"watermark too low":         {state(func(f *snapshotFile) { f.State = []byte(`{"next_offset":600}`) }), inReplica},
		"watermark missing":         {state(func(f *snapshotFile) { f.State = []byte(`{}`) }), inReplica},
		"log is gone":               {remove(logFiles...), inReplica},
		"everything else is gone":   {both(remove(logFiles...), remove(snaps...)), inReplica},
		"segment missing":           {remove(segments[1]), inLog},
		"last entry damaged":        {damage(segments[len(segments)-1], "\x63\x00\x00\x00"), inLog},
		"entry damaged, to replay":  {both(remove(snaps...), damage(segments[0], "\x02\x00\x00\x00")), inLog},
		"vote missing":              {remove(file), inReplica},
		"vote empty":                {with(file, nil), inReplica},
		"vote older":                {with(file, older), inReplica},
		"vote damaged":              {both(damage(file, stableMagic), with(file, make([]byte, stableSize))), inReplica},
		"half of vote damaged":      {damage(file, stableMagic), nil},
		"vote of another copy":      {take(stableName), inReplica},
		"pointer missing":           {remove(current), inReplica},
		"pointer damaged":           {damage(current, ""), inReplica},
		"pointer of another copy":   {take(currentName), inReplica},
		"log of another copy":       {both(remove(slices.Concat(logFiles, snaps)...), take("gen-1/log")), inReplica},
		"all of another generation": {both(take(currentName), take(stableName)), inReplica},
		"pointer and vote missing":  {remove(file, current), inReplica},
		"of an older version":       {with(filepath.Join(dir, "raft.db"), nil), new(error)},
	} {
		t.Run(name, func(t *testing.T) {
			clone := fs.CrashClone(nil, vfstest.All)
			if err := tc.change(clone); err != nil {
				t.Fatal(err)
			}
			cfg := cfg
			cfg.FS = clone
			cfg.OnFatal = func(err error) { t.Errorf("fatal: %v", err) }
			before := clone.Snapshot()
			r, err := Open(cfg)
			if tc.want == nil {
				if err != nil {
					t.Fatal(err)
				}
				if err := r.WaitReady(t.Context()); err != nil {
					t.Error(err)
				}
				if _, watermark, _ := r.Bounds(); watermark != 601 {
					t.Errorf("watermark %d", watermark)
				}
				mustClose(t, r)
				return
			}
			if err == nil {
				mustClose(t, r)
				t.Fatal("it opens")
			}
			if !errors.As(err, tc.want) {
				t.Errorf("%T: %v", err, err)
			}
			for name, b := range before {
				if after, err := clone.ReadFile(name); !strings.Contains(name, "/log/") && (err != nil || !slices.Equal(b, after)) {
					t.Errorf("%s was changed (%v)", name, err)
				}
			}
		})
	}
}

// TestPrefixNeedsSnapshot: what was deleted cannot be applied again.
func TestPrefixNeedsSnapshot(t *testing.T) {
	fs := vfstest.New()
	cfg := memConfig("data", fs)
	r := mustOpen(t, cfg)
	var all []acked
	for i := range uint64(60) {
		p := batchOf(i, 20)
		all = append(all, acked{i, 20, mustPropose(t, r, string(p.Records), p.Count)})
	}
	if err := r.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	early := fs.CrashClone(nil, vfstest.All).Snapshot()
	for i := range uint64(60) {
		p := batchOf(100+i, 20)
		all = append(all, acked{100 + i, 20, mustPropose(t, r, string(p.Records), p.Count)})
	}
	if err := r.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	first, err := r.gens.log().DeletePrefix(r.gens.log().LastIndex())
	if err != nil || first < 80 {
		t.Fatal(first, err)
	}
	mustClose(t, r)

	reopen := func(change func(name string) bool) error {
		clone := fs.CrashClone(nil, vfstest.All)
		for _, name := range clone.Names() {
			if strings.HasSuffix(name, ".snap") && change(name) {
				if err := clone.Remove(name); err != nil {
					t.Fatal(err)
				}
			}
		}
		cfg := cfg
		cfg.FS = clone
		r, err := Open(cfg)
		if err != nil {
			return err
		}
		defer mustClose(t, r)
		if err := r.WaitReady(t.Context()); err != nil {
			return err
		}
		kept := slices.DeleteFunc(slices.Clone(all), func(a acked) bool { return a.ack.BaseOffset < r.gens.log().FirstOffset() })
		if len(kept) == 0 || len(kept) == len(all) {
			return fmt.Errorf("%d of %d batches are kept", len(kept), len(all))
		}
		return checkAcked(r, kept)
	}
	if err := reopen(func(string) bool { return false }); err != nil {
		t.Error(err)
	}
	var corrupt *CorruptError
	if err := reopen(func(string) bool { return true }); !errors.As(err, &corrupt) {
		t.Errorf("without snapshots: %v", err)
	}
	// Only a snapshot from before what is kept; it is there to fall back to.
	if err := reopen(func(name string) bool { return early[name] == nil }); !errors.As(err, &corrupt) {
		t.Errorf("with an old snapshot: %v", err)
	}
}
