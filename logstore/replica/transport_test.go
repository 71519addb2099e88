package replica

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// testTransports are of two servers that are connected, with nobody behind
// them.
func testTransports(t *testing.T) (n *memNetwork, a, b *transport) {
	n = newMemNetwork()
	of := func(id string) *transport {
		cfg := testConfig(t, "x")
		cfg.ID, cfg.Address, cfg.Network = id, id+":1", n.listen(id)
		cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout = 2*time.Second, 2*time.Second, time.Second
		if err := cfg.applyDefaultsAndValidate(); err != nil {
			t.Fatal(err)
		}
		return newTransport(&cfg)
	}
	return n, of("a"), of("b")
}

func closeTransports(t *testing.T, all ...*transport) {
	t.Helper()
	for _, tr := range all {
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
		tr.wait()
	}
}

// answer gives a fixed answer to all requests, and keeps them.
func answer(tr *transport, resp any) <-chan raft.RPC {
	seen := make(chan raft.RPC, 100)
	go func() {
		for {
			select {
			case rpc := <-tr.Consumer():
				if rpc.Reader != nil {
					b, err := io.ReadAll(rpc.Reader)
					if err != nil {
						rpc.Respond(nil, err)
						continue
					}
					rpc.Reader = bytes.NewReader(b)
				}
				seen <- rpc
				rpc.Respond(resp, nil)
			case <-tr.ctx.Done():
				return
			}
		}
	}()
	return seen
}

// TestRequests go to the server with the id, by way of its address.
func TestRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := testTransports(t)
		defer closeTransports(t, a, b)
		seen := answer(b, &raft.AppendEntriesResponse{Term: 3, LastLog: 7, Success: true})
		req := &raft.AppendEntriesRequest{Term: 3, PrevLogEntry: 1, PrevLogTerm: 1, LeaderCommitIndex: 1,
			Entries: []*raft.Log{{Index: 2, Term: 3, Data: bytes.Repeat([]byte("x"), 2<<20), Extensions: []byte("e")}}}
		var resp raft.AppendEntriesResponse
		if err := a.AppendEntries("b", "b:1", req, &resp); err != nil {
			t.Fatal(err)
		}
		got := (<-seen).Command.(*raft.AppendEntriesRequest)
		if !bytes.Equal(got.Entries[0].Data, req.Entries[0].Data) || resp.LastLog != 7 {
			t.Errorf("%+v, %+v", got, resp)
		}
		if c, ok := a.contacts.get("b"); !ok || c.last != 7 {
			t.Errorf("contact %+v", c)
		}
		if err := a.AppendEntries("z", "b:1", req, &resp); err == nil || !strings.Contains(err.Error(), "no server z") {
			t.Errorf("unknown id: %v", err)
		}
		if a.LocalAddr() != "a:1" || string(a.EncodePeer("a", "a:1")) != "a:1" {
			t.Error(a.LocalAddr())
		}
		p, err := a.AppendEntriesPipeline("b", "b:1")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.AppendEntries(req, &resp); err != nil {
			t.Error(err)
		}
		<-p.Consumer()
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestPipelineDoesNotRepeat: what an idle leader says again and again is sent
// now and then, and what is new at once.
func TestPipelineDoesNotRepeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := testTransports(t)
		defer closeTransports(t, a, b)
		seen := answer(b, &raft.AppendEntriesResponse{Term: 3, Success: true})
		p, err := a.AppendEntriesPipeline("b", "b:1")
		if err != nil {
			t.Fatal(err)
		}
		send := func(what string, commit uint64, entries []*raft.Log, sent bool) {
			t.Helper()
			req := &raft.AppendEntriesRequest{Term: 3, PrevLogEntry: 4, PrevLogTerm: 2, LeaderCommitIndex: commit, Entries: entries}
			if _, err := p.AppendEntries(req, new(raft.AppendEntriesResponse)); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			synctest.Wait()
			if got := len(seen) == 1; got != sent {
				t.Errorf("%s: sent %v", what, got)
			}
			if len(seen) > 0 {
				<-seen
				<-p.Consumer()
			}
		}
		entry := []*raft.Log{{Index: 5, Term: 3}}
		send("the first", 3, nil, true)
		send("the same", 3, nil, false)
		send("another commit index", 4, nil, true)
		send("the same again", 4, nil, false)
		time.Sleep(repeatAfter)
		send("the same, later", 4, nil, true)
		send("the same, soon after", 4, nil, false)
		send("entries", 4, entry, true)
		send("the same entries", 4, entry, true)
		send("the same, after entries", 4, nil, true)
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestTarget: an id may hold anything.
func TestTarget(t *testing.T) {
	for _, id := range []raft.ServerID{"", "a", "a@b", "0d5f:1"} {
		if got, address := splitTarget(target(id, "[::1]:8400")); got != string(id) || address != "[::1]:8400" {
			t.Errorf("%q becomes %q, %q", id, got, address)
		}
	}
}

// TestMend: no request commits more than it verifies, and none that would end
// in a panic of Raft's reaches it.
func TestMend(t *testing.T) {
	entry := func(index, term uint64, typ raft.LogType, data string) *raft.Log {
		return &raft.Log{Index: index, Term: term, Type: typ, Data: []byte(data)}
	}
	for name, tc := range map[string]struct {
		req    raft.AppendEntriesRequest
		commit uint64
		bad    bool
	}{
		"heartbeat":      {raft.AppendEntriesRequest{Term: 2}, 0, false},
		"verified":       {raft.AppendEntriesRequest{Term: 2, PrevLogEntry: 4, Entries: []*raft.Log{entry(5, 2, raft.LogCommand, "")}, LeaderCommitIndex: 5}, 5, false},
		"beyond entries": {raft.AppendEntriesRequest{Term: 2, PrevLogEntry: 4, Entries: []*raft.Log{entry(5, 2, raft.LogNoop, "")}, LeaderCommitIndex: 9}, 5, false},
		"beyond none":    {raft.AppendEntriesRequest{Term: 2, PrevLogEntry: 4, LeaderCommitIndex: 9}, 4, false},
		"below":          {raft.AppendEntriesRequest{Term: 2, PrevLogEntry: 4, LeaderCommitIndex: 3}, 3, false},
		"nil entry":      {raft.AppendEntriesRequest{Term: 2, Entries: []*raft.Log{nil}}, 0, true},
		"a gap":          {raft.AppendEntriesRequest{Term: 2, Entries: []*raft.Log{entry(2, 1, 0, "")}}, 0, true},
		"later term":     {raft.AppendEntriesRequest{Term: 2, Entries: []*raft.Log{entry(1, 3, 0, "")}}, 0, true},
		"unknown type":   {raft.AppendEntriesRequest{Term: 2, Entries: []*raft.Log{entry(1, 1, 77, "")}}, 0, true},
		"configuration":  {raft.AppendEntriesRequest{Term: 2, Entries: []*raft.Log{entry(1, 1, raft.LogConfiguration, "\xff")}}, 0, true},
	} {
		n := len(tc.req.Entries)
		err := mend(&tc.req)
		if (err != nil) != tc.bad || !tc.bad && tc.req.LeaderCommitIndex != tc.commit || len(tc.req.Entries) != n {
			t.Errorf("%s: %v, commit %d", name, err, tc.req.LeaderCommitIndex)
		}
	}
}

// TestUnverifiedTail shows what the clamp prevents: a follower whose log ends in
// entries of an old leader's, which nobody committed, is told of a commit index
// behind them by a request that verifies less. Raft takes its own last entry
// for the one that is meant.
func TestUnverifiedTail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 1, nil)
		defer g.stop()
		peer := g.net.listen("b")
		cfg := testConfig(t, "x")
		cfg.ID, cfg.Address, cfg.Network = "b", "b:1", peer
		if err := cfg.applyDefaultsAndValidate(); err != nil {
			t.Fatal(err)
		}
		b := newTransport(&cfg)
		defer closeTransports(t, b)
		// A server that never had a configuration stands for no election.
		f := g.start("f")
		header := raft.RPCHeader{ProtocolVersion: 3, ID: []byte("b"), Addr: []byte("b:1")}
		send := func(req raft.AppendEntriesRequest) {
			t.Helper()
			req.RPCHeader = header
			var resp raft.AppendEntriesResponse
			if err := b.AppendEntries("f", "f:1", &req, &resp); err != nil || !resp.Success {
				t.Fatalf("%v, %+v", err, resp)
			}
		}
		var tail []*raft.Log
		for i := range uint64(10) {
			tail = append(tail, &raft.Log{Index: i + 1, Term: 1, Extensions: encodeExtensions(i, 1, 1), Data: []byte("x")})
		}
		send(raft.AppendEntriesRequest{Term: 1, Entries: tail})
		// The next leader knows of eight, and has committed two others behind them.
		send(raft.AppendEntriesRequest{Term: 2, PrevLogEntry: 8, PrevLogTerm: 1, LeaderCommitIndex: 10})
		synctest.Wait()
		if got := f.applied.Load(); got != 8 {
			t.Errorf("applied up to %d; the leader's log was found to agree up to 8", got)
		}
	})
}

// TestSerialHeartbeats shows what ignoring the heartbeat handler prevents: a
// heartbeat that is taken while the main goroutine is busy. With the handler it
// raises the term under the hands of a leader that is writing entries, which
// then bear the term of the leader that sent it.
func TestSerialHeartbeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := testTransports(t)
		defer closeTransports(t, a, b)
		beside := false
		b.SetHeartbeatHandler(func(rpc raft.RPC) {
			beside = true
			rpc.Respond(&raft.AppendEntriesResponse{}, nil)
		})
		seen := answer(b, &raft.AppendEntriesResponse{})
		req := &raft.AppendEntriesRequest{RPCHeader: raft.RPCHeader{Addr: []byte("a:1")}, Term: 9}
		if err := a.AppendEntries("b", "b:1", req, &raft.AppendEntriesResponse{}); err != nil {
			t.Fatal(err)
		}
		if len(seen) != 1 || beside {
			t.Errorf("a heartbeat went past the main goroutine")
		}
	})
}

// rawStream opens a stream past the transport.
func rawStream(t *testing.T, n *memNetwork, kind byte) net.Conn {
	t.Helper()
	c, err := n.listen("x").Dial(t.Context(), "b", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte{kind}); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestGarbage: whatever a peer sends costs no more memory than a message may
// have, and ends its stream at the latest there.
func TestGarbage(t *testing.T) {
	endless := func(c net.Conn) {
		block := make([]byte, 64<<10)
		for range 64 << 20 / len(block) {
			if _, err := c.Write(block); err != nil {
				return
			}
		}
	}
	for name, tc := range map[string]struct {
		kind byte
		send []byte
	}{
		"unknown kind":       {'x', nil},
		"unknown request":    {streamRPC, []byte{99}},
		"not msgpack":        {streamRPC, []byte{0, 0xc1}},
		"a field of 4 GiB":   {streamRPC, append([]byte{0, 0x81, 0xa6}, "Leader\xc6\xff\xff\xff\xff"...)},
		"4 billion entries":  {streamRPC, append([]byte{0, 0x81, 0xa7}, "Entries\xdd\xff\xff\xff\xff"...)},
		"an unknown field":   {streamRPC, append([]byte{1, 0x81, 0xa1}, "x\xc6\xff\xff\xff\xff"...)},
		"a snapshot":         {streamSnapshot, binary.LittleEndian.AppendUint32(nil, maxSnapshotHeader+1)},
		"a snapshot's JSON":  {streamSnapshot, []byte{2, 0, 0, 0, '{', 'x'}},
		"a snapshot as RPC":  {streamRPC, append([]byte{2, 0x81, 0xad}, "Configuration\xc6\xff\xff\xff\xff"...)},
		"nothing but zeroes": {streamRPC, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n, a, b := testTransports(t)
				defer closeTransports(t, a, b)
				b.requestBytes = 2 << 20 // the real limit takes long
				seen := answer(b, &raft.AppendEntriesResponse{})
				c := rawStream(t, n, tc.kind)
				defer c.Close()
				var before, after runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&before)
				if _, err := c.Write(tc.send); err == nil {
					endless(c)
				}
				synctest.Wait()
				runtime.GC()
				runtime.ReadMemStats(&after)
				if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 24<<20 {
					t.Errorf("the heap grew by %d MiB and stayed", grown>>20)
				}
				if _, err := c.Read(make([]byte, 1)); err == nil && tc.kind == streamRPC && len(tc.send) > 0 {
					t.Error("the stream goes on")
				}
				for len(seen) > 0 {
					if rpc := <-seen; len(rpc.Command.(*raft.AppendEntriesRequest).Entries) > 0 {
						t.Errorf("%+v", rpc.Command)
					}
				}
			})
		})
	}
}

// TestSnapshotStream brings a snapshot over, with what Raft says to it.
func TestSnapshotStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := testTransports(t)
		defer closeTransports(t, a, b)
		seen := answer(b, &raft.InstallSnapshotResponse{Term: 4, Success: true})
		data := bytes.Repeat([]byte("snapshot"), 1<<20)
		configuration := raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "a:1"}}})
		req := &raft.InstallSnapshotRequest{
			RPCHeader: raft.RPCHeader{ProtocolVersion: 3, ID: []byte("a"), Addr: []byte("a:1")}, SnapshotVersion: 1, Term: 4,
			LastLogIndex: 9, LastLogTerm: 3, Configuration: configuration, ConfigurationIndex: 2, Size: int64(len(data)),
		}
		var resp raft.InstallSnapshotResponse
		// What is behind the size is not sent.
		if err := a.InstallSnapshot("b", "b:1", req, &resp, bytes.NewReader(append(data, "and more"...))); err != nil || !resp.Success || resp.Term != 4 {
			t.Fatalf("%v, %+v", err, resp)
		}
		rpc := <-seen
		got := rpc.Command.(*raft.InstallSnapshotRequest)
		b2, err := io.ReadAll(rpc.Reader)
		if err != nil || !bytes.Equal(b2, data) || got.Term != 4 || string(got.ID) != "a" || !bytes.Equal(got.Configuration, configuration) {
			t.Errorf("%v, %d bytes, %+v", err, len(b2), got)
		}
		if err := a.InstallSnapshot("b", "b:1", req, &resp, bytes.NewReader(data[1:])); !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("too little: %v", err)
		}
		req.Configuration = []byte{0xff}
		if err := a.InstallSnapshot("b", "b:1", req, &resp, bytes.NewReader(data)); err == nil {
			t.Error("a configuration that Raft cannot decode")
		}
	})
}

// TestSnapshotStalls: a stream without progress ends, on both sides, wherever
// it stands still, and one that is slow does not.
func TestSnapshotStalls(t *testing.T) {
	configuration := raft.EncodeConfiguration(raft.Configuration{})
	for name, tc := range map[string]struct {
		size int64
		act  func(n *memNetwork, at int64)
		slow bool
	}{
		"sender stops":   {8 << 20, func(n *memNetwork, _ int64) { <-time.After(time.Hour) }, false},
		"network is cut": {8 << 20, func(n *memNetwork, _ int64) { n.set("a", "b", true); n.set("b", "a", true) }, false},
		"slow":           {1 << 20, func(n *memNetwork, at int64) { <-time.After(25 * time.Second) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n, a, b := testTransports(t)
				defer closeTransports(t, a, b)
				ended, began := make(chan error, 1), make(chan struct{})
				go func() {
					rpc := <-b.Consumer()
					close(began)
					_, err := io.Copy(io.Discard, rpc.Reader)
					ended <- err
					rpc.Respond(&raft.InstallSnapshotResponse{Success: err == nil}, err)
				}()
				begin := time.Now()
				req := &raft.InstallSnapshotRequest{SnapshotVersion: 1, Configuration: configuration, Size: tc.size}
				sent := make(chan error, 1)
				go func() {
					sent <- a.InstallSnapshot("b", "b:1", req, &raft.InstallSnapshotResponse{}, &pausing{size: tc.size, act: func(at int64) { <-began; tc.act(n, at) }})
				}()
				err := <-ended
				if took := time.Since(begin); tc.slow != (err == nil || err == io.EOF) && !tc.slow && took > 2*a.stall {
					t.Errorf("%v after %v", err, took)
				}
				if tc.slow && err != nil {
					t.Errorf("slow: %v", err)
				}
				if err := <-sent; (err == nil) != tc.slow {
					t.Errorf("sender: %v", err)
				}
			})
		})
	}
}

// pausing is data that calls act before each part of 256 KiB but the first.
type pausing struct {
	size, at int64
	act      func(at int64)
}

func (p *pausing) Read(b []byte) (int, error) {
	if p.at == p.size {
		return 0, io.EOF
	}
	if p.at > 0 {
		p.act(p.at)
	}
	n := min(int64(len(b)), 256<<10, p.size-p.at)
	p.at += n
	return int(n), nil
}

// TestTransportClose ends streams and calls that wait, both ways.
func TestTransportClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := testTransports(t)
		defer closeTransports(t, a)
		called := make(chan error, 1)
		go func() {
			called <- a.AppendEntries("b", "b:1", &raft.AppendEntriesRequest{Term: 1}, &raft.AppendEntriesResponse{})
		}()
		<-b.Consumer() // and no answer
		out := make(chan error, 1)
		go func() {
			out <- b.AppendEntries("a", "a:1", &raft.AppendEntriesRequest{Term: 1}, &raft.AppendEntriesResponse{})
		}()
		<-a.Consumer()
		idle := rawStream(t, n, streamRPC)
		closeTransports(t, b)
		if err := <-called; err == nil {
			t.Error("an answer from a closed transport")
		}
		if err := <-out; err == nil {
			t.Error("an answer to a closed transport")
		}
		if _, err := idle.Read(make([]byte, 1)); err == nil {
			t.Error("a stream goes on")
		}
		if err := b.AppendEntries("a", "a:1", &raft.AppendEntriesRequest{Term: 1}, &raft.AppendEntriesResponse{}); err == nil {
			t.Error("a call through a closed transport")
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := n.listen("y").Dial(ctx, "b", ""); err == nil {
			t.Error("a stream to a closed transport")
		}
	})
}
