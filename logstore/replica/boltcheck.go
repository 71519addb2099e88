package replica

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
)

// BoltDB trusts the pages of its file. A damaged count or page number makes it
// read memory that is not its own, which no recover survives, or go on with
// pages of the past. So the bytes are checked before it sees them: everything
// that it will follow must be where it can be, and be what it must be. The
// format is that of BoltDB's version 2, in native byte order; it has been the
// same since 2014.
const (
	boltMagic      = 0xED0CDAED
	boltVersion    = 2
	boltHeader     = 16 // of a page: id, flags, count, overflow
	boltElement    = 16 // of a leaf: flags, position, sizes of key and value
	boltBucketSize = 16 // a bucket's root page, 0 if it is inline, and sequence

	boltLeafPage     = 0x02
	boltMetaPage     = 0x04
	boltFreelistPage = 0x10
	boltBucketFlag   = 0x01
)

var native = binary.NativeEndian

type boltFile struct {
	b        []byte
	pageSize uint64
	meta     boltMeta
	used     []uint64 // pages that must not be on the freelist
}

type boltMeta struct{ root, freelist, pages, tx uint64 }

// checkBolt returns the value of a key in a bucket of a BoltDB file whose
// buckets are a page or less.
func checkBolt(b []byte, bucket, key string) ([]byte, error) {
	f := &boltFile{b: b}
	if err := f.findMeta(); err != nil {
		return nil, err
	}
	root, err := f.page(f.meta.root, boltLeafPage)
	if err != nil {
		return nil, err
	}
	buckets, err := boltLeaf(root, boltBucketFlag)
	if err != nil {
		return nil, fmt.Errorf("page %d: %w", f.meta.root, err)
	}
	var value []byte
	for name, header := range buckets {
		values, err := f.bucket(header)
		if err != nil {
			return nil, fmt.Errorf("bucket %q: %w", name, err)
		}
		if name == bucket {
			value = values[key]
		}
	}
	if value == nil {
		return nil, fmt.Errorf("there is no %q in %q", key, bucket)
	}
	return value, f.checkFreelist()
}

// findMeta takes the newer of the two meta pages that are whole, as BoltDB does.
func (f *boltFile) findMeta() error {
	found := false
	take := func(at int) {
		m, size, ok := parseBoltMeta(f.b, at)
		if ok && (!found || f.pageSize == size && m.tx > f.meta.tx) {
			f.meta, f.pageSize, found = m, size, true
		}
	}
	take(0)
	if found {
		take(int(f.pageSize))
	}
	for size := 1 << 10; !found && size <= 1<<24; size <<= 1 {
		if take(size); found && f.pageSize != uint64(size) {
			found = false
		}
	}
	switch {
	case !found:
		return errors.New("neither of its meta pages is whole")
	case f.meta.pages > uint64(len(f.b))/f.pageSize:
		return fmt.Errorf("it has %d bytes, too few for %d pages", len(f.b), f.meta.pages)
	}
	return nil
}

func parseBoltMeta(b []byte, at int) (m boltMeta, pageSize uint64, ok bool) {
	if at+boltHeader+64 > len(b) {
		return m, 0, false
	}
	head, b := b[at:], b[at+boltHeader:]
	sum := fnv.New64a()
	sum.Write(b[:56])
	pageSize = uint64(native.Uint32(b[8:]))
	ok = native.Uint16(head[8:]) == boltMetaPage && native.Uint32(b) == boltMagic && native.Uint32(b[4:]) == boltVersion &&
		native.Uint64(b[56:]) == sum.Sum64() && pageSize >= 1<<10 && pageSize <= 1<<24
	return boltMeta{root: native.Uint64(b[16:]), freelist: native.Uint64(b[32:]), pages: native.Uint64(b[40:]), tx: native.Uint64(b[48:])}, pageSize, ok
}

// page returns a page with what overflows from it, and marks it as in use.
func (f *boltFile) page(id uint64, flags uint16) ([]byte, error) {
	if id < 2 || id >= f.meta.pages {
		return nil, fmt.Errorf("page %d is not one of %d", id, f.meta.pages)
	}
	b := f.b[id*f.pageSize:]
	overflow := uint64(native.Uint32(b[12:]))
	if got := native.Uint64(b); got != id || native.Uint16(b[8:]) != flags || overflow >= f.meta.pages-id {
		return nil, fmt.Errorf("page %d: its header is damaged", id)
	}
	for i := range overflow + 1 {
		f.used = append(f.used, id+i)
	}
	return b[:(overflow+1)*f.pageSize], nil
}

// boltLeaf returns the elements of a leaf page, all of which must have these
// flags.
func boltLeaf(page []byte, flags uint32) (map[string][]byte, error) {
	if len(page) < boltHeader || native.Uint16(page[8:]) != boltLeafPage {
		return nil, errors.New("it is not a leaf")
	}
	size, count := uint64(len(page)), uint64(native.Uint16(page[10:]))
	end := boltHeader + count*boltElement // of the elements; the keys and values follow, in order
	if end > size {
		return nil, fmt.Errorf("no room for %d elements", count)
	}
	elements := make(map[string][]byte, count)
	last := ""
	for i := range count {
		at := boltHeader + i*boltElement
		e := page[at:]
		from := at + uint64(native.Uint32(e[4:]))
		key := from + uint64(native.Uint32(e[8:]))
		value := key + uint64(native.Uint32(e[12:]))
		if native.Uint32(e) != flags || from != end || value > size || key == from || i > 0 && string(page[from:key]) <= last {
			return nil, fmt.Errorf("element %d is damaged", i)
		}
		last, end = string(page[from:key]), value
		elements[last] = page[key:value]
	}
	return elements, nil
}

// bucket returns a bucket's values.
func (f *boltFile) bucket(header []byte) (map[string][]byte, error) {
	if len(header) < boltBucketSize {
		return nil, errors.New("its header is too short")
	}
	page := header[boltBucketSize:]
	if root := native.Uint64(header); root != 0 {
		var err error
		if page, err = f.page(root, boltLeafPage); err != nil {
			return nil, err
		}
	}
	return boltLeaf(page, 0)
}

// checkFreelist: a page that is in use and on the freelist, too, will be
// written over.
func (f *boltFile) checkFreelist() error {
	page, err := f.page(f.meta.freelist, boltFreelistPage)
	if err != nil {
		return err
	}
	count := int(native.Uint16(page[10:]))
	if count > (len(page)-boltHeader)/8 {
		return fmt.Errorf("freelist: no room for %d pages", count)
	}
	last := uint64(1)
	for i := range count {
		id := native.Uint64(page[boltHeader+8*i:])
		if id <= last || id >= f.meta.pages || slices.Contains(f.used, id) {
			return fmt.Errorf("freelist: page %d cannot be free", id)
		}
		last = id
	}
	return nil
}
