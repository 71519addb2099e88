package replica

import (
	"context"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/diurnalog/diurna/logstore/vfs"
)

// AppendEntriesPipeline implements raft.Transport.
func (t *transport) AppendEntriesPipeline(id raft.ServerID, a raft.ServerAddress) (raft.AppendPipeline, error) {
	inner, err := t.bulk.AppendEntriesPipeline(id, target(id, a))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(t.ctx)
	p := &pipeline{AppendPipeline: inner, now: t.contacts.now, ready: make(chan raft.AppendFuture, 1), closing: make(chan struct{}), cancel: cancel}
	t.work.Go(func() { p.run(func(last uint64) { t.contacts.note(string(id), last) }) })
	if t.committed != nil {
		t.work.Go(func() { p.tell(ctx, t.committed) })
	}
	return p, nil
}

// pipeline is Raft's way to a follower that keeps up. It ends Raft's goroutine
// that waits for answers also when the one that would tell it to end has ended
// itself, see watchedLog.GetLog: Raft could not be shut down otherwise. It tells
// the follower soon what is committed, see tell. And it does not repeat itself,
// see AppendEntries.
type pipeline struct {
	raft.AppendPipeline
	now     func() time.Time
	ready   chan raft.AppendFuture
	once    sync.Once
	closing chan struct{}
	cancel  context.CancelFunc // ends tell

	// mu is held while something is sent, by Raft or by tell.
	mu vfs.Mutex
	// last is what the last request said, sent at at; sender is that request
	// without what it said.
	last   said
	at     time.Time
	sender raft.AppendEntriesRequest
}

// said is what a request says of the log up to which it goes: the index and term
// of its last entry, or else of the one before, and what is committed. news tells
// that it had entries.
type said struct {
	term, index, indexTerm, commit uint64
	news                           bool
}

// repeatAfter is how often a pipeline says what it has said before.
const repeatAfter = 100 * time.Millisecond

// AppendEntries implements raft.AppendPipeline. A leader tells its followers
// every Config.CommitTimeout what is committed; of all these requests but the
// first it sends only a few on, because they say the same: else an idle server
// would be busy with them. Raft does not look at what is returned for a request,
// and waits for no answer to one without entries. That a leader lives, its
// heartbeats say, which go another way.
func (p *pipeline) AppendEntries(req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	says := said{term: req.Term, index: req.PrevLogEntry, indexTerm: req.PrevLogTerm, commit: req.LeaderCommitIndex}
	if n := len(req.Entries); n > 0 {
		says.index, says.indexTerm, says.news = req.Entries[n-1].Index, req.Entries[n-1].Term, true
	} else if says == p.last && now.Sub(p.at) < repeatAfter {
		return refused{}, nil
	}
	p.last, p.at = says, now
	p.sender = raft.AppendEntriesRequest{RPCHeader: req.RPCHeader, Term: req.Term}
	return p.AppendPipeline.AppendEntries(req, resp)
}

// tellAfter is how long tell waits for Raft to say something anyway.
const tellAfter = 2 * time.Millisecond

// tell tells the follower that entries which it has been sent are committed.
// Raft itself says so with the next entries, or else after Config.CommitTimeout,
// for which an idle server would have to wake up all the time. What is sent is
// what Raft would send then: that the last entry is of this index and term, and
// that entries up to this one are committed. It follows the entry on the same
// stream.
func (p *pipeline) tell(ctx context.Context, committed *watermark) {
	defer p.cancel()
	for told := uint64(0); committed.wait(ctx, told) == nil; {
		timer := time.NewTimer(tellAfter)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		told = committed.load()
		if p.say(told) != nil {
			return // Raft finds out as well
		}
	}
}

// say sends what is committed, unless that was said.
func (p *pipeline) say(committed uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	known := min(p.last.commit, p.last.index)
	if p.last.term == 0 || min(committed, p.last.index) <= known {
		return nil
	}
	req := p.sender
	req.PrevLogEntry, req.PrevLogTerm, req.LeaderCommitIndex = p.last.index, p.last.indexTerm, committed
	p.last.commit, p.last.news, p.at = committed, false, p.now()
	_, err := p.AppendPipeline.AppendEntries(&req, new(raft.AppendEntriesResponse))
	return err
}
func (p *pipeline) run(heard func(last uint64)) {
	for {
		select {
		case f := <-p.AppendPipeline.Consumer():
			if f.Response().Success {
				heard(f.Request().PrevLogEntry + uint64(len(f.Request().Entries)))
			}
			select {
			case p.ready <- f:
				continue
			case <-p.closing:
			}
		case <-p.closing:
		}
		select {
		case <-p.ready:
		default:
		}
		p.ready <- refused{}
		return
	}
}

// Consumer implements raft.AppendPipeline.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.ready }

// Close implements raft.AppendPipeline.
func (p *pipeline) Close() error {
	p.once.Do(func() {
		close(p.closing)
		p.cancel()
	})
	return p.AppendPipeline.Close()
}

// refused is an answer that ends a pipeline.
type refused struct{ raft.AppendFuture }

func (refused) Start() time.Time                      { return time.Time{} }
func (refused) Error() error                          { return nil }
func (refused) Request() *raft.AppendEntriesRequest   { return &raft.AppendEntriesRequest{} }
func (refused) Response() *raft.AppendEntriesResponse { return &raft.AppendEntriesResponse{} }
