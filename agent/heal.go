package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/agent/config"
	"github.com/diurnalog/diurna/discovery"
	"github.com/diurnalog/diurna/logstore/replica"
)

// Again tells whether a node that failed like this, or did not start, should be
// started again in this process: after Heal where its data is damaged.
func Again(cfg *config.Config, err error) bool {
	return errors.Is(err, replica.ErrRestart) || damaged(cfg, err)
}

// damaged tells whether the node's data is damaged and others may have it whole.
func damaged(cfg *config.Config, err error) bool {
	return errors.Is(err, replica.ErrDamaged) && !cfg.Alone()
}

// Heal prepares the data directory of a node, which must not run, for its next
// start. It does nothing unless damage says that the data is damaged.
//
// Then the node can neither vote, because it may have acknowledged what it no
// longer has, nor serve. It becomes a new node of the same cluster, with a new
// id and no log, which the leader brings up to date. It does so only while it
// sees a leader that has a quorum without it: were all nodes damaged at once,
// all of them must keep what they have.
//
// The damaged data stays beside the new until the node is a voter again.
func Heal(ctx context.Context, cfg *config.Config, opts Options, damage error) (err error) {
	if !damaged(cfg, damage) {
		return nil
	}
	opts = opts.withDefaults()
	logger := opts.Logger
	logger.Error("the data is damaged; the node does not serve it, and looks for a leader to get it from", "error", damage)
	data, err := openDataDir(opts.fs, cfg.DataDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, data.Close()) }()
	if err := awaitLeader(ctx, cfg, opts, data, logger); err != nil {
		return fmt.Errorf("waiting for a leader to get undamaged data from: %w", err)
	}
	was := data.identity()
	if err := data.renew(); err != nil {
		return err
	}
	now := data.identity()
	logger.Warn("this node begins anew and gets the log from the leader; the damaged data is kept until then",
		"id", now.node, "was", was.node, "damaged", was.logs())
	return nil
}

// awaitLeader returns once another node of the cluster leads, and has shown it.
func awaitLeader(ctx context.Context, cfg *config.Config, opts Options, data *dataDir, logger hclog.Logger) (err error) {
	sec, err := openSecurity(ctx, cfg, opts, data, cfg.Listener.Advertise)
	if err != nil {
		return err
	}
	n, err := openNeighbours(cfg, opts, data, sec)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { sec.run(ctx, nil) })
	ended := make(chan error, 1)
	running.Go(func() { ended <- n.discovery.Run(ctx) })
	defer func() {
		cancel()
		running.Wait()
		err = errors.Join(err, <-ended, n.close(context.Background()))
	}()
	id := data.identity()
	for said := false; ; {
		changed := n.discovery.Changed()
		for _, a := range ask(ctx, n.forward.Status, n.known(discovery.Node{ID: id.node})) {
			if a.err != nil || a.status.Role != "leader" || a.status.NodeID == id.node || a.status.ClusterID != id.cluster {
				continue
			}
			// It may still lead by what this node said to it before it stopped.
			within, cancel := context.WithTimeout(ctx, probeTimeout)
			err := n.forward.Confirm(within, a.node.Address)
			cancel()
			if err == nil {
				return nil
			}
			logger.Debug("this leader does not lead without this node", "error", err)
		}
		if !said {
			said = true
			logger.Warn("no leader answers; waiting for one, and keeping the damaged data")
		}
		timer := time.NewTimer(2 * time.Second)
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
		timer.Stop()
	}
}
