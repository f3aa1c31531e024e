package daemon

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestProgramPaths has a container's program looked for where the runtime would.
func TestProgramPaths(t *testing.T) {
	always := []string{"/etc/passwd", "/etc/group", "/bin/sh"}
	for name, c := range map[string]struct {
		config ocispec.ImageConfig
		want   []string
	}{
		"none":       {ocispec.ImageConfig{}, nil},
		"absolute":   {ocispec.ImageConfig{Cmd: []string{"/usr/bin/app", "-v"}}, []string{"/usr/bin/app"}},
		"relative":   {ocispec.ImageConfig{Cmd: []string{"./app"}, WorkingDir: "/srv"}, []string{"/srv/app", "/app"}},
		"entrypoint": {ocispec.ImageConfig{Entrypoint: []string{"/init"}, Cmd: []string{"app"}}, []string{"/init"}},
		"in PATH":    {ocispec.ImageConfig{Cmd: []string{"app"}, Env: []string{"PATH=/opt/bin::bin:/bin"}}, []string{"/opt/bin/app", "/bin/app"}},
		"no PATH":    {ocispec.ImageConfig{Cmd: []string{"app"}}, []string{"/usr/local/sbin/app", "/usr/local/bin/app", "/usr/sbin/app", "/usr/bin/app", "/sbin/app", "/bin/app"}},
		"too long":   {ocispec.ImageConfig{Cmd: []string{strings.Repeat("a", 1<<20)}, Env: []string{"PATH=" + strings.Repeat("/a:", 1<<20)}}, nil},
		"above":      {ocispec.ImageConfig{Cmd: []string{"../../app"}}, []string{"/app"}},
	} {
		if got := newProgram(nil, c.config).next; !slices.Equal(got, append(slices.Clone(always), c.want...)) {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// TestProgramPathLong has a PATH of megabytes looked through as far as files are
// fetched.
func TestProgramPathLong(t *testing.T) {
	c := ocispec.ImageConfig{Cmd: []string{strings.Repeat("a", 4000)}, Env: []string{"PATH=" + strings.Repeat("/a:", 1<<20)}}
	if n := len(inPath(c.Env, c.Cmd[0])); n != maxFiles {
		t.Errorf("%d places", n)
	}
	if n := len(newProgram(nil, c).next); n > maxFiles {
		t.Errorf("%d files", n)
	}
}

// program64 makes a program whose dynamic entries name libraries at these places of a
// table of strings, all in one segment.
func program64(order binary.ByteOrder, interpreter, table string, needed []uint64) []byte {
	const segments, interp = 64, 64 + 3*56
	dynamic := uint64(interp + len(interpreter) + 1)
	strings := dynamic + uint64(len(needed)+2)*16
	end := strings + uint64(len(table))
	data := elf.ELFDATA2LSB
	if order.Uint16([]byte{1, 0}) != 1 {
		data = elf.ELFDATA2MSB
	}
	var b bytes.Buffer
	h := elf.Header64{Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: segments, Ehsize: 64, Phentsize: 56, Phnum: 3}
	copy(h.Ident[:], elf.ELFMAG+string([]byte{byte(elf.ELFCLASS64), byte(data), 1}))
	binary.Write(&b, order, h)
	const base = 0x400000
	binary.Write(&b, order, []elf.Prog64{
		{Type: uint32(elf.PT_LOAD), Vaddr: base, Filesz: end, Memsz: end},
		{Type: uint32(elf.PT_INTERP), Off: interp, Filesz: uint64(len(interpreter) + 1)},
		{Type: uint32(elf.PT_DYNAMIC), Off: dynamic, Filesz: strings - dynamic},
	})
	b.WriteString(interpreter + "\x00")
	for _, at := range needed {
		binary.Write(&b, order, elf.Dyn64{Tag: int64(elf.DT_NEEDED), Val: at})
	}
	binary.Write(&b, order, []elf.Dyn64{{Tag: int64(elf.DT_STRTAB), Val: base + strings}, {}})
	b.WriteString(table)
	return b.Bytes()
}

// program32 is program64 for 32 bits, little-endian.
func program32(interpreter, table string, needed []uint64) []byte {
	const segments, interp = 52, 52 + 3*32
	dynamic := uint32(interp + len(interpreter) + 1)
	strings := dynamic + uint32(len(needed)+2)*8
	end := strings + uint32(len(table))
	var b bytes.Buffer
	h := elf.Header32{Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_ARM), Version: 1, Phoff: segments, Ehsize: 52, Phentsize: 32, Phnum: 3}
	copy(h.Ident[:], elf.ELFMAG+string([]byte{byte(elf.ELFCLASS32), byte(elf.ELFDATA2LSB), 1}))
	order := binary.LittleEndian
	binary.Write(&b, order, h)
	const base = 0x10000
	binary.Write(&b, order, []elf.Prog32{
		{Type: uint32(elf.PT_LOAD), Vaddr: base, Filesz: end, Memsz: end},
		{Type: uint32(elf.PT_INTERP), Off: interp, Filesz: uint32(len(interpreter) + 1)},
		{Type: uint32(elf.PT_DYNAMIC), Off: dynamic, Filesz: strings - dynamic},
	})
	b.WriteString(interpreter + "\x00")
	for _, at := range needed {
		binary.Write(&b, order, elf.Dyn32{Tag: int32(elf.DT_NEEDED), Val: uint32(at)})
	}
	binary.Write(&b, order, []elf.Dyn32{{Tag: int32(elf.DT_STRTAB), Val: base + strings}, {}})
	b.WriteString(table)
	return b.Bytes()
}

// TestNeeds reads what programs need of them, of all forms and of the machine's own,
// as the usual reader does.
func TestNeeds(t *testing.T) {
	const ld, table = "/lib/ld.so", "\x00libc.so.6\x00libm.so\x00"
	programs := map[string][]byte{
		"64 bits":    program64(binary.LittleEndian, ld, table, []uint64{1, 11}),
		"big-endian": program64(binary.BigEndian, ld, table, []uint64{1, 11}),
		"32 bits":    program32(ld, table, []uint64{1, 11}),
	}
	for name, b := range programs {
		f, err := openELF(bytes.NewReader(b))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if with, libs, err := f.needs(); with != ld || !slices.Equal(libs, []string{"libc.so.6", "libm.so"}) || err != nil {
			t.Errorf("%s: %q %q %v", name, with, libs, err)
		}
	}
	for _, path := range []string{"/bin/sh", "/usr/bin/env", "/proc/self/exe"} {
		real, err := elf.Open(path)
		if err != nil {
			continue
		}
		defer real.Close()
		want, _ := real.ImportedLibraries()
		r, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		f, err := openELF(r)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if _, libs, err := f.needs(); !slices.Equal(libs, want) || f.machine != real.Machine || err != nil {
			t.Errorf("%s: %q %v %v, want %q %v", path, libs, f.machine, err, want, real.Machine)
		}
	}
}

// TestNeedsBounded gives programs that would have their reader fill memory: a hundred
// thousand times the same megabyte as a library's name.
func TestNeedsBounded(t *testing.T) {
	b := program64(binary.LittleEndian, strings.Repeat("i", 100_000), strings.Repeat("l", 1<<20)+"\x00", make([]uint64, 100_000))
	bounded(t, b)
}

func bounded(t *testing.T, b []byte) {
	f, err := openELF(bytes.NewReader(b))
	if err != nil {
		return
	}
	with, libs, _ := f.needs()
	if len(with) > maxPath || len(libs) > maxFiles || len(f.segments) > maxSegments {
		t.Errorf("%d bytes of interpreter, %d libraries, %d segments", len(with), len(libs), len(f.segments))
	}
	for _, l := range libs {
		if len(l) > maxLibrary || strings.Contains(l, "\x00") {
			t.Errorf("a library of %d bytes", len(l))
		}
	}
}

// FuzzNeeds reads anything as a program.
func FuzzNeeds(f *testing.F) {
	f.Add(program64(binary.LittleEndian, "/ld", "\x00libc\x00", []uint64{1}))
	f.Add(program64(binary.BigEndian, "/ld", "\x00libc\x00", []uint64{1}))
	f.Add(program32("/ld", "\x00libc\x00", []uint64{1}))
	f.Fuzz(bounded)
}
