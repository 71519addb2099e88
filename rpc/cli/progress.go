package cli

import (
	"fmt"
	"io"
	"time"
)

// progress draws a line on the terminal, again and again.
type progress struct {
	quit, done chan struct{}
}

// noProgress draws nothing.
func noProgress() *progress {
	g := &progress{quit: make(chan struct{}), done: make(chan struct{})}
	close(g.done)
	return g
}

// startProgress draws a line until stop; "" draws nothing yet. Without a terminal
// it draws nothing at all.
func (m *Meta) startProgress(line func() string) *progress {
	if !m.stderrIsTerminal() {
		return noProgress()
	}
	g := &progress{quit: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(g.done)
		drawn := false
		ticker := time.NewTicker(250 * time.Millisecond)
		defer ticker.Stop()
		for {
			select {
			case <-g.quit:
				if drawn {
					_, _ = io.WriteString(m.Stderr, "\r\x1b[K")
				}
				return
			case <-ticker.C:
				if text := line(); text != "" {
					drawn = true
					_, _ = fmt.Fprintf(m.Stderr, "\r\x1b[K%s", text)
				}
			}
		}
	}()
	return g
}

func (g *progress) stop() {
	close(g.quit)
	<-g.done
}
