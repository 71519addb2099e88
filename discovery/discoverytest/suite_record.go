package discoverytest

import (
	"bytes"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/diurnalog/diurna/discovery"
)

func testRecord(t *testing.T, s *suite) {
	ctx := t.Context()
	a, b := s.join(t, "a"), s.join(t, "b")
	ra, rb := a.Bootstrap(), b.Bootstrap()
	get := func(r discovery.Record, want string) uint64 {
		t.Helper()
		got, version, err := r.Get(ctx)
		if err != nil || string(got) != want || version == 0 {
			t.Fatalf("want %q, got %q, version %d, %v", want, got, version, err)
		}
		return version
	}
	put := func(what string, won bool, err error, want bool) {
		t.Helper()
		if err != nil || won != want {
			t.Fatalf("%s: want %t, got %t, %v", what, want, won, err)
		}
	}

	if got, version, err := ra.Get(ctx); err != nil || got != nil || version != 0 {
		t.Fatalf("before it was written: %q, %d, %v", got, version, err)
	}
	won, err := ra.Create(ctx, []byte("one"))
	put("create", won, err, true)
	won, err = rb.Create(ctx, []byte("two"))
	put("create what there is", won, err, false)
	first := get(rb, "one")
	won, err = rb.Replace(ctx, first, []byte("two"))
	put("replace", won, err, true)
	won, err = ra.Replace(ctx, first, []byte("three"))
	put("replace an old version", won, err, false)
	second := get(ra, "two")
	if second == first {
		t.Errorf("two values have version %d", first)
	}
	if _, err := ra.Replace(ctx, 0, nil); err == nil {
		t.Error("version 0 can be replaced")
	}
	// Any bytes, and many.
	binary := bytes.Repeat([]byte{0, 0xff, '\n', '"'}, 16<<10)
	won, err = ra.Replace(ctx, second, binary)
	put("replace by bytes", won, err, true)
	get(rb, string(binary))

	// It belongs to the cluster, not to who wrote it.
	if err := a.stop(); err != nil {
		t.Error(err)
	}
	get(rb, string(binary))
	other := s.New(t, s.cluster+"-b")
	start(t, other, discovery.Registration{})
	if _, version, err := other.Bootstrap().Get(ctx); err != nil || version != 0 {
		t.Errorf("another cluster has the record too: %d, %v", version, err)
	}
}

// testRecordRaces has many write at once: one creates, and every counter step
// is made once.
func testRecordRaces(t *testing.T, s *suite) {
	const writers, steps = 12, 5
	var records []discovery.Record
	for range 3 {
		records = append(records, start(t, s.New(t, s.cluster), discovery.Registration{}).Bootstrap())
	}
	var created atomic.Int64
	var all sync.WaitGroup
	for i := range writers {
		r := records[i%len(records)]
		all.Go(func() {
			won, err := r.Create(t.Context(), []byte("0"))
			if err != nil {
				t.Errorf("create: %v", err)
				return
			}
			if won {
				created.Add(1)
			}
			for done := 0; done < steps; {
				v, version, err := r.Get(t.Context())
				if err != nil {
					t.Errorf("get: %v", err)
					return
				}
				var n int
				if _, err := fmt.Sscan(string(v), &n); err != nil {
					t.Errorf("read %q: %v", v, err)
					return
				}
				won, err := r.Replace(t.Context(), version, fmt.Append(nil, n+1))
				if err != nil {
					t.Errorf("replace: %v", err)
					return
				}
				if won {
					done++
				}
			}
		})
	}
	all.Wait()
	if n := created.Load(); n != 1 {
		t.Errorf("%d created the record", n)
	}
	if v, _, err := records[0].Get(t.Context()); err != nil || string(v) != fmt.Sprint(writers*steps) {
		t.Errorf("want %d, got %q, %v", writers*steps, v, err)
	}
}
