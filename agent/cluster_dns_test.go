package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/diurnalog/diurna/discovery/consul/consultest"
	"github.com/diurnalog/diurna/rpc/client"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// samePort is a port that is free at so many addresses of the loopback network,
// as that of three machines is.
func samePort(t testing.TB, n int) (addresses []string) {
	t.Helper()
	for range 20 {
		addresses = nil
		port := "0"
		var open []net.Listener
		var err error
		for i := range n {
			var l net.Listener
			if l, err = net.Listen("tcp", net.JoinHostPort(fmt.Sprintf("127.0.0.%d", i+1), port)); err != nil {
				break
			}
			open = append(open, l)
			addresses = append(addresses, l.Addr().String())
			_, port, _ = net.SplitHostPort(l.Addr().String())
		}
		for _, l := range open {
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err == nil {
			return addresses
		}
		if errors.Is(err, syscall.EADDRNOTAVAIL) {
			t.Skip("this system has no 127.0.0.2, so that three nodes cannot have the same port")
		}
	}
	t.Fatal("found no port that is free at three addresses")
	return nil
}

// namedCluster is three nodes with TLS, at one port of three addresses.
func namedCluster(t *testing.T) (c *processCluster, port string) {
	t.Helper()
	addresses := samePort(t, 3)
	c = &processCluster{consul: consultest.Start(t, consultest.Options{}), dir: t.TempDir()}
	c.configure(t, 3, fmt.Sprintf("consul { address = %q }", c.consul.HTTP))
	keys := filepath.Join(c.dir, "tls")
	c.files = &client.TLSFiles{
		CAFile: filepath.Join(keys, "ca.pem"), CertFile: filepath.Join(keys, "client.pem"), KeyFile: filepath.Join(keys, "client-key.pem"),
	}
	for i, address := range addresses {
		name := fmt.Sprintf("n%d", i+1)
		m := &member{name: name, dir: c.dataDir(name), listen: address, more: []string{"-tls", "-tls-dir", keys}}
		trusts.Store(address, *c.files)
		c.nodes = append(c.nodes, m)
		c.launch(t, m)
	}
	for _, m := range c.nodes {
		m.awaitReady(t)
	}
	c.servers(t, "three nodes vote", healthy(3))
	_, port, _ = net.SplitHostPort(addresses[0])
	return c, port
}

// TestClusterByName: whoever knows only the names that Consul's DNS answers to
// produces and consumes: with any gRPC library and the nodes' port, at the
// leader's name, and at whatever ports SRV records tell.
func TestClusterByName(t *testing.T) {
	t.Parallel()
	c, port := namedCluster(t)
	c.awaitAddresses(t, "diurna", c.nodes...)
	c.awaitAddresses(t, "leader.diurna", c.leader(t))

	// A gRPC library with nothing of ours in it. The name that it dials is the one
	// that it expects in the certificate.
	anyone := func(name string) v1.LogClient {
		conn, err := grpc.NewClient("dns://"+c.consul.DNS+"/"+name+".service.consul:"+port,
			grpc.WithTransportCredentials(credentials.NewTLS(c.clientTLS(t))),
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return v1.NewLogClient(conn)
	}
	anyNode, atLeader := anyone("diurna"), anyone("leader.diurna")
	var want []string
	for i := range 30 {
		value := fmt.Sprintf("by name %d", i)
		log := anyNode
		if i%10 == 0 {
			log = atLeader
		}
		produceBy(t, log, i, value)
		want = append(want, value)
	}
	if got := consumeBy(t, anyNode); !slices.Equal(got, want) {
		t.Fatalf("got %d records, want %d", len(got), len(want))
	}
	asked := map[string]bool{}
	for range 12 {
		r, err := anyNode.GetServers(t.Context(), &v1.GetServersRequest{}, grpc.WaitForReady(true))
		if err != nil {
			t.Fatal(err)
		}
		asked[r.AnsweredBy] = true
	}
	if len(asked) != 3 {
		t.Errorf("%d nodes were asked, want 3", len(asked))
	}

	// By SRV records, which name a port for every node.
	files := *c.files
	files.ServerName = "diurna.service.consul"
	bySRV, err := client.Dial(strings.Join(c.lookup(t, "_diurna._tcp"), ","), client.WithTLS(files), client.WithRetry(patience))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := bySRV.Close(); err != nil {
			t.Error(err)
		}
	}()
	produce(t, bySRV, "by SRV")
	want = append(want, "by SRV")

	// A node goes, and the names with it. Who was told of three still has two.
	dead := c.leader(t)
	dead.kill(t)
	produceBy(t, anyNode, len(want), "after")
	want = append(want, "after")
	others := slices.DeleteFunc(slices.Clone(c.nodes), func(m *member) bool { return m == dead })
	c.awaitAddresses(t, "diurna", others...)
	c.awaitAddresses(t, "leader.diurna", c.leader(t))
	if got := consumeBy(t, anyNode); !slices.Equal(got, want) {
		t.Errorf("got %d records, want %d: %q", len(got), len(want), got[len(got)-2:])
	}
}

// produceBy appends one record at an offset, for the log's only producer. Where
// it is not known whether it was appended, asking for the offset tells.
func produceBy(t testing.TB, log v1.LogClient, offset int, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	at := uint64(offset)
	for doubt := false; ; {
		_, err := log.Produce(ctx, &v1.ProduceRequest{
			Records: []*v1.Record{{Value: []byte(value)}}, ExpectedOffset: &at,
		}, grpc.WaitForReady(true))
		if err == nil {
			return
		}
		reason := ""
		for _, d := range status.Convert(err).Details() {
			if info, ok := d.(*errdetails.ErrorInfo); ok {
				reason = info.Reason
			}
		}
		switch {
		case doubt && reason == "OFFSET_MISMATCH":
			return
		case status.Code(err) == codes.Unavailable && reason != "": // definite
		case status.Code(err) == codes.Unavailable || reason == "UNKNOWN_OUTCOME":
			doubt = true
		default:
			t.Fatalf("%s: %v", value, err)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("%s: %v", value, err)
		}
	}
}

// consumeBy reads all records.
func consumeBy(t testing.TB, log v1.LogClient) (values []string) {
	t.Helper()
	stream, err := log.ConsumeStream(t.Context(), &v1.ConsumeRequest{Linearizable: true}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return values
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range r.Batches {
			for _, rec := range b.Records {
				values = append(values, string(rec.Value))
			}
		}
	}
}

// lookup resolves a service to addresses, host:port, as SRV records tell them.
func (c *processCluster) lookup(t testing.TB, name string) (addresses []string) {
	t.Helper()
	_, records, err := c.dns().LookupSRV(t.Context(), "", "", name+".service.consul.")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		hosts, err := c.dns().LookupHost(t.Context(), r.Target)
		if err != nil || len(hosts) != 1 {
			t.Fatalf("%s: %v, %v", r.Target, hosts, err)
		}
		addresses = append(addresses, net.JoinHostPort(hosts[0], fmt.Sprint(r.Port)))
	}
	slices.Sort(addresses)
	return addresses
}

// awaitAddresses waits until a name resolves to these nodes, and no others.
func (c *processCluster) awaitAddresses(t testing.TB, name string, members ...*member) {
	t.Helper()
	var want []string
	for _, m := range members {
		host, _, _ := net.SplitHostPort(m.listen)
		want = append(want, host)
	}
	c.awaitLookup(t, name, want, func(ctx context.Context) ([]string, error) {
		return c.dns().LookupHost(ctx, name+".service.consul.")
	})
}
