package replica

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// TestPipelineTells: a follower is told what is committed of what it was sent,
// soon, once, and not where Raft does so itself.
func TestPipelineTells(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := testTransports(t)
		defer closeTransports(t, a, b)
		var committed watermark
		defer committed.close()
		a.committed = &committed
		seen := answer(b, &raft.AppendEntriesResponse{Term: 3, Success: true})
		p, err := a.AppendEntriesPipeline("b", "b:1")
		if err != nil {
			t.Fatal(err)
		}
		send := func(prev, term, commit uint64, entries ...*raft.Log) {
			t.Helper()
			req := &raft.AppendEntriesRequest{Term: 3, PrevLogEntry: prev, PrevLogTerm: term, LeaderCommitIndex: commit, Entries: entries}
			if _, err := p.AppendEntries(req, new(raft.AppendEntriesResponse)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		heard := func(what string, prev, term, commit uint64) {
			t.Helper()
			synctest.Wait()
			select {
			case rpc := <-seen:
				<-p.Consumer()
				r := rpc.Command.(*raft.AppendEntriesRequest)
				if r.PrevLogEntry != prev || r.PrevLogTerm != term || r.LeaderCommitIndex != commit || r.Term != 3 {
					t.Errorf("%s: got %+v", what, r)
				}
			default:
				t.Errorf("%s: nothing was sent", what)
			}
		}
		silent := func(what string) {
			t.Helper()
			time.Sleep(repeatAfter / 2)
			synctest.Wait()
			if len(seen) > 0 {
				t.Errorf("%s: sent %+v", what, (<-seen).Command)
				<-p.Consumer()
			}
		}
		committed.advance(3)
		silent("before Raft has said who it is")
		send(4, 2, 3, &raft.Log{Index: 5, Term: 3}, &raft.Log{Index: 6, Term: 3})
		heard("entries", 4, 2, 3)
		committed.advance(6)
		time.Sleep(tellAfter)
		heard("that they are committed", 6, 3, 6)
		silent("again")
		send(6, 3, 6)
		silent("what Raft then says, which is the same")
		committed.advance(9)
		silent("what is committed and was not sent")
		send(6, 3, 6, &raft.Log{Index: 7, Term: 3})
		heard("an entry", 6, 3, 6)
		silent("what was committed before it was sent, which the next request says")
		send(7, 3, 9)
		heard("what Raft says, as far as it is verified", 7, 3, 7)
		committed.advance(10)
		silent("what is committed beyond what was sent")
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestFollowersHearAtOnce: readers of an idle follower do not wait for the
// commit timeout.
func TestFollowersHearAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, func(c *Config) { c.CommitTimeout = time.Second })
		defer g.stop()
		ctx, cancel := g.within(20)
		defer cancel()
		leader := g.leader(ctx)
		time.Sleep(10 * time.Second) // now there are pipelines
		for range 5 {
			mustPropose(t, leader, "x", 1)
			_, next, _ := leader.Bounds()
			for _, id := range g.others(leader.cfg.ID) {
				ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
				if err := g.nodes[id].WaitReadable(ctx, next-1); err != nil {
					t.Errorf("%s does not see what the leader has acknowledged: %v", id, err)
				}
				cancel()
			}
			time.Sleep(3 * time.Second)
		}
	})
}
