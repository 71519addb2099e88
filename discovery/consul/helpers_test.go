package consul

import (
	"bytes"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// quick is Timing for tests against a Consul that is theirs.
var quick = Timing{
	TTL: 20 * time.Second, TTLUpdate: 250 * time.Millisecond,
	GRPCInterval: time.Second, GRPCTimeout: time.Second,
	Reconcile: 500 * time.Millisecond, RetryStep: 50 * time.Millisecond, RetryMax: 500 * time.Millisecond,
	Wait: 5 * time.Second, WaitGrace: 5 * time.Second, WatchEvery: 10 * time.Millisecond, Settle: 3 * time.Second,
}

// healthy returns the address of a gRPC server that says it serves, until the
// test ends. Real gRPC is not for this room; this is the one call by hand.
func healthy(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	s := &http.Server{Protocols: &protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		var request bytes.Buffer
		if _, err := request.ReadFrom(r.Body); err != nil || r.URL.Path != "/grpc.health.v1.Health/Check" ||
			!strings.Contains(request.String(), "diurna.v1.Log") {
			w.Header().Set("Grpc-Status", "12") // unimplemented
			return
		}
		_, _ = w.Write([]byte{0, 0, 0, 0, 2, 8, 1}) // a message of two bytes: field 1 is 1, serving
		w.Header().Set("Grpc-Status", "0")
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l) // until it is closed
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	return l.Addr().String()
}

// logs collects what is logged.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *logs) count(text string) int { return strings.Count(l.String(), text) }

// logger returns a logger into l, which is shown if the test fails.
func (l *logs) logger(t testing.TB, name string) hclog.Logger {
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", name, l.String())
		}
	})
	return hclog.New(&hclog.LoggerOptions{Name: name, Output: l, Level: hclog.Debug})
}
