package replica

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/hashicorp/raft"
)

// A snapshot has a stream of its own. The leader sends
//
//	length  4 bytes, little endian
//	header  that much JSON: raft.InstallSnapshotRequest
//	data    header.Size bytes
//
// and the other one answers
//
//	working  a zero byte from time to time, while it takes it in
//	done     a one, the length of what follows, and snapshotAnswer as JSON
//
// A side that hears nothing for the stall timeout, or whose data nobody takes
// for that long, ends the stream: Raft itself would wait for as long as a
// slow network might need for the whole. Raft's receiver can neither vote nor
// append in the meantime, so that a stream that hangs must not last.
const maxSnapshotHeader = 1 << 20

var errStreamStalled = errors.New("the stream of a snapshot made no progress")

// snapshotAnswer is what became of a snapshot.
type snapshotAnswer struct {
	raft.InstallSnapshotResponse
	Error string `json:",omitempty"`
}

// guarded is a connection whose every read and write must be done in time. It
// needs no clock of the machine's.
type guarded struct {
	net.Conn
	stall time.Duration
}

func (g guarded) timed(op func([]byte) (int, error), p []byte) (int, error) {
	late := time.AfterFunc(g.stall, func() { _ = g.Close() })
	n, err := op(p)
	if !late.Stop() && err != nil {
		err = fmt.Errorf("%w for %v (%w)", errStreamStalled, g.stall, err)
	}
	return n, err
}

func (g guarded) Read(p []byte) (int, error)  { return g.timed(g.Conn.Read, p) }
func (g guarded) Write(p []byte) (int, error) { return g.timed(g.Conn.Write, p) }

// InstallSnapshot implements raft.Transport.
func (t *transport) InstallSnapshot(id raft.ServerID, a raft.ServerAddress, req *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) (err error) {
	s, err := t.dial(streamSnapshot, target(id, a), t.dialTimeout)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	g := guarded{s.Conn, t.stall}
	if err := writeMessage(g, nil, req); err != nil {
		return err
	}
	if n, err := io.CopyBuffer(struct{ io.Writer }{g}, io.LimitReader(data, req.Size), make([]byte, 256<<10)); err != nil || n != req.Size {
		return fmt.Errorf("sent %d of %d bytes of the snapshot: %w", n, req.Size, errors.Join(err, io.ErrShortWrite))
	}
	for {
		var mark [1]byte
		if _, err := io.ReadFull(g, mark[:]); err != nil {
			return err
		}
		if mark[0] == 0 {
			continue
		}
		var answer snapshotAnswer
		if err := readMessage(g, &answer); err != nil {
			return err
		}
		*resp = answer.InstallSnapshotResponse
		if answer.Error != "" {
			return errors.New(answer.Error)
		}
		return nil
	}
}

// receiveSnapshot gives a snapshot's stream to Raft and answers it.
func (t *transport) receiveSnapshot(s *stream) error {
	g := guarded{s.Conn, t.stall}
	var req raft.InstallSnapshotRequest
	if err := readMessage(g, &req); err != nil {
		return err
	}
	answered := make(chan raft.RPCResponse, 1)
	if !t.deliver(raft.RPC{Command: &req, Reader: io.LimitReader(g, req.Size), RespChan: answered}) {
		return nil
	}
	working := time.NewTicker(max(t.stall/4, time.Millisecond))
	defer working.Stop()
	for {
		select {
		case got := <-answered:
			var answer snapshotAnswer
			if r, ok := got.Response.(*raft.InstallSnapshotResponse); ok {
				answer.InstallSnapshotResponse = *r
			}
			if got.Error != nil {
				answer.Error = got.Error.Error()
			}
			return writeMessage(g, []byte{1}, &answer)
		case <-working.C:
			if _, err := g.Write([]byte{0}); err != nil {
				return err
			}
		case <-t.ctx.Done():
			return nil
		}
	}
}

func writeMessage(w io.Writer, before []byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxSnapshotHeader {
		return fmt.Errorf("a snapshot's header of %d bytes", len(b))
	}
	_, err = w.Write(append(binary.LittleEndian.AppendUint32(before, uint32(len(b))), b...))
	return err
}

func readMessage(r io.Reader, v any) error {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint32(length[:])
	if n > maxSnapshotHeader {
		return fmt.Errorf("%w: a header of %d bytes", errTooMuch, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}
