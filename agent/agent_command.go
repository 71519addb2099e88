package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/agent/config"
	ident "github.com/diurnalog/diurna/agent/identity"
	"github.com/diurnalog/diurna/logstore/vfs"
	"github.com/diurnalog/diurna/rpc/cli/flags"
)

// agentCommand runs a node until it is told to stop.
type agentCommand struct {
	stdout, stderr io.Writer
	version        string
	// program is how the user called it.
	program string
	// fs is where tests have the disk fail; nil is the machine's.
	fs vfs.FS
	// signals starts the delivery of INT, TERM and HUP.
	signals func() (<-chan os.Signal, func())
	// exit ends the process at once.
	exit func(code int)
	now  func() time.Time

	asked time.Time // when the first request to stop came
	raft  *raftSink // what Raft tells of itself, whichever node runs
}

// echo is how soon after a signal the same one is taken for an echo of it, and
// not for impatience: timeout(1), and others who signal a process and then its
// group, send every signal twice.
const echo = 200 * time.Millisecond

// impatient notes a request to stop, and tells whether it is not the first.
func (c *agentCommand) impatient() bool {
	now := c.now()
	if c.asked.IsZero() {
		c.asked = now
		return false
	}
	return now.Sub(c.asked) >= echo
}

func osSignals() (<-chan os.Signal, func()) {
	ch := make(chan os.Signal, 4)
	signal.Notify(ch, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	return ch, func() { signal.Stop(ch) }
}

// Synopsis implements cli.Command.
func (c *agentCommand) Synopsis() string { return "Run a node" }

func (c *agentCommand) options(src *config.Sources) *flags.Set {
	f := flags.New()
	f.Adopt(src.Register)
	return f
}

// Help implements cli.Command.
func (c *agentCommand) Help() string {
	return c.options(&config.Sources{}).Help("diurna agent [options]", `
Runs a node in the foreground. It logs to standard error.

INT (Ctrl-C) and TERM stop it cleanly: it takes no more calls, answers those
under way, closes the log and exits 0. A second one ends it at once, with 1.
HUP reads the configuration again and applies what can change while it runs.

Exits 1 when it cannot start, 2 when it had to give up serving, and 3 when a
disk failed under it: then nothing more was acknowledged, and what was is on
disk. Look at the disk before you start it again.
`, `
Examples:

  Try it, with data that is gone at the end:

      $ diurna agent -dev

  The same, with data that stays, at another port:

      $ diurna agent -dev -data-dir ./data -rpc-addr 127.0.0.1:9400

  With certificates of a throw-away CA, also for the clients:

      $ diurna agent -dev -tls

  With configuration files:

      $ diurna agent -config-dir /etc/diurna.d
`)
}

// Run implements cli.Command.
func (c *agentCommand) Run(args []string) int {
	var src config.Sources
	if err := c.options(&src).Parse(args); err != nil {
		return usageError(c.stderr, "agent", err)
	}
	cfg, ok := loadConfig(src, c.stderr)
	if !ok {
		return exitUsage
	}
	held := ballast()
	defer runtime.KeepAlive(held)
	logger := newLogger(cfg, c.stderr)
	var err error
	if c.raft, err = tellRaft(); err != nil {
		c.fail(cfg, logger, "cannot start", err)
		return exitUsage
	}
	// Before anything that a signal would have to end cleanly.
	signals, unsubscribe := c.signals()
	defer unsubscribe()

	var delay time.Duration
	for {
		began := c.now()
		a, code, err := c.start(cfg, src, logger, signals)
		if a != nil {
			code, err = c.supervise(a, cfg, src, logger, signals)
		}
		if err == nil {
			return code
		}
		// In place: a supervisor's restart would do, but not every node has one.
		if code, again := c.heal(cfg, logger, signals, err); !again {
			return code
		}
		if delay = min(2*delay+time.Second, maxRestartDelay); c.now().Sub(began) > steadyRun {
			delay = 0
		}
		logger.Info("starting again", "in", delay)
		if !c.pause(delay, logger, signals) {
			return exitOK
		}
	}
}

// A node that ends soon after each start is started again ever more slowly.
const (
	steadyRun       = time.Minute
	maxRestartDelay = 30 * time.Second
)

// pause waits, unless it is told to stop.
func (c *agentCommand) pause(d time.Duration, logger hclog.Logger, signals <-chan os.Signal) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			return true
		case s := <-signals:
			if s != syscall.SIGHUP {
				logger.Info("stopping", "signal", s.String())
				return false
			}
			logger.Warn("not reloading while the node does not run")
		}
	}
}

// heal prepares the next start of a node that ended for err, which may take as
// long as there is no leader to get undamaged data from.
func (c *agentCommand) heal(cfg *config.Config, logger hclog.Logger, signals <-chan os.Signal, cause error) (code int, again bool) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	healed := make(chan error, 1)
	go func() { healed <- Heal(ctx, cfg, c.agentOptions(cfg, logger), cause) }()
	for {
		select {
		case err := <-healed:
			switch {
			case err == nil:
				return exitOK, true
			case !c.asked.IsZero():
				return exitOK, false
			}
			c.fail(cfg, logger, "cannot go on with damaged data", err)
			return exitStorage, false
		case s := <-signals:
			if s == syscall.SIGHUP {
				logger.Warn("not reloading while the node does not run")
			} else if c.impatient() {
				return c.stopAtOnce(logger, s), false
			}
			cancel()
		}
	}
}

func (c *agentCommand) agentOptions(cfg *config.Config, logger hclog.Logger) Options {
	return Options{Logger: logger, Version: c.version, fs: c.fs, raft: c.raft, OnFatal: func(err error) {
		c.diskFailed(cfg, logger, err)
		c.exit(exitStorage)
	}}
}

// start starts the node, which takes a while if there is much to recover, and
// returns it; or nil and the exit code, with an error if it should be tried
// again.
func (c *agentCommand) start(cfg *config.Config, src config.Sources, logger hclog.Logger, signals <-chan os.Signal) (*Agent, int, error) {
	type result struct {
		agent *Agent
		err   error
	}
	started := make(chan result, 1)
	// Ends the wait for a certificate, should somebody not want to wait.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		a, err := Start(ctx, cfg, c.agentOptions(cfg, logger))
		started <- result{a, err}
	}()
	reload := false
	for {
		select {
		case r := <-started:
			switch {
			case r.err != nil && !c.asked.IsZero() && errors.Is(r.err, context.Canceled):
				return nil, exitOK, nil
			case r.err != nil:
				err := r.err
				if Again(cfg, err) && c.asked.IsZero() {
					return nil, exitUsage, err
				}
				if isFull(err) {
					err = fmt.Errorf("%w: the disk is full, make room and start the node again", err)
				}
				c.fail(cfg, logger, "cannot start", err)
				return nil, exitUsage, nil
			case !c.asked.IsZero():
				return nil, c.stop(r.agent, cfg, logger, signals), nil
			case reload:
				c.reload(r.agent, src, logger)
			}
			return r.agent, exitOK, nil
		case s := <-signals:
			switch {
			case s == syscall.SIGHUP:
				reload = true
			case c.impatient():
				return nil, c.stopAtOnce(logger, s), nil
			default:
				logger.Info("stopping once it has started", "signal", s.String())
				cancel()
			}
		}
	}
}

func (c *agentCommand) diskFailed(cfg *config.Config, logger hclog.Logger, err error) {
	what, advice := "the disk failed", "Nothing more is acknowledged, and what was is on it. Look at the disk before you start the node again."
	if isFull(err) {
		what, advice = "the disk is full", "What was acknowledged is on it. Make room, then start the node again."
	}
	if cfg.LogJSON {
		logger.Error(what, "error", err, "advice", advice)
		return
	}
	say(c.stderr, "Error: %s: %v. %s\n", what, err, advice)
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// fail tells an error where somebody will see it: as log, or as plain text
// beside logs for people.
func (c *agentCommand) fail(cfg *config.Config, logger hclog.Logger, what string, err error) {
	if cfg.LogJSON {
		logger.Error(what, "error", err)
		return
	}
	say(c.stderr, "Error: %s: %v\n", what, err)
}

// supervise runs a started node until it is to end, and ends it. It returns the
// exit code, with an error if the node should be started again.
func (c *agentCommand) supervise(a *Agent, cfg *config.Config, src config.Sources, logger hclog.Logger, signals <-chan os.Signal) (int, error) {
	ctx, cancel := context.WithCancel(context.Background())
	ready := make(chan error, 1)
	var waiting sync.WaitGroup
	waiting.Go(func() { ready <- a.WaitReady(ctx) })
	code := exitOK
	var again error
	for running := true; running; {
		select {
		case err := <-ready:
			ready = nil
			if err != nil {
				logger.Error("not ready", "error", err)
			} else if cfg.Dev && !cfg.LogJSON {
				c.banner(cfg, a)
			}
		case err := <-a.Failed():
			running = false
			switch {
			case errors.Is(err, ErrLeft):
				logger.Info("left the cluster; the data is of no more use")
			case Again(cfg, err):
				again = err
			default:
				c.fail(cfg, logger, "cannot serve any more", err)
				code = exitServer
			}
		case s := <-signals:
			if s == syscall.SIGHUP {
				c.reload(a, src, logger)
				continue
			}
			c.impatient()
			logger.Info("stopping", "signal", s.String())
			running, again = false, nil
		}
	}
	cancel()
	waiting.Wait()
	stopped := c.stop(a, cfg, logger, signals)
	if again != nil && c.asked.IsZero() {
		return stopped, again
	}
	return max(code, stopped), nil
}

// stop ends the node cleanly; another signal ends the process at once.
func (c *agentCommand) stop(a *Agent, cfg *config.Config, logger hclog.Logger, signals <-chan os.Signal) int {
	ctx, cancel := context.WithTimeout(context.Background(), cfg.ShutdownTimeout)
	defer cancel()
	stopped := make(chan error, 1)
	go func() { stopped <- a.Stop(ctx) }()
	for {
		select {
		case err := <-stopped:
			if err != nil {
				c.fail(cfg, logger, "not stopped cleanly", err)
				return exitUsage
			}
			return exitOK
		case s := <-signals:
			if s == syscall.SIGHUP || !c.impatient() {
				continue
			}
			return c.stopAtOnce(logger, s)
		}
	}
}

func (c *agentCommand) stopAtOnce(logger hclog.Logger, s os.Signal) int {
	logger.Warn("stopping at once", "signal", s.String())
	c.exit(exitUsage)
	return exitUsage
}

func (c *agentCommand) reload(a *Agent, src config.Sources, logger hclog.Logger) {
	cfg, err := config.Load(src)
	if err != nil {
		// The running configuration stays.
		logger.Error("configuration not reloaded", "error", err)
		return
	}
	if changes := a.Reload(cfg); len(changes) == 0 {
		logger.Info("configuration reloaded; nothing has changed")
	}
}

// banner is the two lines to try, for the address this node really has, and
// what goes before them where it wants certificates.
func (c *agentCommand) banner(cfg *config.Config, a *Agent) {
	addr, where, first := "", "", ""
	if a.Address() != "127.0.0.1:8400" {
		addr = " -addr " + a.Address()
	}
	switch cfg.TLS.Source {
	case config.TLSNone:
	case config.TLSDev:
		dir := absolute(cmp.Or(cfg.TLS.DevDir, filepath.Join(a.data.path, tlsDir)))
		first = "    " + exports(filepath.Join(dir, ident.CAFile), filepath.Join(dir, ident.DevClientFile), filepath.Join(dir, ident.DevClientKeyFile)) + "\n"
	default:
		where = ", with DIURNA_CACERT, DIURNA_CLIENT_CERT and\nDIURNA_CLIENT_KEY naming the files of a client"
	}
	say(c.stdout, "\nReady. In another terminal%[3]s:\n\n%[4]s    seq 1 100000 | %[1]s produce%[2]s\n    %[1]s consume%[2]s\n\n", c.program, addr, where, first)
}
