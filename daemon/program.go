package daemon

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/index"
)

// program finds what a container of an image reads before its program's first line,
// whatever that does: users, the program itself and a shell, what interprets them, and
// the libraries that they name. It is what is fetched for a container where nothing
// better is known, all files of a step at once: by itself the loader opens one after
// the other.
type program struct {
	tree *tree
	seen map[string]bool
	next []string // paths that were found and not looked at
	left int64    // bytes that may yet be fetched
}

const (
	// maxProgram bounds all of it, and maxWhole one file that is fetched whole: of a
	// larger one the loader reads little.
	maxProgram = 32 << 20
	maxWhole   = 8 << 20

	maxSteps = 6   // from a program to its libraries, theirs, and so on
	maxFiles = 128 // of a step

	maxPath = 4096 // the kernel's PATH_MAX
)

func newProgram(t *tree, c ocispec.ImageConfig) *program {
	p := &program{tree: t, seen: map[string]bool{}, left: maxProgram}
	p.add("/etc/passwd", "/etc/group", "/bin/sh")
	command := append(slices.Clone(c.Entrypoint), c.Cmd...)
	if len(command) == 0 || len(command[0]) >= maxPath {
		return p
	}
	if name := command[0]; strings.Contains(name, "/") {
		p.add(path.Join("/", c.WorkingDir, name), path.Clean("/"+name))
	} else {
		p.add(inPath(c.Env, name)...)
	}
	return p
}

// inPath gives where a program may lie.
func inPath(env []string, name string) (paths []string) {
	dirs := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			dirs = v
		}
	}
	for dir := range strings.SplitSeq(dirs, ":") {
		if len(paths) == maxFiles { // a PATH may be megabytes
			break
		}
		if path.IsAbs(dir) && len(dir)+len(name) < maxPath {
			paths = append(paths, path.Join(dir, name))
		}
	}
	return paths
}

func (p *program) add(paths ...string) {
	for _, s := range paths {
		if !p.seen[s] && len(p.next) < maxFiles {
			p.seen[s] = true
			p.next = append(p.next, s)
		}
	}
}

// bring fetches it.
func (p *program) bring(ctx context.Context, f *fetch.Fetcher) error {
	for range maxSteps {
		var files []*index.Inode
		var wants []fetch.Want
		for _, name := range p.next {
			in, err := p.tree.resolve(name, true)
			if err != nil || in.Mode&unix.S_IFMT != unix.S_IFREG || in.Size == 0 {
				continue // it may well lie elsewhere
			}
			layer, off, ok, err := p.tree.index.Extent(&in)
			if err != nil || !ok {
				continue
			}
			files = append(files, &in)
			if in.Size <= min(maxWhole, p.left) {
				p.left -= in.Size
				wants = append(wants, fetch.Want{Layer: p.tree.layers[layer], Off: off, N: in.Size})
			}
		}
		p.next = nil
		if len(files) == 0 {
			return nil
		}
		if err := f.Bring(ctx, wants, fetch.Bringing{Class: fetch.Profile, Waste: 4}); err != nil {
			return err
		}
		for _, in := range files {
			p.look(in)
		}
	}
	return nil
}

// look finds what a program or a library needs besides itself.
func (p *program) look(in *index.Inode) {
	r := &fileReader{tree: p.tree, in: in}
	head := make([]byte, min(in.Size, 256))
	if _, err := r.ReadAt(head, 0); err != nil {
		return
	}
	if line, ok := bytes.CutPrefix(head, []byte("#!")); ok {
		line, _, _ = bytes.Cut(line, []byte("\n"))
		if words := strings.Fields(string(line)); len(words) > 0 {
			p.add(words[0])
			if path.Base(words[0]) == "env" && len(words) > 1 {
				p.add(inPath(nil, words[1])...)
			}
		}
		return
	}
	e, err := openELF(r)
	if err != nil {
		return // something else that the kernel knows, or not
	}
	interpreter, libs, err := e.needs()
	if err != nil {
		return
	}
	if interpreter != "" {
		p.add(path.Clean("/" + interpreter))
	}
	for _, lib := range libs {
		if strings.Contains(lib, "/") {
			continue // relative to what only the loader knows
		}
		for _, dir := range libraryDirs(e.machine) {
			p.add(path.Join(dir, lib))
		}
	}
}

// libraryDirs are where loaders look, Debian's first.
func libraryDirs(m elf.Machine) []string {
	dirs := []string{"/usr/local/lib", "/lib64", "/usr/lib64", "/lib", "/usr/lib"}
	if arch, ok := map[elf.Machine]string{elf.EM_X86_64: "x86_64", elf.EM_AARCH64: "aarch64", elf.EM_RISCV: "riscv64", elf.EM_S390: "s390x"}[m]; ok {
		dirs = slices.Insert(dirs, 0, "/lib/"+arch+"-linux-gnu", "/usr/lib/"+arch+"-linux-gnu")
	}
	return dirs
}

// fileReader reads a file of the image, fetching what is missing.
type fileReader struct {
	tree *tree
	in   *index.Inode
}

func (r *fileReader) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 || off >= r.in.Size {
		return 0, io.EOF
	}
	layer, at, ok, err := r.tree.index.Extent(r.in)
	if err != nil || !ok {
		return 0, fmt.Errorf("no extent: %w", err)
	}
	n := min(int64(len(b)), r.in.Size-off)
	l := r.tree.layers[layer]
	if err := l.Hold(at+off, n); err != nil {
		return 0, err
	}
	defer l.Release()
	got, err := unix.Pread(l.Fd(), b[:n], at+off)
	if err == nil && got < len(b) {
		err = io.EOF
	}
	return max(got, 0), err
}
