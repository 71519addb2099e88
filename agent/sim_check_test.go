package agent

import (
	"fmt"
	"slices"
)

// violations holds a finished history against what docs/GUARANTEES.md promises.
// The checks are named by letters:
//
//	a  every acknowledged record is on every node at the end, at its offset
//	b  an offset never has two contents, on any node, at any time; and what was
//	   once read is there at the end
//	c  what was acknowledged before another was begun is before it in the log;
//	   so is what was sent before it on the same stream
//	d  offsets are dense, batches whole
//	e  nothing is in the log that nobody tried to append or that was refused;
//	   nothing is there twice; nothing is read before it was tried
//	f  what a client reads at a node never ends earlier than what it read there
//	   before, unless the node was started again; a linearizable read ends no
//	   earlier than anything that anybody read or was acknowledged before
//	h  at the end all nodes have the same
func violations(h *history) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := &checker{h: h, where: map[uint64]simRecord{}, at: map[string]uint64{}, batches: map[[2]int]*simBatch{}}
	c.collect()
	for _, r := range h.reads {
		c.read(r)
	}
	c.acked()
	c.whole()
	c.audits()
	c.order()
	c.forward()
	return c.found
}

type checker struct {
	h     *history
	found []string
	// where is what was read at an offset, by whoever was the first; at where
	// a record was found, by its id.
	where   map[uint64]simRecord
	at      map[string]uint64
	batches map[[2]int]*simBatch
}

// simBatch is a batch with all attempts to append it.
type simBatch struct {
	count int
	tries []*simAppend
}

// outcome of the whole: acknowledged if one attempt was, refused if all were.
func (b *simBatch) outcome() simOutcome {
	all := simRefused
	for _, a := range b.tries {
		switch a.outcome {
		case simAcked:
			return simAcked
		case simUnknown:
			all = simUnknown
		}
	}
	return all
}

const maxFound = 20 // more say no more

func (c *checker) fail(check, format string, args ...any) {
	if len(c.found) < maxFound {
		c.found = append(c.found, fmt.Sprintf("(%s) ", check)+fmt.Sprintf(format, args...))
	}
}

func (c *checker) collect() {
	for _, a := range c.h.appends {
		key := [2]int{a.client, a.batch}
		b := c.batches[key]
		if b == nil {
			b = &simBatch{count: a.count}
			c.batches[key] = b
		}
		b.tries = append(b.tries, a)
	}
}

// read checks what one read returned, by itself and against all others.
func (c *checker) read(r *simRead) {
	next := r.from
	var last int64
	for i, rec := range r.records {
		if rec.offset != next && (i != 0 || !r.final) {
			c.fail("d", "a read at %v returned offset %d where %d is due", r.node, rec.offset, next)
		}
		next = rec.offset + 1
		if rec.time < last {
			c.fail("d", "a read at %v: the append time goes backwards at offset %d", r.node, rec.offset)
		}
		last = rec.time
		if have, ok := c.where[rec.offset]; !ok {
			c.where[rec.offset] = rec
		} else if have != rec {
			c.fail("b", "offset %d held %v, and %v at %v", rec.offset, have, rec, r.node)
		}
		c.record(r, rec)
	}
	if r.complete && r.limit == 0 && r.end != next {
		c.fail("d", "a read at %v returned records up to %d, and the log ended at %d", r.node, next, r.end)
	}
}

func (c *checker) record(r *simRead, rec simRecord) {
	client, batch, i, count, ok := parseSimKey(rec.id)
	b := c.batches[[2]int{client, batch}]
	switch {
	case !ok || b == nil || count != b.count || i >= count:
		c.fail("e", "offset %d at %v holds %q, which nobody tried to append", rec.offset, r.node, rec.id)
		return
	case rec.sum != simSum(simValue(rec.id)):
		c.fail("e", "offset %d at %v holds %s with another content than was appended", rec.offset, r.node, rec.id)
	case b.outcome() == simRefused:
		c.fail("e", "offset %d at %v holds %s, which was refused (%s)", rec.offset, r.node, rec.id, b.tries[0].why)
	case r.returned > 0 && r.returned < b.tries[0].call:
		c.fail("e", "offset %d at %v held %s before anybody tried to append it", rec.offset, r.node, rec.id)
	}
	if have, ok := c.at[rec.id]; !ok {
		c.at[rec.id] = rec.offset
	} else if have != rec.offset {
		c.fail("e", "%s is at offset %d and, at %v, at %d", rec.id, have, r.node, rec.offset)
	}
}

// acked: nothing is acknowledged twice at one offset, and what was
// acknowledged is where the acknowledgement said, wherever it was read.
func (c *checker) acked() {
	taken := map[uint64]string{}
	for _, a := range c.h.appends {
		if a.outcome != simAcked {
			continue
		}
		if a.expected != nil && *a.expected != a.base {
			c.fail("c", "%d/%d was acknowledged at %d, expecting %d", a.client, a.batch, a.base, *a.expected)
		}
		for i := range a.count {
			id, offset := simKey(a.client, a.batch, i, a.count), a.base+uint64(i)
			if other, ok := taken[offset]; ok && other != id {
				c.fail("b", "offset %d was acknowledged for %s and for %s", offset, other, id)
			}
			taken[offset] = id
			if rec, ok := c.where[offset]; ok && rec.id != id {
				c.fail("b", "offset %d was acknowledged for %s, and holds %s", offset, id, rec.id)
			}
		}
	}
}

// whole: of a batch there is all or nothing, in a row.
func (c *checker) whole() {
	for key, b := range c.batches {
		base, ok := c.at[simKey(key[0], key[1], 0, b.count)]
		for i := 1; i < b.count; i++ {
			offset, there := c.at[simKey(key[0], key[1], i, b.count)]
			// A read may end in the middle of a batch; the audit does not.
			if there && (!ok || offset != base+uint64(i)) || ok && !there && len(c.finals()) > 0 {
				c.fail("d", "of batch %d/%d, record 0 is at %d (%v), record %d at %d (%v)", key[0], key[1], base, ok, i, offset, there)
			}
		}
	}
}

func (c *checker) finals() (all []*simRead) {
	for _, r := range c.h.reads {
		if r.final && r.complete {
			all = append(all, r)
		}
	}
	return all
}

// audits: all nodes have the same at the end, from where each begins, and in it
// everything that was acknowledged or read.
func (c *checker) audits() {
	finals := c.finals()
	for _, r := range finals {
		first := r.end
		if len(r.records) > 0 {
			first = r.records[0].offset
		}
		if first > r.from && r.from == 0 && len(r.records) == 0 && r.end > 0 {
			c.fail("h", "at the end %v has nothing, and its log ends at %d", r.node, r.end)
		}
		if r.end != finals[0].end {
			c.fail("h", "at the end the log ends at %d at %v, and at %d at %v", r.end, r.node, finals[0].end, finals[0].node)
		}
		for offset, rec := range c.where {
			if offset >= r.end {
				c.fail("b", "offset %d held %s, and is gone at %v, where the log ends at %d", offset, rec.id, r.node, r.end)
			}
		}
		for _, a := range c.h.appends {
			if a.outcome != simAcked || a.base < first {
				continue
			}
			for i := range a.count {
				at := a.base + uint64(i) - first
				if id := simKey(a.client, a.batch, i, a.count); at >= uint64(len(r.records)) || r.records[at].id != id {
					c.fail("a", "%s was acknowledged at %d by %v, and is not there at %v", id, a.base+uint64(i), a.node, r.node)
				}
			}
		}
	}
}

// order: time and streams.
func (c *checker) order() {
	type span struct {
		call, returned int64
		base, end      uint64
		what           string
	}
	var acked []span
	for _, a := range c.h.appends {
		if a.outcome == simAcked {
			acked = append(acked, span{a.call, a.returned, a.base, a.base + uint64(a.count), fmt.Sprintf("%d/%d", a.client, a.batch)})
		}
	}
	// The highest that was acknowledged before each began.
	byReturn := slices.Clone(acked)
	slices.SortFunc(byReturn, func(a, b span) int { return int(a.returned - b.returned) })
	slices.SortFunc(acked, func(a, b span) int { return int(a.call - b.call) })
	var highest span
	for _, a := range acked {
		for len(byReturn) > 0 && byReturn[0].returned < a.call {
			if byReturn[0].end > highest.end {
				highest = byReturn[0]
			}
			byReturn = byReturn[1:]
		}
		if a.base < highest.end {
			c.fail("c", "%s was begun after %s had been acknowledged up to %d, and was acknowledged at %d", a.what, highest.what, highest.end, a.base)
		}
	}
	streams := map[int][]*simAppend{}
	for _, a := range c.h.appends {
		if a.stream != 0 {
			streams[a.stream] = append(streams[a.stream], a)
		}
	}
	for stream, sent := range streams {
		slices.SortFunc(sent, func(a, b *simAppend) int { return a.position - b.position })
		var before uint64
		for _, a := range sent {
			base, ok := c.at[simKey(a.client, a.batch, 0, a.count)]
			if ok && len(c.batches[[2]int{a.client, a.batch}].tries) == 1 {
				if base < before {
					c.fail("c", "on stream %d, %d/%d was sent after what is at %d, and is at %d", stream, a.client, a.batch, before-1, base)
				}
				before = base + uint64(a.count)
			}
		}
	}
}

// forward: reads do not go back.
func (c *checker) forward() {
	type view struct {
		client int
		node   simPlace
	}
	reads := slices.DeleteFunc(slices.Clone(c.h.reads), func(r *simRead) bool { return !r.complete || r.limit > 0 })
	slices.SortFunc(reads, func(a, b *simRead) int { return int(a.call - b.call) })
	seen := map[view]*simRead{}
	for _, r := range reads {
		v := view{r.client, r.node}
		if before := seen[v]; before != nil && before.returned < r.call && r.end < before.end {
			c.fail("f", "client %d read up to %d at %v, and later up to %d", r.client, before.end, r.node, r.end)
		}
		if before := seen[v]; before == nil || r.end > before.end {
			seen[v] = r
		}
	}
	// What had been shown to anybody when something returned.
	type shown struct {
		returned int64
		end      uint64
		what     string
	}
	var all []shown
	for _, r := range c.h.reads {
		end := r.end
		if n := len(r.records); n > 0 {
			end = max(end, r.records[n-1].offset+1)
		}
		if r.returned > 0 {
			all = append(all, shown{r.returned, end, fmt.Sprintf("client %d had read at %v", r.client, r.node)})
		}
	}
	for _, a := range c.h.appends {
		if a.outcome == simAcked {
			all = append(all, shown{a.returned, a.base + uint64(a.count), fmt.Sprintf("client %d had an acknowledgement of %v", a.client, a.node)})
		}
	}
	slices.SortFunc(all, func(a, b shown) int { return int(a.returned - b.returned) })
	var highest shown
	for _, r := range reads {
		for len(all) > 0 && all[0].returned < r.call {
			if all[0].end > highest.end {
				highest = all[0]
			}
			all = all[1:]
		}
		if r.linear && r.end < highest.end {
			c.fail("f", "a linearizable read of client %d at %v ended at %d, when %s up to %d", r.client, r.node, r.end, highest.what, highest.end)
		}
	}
}
