package agent

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/rpc"
)

// TestAsk: who answers at an address counts, whoever is listed there, but is
// never taken for being at two.
func TestAsk(t *testing.T) {
	lives := map[string]string{"x": "new", "y": "b", "z": "b"} // who answers where
	probe := func(_ context.Context, address string) (rpc.NodeStatus, error) {
		if id, ok := lives[address]; ok {
			return rpc.NodeStatus{NodeID: id}, nil
		}
		return rpc.NodeStatus{}, errors.New("nobody there")
	}
	for name, tc := range map[string]struct {
		listed []discovery.Node
		want   []string // "" for an error
	}{
		"as listed":                        {[]discovery.Node{{ID: "b", Address: "y"}}, []string{"b"}},
		"nobody listed":                    {[]discovery.Node{{Address: "x"}}, []string{"new"}},
		"nobody there":                     {[]discovery.Node{{ID: "c", Address: "w"}}, []string{""}},
		"one that was there before":        {[]discovery.Node{{ID: "old", Address: "x"}}, []string{"new"}},
		"one that is at home elsewhere":    {[]discovery.Node{{ID: "c", Address: "z"}, {ID: "b", Address: "y"}}, []string{"", "b"}},
		"two at addresses of a third":      {[]discovery.Node{{ID: "c", Address: "z"}, {ID: "d", Address: "y"}}, []string{"b", ""}},
		"one that is remembered elsewhere": {[]discovery.Node{{ID: "c", Address: "z"}, {Address: "y"}}, []string{"", "b"}},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for i, a := range ask(t.Context(), probe, tc.listed) {
				if a.node.Address != tc.listed[i].Address {
					t.Errorf("answer %d is from %q", i, a.node.Address)
				}
				id := a.status.NodeID
				if a.err != nil {
					id = ""
				}
				got = append(got, id)
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}
