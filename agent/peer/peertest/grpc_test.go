package peertest

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/diurnalog/diurna/agent/peer"
)

// TestGRPC runs gRPC over the network and a Port for an hour that passes at
// once: calls, a stream, a partition that keep-alive has to notice, a crash.
func TestGRPC(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		n.SetLinks(Link{Delay: 5 * time.Millisecond, Jitter: 5 * time.Millisecond})
		stop := serveHealth(t, n)
		defer func() { stop() }()

		conn, err := grpc.NewClient("passthrough:///server:8400",
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(n.Host("client").Dial),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}),
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Second, Multiplier: 1, MaxDelay: time.Second}, MinConnectTimeout: 5 * time.Second}))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		client := healthpb.NewHealthClient(conn)
		check := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			_, err := client.Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true))
			return err
		}
		watch, err := client.Watch(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := watch.Recv(); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		for time.Since(begin) < time.Hour {
			if err := check(); err != nil {
				t.Fatalf("after %v: %v", time.Since(begin), err)
			}
			time.Sleep(time.Minute)
		}
		if got := n.Conns("client", "server"); got != 1 {
			t.Errorf("%d connections, want one that has lasted", got)
		}

		n.OneWay("client", "server")
		begin = time.Now()
		if err := check(); status.Code(err) != codes.DeadlineExceeded && status.Code(err) != codes.Unavailable {
			t.Errorf("partitioned: %v", err)
		}
		if _, err := watch.Recv(); status.Code(err) != codes.Unavailable || time.Since(begin) > 30*time.Second {
			t.Errorf("the stream ended with %v after %v", err, time.Since(begin))
		}
		n.Heal()
		if err := check(); err != nil {
			t.Errorf("healed: %v", err)
		}

		n.Crash("server")
		stop()
		stop = serveHealth(t, n)
		if err := check(); err != nil {
			t.Errorf("started again: %v", err)
		}
	})
}

// serveHealth serves the health service at server:8400, behind a Port.
func serveHealth(t *testing.T, n *Net) (stop func()) {
	t.Helper()
	l, err := n.Host("server").Listen(":8400")
	if err != nil {
		t.Fatal(err)
	}
	port := peer.NewPort(l, peer.PortConfig{Self: func() (string, string) { return "n1", "" }})
	server := grpc.NewServer(grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}))
	healthpb.RegisterHealthServer(server, health.NewServer())
	done := make(chan error, 1)
	go func() { done <- server.Serve(port.Clients()) }()
	stopped := false
	return func() {
		if stopped {
			return
		}
		stopped = true
		server.Stop()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		if err := port.Close(); err != nil {
			t.Error(err)
		}
	}
}
