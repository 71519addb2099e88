package identity

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// The files of the cache. Key and certificate are in one, so that a crash
// leaves both of the same renewal.
const (
	cacheNode    = "node.pem"
	cacheIssuers = "issuers.pem"
)

// goneHeader tells, in issuers.pem, since when an issuer is no longer listed.
const goneHeader = "Gone"

// loadCache reads what an earlier run left. Nothing there is nil.
func loadCache(dir string, now time.Time) (*state, error) {
	removeTemps(dir, cacheNode, cacheIssuers)
	node, err := readCached(filepath.Join(dir, cacheNode))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	list, err := readCached(filepath.Join(dir, cacheIssuers))
	if err != nil {
		return nil, err
	}
	if len(node.keys) != 1 {
		return nil, fmt.Errorf("%s: it holds %d keys, not one", filepath.Join(dir, cacheNode), len(node.keys))
	}
	p, err := newPair(node.keys[0], node.certs)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, cacheNode), err)
	}
	var anchors []anchor
	for k, c := range list.certs {
		a := anchor{cert: c}
		if text, ok := list.headers[k][goneHeader]; ok {
			if a.gone, err = time.Parse(time.RFC3339Nano, text); err != nil {
				return nil, fmt.Errorf("%s: %w", filepath.Join(dir, cacheIssuers), err)
			}
		}
		if !now.After(c.NotAfter) {
			anchors = append(anchors, a)
		}
	}
	t, err := newTrust(anchors, list.crls)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, cacheIssuers), err)
	}
	return &state{p, t}, nil
}

// readCached reads a file that nobody else may read or write.
func readCached(name string) (*bundle, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", name)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %04o: others can read it, and its key may be known; it should be 0600", name, mode)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err != nil {
		return nil, err
	}
	b, err := parsePEM(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

// save keeps what is in use for the next run. Without it a restart needs Vault,
// which is said, but nothing else is wrong.
func (i *Identity) save(p *pair, t *trust) {
	if _, ok := i.src.(*vaultSource); !ok || i.cfg.Dir == "" {
		return
	}
	if err := saveCache(i.cfg.Dir, p, t); err != nil {
		i.logger.Warn("cannot keep the certificate: a restart will need Vault", "folder", i.cfg.Dir, "error", err)
	}
}

func saveCache(dir string, p *pair, t *trust) error {
	key, err := encodeKey(p.key)
	if err != nil {
		return err
	}
	if err := makeDir(dir); err != nil {
		return err
	}
	var list []byte
	for _, a := range t.anchors {
		block := &pem.Block{Type: pemCertificate, Bytes: a.cert.Raw}
		if !a.gone.IsZero() {
			block.Headers = map[string]string{goneHeader: a.gone.UTC().Format(time.RFC3339Nano)}
		}
		list = append(list, pem.EncodeToMemory(block)...)
	}
	for _, crl := range t.crls {
		list = append(list, pem.EncodeToMemory(&pem.Block{Type: pemCRL, Bytes: crl.Raw})...)
	}
	// The issuers first: those of the new certificate are also those that
	// vouch for the old one.
	if err := writeFile(filepath.Join(dir, cacheIssuers), list); err != nil {
		return err
	}
	chain := append([]*x509.Certificate{p.leaf}, p.above...)
	return writeFile(filepath.Join(dir, cacheNode), append(key, encodeCerts(chain...)...))
}
