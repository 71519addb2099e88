package identity

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"sync"

	"github.com/hashicorp/go-hclog"

	"github.com/diurnalog/diurna/agent/config"
)

// fileSource reads certificates that somebody else renews: Vault Agent,
// cert-manager, a person.
type fileSource struct {
	tls    config.TLS
	logger hclog.Logger
	watch  watch
	warned sync.Once
}

func newFileSource(c config.TLS, logger hclog.Logger) *fileSource {
	return &fileSource{tls: c, logger: logger, watch: watch{files: []string{c.CertFile, c.KeyFile, c.CAFile}}}
}

func (s *fileSource) fetch(context.Context) (*pair, *issuers, error) {
	// A failure is final until the files change: they are seen from now on.
	s.watch.mark()
	p, err := s.pair()
	if err != nil {
		return nil, nil, permanent(err)
	}
	from, err := loadIssuers(s.tls.CAFile)
	if err != nil {
		return nil, nil, permanent(fmt.Errorf("tls.ca_file: %w", err))
	}
	return p, from, nil
}

func (s *fileSource) pair() (*pair, error) {
	certs, err := loadPEM(s.tls.CertFile)
	if err != nil {
		return nil, fmt.Errorf("tls.cert_file: %w", err)
	}
	if len(certs.certs) == 0 {
		return nil, fmt.Errorf("tls.cert_file: %s holds no certificate", s.tls.CertFile)
	}
	keys, err := loadPEM(s.tls.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("tls.key_file: %w", err)
	}
	if len(keys.keys) != 1 {
		return nil, fmt.Errorf("tls.key_file: %s holds %d keys, not one", s.tls.KeyFile, len(keys.keys))
	}
	if info, err := os.Stat(s.tls.KeyFile); err == nil && info.Mode().Perm()&0o007 != 0 {
		s.warned.Do(func() {
			s.logger.Warn("everybody on this machine can read the key", "file", s.tls.KeyFile, "mode", fmt.Sprintf("%04o", info.Mode().Perm()))
		})
	}
	p, err := newPair(keys.keys[0], certs.certs)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", s.tls.CertFile, s.tls.KeyFile, err)
	}
	return p, nil
}

func (s *fileSource) issuers(context.Context) (*issuers, error) { return nil, nil }
func (s *fileSource) changed() bool                             { return s.watch.changed() }
func (s *fileSource) scheduled() bool                           { return false }
func (s *fileSource) run(context.Context)                       {}

func loadPEM(name string) (*bundle, error) {
	text, err := readFile(name)
	if err != nil {
		return nil, err
	}
	b, err := parsePEM(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

// loadIssuers reads CAs, and their revocation lists where there are some. What
// is in the file is trusted, nothing else.
func loadIssuers(name string) (*issuers, error) {
	b, err := loadPEM(name)
	if err != nil {
		return nil, err
	}
	if len(b.certs) == 0 {
		return nil, fmt.Errorf("%s holds no certificate", name)
	}
	return &issuers{certs: b.certs, crls: b.crls, complete: true, exact: true}, nil
}

// watch tells when the content of files has changed and settled: the files of a
// pair are seldom replaced at once.
type watch struct {
	files []string

	mu            sync.Mutex
	seen, pending [sha256.Size]byte
}

// mark takes what is there as seen.
func (w *watch) mark() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen = w.sum()
}

// changed is true once for content that is new, and was the same the last time.
func (w *watch) changed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch sum := w.sum(); sum {
	case w.seen:
		w.pending = sum
	case w.pending:
		w.seen = sum
		return true
	default:
		w.pending = sum
	}
	return false
}

func (w *watch) sum() (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, name := range w.files {
		if name == "" {
			continue
		}
		text, err := readFile(name)
		if err != nil {
			text = []byte(err.Error())
		}
		one := sha256.Sum256(text)
		h.Write(one[:])
	}
	h.Sum(sum[:0])
	return sum
}
