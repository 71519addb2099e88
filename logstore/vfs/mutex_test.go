package vfs

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestMutex(t *testing.T) {
	var m Mutex
	var wg sync.WaitGroup
	count := 0
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				m.Lock()
				count++
				m.Unlock()
			}
		})
	}
	wg.Wait()
	if count != 8000 {
		t.Errorf("counted to %d", count)
	}
	defer func() {
		if recover() == nil {
			t.Error("a lock that nobody holds can be given back")
		}
	}()
	m.Unlock()
}

// TestMutexInFakeTime: time passes while one waits for another that sleeps.
func TestMutexInFakeTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m Mutex
		m.Lock()
		begin := time.Now()
		go func() {
			time.Sleep(time.Hour)
			m.Unlock()
		}()
		m.Lock()
		if took := time.Since(begin); took != time.Hour {
			t.Errorf("waited for %v", took)
		}
		m.Unlock()
	})
}
