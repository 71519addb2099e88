package identity

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Lives of what a throw-away CA makes.
const (
	devCALife     = 10 * 365 * 24 * time.Hour
	devServerLife = 30 * 24 * time.Hour
	devClientLife = 365 * 24 * time.Hour
	// devClient is the name of the client that the command line is.
	devClient = "dev"
)

// devSource makes certificates with a CA in a folder, which the first process
// that needs it makes. The node's own key and certificate stay in memory.
type devSource struct {
	dir     string
	cluster string
	names   names
	now     func() time.Time
	logger  hclog.Logger

	once  sync.Once
	files watch
}

func (s *devSource) fetch(context.Context) (*pair, *issuers, error) {
	fail := func(err error) (*pair, *issuers, error) {
		return nil, nil, permanent(fmt.Errorf("throw-away CA in %s: %w", s.dir, err))
	}
	ca, err := s.authority()
	if err != nil {
		return fail(err)
	}
	s.watcher().mark()
	if now := s.now(); now.After(ca.cert.NotAfter) {
		return fail(fmt.Errorf("the CA has expired: remove the folder, and there will be a new one: %w", ErrExpired))
	}
	if err := s.client(ca); err != nil {
		return fail(err)
	}
	key, err := newKey()
	if err != nil {
		return fail(err)
	}
	leaf, err := ca.sign(key.Public(), s.names, true, devServerLife, s.now())
	if err != nil {
		return fail(err)
	}
	p, err := newPair(key, []*x509.Certificate{leaf, ca.cert})
	if err != nil {
		return fail(err)
	}
	return p, &issuers{certs: []*x509.Certificate{ca.cert}, complete: true, exact: true}, nil
}

// authority loads the CA, or makes it. Of several processes that make one, one
// makes it that counts: only one can create the file.
func (s *devSource) authority() (*authority, error) {
	if err := makeDir(s.dir); err != nil {
		return nil, err
	}
	ca, err := loadCA(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		var text []byte
		if ca, err = newCA("Diurna throw-away CA", devCALife, s.now()); err != nil {
			return nil, err
		}
		if text, err = ca.encode(); err != nil {
			return nil, err
		}
		err = createFile(filepath.Join(s.dir, CAKeyFile), text)
		switch {
		case err == nil:
			s.logger.Info("made a throw-away CA", "folder", s.dir)
		case errors.Is(err, fs.ErrExist):
			ca, err = loadCA(s.dir) // another process was first
		}
	}
	if err != nil {
		return nil, err
	}
	// Every process writes the same.
	return ca, writeChanged(filepath.Join(s.dir, CAFile), encodeCerts(ca.cert))
}

// client keeps the command line's certificate good. Processes share its key,
// which is made once; so whoever writes the certificate, it fits.
func (s *devSource) client(ca *authority) error {
	key, err := s.clientKey()
	if err != nil {
		return err
	}
	name := filepath.Join(s.dir, DevClientFile)
	n := clientNames(s.cluster, devClient)
	if b, err := loadPEM(name); err == nil && len(b.certs) == 1 {
		c, now := b.certs[0], s.now()
		if samePublic(key, c) && c.CheckSignatureFrom(ca.cert) == nil && n.missing(c) == "" &&
			!now.Before(c.NotBefore) && now.Before(renewAt(c.NotBefore, c, 0)) {
			return nil
		}
	}
	cert, err := ca.sign(key.Public(), n, false, devClientLife, s.now())
	if err != nil {
		return err
	}
	return writeFile(name, encodeCerts(cert))
}

func (s *devSource) clientKey() (crypto.Signer, error) {
	name := filepath.Join(s.dir, DevClientKeyFile)
	b, err := loadPEM(name)
	if errors.Is(err, fs.ErrNotExist) {
		key, err := newKey()
		if err != nil {
			return nil, err
		}
		text, err := encodeKey(key)
		if err != nil {
			return nil, err
		}
		if err := createFile(name, text); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		b, err = loadPEM(name)
		if err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	if len(b.keys) != 1 {
		return nil, fmt.Errorf("%s holds %d keys, not one", name, len(b.keys))
	}
	return b.keys[0], nil
}

// writeChanged writes a file unless it has this content.
func writeChanged(name string, text []byte) error {
	if have, err := os.ReadFile(name); err == nil && string(have) == string(text) {
		return nil
	}
	return writeFile(name, text)
}

func (s *devSource) watcher() *watch {
	s.once.Do(func() { s.files.files = []string{filepath.Join(s.dir, CAKeyFile)} })
	return &s.files
}

func (s *devSource) issuers(context.Context) (*issuers, error) { return nil, nil }
func (s *devSource) scheduled() bool                           { return true }
func (s *devSource) changed() bool                             { return s.watcher().changed() }
func (s *devSource) run(context.Context)                       {}
