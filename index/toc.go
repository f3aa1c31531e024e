package index

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"unsafe"
)

// The names of a layer are kept as one file, so that every image that has the
// layer merges from it and nothing is fetched or scanned twice: the magic, the
// entries as varints and counted strings, and a SHA-256 of all before it.
const tocMagic = "varvetc1"

// minEntry is the least number of bytes that an entry takes: what a file that was
// made by others says of its entries is held against its length.
const minEntry = 12

// WriteTOC writes entries as [ReadTOC] reads them.
func WriteTOC(w io.Writer, entries []Entry) error {
	const some = 32 << 10
	sum := sha256.New()
	both := io.MultiWriter(w, sum)
	buf := append(make([]byte, 0, 2*some), tocMagic...)
	buf = binary.AppendUvarint(buf, uint64(len(entries)))
	for i := range entries {
		if buf = appendEntry(buf, &entries[i]); len(buf) >= some {
			if _, err := both.Write(buf); err != nil {
				return err
			}
			buf = buf[:0]
		}
	}
	if _, err := both.Write(buf); err != nil {
		return err
	}
	_, err := w.Write(sum.Sum(buf[:0]))
	return err
}

func appendEntry(buf []byte, e *Entry) []byte {
	buf = appendString(buf, e.Name)
	hard := uint64(0)
	if e.HardLink {
		hard = 1
	}
	for _, v := range [...]uint64{uint64(e.Mode), uint64(e.UID), uint64(e.GID), uint64(e.Rdev), uint64(e.MtimeNs), uint64(e.Size), uint64(e.Data), hard} {
		buf = binary.AppendUvarint(buf, v)
	}
	buf = binary.AppendVarint(buf, e.Mtime)
	buf = appendString(buf, e.Link)
	buf = binary.AppendUvarint(buf, uint64(len(e.Xattrs)))
	for _, x := range e.Xattrs {
		buf = appendString(buf, x.Name)
		buf = appendString(buf, x.Value)
	}
	return buf
}

func appendString[S string | []byte](buf []byte, s S) []byte {
	buf = binary.AppendUvarint(buf, uint64(len(s)))
	return append(buf, s...)
}

// ReadTOC gives the entries that [WriteTOC] wrote. Their strings are raw's own
// memory, which must not change while there are entries. A file that was cut or
// changed is refused.
func ReadTOC(raw []byte) ([]Entry, error) {
	if len(raw) < len(tocMagic)+sha256.Size || string(raw[:len(tocMagic)]) != tocMagic {
		return nil, fmt.Errorf("%w: not a layer's table of contents", ErrMalformed)
	}
	body, sum := raw[:len(raw)-sha256.Size], raw[len(raw)-sha256.Size:]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) {
		return nil, fmt.Errorf("%w: the layer's table of contents does not match its sum", ErrMalformed)
	}
	d := tocDecoder{s: inPlace(body[len(tocMagic):])}
	n := d.uint()
	if n > MaxEntries || n > uint64(len(body)/minEntry) {
		return nil, fmt.Errorf("%w: %d entries in one layer", ErrMalformed, n)
	}
	entries := make([]Entry, n)
	for i := range entries {
		e := &entries[i]
		e.Name = d.str()
		e.Mode, e.UID, e.GID, e.Rdev, e.MtimeNs = uint32(d.uint()), uint32(d.uint()), uint32(d.uint()), uint32(d.uint()), uint32(d.uint())
		e.Size, e.Data = int64(d.uint()), int64(d.uint())
		e.HardLink = d.uint() == 1
		e.Mtime = d.int()
		e.Link = d.str()
		if n := d.uint(); n > uint64(len(d.s)/2) {
			d.short = true
		} else if n > 0 {
			e.Xattrs = make([]Xattr, n)
			for k := range e.Xattrs {
				e.Xattrs[k] = Xattr{Name: d.str(), Value: []byte(d.str())}
			}
		}
		if d.short {
			return nil, fmt.Errorf("%w: the layer's table of contents ends early", ErrMalformed)
		}
	}
	return entries, nil
}

// inPlace gives bytes that do not change any more as a string, uncopied.
func inPlace(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

type tocDecoder struct {
	s     string
	short bool
}

func (d *tocDecoder) uint() uint64 {
	var v uint64
	for i := 0; i < len(d.s) && i < binary.MaxVarintLen64; i++ {
		v |= uint64(d.s[i]&0x7f) << (7 * i)
		if d.s[i] < 0x80 {
			d.s = d.s[i+1:]
			return v
		}
	}
	d.short = true
	return 0
}

func (d *tocDecoder) int() int64 {
	u := d.uint()
	return int64(u>>1) ^ -int64(u&1)
}

func (d *tocDecoder) str() string {
	n := d.uint()
	if n > uint64(len(d.s)) {
		d.short = true
		return ""
	}
	s := d.s[:n]
	d.s = d.s[n:]
	return s
}
