package cli

import (
	"context"
	"sync"
	"time"

	"github.com/diurnalog/diurna/rpc/client"
)

const (
	// othersTimeout bounds what the other nodes add to an answer: it is an
	// extra, and the node that is down is the one that is looked for.
	othersTimeout = time.Second
	// othersAtOnce bounds how many are asked at a time.
	othersAtOnce = 16
)

// askOthers fills in what a list's other nodes say of themselves, and what the
// leader says of all, as far as they can be reached.
func (n *node) askOthers(ctx context.Context, list *client.ServerList) {
	ctx, cancel := context.WithTimeout(ctx, othersTimeout)
	defer cancel()
	answers := make([]client.ServerList, len(list.Servers))
	var wg sync.WaitGroup
	slots := make(chan struct{}, othersAtOnce)
	for i, s := range list.Servers {
		if s.ID == list.AnsweredBy || s.Address == "" {
			continue
		}
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			answers[i] = n.askOne(ctx, s.Address)
		})
	}
	wg.Wait()
	for i := range list.Servers {
		s, answer := &list.Servers[i], answers[i]
		if answer.AnsweredBy != s.ID {
			continue // nobody, or somebody else at its address
		}
		if self, ok := answer.Self(); ok {
			mergeSelf(s, self)
		}
		if s.Leader {
			mergeHealth(list, answer)
		}
	}
}

func (n *node) askOne(ctx context.Context, address string) client.ServerList {
	c, err := client.Dial(address, n.clientOptions(client.WithRetry(0))...)
	if err != nil {
		return client.ServerList{}
	}
	list, err := c.Servers(ctx)
	if cerr := c.Close(); err != nil || cerr != nil {
		return client.ServerList{}
	}
	return list
}

// mergeSelf takes over what a node says of itself.
func mergeSelf(s *client.Server, self client.Server) {
	s.Term, s.AppliedIndex = self.Term, self.AppliedIndex
	s.FirstOffset, s.HighWatermark = self.FirstOffset, self.HighWatermark
	for _, text := range []struct {
		to   *string
		from string
	}{{&s.Name, self.Name}, {&s.Version, self.Version}, {&s.State, self.State}, {&s.Build, self.Build}} {
		if text.from != "" {
			*text.to = text.from
		}
	}
}

// mergeHealth takes over what the leader says of all.
func mergeHealth(list *client.ServerList, leader client.ServerList) {
	for _, said := range leader.Servers {
		for i := range list.Servers {
			s := &list.Servers[i]
			if s.ID != said.ID {
				continue
			}
			if said.Healthy != nil {
				s.Healthy, s.StableSince = said.Healthy, said.StableSince
			}
			if said.LastContact >= 0 {
				s.LastContact = said.LastContact
			}
			if s.CatalogAddress == "" {
				s.CatalogAddress = said.CatalogAddress
			}
		}
	}
}
