package peertest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/nettest"

	"github.com/diurnalog/diurna/logstore/vfs/vfstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bubble runs a test in a bubble, on a network that it closes at the end.
func bubble(t *testing.T, f func(t *testing.T, n *Net)) {
	t.Helper()
	rng := vfstest.Rand(t)
	synctest.Test(t, func(t *testing.T) {
		n := New(rng)
		defer n.Close()
		f(t, n)
	})
}

func listen(t *testing.T, n *Net, host, address string) net.Listener {
	t.Helper()
	l, err := n.Host(host).Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// connect returns a connection from a to b, both sides of it.
func connect(t *testing.T, n *Net, a, b string) (from, to net.Conn) {
	t.Helper()
	l := listen(t, n, b, ":0")
	defer l.Close()
	from, err := n.Host(a).Dial(t.Context(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	to, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return from, to
}

func write(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

func expect(t *testing.T, c net.Conn, text string) {
	t.Helper()
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("read %q and %v, want %q", b, err, text)
	}
}

// expectAt reads text and requires that it came after so long.
func expectAt(t *testing.T, c net.Conn, text string, since time.Time, after time.Duration) {
	t.Helper()
	expect(t, c, text)
	if got := time.Since(since); got != after {
		t.Fatalf("%q came after %v, want %v", text, got, after)
	}
}

func expectError(t *testing.T, c net.Conn, want error, since time.Time, after time.Duration) {
	t.Helper()
	if k, err := c.Read(make([]byte, 1)); !errors.Is(err, want) {
		t.Fatalf("read %d bytes and %v, want %v", k, err, want)
	}
	if got := time.Since(since); got != after {
		t.Fatalf("%v came after %v, want %v", want, got, after)
	}
}

// silent requires that nothing is read for a while.
func silent(t *testing.T, c net.Conn, d time.Duration) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(d)); err != nil {
		t.Fatal(err)
	}
	expectError(t, c, os.ErrDeadlineExceeded, time.Now(), d)
	if err := c.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
}

// TestConn holds the connections to what every net.Conn has to do.
func TestConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		n := New(vfstest.Rand(t))
		l, err := n.Host("b").Listen(":0")
		if err != nil {
			return nil, nil, nil, err
		}
		c1, err = n.Host("a").Dial(context.Background(), l.Addr().String())
		if err != nil {
			return nil, nil, nil, err
		}
		c2, err = l.Accept()
		return c1, c2, n.Close, err
	})
}

func TestAddresses(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		l := listen(t, n, "a", "a:8400")
		if got := l.Addr().String(); got != "a:8400" || l.Addr().Network() != "tcp" {
			t.Errorf("listens at %s %s", l.Addr().Network(), got)
		}
		if _, err := n.Host("a").Listen(":8400"); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("twice at one address: %v", err)
		}
		if _, err := n.Host("b").Listen("a:8401"); !errors.Is(err, syscall.EADDRNOTAVAIL) {
			t.Errorf("at another host's address: %v", err)
		}
		if _, err := n.Host("b").Listen("b"); err == nil {
			t.Error("listens without a port")
		}
		if _, err := n.Host("b").Dial(t.Context(), "a:8401"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial where nobody listens: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed twice: %v", err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("accept after close: %v", err)
		}
		l = listen(t, n, "a", ":8400")
		c, err := n.Host("b").Dial(t.Context(), "a:8400")
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if c.RemoteAddr().String() != "a:8400" || s.LocalAddr().String() != "a:8400" || c.LocalAddr().String() != s.RemoteAddr().String() {
			t.Errorf("%v %v %v %v", c.LocalAddr(), c.RemoteAddr(), s.LocalAddr(), s.RemoteAddr())
		}
	})
}

func TestStream(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		a, b := connect(t, n, "a", "b")
		write(t, a, "there")
		write(t, b, "back")
		expect(t, b, "there")
		expect(t, a, "back")

		if err := a.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		expectError(t, b, io.EOF, time.Now(), 0)
		if _, err := a.Write([]byte{1}); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write after CloseWrite: %v", err)
		}
		write(t, b, "still")
		expect(t, a, "still")
		a.Close()
		write(t, b, "too late")
		expectError(t, b, syscall.ECONNRESET, time.Now(), 0)
		if got := n.Conns("b", "a"); got != 0 {
			t.Errorf("%d connections are left", got)
		}
	})
}

// TestCloseUnread: what was sent to a side that closes without having read it
// breaks the connection, it is not silently gone.
func TestCloseUnread(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		a, b := connect(t, n, "a", "b")
		write(t, a, "unread")
		synctest.Wait()
		b.Close()
		expectError(t, a, syscall.ECONNRESET, time.Now(), 0)
	})
}

func TestFullWindowBlocks(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		a, b := connect(t, n, "a", "b")
		big := make([]byte, 1<<20)
		for i := range big {
			big[i] = byte(i >> 8)
		}
		if err := a.SetWriteDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		k, err := a.Write(big)
		if !errors.Is(err, os.ErrDeadlineExceeded) || k == 0 || k == len(big) || time.Since(begin) != time.Minute {
			t.Fatalf("wrote %d bytes to who does not read, %v, after %v", k, err, time.Since(begin))
		}
		if err := a.SetWriteDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			_, err := a.Write(big[k:])
			done <- errors.Join(err, a.Close())
		}()
		got, err := io.ReadAll(b)
		if err != nil || !bytes.Equal(got, big) {
			t.Errorf("read %d bytes, %v", len(got), err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestDelayKeepsOrder(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		n.SetLink("a", "b", Link{Delay: 100 * time.Millisecond})
		begin := time.Now()
		a, b := connect(t, n, "a", "b")
		if got := time.Since(begin); got != 100*time.Millisecond {
			t.Errorf("dialled in %v", got)
		}
		begin = time.Now()
		write(t, a, "x")
		write(t, b, "y")
		expectAt(t, a, "y", begin, 0)
		expectAt(t, b, "x", begin, 100*time.Millisecond)

		n.SetLinks(Link{Jitter: time.Second})
		n.SetLink("a", "b", Link{Delay: time.Millisecond, Jitter: time.Second})
		var want, got []byte
		for i := range 200 {
			want = append(want, byte(i))
			write(t, a, string(want[i:]))
		}
		n.Calm() // what is under way stays so
		a.Close()
		got, err := io.ReadAll(b)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("read %v, %v", got, err)
		}
		if took := time.Since(begin); took < 500*time.Millisecond {
			t.Errorf("200 random delays of up to a second took %v", took)
		}
	})
}

func TestBandwidth(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		a, b := connect(t, n, "a", "b")
		a2, b2 := connect(t, n, "a", "b")
		n.SetLink("a", "b", Link{BytesPerSecond: 1000})
		begin := time.Now()
		write(t, a, string(make([]byte, 5000)))
		write(t, a2, string(make([]byte, 5000)))
		expectAt(t, b, string(make([]byte, 5000)), begin, 5*time.Second)
		expectAt(t, b2, string(make([]byte, 5000)), begin, 10*time.Second)
	})
}

// TestBlock: one direction stands still and goes on where it was.
func TestBlock(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		a, b := connect(t, n, "a", "b")
		n.Block("a", "b")
		write(t, a, "held")
		write(t, b, "passes")
		expect(t, a, "passes")
		silent(t, b, 10*time.Second)
		a.Close() // the end waits its turn too
		silent(t, b, 10*time.Second)
		n.Heal()
		expectAt(t, b, "held", time.Now(), 0)
		expectError(t, b, io.EOF, time.Now(), 0)
	})
}

func TestOneWay(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		a, b := connect(t, n, "a", "b")
		n.OneWay("a", "b")
		write(t, a, "x")
		write(t, b, "y")
		expect(t, b, "x")
		silent(t, a, time.Second)
		n.OneWay("b", "a") // the other way round
		write(t, a, "z")
		expect(t, a, "y")
		silent(t, b, time.Second)
		n.Unblock("a", "b")
		expect(t, b, "z")
		if !n.Reachable("a", "b") || !n.Reachable("b", "a") {
			t.Error("not healed")
		}
	})
}

// TestPatience: a connection does not outlive a long cut, whichever way it is
// cut and whether or not anything was sent.
func TestPatience(t *testing.T) {
	for name, cut := range map[string]func(n *Net){
		"blocked there": func(n *Net) { n.Block("a", "b") },
		"blocked back":  func(n *Net) { n.Block("b", "a") },
		"isolated":      func(n *Net) { n.Isolate("b") },
		"paused":        func(n *Net) { n.Pause("a") },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *Net) {
				a, b := connect(t, n, "a", "b")
				cut(n)
				time.Sleep(29 * time.Second)
				n.Heal()
				n.Resume("a")
				silent(t, a, time.Minute)
				write(t, a, "x")
				expect(t, b, "x")

				cut(n) // counts anew
				begin := time.Now()
				expectError(t, a, syscall.ETIMEDOUT, begin, 30*time.Second)
				expectError(t, b, syscall.ETIMEDOUT, begin, 30*time.Second)
				if _, err := b.Write([]byte("x")); !errors.Is(err, syscall.ETIMEDOUT) {
					t.Errorf("write: %v", err)
				}
				n.Heal()
				expectError(t, a, syscall.ETIMEDOUT, time.Now(), 0)
			})
		})
	}
	bubble(t, func(t *testing.T, n *Net) {
		n.SetPatience(0)
		a, b := connect(t, n, "a", "b")
		n.Block("a", "b")
		write(t, a, "x")
		silent(t, b, 24*time.Hour)
		n.Heal()
		expect(t, b, "x")
	})
}

func TestResetOnHeal(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		n.SetResetOnHeal(0.5)
		const total = 100
		var froms []net.Conn
		for range total {
			a, _ := connect(t, n, "a", "b")
			froms = append(froms, a)
		}
		n.Partition([]string{"a"}, []string{"b"})
		n.Heal()
		broken := 0
		for _, a := range froms {
			if _, err := a.Write([]byte{1}); errors.Is(err, syscall.ECONNRESET) {
				broken++
			}
		}
		if broken < total/5 || broken > total*4/5 || n.Conns("a", "b") != total-broken {
			t.Errorf("%d of %d were reset, %d are open", broken, total, n.Conns("a", "b"))
		}
	})
}

func TestDialWhileCut(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		l := listen(t, n, "b", ":0")
		for name, cut := range map[string]func(){
			"there":    func() { n.Block("a", "b") },
			"back":     func() { n.Block("b", "a") },
			"isolated": func() { n.Isolate("a") },
			"paused":   func() { n.Pause("b") },
		} {
			cut()
			ctx, cancel := context.WithTimeout(t.Context(), 7*time.Second)
			begin := time.Now()
			_, err := n.Host("a").Dial(ctx, l.Addr().String())
			cancel()
			if !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != 7*time.Second {
				t.Errorf("%s: %v after %v", name, err, time.Since(begin))
			}
			begin = time.Now()
			time.AfterFunc(5*time.Second, func() { n.Heal(); n.Resume("b") })
			c, err := n.Host("a").Dial(t.Context(), l.Addr().String())
			if err != nil || time.Since(begin) != 5*time.Second {
				t.Fatalf("%s: %v after %v", name, err, time.Since(begin))
			}
			c.Close()
		}
		n.Isolate("b")
		begin := time.Now()
		_, err := n.Host("a").Dial(t.Context(), l.Addr().String())
		if !errors.Is(err, syscall.ETIMEDOUT) || time.Since(begin) != 2*time.Minute {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
	})
}

func TestPartition(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		reach := func(want string, hosts ...string) {
			t.Helper()
			var got []byte
			for i, a := range hosts {
				for _, b := range hosts[i+1:] {
					switch {
					case n.Reachable(a, b) && n.Reachable(b, a):
						got = append(got, '+')
					case n.Reachable(a, b) || n.Reachable(b, a):
						got = append(got, '/')
					default:
						got = append(got, '-')
					}
				}
			}
			if string(got) != want {
				t.Errorf("reachable: %s, want %s", got, want)
			}
		}
		n.Partition([]string{"a", "b"}, []string{"c"})
		reach("+--" /* ab ac bc */, "a", "b", "c")
		reach("+++", "a", "b", "client")
		n.Heal()
		reach("+++", "a", "b", "c")
		n.Partition([]string{"a", "b"}, []string{"b", "c"})
		reach("+-+", "a", "b", "c")
		n.Heal()
		n.Isolate("b")
		n.Pause("c")
		reach("---", "a", "b", "c")
		n.Heal()
		reach("+--", "a", "b", "c")
		n.Resume("c")
		n.Block("a", "b")
		reach("/++", "a", "b", "c")
	})
}

func TestSelfIsNeverCut(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		n.SetLinks(Link{Delay: time.Hour, Reset: 1})
		n.Isolate("a")
		n.Pause("a")
		a, b := connect(t, n, "a", "a")
		write(t, a, "x")
		expectAt(t, b, "x", time.Now(), 0)
	})
}

// TestPause: nothing is lost when it does not take too long.
func TestPause(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		a, b := connect(t, n, "a", "b")
		n.Pause("b")
		write(t, a, "x")
		write(t, b, "y")
		silent(t, b, 10*time.Second)
		silent(t, a, 10*time.Second)
		n.Resume("b")
		expect(t, b, "x")
		expect(t, a, "y")
	})
}

// TestWriteResets: a broken connection delivers a prefix of what was written,
// and the writer may think that all is well.
func TestWriteResets(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		n.SetLink("a", "b", Link{Reset: 0.3, Delay: time.Millisecond})
		const total = 400
		var unknown, lost, arrived, delivered int
		for range total {
			a, b := connect(t, n, "a", "b")
			_, err := io.WriteString(a, "0123456789")
			failed := err != nil
			_ = b.SetReadDeadline(time.Now().Add(time.Second))
			got, rerr := io.ReadAll(b)
			switch {
			case failed && !errors.Is(err, syscall.ECONNRESET):
				t.Fatal(err)
			case !bytes.HasPrefix([]byte("0123456789"), got):
				t.Fatalf("read %q", got)
			case errors.Is(rerr, os.ErrDeadlineExceeded):
				delivered++
				if len(got) != 10 {
					t.Fatalf("read %q of a connection that lives", got)
				}
			case !errors.Is(rerr, syscall.ECONNRESET):
				t.Fatal(rerr)
			case failed && len(got) == 10:
				unknown++
			case !failed && len(got) < 10:
				lost++
			default:
				arrived++
			}
			a.Close()
			b.Close()
		}
		if unknown == 0 || lost == 0 || arrived == 0 || delivered < total/2 {
			t.Errorf("%d failed but arrived, %d lost, %d as it seems, %d well", unknown, lost, arrived, delivered)
		}
		if got := n.Conns("a", "b"); got != 0 {
			t.Errorf("%d connections are left", got)
		}
	})
}

func TestResetAndCrash(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		a, b := connect(t, n, "a", "b")
		b2, c := connect(t, n, "b", "c")
		d, e := connect(t, n, "a", "c")
		n.Isolate("a")
		n.Reset("b")
		for _, conn := range []net.Conn{a, b, b2, c} {
			expectError(t, conn, syscall.ECONNRESET, time.Now(), 0)
		}
		n.Heal()
		write(t, d, "x")
		expect(t, e, "x")
		n.ResetBetween("c", "a")
		expectError(t, d, syscall.ECONNRESET, time.Now(), 0)

		l := listen(t, n, "b", ":8400")
		waiting, err := n.Host("a").Dial(t.Context(), "b:8400")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		crashed := listen(t, n, "b", ":8500")
		go func() {
			_, err := crashed.Accept()
			done <- err
		}()
		synctest.Wait()
		n.Crash("b")
		expectError(t, waiting, syscall.ECONNRESET, time.Now(), 0)
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		listen(t, n, "b", ":8400")
	})
}

func TestRefuse(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		l := listen(t, n, "b", ":0")
		n.Refuse("b", true)
		if _, err := n.Host("a").Dial(t.Context(), l.Addr().String()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
		n.Refuse("b", false)
		if _, err := n.Host("a").Dial(t.Context(), l.Addr().String()); err != nil {
			t.Error(err)
		}
	})
}

// TestFullBacklog: dialling waits for somebody to accept.
func TestFullBacklog(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		l := listen(t, n, "b", ":0")
		dial := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := n.Host("a").Dial(ctx, l.Addr().String())
			return err
		}
		for range 128 {
			if err := dial(); err != nil {
				t.Fatal(err)
			}
		}
		if err := dial(); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		time.AfterFunc(time.Second/2, func() {
			if _, err := l.Accept(); err != nil {
				t.Error(err)
			}
		})
		if err := dial(); err != nil {
			t.Error(err)
		}
	})
}

// TestCloseEndsEverything: whoever waits on the network is let go.
func TestCloseEndsEverything(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		a, b := connect(t, n, "a", "b")
		l := listen(t, n, "b", ":0")
		n.Isolate("c")
		done := make(chan error, 4)
		go func() { _, err := a.Read(make([]byte, 1)); done <- err }()
		go func() { _, err := b.Write(make([]byte, 1<<20)); done <- err }()
		go func() { _, err := l.Accept(); done <- err }()
		go func() {
			_, err := n.Host("c").Dial(context.WithoutCancel(t.Context()), l.Addr().String())
			done <- err
		}()
		synctest.Wait()
		n.Close()
		n.Close()
		for range cap(done) {
			if err := <-done; !errors.Is(err, net.ErrClosed) && err != nil {
				t.Error(err)
			}
		}
		if _, err := n.Host("a").Listen(":0"); err == nil {
			t.Error("listens after Close")
		}
	})
}

// TestSameSeed: the same happens with the same seed.
func TestSameSeed(t *testing.T) {
	t.Setenv("DIURNA_SEED", "7")
	run := func() (log []byte) {
		bubble(t, func(t *testing.T, n *Net) {
			n.SetLinks(Link{Jitter: time.Second, Reset: 0.05})
			begin := time.Now()
			for range 50 {
				a, b := connect(t, n, "a", "b")
				_, _ = io.WriteString(a, "0123456789")
				_ = b.SetReadDeadline(time.Now().Add(2 * time.Second))
				got, err := io.ReadAll(b)
				log = append(log, got...)
				log = append(log, err.Error()...)
				log = append(log, time.Since(begin).String()...)
			}
		})
		return log
	}
	first := run()
	if second := run(); !bytes.Equal(first, second) {
		t.Errorf("first\n%s\nthen\n%s", first, second)
	}
}
