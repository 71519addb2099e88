package replica

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// sent is a snapshot as a leader sends it.
type sent struct {
	meta    *raft.SnapshotMeta
	stream  []byte
	records []record
	first   uint64
}

// makeSent makes a log of one server, cuts its front off, and takes its stream.
func makeSent(t testing.TB, batches int) sent {
	t.Helper()
	c := newCluster(t, "z")
	c.bootstrap("z")
	c.append(1, batches, 20)
	c.cutFront()
	z := c.nodes["z"]
	metas, err := z.snapshots.List()
	if err != nil || len(metas) != 1 {
		t.Fatal(metas, err)
	}
	meta, r, err := z.snapshots.Open(metas[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close(), r.Close()); err != nil || int64(len(stream)) != meta.Size {
		t.Fatalf("%d bytes, announced were %d: %v", len(stream), meta.Size, err)
	}
	first, records, err := readAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return sent{meta, stream, records, first}
}

// receive does what Raft does with a snapshot, up to n bytes of it, in pieces.
func (s *sent) receive(r *Replica, stream []byte) error {
	sink, err := r.snapshots.Create(s.meta.Version, s.meta.Index, s.meta.Term, s.meta.Configuration, s.meta.ConfigurationIndex, nil)
	if err != nil {
		return err
	}
	for at := 0; at < len(stream); at += 700 {
		if _, err := sink.Write(stream[at:min(at+700, len(stream))]); err != nil {
			return errors.Join(err, sink.Cancel())
		}
	}
	if len(stream) != len(s.stream) {
		return errors.Join(io.ErrUnexpectedEOF, sink.Cancel())
	}
	if err := sink.Close(); err != nil {
		return err
	}
	_, staged, err := r.snapshots.Open(sink.ID())
	if err != nil {
		return err
	}
	return errors.Join(r.machine.Restore(staged), staged.Close())
}

// idle opens a replica whose Raft does nothing.
func idle(t testing.TB, fs *vfstest.Mem) (*Replica, error) {
	cfg := memConfig("data", fs)
	cfg.Bootstrap = nil
	cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout = time.Hour, time.Hour, time.Hour
	cfg.ScrubInterval = -1
	return Open(cfg)
}

// receiver is a disk with a small log of its own and a later term.
func receiver(t testing.TB) (*vfstest.Mem, []record) {
	t.Helper()
	fs := vfstest.New()
	r := mustOpen(t, memConfig("data", fs))
	for i := range uint64(3) {
		p := batchOf(1<<50|i, 5)
		mustPropose(t, r, string(p.Records), p.Count)
	}
	_, records, err := readAll(r)
	if err := errors.Join(err, r.stable.SetUint64(keyCurrentTerm, 50)); err != nil {
		t.Fatal(err)
	}
	mustClose(t, r)
	return fs, records
}

func closeIdle(t testing.TB, r *Replica) {
	t.Helper()
	if err := r.Close(t.Context()); err != nil && r.Err() == nil {
		t.Error(err)
	}
}

// TestInstallCrash crashes at every operation of receiving a snapshot and making
// it current, and again while opening what that left: there is the old log or
// the new one, never a mixture, nothing is left over, and it can be sent again.
func TestInstallCrash(t *testing.T) {
	rng := vfstest.Rand(t)
	snap := makeSent(t, 40)
	base, old := receiver(t)
	crash := errors.New("crash")
	olds, news := 0, 0
	for k := 1; ; k++ {
		fs := base.CrashClone(nil, vfstest.All)
		r, err := idle(t, fs)
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		n, last := 0, vfstest.Op{}
		fs.SetHook(func(op vfstest.Op) error {
			mu.Lock()
			defer mu.Unlock()
			if n++; n >= k {
				if n == k {
					last = op
				}
				return crash
			}
			return nil
		})
		err = snap.receive(r, snap.stream)
		done := err == nil && r.Err() == nil
		clones := []*vfstest.Mem{
			fs.CrashClone(rng, vfstest.None), fs.CrashClone(rng, vfstest.Some), fs.CrashClone(rng, vfstest.Some), fs.CrashClone(rng, vfstest.All),
		}
		fs.SetHook(nil)
		closeIdle(t, r)
		for i, clone := range clones {
			when := fmt.Sprintf("operation %d (%v), clone %d", k, last, i)
			stop := rng.IntN(30)
			clone.SetHook(func(vfstest.Op) error {
				if stop--; stop < 0 {
					return crash
				}
				return nil
			})
			if r, err := idle(t, clone); err == nil {
				_ = r.Close(t.Context()) // with the hook it fails
			}
			clone = clone.CrashClone(rng, vfstest.Survival(rng.IntN(3)))
			r, err := idle(t, clone)
			if err != nil {
				t.Fatalf("%s: %v", when, err)
			}
			first, records, err := readAll(r)
			switch {
			case err != nil:
				t.Fatalf("%s: %v", when, err)
			case slices.Equal(records, old) && first == 0 && !done:
				olds++
			case slices.Equal(records, snap.records) && first == snap.first:
				news++
			default:
				t.Fatalf("%s: %d records from %d on; done %v", when, len(records), first, done)
			}
			if got := generationsOn(clone); len(got) != 1 {
				t.Fatalf("%s: generations %v", when, got)
			}
			if err := snap.receive(r, snap.stream); err != nil {
				t.Fatalf("%s: again: %v", when, err)
			}
			if first, records, err := readAll(r); err != nil || first != snap.first || !slices.Equal(records, snap.records) {
				t.Fatalf("%s: again: %d records from %d on, %v", when, len(records), first, err)
			}
			closeIdle(t, r)
		}
		if done {
			t.Logf("%d operations, %d times the old log, %d times the new one", k-1, olds, news)
			return
		}
	}
}

// TestInstallInterrupted ends the stream anywhere, and damages it anywhere: the
// replica goes on with what it had, and nothing is left over.
func TestInstallInterrupted(t *testing.T) {
	rng := vfstest.Rand(t)
	snap := makeSent(t, 40)
	fs, old := receiver(t)
	r, err := idle(t, fs)
	if err != nil {
		t.Fatal(err)
	}
	defer closeIdle(t, r)
	cuts := []int{0, 1, streamHeader - 1, streamHeader, streamHeader + 1, len(snap.stream) - 1}
	for at := 0; at < len(snap.stream); at += 701 {
		cuts = append(cuts, at)
	}
	check := func(when string, err error) {
		t.Helper()
		if err == nil {
			t.Errorf("%s: it was installed", when)
		}
		if first, records, err := readAll(r); err != nil || first != 0 || !slices.Equal(records, old) {
			t.Fatalf("%s: %d records from %d on, %v", when, len(records), first, err)
		}
		if got := generationsOn(fs); !slices.Equal(got, []string{"gen-1"}) {
			t.Fatalf("%s: generations %v", when, got)
		}
		if r.Err() != nil {
			t.Fatalf("%s: %v", when, r.Err())
		}
	}
	for _, at := range cuts {
		check(fmt.Sprintf("cut at %d of %d", at, len(snap.stream)), snap.receive(r, snap.stream[:at]))
	}
	for range vfstest.Env(t, "DIURNA_FLIPS", 3000) / 10 {
		at := rng.IntN(len(snap.stream))
		b := slices.Clone(snap.stream)
		b[at] ^= 1 << rng.IntN(8)
		check(fmt.Sprintf("byte %d of %d", at, len(b)), snap.receive(r, b))
	}
	if err := snap.receive(r, snap.stream); err != nil {
		t.Fatal(err)
	}
	if first, records, err := readAll(r); err != nil || first != snap.first || !slices.Equal(records, snap.records) {
		t.Fatalf("%d records from %d on, %v", len(records), first, err)
	}
}

// TestInstallDiskFull: no space for what a leader sends is not the end.
func TestInstallDiskFull(t *testing.T) {
	snap := makeSent(t, 40)
	fs, old := receiver(t)
	r, err := idle(t, fs)
	if err != nil {
		t.Fatal(err)
	}
	defer closeIdle(t, r)
	for extra := int64(0); extra < 20<<10; extra += 1500 {
		fs.SetCapacity(fs.Used() + extra)
		if err := snap.receive(r, snap.stream); !errors.Is(err, logstore.ErrFull) || r.Err() != nil {
			t.Fatalf("%d bytes free: %v; %v", extra, err, r.Err())
		}
	}
	if first, records, err := readAll(r); err != nil || first != 0 || !slices.Equal(records, old) {
		t.Fatalf("%d records from %d on, %v", len(records), first, err)
	}
	// Nor does a vote need any.
	fs.SetCapacity(fs.Used())
	if err := r.stable.SetUint64(keyCurrentTerm, 51); err != nil {
		t.Error(err)
	}
	fs.SetCapacity(-1)
	if err := snap.receive(r, snap.stream); err != nil {
		t.Fatal(err)
	}
}

// TestInstallRefuses snapshots that are whole, but not for this replica.
func TestInstallRefuses(t *testing.T) {
	snap := makeSent(t, 40)
	fs, _ := receiver(t)
	r, err := idle(t, fs)
	if err != nil {
		t.Fatal(err)
	}
	defer closeIdle(t, r)
	announce := func(change func(m *raft.SnapshotMeta)) sent {
		other, meta := snap, *snap.meta
		change(&meta)
		other.meta = &meta
		return other
	}
	for name, s := range map[string]sent{
		"another index":         announce(func(m *raft.SnapshotMeta) { m.Index++ }),
		"another term":          announce(func(m *raft.SnapshotMeta) { m.Term++ }),
		"another configuration": announce(func(m *raft.SnapshotMeta) { m.Configuration.Servers = nil }),
	} {
		if err := s.receive(r, s.stream); err == nil {
			t.Errorf("%s: it was installed", name)
		}
	}
	b := slices.Clone(snap.stream)
	copy(b, reslot(encodeStreamHeader(1), func(b []byte) { b[12] = 2 }))
	var newer *VersionError
	if err := snap.receive(r, b); !errors.As(err, &newer) {
		t.Errorf("a newer version: %v", err)
	}
	if r.Err() != nil {
		t.Error(r.Err())
	}
}

// TestInstallKeepsLog: a follower that has all of a snapshot keeps what it has
// behind it, which it has acknowledged.
func TestInstallKeepsLog(t *testing.T) {
	c := newCluster(t, "a", "b", "c")
	c.bootstrap("a", "b", "c")
	all := c.append(1, 30, 20)
	l := c.leader()
	if err := l.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	metas, err := l.snapshots.List()
	if err != nil {
		t.Fatal(err)
	}
	all = append(all, c.append(100, 30, 20)...)
	for _, id := range []string{"a", "b", "c"} {
		if id == l.cfg.ID {
			continue
		}
		c.caughtUp(id)
		f := c.nodes[id]
		// As an earlier leader's, that comes late.
		meta, stream, err := l.snapshots.Open(metas[0].ID)
		if err != nil {
			t.Fatal(err)
		}
		before := f.Status()
		first, watermark, end := f.Bounds()
		var resp raft.InstallSnapshotResponse
		err = c.links[l.cfg.ID].InstallSnapshot(raft.ServerID(id), raft.ServerAddress(id+":1"), &raft.InstallSnapshotRequest{
			RPCHeader: raft.RPCHeader{ProtocolVersion: 3, ID: []byte(l.cfg.ID), Addr: []byte(l.cfg.Address)}, SnapshotVersion: meta.Version, Term: l.raft.CurrentTerm(),
			LastLogIndex: meta.Index, LastLogTerm: meta.Term, Size: meta.Size,
			Configuration: raft.EncodeConfiguration(meta.Configuration), ConfigurationIndex: meta.ConfigurationIndex,
		}, &resp, stream)
		if err := errors.Join(err, stream.Close()); err != nil || !resp.Success {
			t.Fatalf("%+v, %v", resp, err)
		}
		after := f.Status()
		if a, w, e := f.Bounds(); a != first || w < watermark || e < end || after.Log.LastIndex < before.Log.LastIndex || after.Applied < before.Applied {
			t.Errorf("%s fell back: %+v, was %+v", id, after, before)
		}
		if f.gens.now.Load().number != 1 {
			t.Errorf("%s has replaced its log", id)
		}
	}
	all = append(all, c.append(200, 30, 20)...)
	for _, id := range c.ids {
		c.caughtUp(id)
		if err := checkAcked(c.nodes[id], all); err != nil {
			t.Errorf("%s: %v", id, err)
		}
		// A snapshot of the present, after the past was applied again.
		if err := c.nodes[id].raft.Snapshot().Error(); err != nil {
			t.Errorf("%s: %v", id, err)
		}
		c.stop(id)
		c.start(id)
	}
}

// TestInstallOverLongerLog: Raft does not notice that its log has become
// shorter; the replica has to be opened again.
func TestInstallOverLongerLog(t *testing.T) {
	c := newCluster(t, "a", "b", "c")
	c.tweak = func(_ string, cfg *Config) { cfg.EntriesInFlight = 1000 }
	c.bootstrap("a", "b", "c")
	all := c.append(1, 10, 20)
	for _, other := range c.ids {
		c.caughtUp(other)
	}
	var old *Replica
	var id string
	// It leads on for a moment after it has lost the others.
	for next := uint64(1) << 40; old == nil || old.gens.log().LastIndex() < old.applied.Load()+100; {
		if old != nil {
			c.heal(id)
		}
		old = c.leader()
		id = old.cfg.ID
		c.isolate(id)
		for range 400 {
			if _, err := old.Propose(t.Context(), batchOf(next, 40), true); err != nil {
				break
			}
			next++
		}
		eventually(t, "the old leader has given up", func() bool { return old.raft.State() != raft.Leader })
	}
	all = append(all, c.append(100, 40, 20)...)
	c.cutFront()
	if mine, theirs := old.gens.log().LastIndex(), c.leader().gens.log().LastIndex(); mine <= theirs {
		t.Fatalf("the log of the old leader ends at %d, that of the new one at %d", mine, theirs)
	}
	c.heal(id)
	<-old.Failed()
	if err := old.Err(); !errors.Is(err, ErrRestart) {
		t.Fatal(err)
	}
	c.stop(id)
	c.start(id)
	all = append(all, c.append(1000, 10, 20)...)
	c.caughtUp(id)
	c.same(c.leader().cfg.ID, id)
	r := c.nodes[id]
	first, _, _ := r.Bounds()
	if err := checkAcked(r, slices.DeleteFunc(all, func(a acked) bool { return a.ack.BaseOffset < first })); err != nil {
		t.Error(err)
	}
	if r.Err() != nil || r.gens.now.Load().number != 2 {
		t.Errorf("generation %d, %v", r.gens.now.Load().number, r.Err())
	}
}
