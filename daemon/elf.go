package daemon

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

const (
	maxSegments = 128      // program headers that are looked at
	maxDynamic  = 64 << 10 // bytes of a program's dynamic entries
	maxLibrary  = 255      // bytes of a library's name: the kernel's NAME_MAX
)

// segment is a program header of either class.
type segment struct {
	kind                elf.ProgType
	off, vaddr, storage uint64
}

// elfFile is what a loader reads of a program: its program headers. The usual reader
// goes by sections, which may be compressed, and may name one long string a hundred
// thousand times: a small file that fills memory.
type elfFile struct {
	r        io.ReaderAt
	order    binary.ByteOrder
	wide     bool // 64 bits
	machine  elf.Machine
	segments []segment
}

func openELF(r io.ReaderAt) (*elfFile, error) {
	var head [64]byte
	if _, err := r.ReadAt(head[:52], 0); err != nil { // as long as the 32 bits' is
		return nil, err
	}
	f := &elfFile{r: r, order: binary.LittleEndian, wide: elf.Class(head[elf.EI_CLASS]) == elf.ELFCLASS64}
	if elf.Data(head[elf.EI_DATA]) == elf.ELFDATA2MSB {
		f.order = binary.BigEndian
	}
	if string(head[:4]) != elf.ELFMAG {
		return nil, fmt.Errorf("no ELF file: it begins with %q", head[:4])
	}
	if f.wide {
		if _, err := r.ReadAt(head[:], 0); err != nil {
			return nil, err
		}
	}
	f.machine = elf.Machine(f.order.Uint16(head[18:]))
	at, size, n := uint64(f.order.Uint32(head[28:])), f.order.Uint16(head[42:]), f.order.Uint16(head[44:])
	if f.wide {
		at, size, n = f.order.Uint64(head[32:]), f.order.Uint16(head[54:]), f.order.Uint16(head[56:])
	}
	for i := range min(uint64(n), maxSegments) {
		s, err := f.segment(at + i*uint64(size))
		if err != nil {
			return nil, err
		}
		f.segments = append(f.segments, s)
	}
	return f, nil
}

func (f *elfFile) segment(at uint64) (s segment, err error) {
	var b [56]byte
	used := b[:32]
	if f.wide {
		used = b[:]
	}
	if err := f.read(used, at); err != nil {
		return s, err
	}
	s.kind = elf.ProgType(f.order.Uint32(b[:]))
	if f.wide {
		s.off, s.vaddr, s.storage = f.order.Uint64(b[8:]), f.order.Uint64(b[16:]), f.order.Uint64(b[32:])
	} else {
		s.off, s.vaddr, s.storage = uint64(f.order.Uint32(b[4:])), uint64(f.order.Uint32(b[8:])), uint64(f.order.Uint32(b[16:]))
	}
	return s, nil
}

// read fills b.
func (f *elfFile) read(b []byte, at uint64) error {
	if at > math.MaxInt64 {
		return io.ErrUnexpectedEOF
	}
	n, err := f.r.ReadAt(b, int64(at))
	if n == len(b) {
		return nil
	}
	return err
}

// text gives a string of at most so many bytes that ends with a NUL, "" if there is
// none.
func (f *elfFile) text(at uint64, most int) (string, error) {
	b := make([]byte, most+1)
	if err := f.read(b, at); err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	end := max(bytes.IndexByte(b, 0), 0)
	return string(b[:end]), nil
}

// needs gives what a loader opens besides: what interprets the program, "" for none,
// and the libraries that it names.
func (f *elfFile) needs() (interpreter string, libraries []string, err error) {
	for _, s := range f.segments {
		switch {
		case s.kind == elf.PT_INTERP && interpreter == "":
			interpreter, err = f.text(s.off, int(min(s.storage, maxPath)))
		case s.kind == elf.PT_DYNAMIC && libraries == nil:
			libraries, err = f.libraries(s)
		}
		if err != nil {
			return "", nil, err
		}
	}
	return interpreter, libraries, nil
}

// libraries gives those that the dynamic entries name.
func (f *elfFile) libraries(dynamic segment) (names []string, err error) {
	b := make([]byte, min(dynamic.storage, maxDynamic))
	if err := f.read(b, dynamic.off); err != nil {
		return nil, err
	}
	half := 4
	if f.wide {
		half = 8
	}
	word := func(b []byte) uint64 {
		if f.wide {
			return f.order.Uint64(b)
		}
		return uint64(f.order.Uint32(b))
	}
	var in []uint64 // the table of strings
	var table uint64
	for ; len(b) >= 2*half && elf.DynTag(word(b)) != elf.DT_NULL; b = b[2*half:] {
		switch v := word(b[half:]); {
		case elf.DynTag(word(b)) == elf.DT_STRTAB:
			table = v
		case elf.DynTag(word(b)) == elf.DT_NEEDED && len(in) < maxFiles:
			in = append(in, v)
		}
	}
	for _, s := range f.segments {
		if s.kind != elf.PT_LOAD || table < s.vaddr || table-s.vaddr >= s.storage {
			continue
		}
		for _, off := range in {
			if off >= s.storage {
				continue
			}
			name, err := f.text(s.off+(table-s.vaddr)+off, maxLibrary)
			if err != nil {
				return nil, err
			}
			if name != "" {
				names = append(names, name)
			}
		}
		break
	}
	return names, nil
}
