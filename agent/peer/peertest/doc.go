// Package peertest is a faulty network in memory, for tests that run a whole
// cluster in one process, most of all inside a testing/synctest bubble: there
// its delays take no time, and a goroutine that waits on a connection counts as
// blocked. Make the Net inside of the bubble that uses it.
//
// Connections behave like TCP's: ordered, bounded, half-closable, with
// deadlines. What cannot be delivered waits, as a real sender repeats it, until
// the way is free again or the connection is given up; nothing in the middle of
// a stream is ever lost without the connection breaking.
//
// Faults can be changed at any time:
//
//   - Block, OneWay, Partition and Isolate stop delivery in one direction or
//     both; Heal ends them all. Dialling waits for its context.
//   - Pause stops everything to and from a host, until Resume.
//   - SetLink and SetLinks delay, slow down, and break connections as they are
//     written to, in one direction each.
//   - Refuse turns dialling away; Reset breaks every connection of a host; Crash
//     closes its listeners too.
//
// A connection between hosts that cannot reach each other, in either direction,
// for longer than SetPatience (30 s) fails on both sides with ETIMEDOUT, as with
// keep-alive and a user timeout. SetResetOnHeal lets some fail when the way is
// free again.
//
// The Net starts no goroutines; its timers end with Close. Choices come from one
// generator in the order in which things happen, so that a seed repeats a run
// as far as the scheduler does.
package peertest
