package consul

import (
	"context"
	"fmt"

	"github.com/hashicorp/consul/api"

	"github.com/diurnalog/diurna/discovery"
)

// record is a key in Consul's KV store. Reads are consistent: the leader makes
// sure that it still is one. No session is involved, so it outlives everybody.
type record struct {
	c   *client
	key string
}

// Get implements discovery.Record. The version is the key's modify index.
func (r *record) Get(ctx context.Context) (value []byte, version uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.c.cfg.Timing.Request)
	defer cancel()
	var pair *api.KVPair
	err = r.c.do("read the key "+r.key, func(token string) error {
		o := r.c.query(ctx, token)
		o.RequireConsistent = true
		pair, _, err = r.c.api.KV().Get(r.key, o)
		return err
	})
	if err != nil || pair == nil {
		return nil, 0, err
	}
	return pair.Value, pair.ModifyIndex, nil
}

// Create implements discovery.Record.
func (r *record) Create(ctx context.Context, value []byte) (bool, error) {
	return r.put(ctx, value, 0)
}

// Replace implements discovery.Record.
func (r *record) Replace(ctx context.Context, version uint64, value []byte) (bool, error) {
	if version == 0 {
		return false, fmt.Errorf("consul at %s: the key %s cannot be replaced where there is none: create it", r.c.cfg.Address, r.key)
	}
	return r.put(ctx, value, version)
}

// put writes the key if its modify index is as said; 0 means that there must
// be none.
func (r *record) put(ctx context.Context, value []byte, index uint64) (won bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.c.cfg.Timing.Request)
	defer cancel()
	err = r.c.do("write the key "+r.key, func(token string) error {
		won, _, err = r.c.api.KV().CAS(&api.KVPair{Key: r.key, Value: value, ModifyIndex: index},
			(&api.WriteOptions{Token: token}).WithContext(ctx))
		return err
	})
	return won && err == nil, err
}

var _ discovery.Record = (*record)(nil)
