package peer

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/diurnalog/diurna/logstore/vfs"
)

const (
	// bookLimit is how many nodes a Book holds.
	bookLimit = 1024
	// bookFormat is the version of its file.
	bookFormat = 1
	// bookFileLimit is more than the largest file of bookLimit lines.
	bookFileLimit = bookLimit*(2*nameLimit+64) + 4<<10
	// bookStale is how old the file's times may get while nothing else changes.
	bookStale = 24 * time.Hour
)

// Entry is what a Book holds of a node.
type Entry struct {
	// Address is host:port.
	Address string
	// Seen is when the address was last confirmed, to the second.
	Seen time.Time
}

// Book remembers where nodes were last, so that a node that starts while
// nobody can tell it still finds the others. It is a cache: losing it loses
// nothing that cannot be learned again. It holds 1024 nodes; the one that was
// not seen for longest makes room. All methods are safe for concurrent use;
// Lookup and All never wait for the disk.
type Book struct {
	fs   vfs.FS
	file string

	writing vfs.Mutex // held while the file is written, and before mu

	mu      sync.Mutex
	entries map[string]Entry // guarded by mu
	dirty   bool             // the file says otherwise; guarded by mu
	saved   time.Time        // when it was last written; guarded by mu
}

// OpenBook reads the file, in a directory that exists. The Book is usable
// whatever happens: if the file is missing it is empty; if it is damaged or
// cannot be read it is empty too, and the error is a warning that says so.
func OpenBook(fsys vfs.FS, file string) (*Book, error) {
	b := &Book{fs: fsys, file: file, entries: make(map[string]Entry)}
	content, err := vfs.ReadFile(fsys, file, bookFileLimit)
	if errors.Is(err, fs.ErrNotExist) {
		return b, nil
	}
	if err == nil {
		var entries map[string]Entry
		if entries, err = decodeBook(content); err == nil {
			b.entries = entries
			b.saved = time.Now()
			return b, nil
		}
	}
	return b, fmt.Errorf("the peers' last addresses are forgotten: %s: %w", file, err)
}

// Lookup returns the last known address of a node.
func (b *Book) Lookup(id string) (address string, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, ok := b.entries[id]
	return e.Address, ok
}

// All returns a copy of what the Book holds, by node id.
func (b *Book) All() map[string]Entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.entries)
}

// Update notes where nodes are now, by node id, and forgets none that are not
// mentioned. The file is written if an address is new, or its times are old. An
// error means that the Book knows but the file does not, and the next Update
// tries again; or that an id or address is not one word of at most 256 bytes,
// and was left out.
func (b *Book) Update(addresses map[string]string) error {
	b.writing.Lock()
	defer b.writing.Unlock()
	now := time.Now().Truncate(time.Second)
	var invalid []error

	b.mu.Lock()
	for id, address := range addresses {
		if !validName(id) || !validName(address) {
			invalid = append(invalid, fmt.Errorf("node %q at %q cannot be remembered", id, address))
			continue
		}
		if b.entries[id].Address != address {
			b.dirty = true
		}
		b.entries[id] = Entry{Address: address, Seen: now}
	}
	if len(b.entries) > bookLimit {
		byAge := byAge(b.entries)
		for _, id := range byAge[:len(byAge)-bookLimit] {
			delete(b.entries, id)
		}
	}
	if len(b.entries) > 0 && now.Sub(b.saved) >= bookStale {
		b.dirty = true
	}
	b.mu.Unlock()
	return errors.Join(append(invalid, b.save())...)
}

// Forget removes nodes, as when they have left for good.
func (b *Book) Forget(ids ...string) error {
	b.writing.Lock()
	defer b.writing.Unlock()
	b.mu.Lock()
	for _, id := range ids {
		if _, ok := b.entries[id]; ok {
			delete(b.entries, id)
			b.dirty = true
		}
	}
	b.mu.Unlock()
	return b.save()
}

// save writes the file if it says otherwise. The caller holds writing.
func (b *Book) save() error {
	b.mu.Lock()
	dirty, content := b.dirty, encodeBook(b.entries)
	b.mu.Unlock()
	if !dirty {
		return nil
	}
	if err := vfs.WriteFile(b.fs, b.file, content); err != nil {
		return fmt.Errorf("remember the peers' addresses: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty, b.saved = false, time.Now()
	return nil
}

// byAge orders ids by when they were last seen, the oldest first.
func byAge(entries map[string]Entry) []string {
	return slices.SortedFunc(maps.Keys(entries), func(x, y string) int {
		return cmp.Or(entries[x].Seen.Compare(entries[y].Seen), strings.Compare(x, y))
	})
}

// encodeBook makes the file:
//
//	diurna-peers 1
//	node <id> <address> <seconds since 1970 when it was last seen>
//	...
//	crc32c <of everything before this line, eight hexadecimal digits>
//
// in the order of ids.
func encodeBook(entries map[string]Entry) []byte {
	var out bytes.Buffer
	fmt.Fprintf(&out, "diurna-peers %d\n", bookFormat)
	for _, id := range slices.Sorted(maps.Keys(entries)) {
		fmt.Fprintf(&out, "node %s %s %d\n", id, entries[id].Address, entries[id].Seen.Unix())
	}
	out.WriteString(bookSum(out.Bytes()))
	return out.Bytes()
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func bookSum(body []byte) string {
	return fmt.Sprintf("crc32c %08x\n", crc32.Checksum(body, castagnoli))
}

var errBookDamaged = errors.New("the file is damaged")

// decodeBook accepts exactly what encodeBook makes.
func decodeBook(content []byte) (map[string]Entry, error) {
	at := bytes.LastIndex(content, []byte("crc32c "))
	if at < 0 || bookSum(content[:at]) != string(content[at:]) {
		return nil, errBookDamaged
	}
	entries := make(map[string]Entry)
	first := true
	for line := range strings.Lines(string(content[:at])) {
		line = strings.TrimSuffix(line, "\n")
		if first {
			first = false
			v, ok := strings.CutPrefix(line, "diurna-peers ")
			if !ok {
				return nil, errBookDamaged
			}
			if v != strconv.Itoa(bookFormat) {
				return nil, fmt.Errorf("the file has format version %s, this program knows version %d", printable(v), bookFormat)
			}
			continue
		}
		words := strings.Split(line, " ")
		if len(words) != 4 || words[0] != "node" || !validName(words[1]) || !validName(words[2]) {
			return nil, errBookDamaged
		}
		seen, err := strconv.ParseInt(words[3], 10, 64)
		if err != nil {
			return nil, errBookDamaged
		}
		if _, twice := entries[words[1]]; twice || len(entries) == bookLimit {
			return nil, errBookDamaged
		}
		entries[words[1]] = Entry{Address: words[2], Seen: time.Unix(seen, 0)}
	}
	if first {
		return nil, errBookDamaged
	}
	return entries, nil
}
