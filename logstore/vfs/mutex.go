package vfs

import "sync"

// Mutex is a sync.Mutex for what takes as long as a disk takes. Who waits for it
// waits for a channel: in a test's fake time (testing/synctest), which stands
// still while anybody waits for a sync.Mutex, the holder's slow disk would never
// be done. The zero value is unlocked.
type Mutex struct {
	once sync.Once
	held chan struct{} // holds a token while the lock is held
}

// Lock waits until it holds the lock.
func (m *Mutex) Lock() {
	m.once.Do(func() { m.held = make(chan struct{}, 1) })
	m.held <- struct{}{}
}

// Unlock gives the lock back. It panics if nobody holds it.
func (m *Mutex) Unlock() {
	select {
	case <-m.held:
	default:
		panic("vfs: Unlock of a Mutex that nobody holds")
	}
}
