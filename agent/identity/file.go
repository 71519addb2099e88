package identity

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// makeDir makes a folder for secrets.
func makeDir(dir string) error {
	if dir == "" {
		return errors.New("there is no folder to keep it in")
	}
	return os.MkdirAll(dir, 0o700)
}

// writeFile replaces a file at once, readable by its owner only: who reads it
// sees the old or the new, also after a crash.
func writeFile(name string, text []byte) error {
	return viaTemp(name, text, os.Rename)
}

// createFile is writeFile for a file that must not be there yet: of several
// that create it one does, the others get fs.ErrExist.
func createFile(name string, text []byte) error {
	return viaTemp(name, text, func(temp, name string) error {
		// A link, unlike a rename, does not replace.
		if err := os.Link(temp, name); err != nil {
			return err
		}
		return os.Remove(temp)
	})
}

// absent tells of a file that is there already, before another is written that
// would be left without it.
func absent(dir string, names ...string) error {
	for _, name := range names {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			if err == nil {
				err = fs.ErrExist
			}
			return fmt.Errorf("%s: %w", filepath.Join(dir, name), err)
		}
	}
	return nil
}

func viaTemp(name string, text []byte, publish func(temp, name string) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name()) // what went wrong counts
		}
	}()
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = publish(f.Name(), name); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

// removeTemps removes what crashes left of files of which this process is the
// only writer.
func removeTemps(dir string, names ...string) {
	for _, name := range names {
		temps, _ := filepath.Glob(filepath.Join(dir, "."+name+".*")) // a bad pattern finds nothing
		for _, temp := range temps {
			_ = os.Remove(temp) // harmless if it stays
		}
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// readFile reads a file of PEM or a token, of bounded size.
func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	text, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxPEM {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, maxPEM)
	}
	return text, nil
}
