package config

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/hashicorp/go-sockaddr"
	"github.com/hashicorp/go-sockaddr/template"
)

// maxFile bounds configuration files and what file() reads, so that naming a
// wrong file is an error rather than a node out of memory.
const maxFile = mib

var thisHost = host{
	env:       os.LookupEnv,
	hostname:  os.Hostname,
	privateIP: sockaddr.GetPrivateIP,
	expand:    template.Parse,
	readFile:  readRegular,
	readDir:   os.ReadDir,
	isDir: func(path string) (bool, error) {
		st, err := os.Stat(path)
		if err != nil {
			return false, reason(err)
		}
		return st.IsDir(), nil
	},
}

// readRegular reads a whole regular file. It does not open anything else: a
// pipe or a terminal would hang the start.
func readRegular(path string) (_ []byte, err error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, reason(err)
	}
	if st.IsDir() {
		return nil, errors.New("it is a folder")
	}
	if !st.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, reason(err)
	}
	defer func() {
		if cerr := f.Close(); err == nil && cerr != nil {
			err = reason(cerr)
		}
	}()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, reason(err)
	}
	if int64(len(b)) > maxFile {
		return nil, fmt.Errorf("it is larger than %s", formatSize(maxFile))
	}
	return b, nil
}

// reason drops "open <path>:" from an error, where the path is said already.
func reason(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
