package cli

import (
	"bytes"
	"context"
	"crypto/sha256"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/diurnalog/diurna/rpc/client"
	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// snapshotServer sends content, and before its end waits for proceed, if there is
// that.
type snapshotServer struct {
	v1.UnimplementedAdminServer
	content []byte
	sum     [sha256.Size]byte
	proceed chan struct{}
	waiting chan struct{} // closed when it waits
}

func (s *snapshotServer) Snapshot(_ *v1.SnapshotRequest, stream grpc.ServerStreamingServer[v1.SnapshotResponse]) error {
	for _, p := range []*v1.SnapshotResponse{
		{Part: &v1.SnapshotResponse_Info{Info: &v1.SnapshotInfo{Size: uint64(len(s.content)), Cluster: "test", NextOffset: 3}}},
		{Part: &v1.SnapshotResponse_Data{Data: s.content}},
	} {
		if err := stream.Send(p); err != nil {
			return err
		}
	}
	if s.proceed != nil {
		close(s.waiting)
		select {
		case <-s.proceed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
	return stream.Send(&v1.SnapshotResponse{Part: &v1.SnapshotResponse_End{End: &v1.SnapshotEnd{Sha256: s.sum[:]}}})
}

func serveSnapshots(t *testing.T, s *snapshotServer) *shell {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	v1.RegisterAdminServer(server, s)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	sh := newShell(nil, nil)
	sh.DialOptions = []client.Option{client.WithDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) })}
	return sh
}

func newSnapshotServer(wait bool) *snapshotServer {
	s := &snapshotServer{content: []byte("not a snapshot, but nobody looks")}
	s.sum = sha256.Sum256(s.content)
	if wait {
		s.proceed, s.waiting = make(chan struct{}), make(chan struct{})
	}
	return s
}

func filesIn(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// TestSnapshotSave: the file has its name when it is complete, and not before.
func TestSnapshotSave(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "x")
	s := newSnapshotServer(true)
	sh := serveSnapshots(t, s)
	code := sh.start("operator", "snapshot", "save", file)
	await(t, s.waiting)
	if got := filesIn(t, dir); got != "x.partial" {
		t.Errorf("while it is under way there is %q", got)
	}
	// Another one to the same file does not get in its way.
	other := serveSnapshots(t, newSnapshotServer(false))
	if c := other.run("operator", "snapshot", "save", file); c != ExitUsage || !strings.Contains(other.err.String(), "is being written by another process") {
		t.Errorf("exit %d: %s", c, other.err.String())
	}
	close(s.proceed)
	if c := await(t, code); c != ExitOK {
		t.Fatalf("exit %d: %s", c, sh.err.String())
	}
	contains(t, "stdout", sh.out.String(), "Saved 3 records, offsets 0–2,", "cluster test")
	b, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(b, s.content) || filesIn(t, dir) != "x" {
		t.Errorf("%q, %v; there is %q", b, err, filesIn(t, dir))
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}

	// What is there stays, unless it is to be replaced.
	again := newSnapshotServer(false)
	again.content = []byte("another one")
	again.sum = sha256.Sum256(again.content)
	sh = serveSnapshots(t, again)
	if c := sh.run("operator", "snapshot", "save", file); c != ExitUsage || !strings.Contains(sh.err.String(), "-force") {
		t.Errorf("exit %d: %s", c, sh.err.String())
	}
	if c := sh.run("operator", "snapshot", "save", "-force", file); c != ExitOK {
		t.Errorf("exit %d: %s", c, sh.err.String())
	}
	if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, again.content) {
		t.Errorf("%q, %v", b, err)
	}
	if c := sh.run("operator", "snapshot", "save", "-force", dir); c != ExitUsage || !strings.Contains(sh.err.String(), "is a folder") {
		t.Errorf("exit %d: %s", c, sh.err.String())
	}
}

// TestSnapshotSaveFails: whatever goes wrong, no file is left, and one that was
// there is as it was.
func TestSnapshotSaveFails(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*snapshotServer)
		stop   bool
		code   int
		says   string
	}{
		"altered":     {func(s *snapshotServer) { s.sum[3] ^= 1 }, false, ExitServer, "what arrived is not what was sent"},
		"interrupted": {func(*snapshotServer) {}, true, ExitUsage, "interrupted"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "x")
			if err := os.WriteFile(file, []byte("yesterday's"), 0o600); err != nil {
				t.Fatal(err)
			}
			s := newSnapshotServer(tc.stop)
			tc.change(s)
			sh := serveSnapshots(t, s)
			code := sh.start("operator", "snapshot", "save", "-force", file)
			if tc.stop {
				await(t, s.waiting)
				sh.interrupt(t)
			}
			if c := await(t, code); c != tc.code {
				t.Errorf("exit %d", c)
			}
			contains(t, "stderr", sh.err.String(), tc.says, "Nothing was saved.")
			if b, err := os.ReadFile(file); err != nil || string(b) != "yesterday's" || filesIn(t, dir) != "x" {
				t.Errorf("%q, %v; there is %q", b, err, filesIn(t, dir))
			}
		})
	}
}

// TestPartialTaken: a lock on a file that has been moved away is none.
func TestPartialTaken(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x")
	p, err := newPartial(file, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(file + partialSuffix); err != nil {
		t.Fatal(err)
	}
	second, err := newPartial(file, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.drop(); err != nil { // must not take the second one's file
		t.Error(err)
	}
	if err := second.keep(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}
