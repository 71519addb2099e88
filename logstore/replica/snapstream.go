package replica

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/diurnalog/diurna/logstore"
)

// A snapshot on its way to another server is one stream:
//
//	header  24 bytes: magic, checksum of the rest, version, length of metadata
//	metadata  the content of a snapshot file
//	log  logstore's export, through the snapshot's index
//
// docs/FORMAT.md has the table. Nothing is copied before it is sent.
const (
	streamMagic   = "DIURNSNP"
	streamVersion = 1
	streamHeader  = 24
)

// streamName is what errors call it.
const streamName = "the leader's snapshot"

func encodeStreamHeader(meta int) []byte {
	b := make([]byte, streamHeader)
	le := binary.LittleEndian
	copy(b, streamMagic)
	le.PutUint32(b[12:], streamVersion)
	le.PutUint64(b[16:], uint64(meta))
	le.PutUint32(b[8:], crc32.Checksum(b[12:], castagnoli))
	return b
}

// parseStreamHeader returns the length of the metadata.
func parseStreamHeader(b []byte) (meta int, err error) {
	le := binary.LittleEndian
	switch {
	case len(b) != streamHeader || string(b[:8]) != streamMagic:
		return 0, errors.New("this is not a snapshot with records")
	case le.Uint32(b[8:]) != crc32.Checksum(b[12:], castagnoli):
		return 0, errors.New("the checksum of the snapshot's header is wrong")
	case le.Uint32(b[12:]) != streamVersion:
		return 0, &VersionError{streamName, fmt.Sprint("format version ", le.Uint32(b[12:]))}
	case le.Uint64(b[16:]) > snapshotLimit:
		return 0, fmt.Errorf("the snapshot's metadata has %d bytes", le.Uint64(b[16:]))
	}
	return int(le.Uint64(b[16:])), nil
}

// streamReader reads the stream of a snapshot. Raft closes it.
type streamReader struct {
	r       io.Reader
	size    int64
	export  *logstore.Export
	damaged func(error)
	done    func()
}

// openStream begins the stream of a snapshot of a generation. damaged is told of
// reads that fail, and done is called when it is closed.
func openStream(gen *generation, f *snapshotFile, damaged func(error), done func()) (*streamReader, error) {
	meta, err := encodeSnapshot(f)
	if err != nil {
		return nil, err
	}
	export, err := gen.log.Export(f.Index)
	if err != nil {
		return nil, err
	}
	head := append(encodeStreamHeader(len(meta)), meta...)
	return &streamReader{
		r:       io.MultiReader(bytes.NewReader(head), export),
		size:    int64(len(head)) + export.Size(),
		export:  export,
		damaged: damaged,
		done:    done,
	}, nil
}

func (s *streamReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.damaged(err)
	}
	return n, err
}

func (s *streamReader) Close() error {
	if s.done == nil {
		return nil
	}
	err := s.export.Close()
	s.done()
	s.done = nil
	return err
}
