package replica

import (
	"errors"
	"testing"

	"github.com/diurnalog/diurna/logstore"
)

// TestGenerationWaitsForReaders: a log that was replaced stays whole until the
// last one who reads it is done.
func TestGenerationWaitsForReaders(t *testing.T) {
	snap := makeSent(t, 40)
	fs, _ := receiver(t)
	r, err := idle(t, fs)
	if err != nil {
		t.Fatal(err)
	}
	defer closeIdle(t, r)
	first, second := r.gens.use(), r.gens.use()
	if err := snap.receive(r, snap.stream); err != nil {
		t.Fatal(err)
	}
	if r.gens.now.Load() == first {
		t.Fatal("the log was not replaced")
	}
	for _, gen := range []*generation{first, second} {
		select {
		case <-gen.unused:
			t.Fatal("it is given up under a reader")
		default:
		}
		if e, _, err := gen.log.Entry(2, nil); err != nil || e.Index != 2 {
			t.Errorf("read: %+v, %v", e, err)
		}
		r.gens.release(gen)
	}
	<-first.unused
	eventually(t, "it is closed and removed", func() bool {
		_, _, err := first.log.Entry(2, nil)
		return errors.Is(err, logstore.ErrClosed) && len(generationsOn(fs)) == 1
	})
}

// TestGenerationLeftovers: only what CURRENT names stays.
func TestGenerationLeftovers(t *testing.T) {
	fs, old := receiver(t)
	for _, name := range []string{"data/gen-2/log/importing", "data/gen-17/snapshots/x.snap", "data/CURRENT.tmp"} {
		for _, dir := range []string{"data/gen-2/log", "data/gen-17/snapshots"} {
			if err := fs.MkdirAll(dir); err != nil {
				t.Fatal(err)
			}
		}
		f, err := fs.Create(name)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	r, err := idle(t, fs)
	if err != nil {
		t.Fatal(err)
	}
	defer closeIdle(t, r)
	if _, records, err := readAll(r); err != nil || len(records) != len(old) {
		t.Errorf("%d records, %v", len(records), err)
	}
	if got := generationsOn(fs); len(got) != 1 || got[0] != "gen-1" {
		t.Errorf("generations %v", got)
	}
	if _, err := fs.ReadFile("data/CURRENT.tmp"); err == nil {
		t.Error("an unfinished pointer is left")
	}
}
