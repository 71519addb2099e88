package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/discovery/discoverytest"
	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/replica"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
	"github.com/diurnalog/diurna/rpc"
)

// someSnapshot is one of a small log.
func someSnapshot(t *testing.T) []byte {
	t.Helper()
	r, err := replica.Open(replica.Config{
		Dir: "data", FS: vfstest.New(), ID: "a", Address: "a:1", ClusterID: "c", SegmentSize: logstore.MinSegmentSize, Bootstrap: []replica.Server{{ID: "a", Address: "a:1"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	if err := r.WaitReady(within(t)); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		p, err := r.Propose(within(t), replica.Proposal{Records: []byte("some bytes"), Count: 2}, true)
		if err != nil {
			t.Fatal(err)
		}
		<-p.Done()
		if _, err := p.Result(); err != nil {
			t.Fatal(err)
		}
	}
	s, err := r.Save(within(t), replica.SavedInfo{NodeID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(s)
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	return b
}

// crashedDisk is a disk as a crash left it.
type crashedDisk struct {
	when string
	disk *vfstest.Mem
}

// crashAt collects disks as crashes at every step of f would leave them.
func crashAt(t *testing.T, disk *vfstest.Mem, f func()) (crashed []crashedDisk) {
	t.Helper()
	rng := vfstest.Rand(t)
	disk.SetHook(func(op vfstest.Op) error {
		for _, survive := range []vfstest.Survival{vfstest.None, vfstest.Some, vfstest.All} {
			crashed = append(crashed, crashedDisk{fmt.Sprintf("crash before %v, %v survives", op, survive), disk.CrashClone(rng, survive)})
		}
		return nil
	})
	f()
	disk.SetHook(nil)
	return append(crashed, crashedDisk{"no crash", disk})
}

// TestRestoreInterrupted: a restore that a crash interrupts leaves nothing that a
// node would start with, and can be done again; or it was complete.
func TestRestoreInterrupted(t *testing.T) {
	saved := someSnapshot(t)
	disk := vfstest.New()
	again := 0
	for _, c := range crashAt(t, disk, func() {
		if _, _, err := restore(t.Context(), disk, "n", bytes.NewReader(saved)); err != nil {
			t.Fatal(err)
		}
	}) {
		s, err := openStopped(c.disk, "n")
		if err != nil {
			// A node that starts here finds nothing, or refuses.
			if d, err := openDataDir(c.disk.CrashClone(vfstest.Rand(t), vfstest.All), "n"); err == nil {
				if d.identity().cluster != "" {
					t.Errorf("%s: a node starts with %+v", c.when, d.identity())
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
			if _, _, err := restore(t.Context(), c.disk, "n", bytes.NewReader(saved)); err != nil {
				t.Errorf("%s: not restored again: %v", c.when, err)
				continue
			}
			again++
			if s, err = openStopped(c.disk, "n"); err != nil {
				t.Errorf("%s: %v", c.when, err)
				continue
			}
		}
		h, err := s.survey()
		if err != nil || h.NextOffset != 10 || h.ClusterID == "" || h.ClusterID != s.data.identity().cluster {
			t.Errorf("%s: restored %+v, %v", c.when, h, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if again < 20 {
		t.Errorf("it was done again %d times", again)
	}
}

// TestRecoverInterrupted: wherever a crash interrupts a recovery, the node is what
// it was, or does not start until the recovery was done again.
func TestRecoverInterrupted(t *testing.T) {
	disk := vfstest.New()
	id, _, err := restore(t.Context(), disk, "n", bytes.NewReader(someSnapshot(t)))
	if err != nil {
		t.Fatal(err)
	}
	recoverNode := func(disk *vfstest.Mem) error {
		s, err := openStopped(disk, "n")
		if err != nil {
			return err
		}
		h, err := s.survey()
		if err == nil {
			_, err = s.recover(&h)
		}
		return errors.Join(err, s.Close())
	}
	refused := 0
	for _, c := range crashAt(t, disk, func() {
		if err := recoverNode(disk); err != nil {
			t.Fatal(err)
		}
	}) {
		now := id
		d, err := openDataDir(c.disk, "n")
		switch {
		case err == nil:
			now = d.identity()
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		case strings.Contains(err.Error(), "a recovery was begun and not finished"):
			refused++
		default:
			t.Errorf("%s: %v", c.when, err)
		}
		if err == nil {
			h, err := replica.Survey(replica.Config{Dir: "n/logs/" + rpc.DefaultLog, FS: c.disk, ID: id.node, Address: nowhere(id.node)})
			if err != nil || h.ClusterID != now.cluster {
				t.Errorf("%s: the node is of %s, its log of %s, %v", c.when, now.cluster, h.ClusterID, err)
			}
			if now.cluster != id.cluster {
				continue // done
			}
		}
		if err := recoverNode(c.disk); err != nil {
			t.Errorf("%s: not done again: %v", c.when, err)
			continue
		}
		s, err := openStopped(c.disk, "n")
		if err != nil {
			t.Fatal(err)
		}
		h, err := s.survey()
		if got := s.data.identity(); err != nil || s.plan != nil || h.ClusterID != got.cluster || h.Supersedes != id.cluster || got.node != id.node || h.NextOffset != 10 {
			t.Errorf("%s: %+v, %+v, %v", c.when, got, h, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if refused < 10 {
		t.Errorf("the node was refused to start %d times", refused)
	}
}

// TestFullest: which survivor to keep.
func TestFullest(t *testing.T) {
	s := func(id string, term, index uint64) survivor {
		return survivor{NodeID: id, ClusterID: "c", LastTerm: term, LastIndex: index}
	}
	for _, tc := range []struct {
		all  []survivor
		want string
		same int
	}{
		{[]survivor{s("a", 2, 10), s("b", 2, 11)}, "b", 1},
		{[]survivor{s("a", 3, 10), s("b", 2, 11)}, "a", 1},
		{[]survivor{s("b", 3, 10), s("a", 3, 10), s("c", 1, 99)}, "a", 2},
	} {
		for range 2 {
			best, same, err := fullest(tc.all)
			if err != nil || best.NodeID != tc.want || same != tc.same {
				t.Errorf("%+v: %s, %d, %v", tc.all, best.NodeID, same, err)
			}
			slices.Reverse(tc.all)
		}
	}
	other := s("z", 9, 9)
	other.ClusterID = "d"
	if _, _, err := fullest([]survivor{s("a", 1, 1), other}); err == nil {
		t.Error("nodes of two clusters were compared")
	}
}

// TestCloseRecord: what the leader makes of the registry's record of the founding.
func TestCloseRecord(t *testing.T) {
	servers := []replica.Server{{ID: "n", Address: "n:1"}}
	written := func(cluster string, done bool) founding {
		return founding{ClusterID: cluster, Servers: []founder{{ID: "x", Address: "x:1"}}, Done: done}
	}
	ours := founding{ClusterID: "new", Servers: []founder{{ID: "n", Address: "n:1"}}, Done: true}
	for name, tc := range map[string]struct {
		before *founding
		want   founding
	}{
		"none":                         {nil, ours},
		"ours":                         {new(written("new", false)), written("new", true)},
		"ours, done":                   {new(written("new", true)), written("new", true)},
		"of the one before":            {new(written("old", true)), ours},
		"of the one before, not done":  {new(written("old", false)), ours},
		"of another cluster":           {new(written("other", true)), written("other", true)},
		"of another cluster, not done": {new(written("other", false)), written("other", false)},
	} {
		t.Run(name, func(t *testing.T) {
			record := discoverytest.NewRegistry().New("c").Bootstrap()
			if tc.before != nil {
				b, err := json.Marshal(tc.before)
				if err == nil {
					_, err = record.Create(t.Context(), b)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				if err := closeRecord(t.Context(), record, "new", "old", servers); err != nil {
					t.Fatal(err)
				}
			}
			b, _, err := record.Get(t.Context())
			var got founding
			if err := errors.Join(err, json.Unmarshal(b, &got)); err != nil || !reflect.DeepEqual(got, tc.want) {
				t.Errorf("it is %+v, %v; want %+v", got, err, tc.want)
			}
		})
	}
}

// TestSuperseded: who is left over from a cluster that was recovered elsewhere, and
// who only sees that somebody claims so.
func TestSuperseded(t *testing.T) {
	disk := vfstest.New()
	data, err := openDataDir(disk, "n")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := data.Close(); err != nil {
			t.Error(err)
		}
	}()
	const ours, heir = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
	m := &membership{data: data, logger: hclog.NewNullLogger(), self: func() discovery.Node { return discovery.Node{ID: data.nodeID(), Cluster: "c"} }}
	claim := answer{status: rpc.NodeStatus{NodeID: "h", Cluster: "c", ClusterID: heir, Supersedes: ours, State: "member"}}
	if err := m.superseded([]answer{claim}, nil); err != nil {
		t.Errorf("a node without a cluster: %v", err)
	}
	if err := data.join(ours); err != nil {
		t.Fatal(err)
	}
	changed := func(change func(*answer)) answer {
		a := claim
		change(&a)
		return a
	}
	led := []replica.Server{{ID: "l", Leader: true}}
	mate := func(leader string) answer {
		return answer{status: rpc.NodeStatus{NodeID: "m", Cluster: "c", ClusterID: ours, State: "member", LeaderID: leader}}
	}
	for name, tc := range map[string]struct {
		answers []answer
		servers []replica.Server
		want    bool
	}{
		"nobody":                          {nil, nil, false},
		"an heir":                         {[]answer{claim}, nil, true},
		"an heir, and one like ourselves": {[]answer{mate(""), claim}, nil, true},
		"we have a leader":                {[]answer{claim}, led, false},
		"another of ours has a leader":    {[]answer{claim, mate("l")}, nil, false},
		"an heir of others":               {[]answer{changed(func(a *answer) { a.status.Supersedes = heir })}, nil, false},
		"another cluster's name":          {[]answer{changed(func(a *answer) { a.status.Cluster = "d" })}, nil, false},
		"one that was removed":            {[]answer{changed(func(a *answer) { a.status.State = "removed" })}, nil, false},
		"one that does not answer":        {[]answer{changed(func(a *answer) { a.err = errors.New("no") })}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			if err := m.superseded(tc.answers, tc.servers); errors.Is(err, ErrSuperseded) != tc.want || (err != nil) != tc.want {
				t.Errorf("got %v", err)
			}
		})
	}
}
