package replica

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore"
	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

// rot flips a bit in a record of the first segment of a replica.
func rot(t *testing.T, fs *vfstest.Mem) {
	t.Helper()
	for _, name := range fs.Names() {
		if strings.HasSuffix(name, "/00000000000000000001.log") {
			if err := fs.Mutate(name, func(b []byte) []byte { b[len(b)/2] ^= 1; return b }); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("there is no first segment")
}

// TestDamageEndsOneOfMany, however it is found; the others go on.
func TestDamageEndsOneOfMany(t *testing.T) {
	for _, how := range []string{"read", "raft", "scrub", "stream"} {
		t.Run(how, func(t *testing.T) {
			c := newCluster(t, "a", "b", "c")
			if how == "scrub" {
				c.tweak = func(_ string, cfg *Config) { cfg.ScrubInterval = 10 * time.Millisecond }
			}
			c.bootstrap("a", "b", "c")
			all := c.append(1, 30, 20)
			for _, id := range c.ids {
				c.caughtUp(id)
			}
			l := c.leader()
			id := l.cfg.ID
			r := l
			if how == "read" { // any replica
				id = map[string]string{"a": "b", "b": "c", "c": "a"}[id]
				r = c.nodes[id]
			}
			if how == "stream" {
				if err := r.snapshot(); err != nil {
					t.Fatal(err)
				}
			}
			rot(t, c.disks[id])
			switch how {
			case "read":
				_, _, err := readAll(r)
				var corrupt *logstore.CorruptError
				if !errors.As(err, &corrupt) {
					t.Errorf("read: %v", err)
				}
			case "raft":
				var out raft.Log
				for index := range uint64(15) {
					if didEnd(func() { _ = r.store.GetLog(index+1, &out) }) {
						break
					}
				}
			case "stream":
				metas, err := r.snapshots.List()
				if err != nil {
					t.Fatal(err)
				}
				if _, stream, err := r.snapshots.Open(metas[0].ID); err == nil {
					buf := make([]byte, 1000)
					for err == nil {
						_, err = stream.Read(buf)
					}
					if err := stream.Close(); err != nil {
						t.Error(err)
					}
				}
			}
			<-r.Failed()
			var corrupt *logstore.CorruptError
			if err := r.Err(); !errors.Is(err, ErrDamaged) || !errors.As(err, &corrupt) {
				t.Error(err)
			}
			if err := r.store.StoreLog(&raft.Log{}); err == nil {
				t.Error("it still stores")
			}
			c.stop(id)
			all = append(all, c.append(100, 5, 20)...)
			if err := checkAcked(c.leader(), all); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDamageAlone: where there is no other copy, what is whole is served.
func TestDamageAlone(t *testing.T) {
	fs := vfstest.New()
	cfg := memConfig("data", fs)
	cfg.ScrubInterval = 10 * time.Millisecond
	r := mustOpen(t, cfg)
	defer mustClose(t, r)
	for i := range uint64(30) {
		p := batchOf(i, 20)
		mustPropose(t, r, string(p.Records), p.Count)
	}
	rot(t, fs)
	var corrupt *logstore.CorruptError
	if _, _, err := readAll(r); !errors.As(err, &corrupt) {
		t.Errorf("read: %v", err)
	}
	<-time.After(50 * time.Millisecond) // the scrub has been there
	if r.Err() != nil {
		t.Error(r.Err())
	}
	ack := mustPropose(t, r, string(batchOf(100, 1).Records), 1)
	if _, err := r.Read(ack.BaseOffset, make([]byte, 64<<10), nil); err != nil {
		t.Error(err)
	}
}

// TestRejectedByFollower: entries of a leader's that do not continue the log end
// the replica, rather than being sent for ever.
func TestRejectedByFollower(t *testing.T) {
	for name, tc := range map[string]struct {
		log     func(last *raft.Log, next uint64) *raft.Log
		restart bool
	}{
		"index": {func(last *raft.Log, next uint64) *raft.Log {
			return command(last.Index+5, last.Term, next, 1, 1<<62, "x")
		}, true},
		"offset": {func(last *raft.Log, next uint64) *raft.Log {
			return command(last.Index+1, last.Term, next+1, 1, 1<<62, "x")
		}, false},
		"extensions": {func(last *raft.Log, _ uint64) *raft.Log {
			return &raft.Log{Index: last.Index + 1, Term: last.Term, Extensions: []byte("x")}
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			fs, _ := receiver(t)
			r, err := idle(t, fs)
			if err != nil {
				t.Fatal(err)
			}
			defer closeIdle(t, r)
			var last raft.Log
			if err := r.store.GetLog(r.gens.log().LastIndex(), &last); err != nil {
				t.Fatal(err)
			}
			if err := r.store.StoreLog(tc.log(&last, r.gens.NextOffset())); !errors.Is(err, logstore.ErrRejected) {
				t.Errorf("store: %v", err)
			}
			if err := r.Err(); err == nil || errors.Is(err, ErrRestart) != tc.restart {
				t.Errorf("replica: %v", err)
			}
		})
	}
}
