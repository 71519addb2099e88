package agent

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math"
	"time"

	"github.com/anishathalye/porcupine"
)

// The log as a sequential thing, for porcupine: what clients saw has to be
// explained by some order of their operations in which each takes effect at one
// moment between its call and its return. Whatever the length of the log, the
// state is its end and a hash of all records in it, each hashed with the one
// before (as in s2's verification of its own log).

type simState struct {
	tail, hash uint64
}

func (s simState) append(ids []string) simState {
	for _, id := range ids {
		h := fnv.New64a()
		_, _ = h.Write(binary.LittleEndian.AppendUint64(nil, s.hash))
		_, _ = h.Write([]byte(id))
		s = simState{s.tail + 1, h.Sum64()}
	}
	return s
}

// simOp is an operation with its result.
type simOp struct {
	kind simOpKind
	ids  []string // what was to be appended
	// expected is the condition of an append, if there is one.
	expected *uint64
	// at is where it was appended, or what a refused condition said the end is,
	// or the end that a read found.
	at   uint64
	hash uint64 // of all that a read of the whole log found
	// offset and found: a read of one record.
	offset uint64
	found  bool
}

type simOpKind int

const (
	opAppend   simOpKind = iota // it took effect
	opMismatch                  // the condition was refused
	opTail                      // a linearizable read of all of the log
	opGet                       // a linearizable read of one record
)

func (o simOp) String() string {
	switch o.kind {
	case opAppend:
		if o.expected != nil {
			return fmt.Sprintf("append %v if at %d: at %d", o.ids, *o.expected, o.at)
		}
		return fmt.Sprintf("append %v: at %d", o.ids, o.at)
	case opMismatch:
		return fmt.Sprintf("append %v if at %d: no, at %d", o.ids, *o.expected, o.at)
	case opTail:
		return fmt.Sprintf("read all: up to %d, hash %x", o.at, o.hash)
	default:
		return fmt.Sprintf("read %d: %v", o.offset, o.found)
	}
}

// simModel steps from state to state. An operation's input is all there is.
var simModel = porcupine.Model{
	Init: func() any { return simState{} },
	Step: func(state, input, _ any) (bool, any) {
		s, o := state.(simState), input.(simOp)
		switch o.kind {
		case opAppend:
			return s.tail == o.at && (o.expected == nil || *o.expected == s.tail), s.append(o.ids)
		case opMismatch:
			return s.tail == o.at && *o.expected != s.tail, s
		case opTail:
			return s.tail == o.at && s.hash == o.hash, s
		default:
			return o.found == (o.offset < s.tail), s
		}
	},
	Hash:              func(state any) uint64 { return state.(simState).hash },
	DescribeOperation: func(input, _ any) string { return input.(simOp).String() },
	DescribeState:     func(state any) string { return fmt.Sprintf("end %d", state.(simState).tail) },
}

// simOps makes operations of a history. Where nobody knows whether an append
// took effect, the log at the end tells: what is in it did, at some time after
// the call, for which there is no return; what is not did not, and is left out.
func simOps(h *history) []porcupine.Operation {
	h.mu.Lock()
	defer h.mu.Unlock()
	at := map[string]uint64{}
	for _, r := range h.reads {
		for _, rec := range r.records {
			at[rec.id] = rec.offset
		}
	}
	var ops []porcupine.Operation
	add := func(client int, call, returned int64, op simOp) {
		if returned == 0 {
			returned = math.MaxInt64
		}
		ops = append(ops, porcupine.Operation{ClientId: client, Call: call, Return: returned, Input: op})
	}
	// All attempts of unknown outcome at one batch are one operation, that
	// begins with the first of them. It took effect only if no other attempt of
	// that batch is known to have.
	open := map[[2]int]*simAppend{}
	acked := map[[2]int]bool{}
	for _, a := range h.appends {
		ids := make([]string, a.count)
		for i := range ids {
			ids[i] = simKey(a.client, a.batch, i, a.count)
		}
		batch := [2]int{a.client, a.batch}
		switch {
		case a.outcome == simAcked:
			acked[batch] = true
			add(a.client, a.call, a.returned, simOp{kind: opAppend, ids: ids, expected: a.expected, at: a.base})
		case a.outcome == simRefused && a.next != nil:
			add(a.client, a.call, a.returned, simOp{kind: opMismatch, ids: ids, expected: a.expected, at: *a.next})
		case a.outcome == simUnknown && open[batch] == nil:
			open[batch] = a
		}
	}
	for batch, a := range open {
		base, there := at[simKey(a.client, a.batch, 0, a.count)]
		if !there || acked[batch] {
			continue
		}
		ids := make([]string, a.count)
		for i := range ids {
			ids[i] = simKey(a.client, a.batch, i, a.count)
		}
		add(a.client, a.call, 0, simOp{kind: opAppend, ids: ids, expected: a.expected, at: base})
	}
	for _, r := range h.reads {
		switch {
		case !r.complete || !r.linear && !r.final:
		case r.limit == 1:
			add(r.client, r.call, r.returned, simOp{kind: opGet, offset: r.from, found: len(r.records) == 1})
		case r.from == 0 && r.limit == 0:
			ids := make([]string, len(r.records))
			for i, rec := range r.records {
				ids[i] = rec.id
			}
			s := simState{}.append(ids)
			add(r.client, r.call, r.returned, simOp{kind: opTail, at: s.tail, hash: s.hash})
		}
	}
	return ops
}

// simCheckTime is what the search may take, in real time. Not to know is to
// fail.
const simCheckTime = 20 * time.Second

// linearizable tells what porcupine says, and the picture that it draws. It
// must not be called in a bubble: its time is real.
func linearizable(h *history) (porcupine.CheckResult, porcupine.LinearizationInfo) {
	return porcupine.CheckOperationsVerbose(simModel, simOps(h), simCheckTime)
}
