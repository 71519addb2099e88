package vfstest

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

// Env returns the number in an environment variable, or def. It lets
// `make soak` ask the same test for more.
func Env(t testing.TB, name string, def int) int {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		return def
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// Rand returns a generator whose seed is logged, and can be given again by
// DIURNA_SEED.
func Rand(t testing.TB) *rand.Rand {
	t.Helper()
	seed := uint64(Env(t, "DIURNA_SEED", int(rand.Uint64()>>1)))
	t.Logf("seed: DIURNA_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}
