package main

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// touched is what a workload touches of an image.
type touched struct {
	names []string // all that is opened or executed, sorted
	files int
	bytes int64 // compressed
	tocs  int64 // TOCs and footers of all layers
}

// namesIn reads what strace wrote and gives the files opened and executed after
// the chroot, without links, from the image's root and without a leading slash.
// mount is where the image can be looked at.
func namesIn(trace io.Reader, mount string) ([]string, error) {
	names := map[string]bool{}
	root := ""                     // of the overlay, after the chroot
	pending := map[string]string{} // calls that others interrupted, by process
	sc := bufio.NewScanner(trace)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		pid, call, _ := strings.Cut(sc.Text(), " ")
		call = strings.TrimSpace(call)
		if c, ok := strings.CutSuffix(call, " <unfinished ...>"); ok {
			pending[pid] = c
			continue
		}
		if _, rest, ok := strings.Cut(call, " resumed>"); ok && strings.HasPrefix(call, "<... ") {
			call = pending[pid] + rest
		}
		i := strings.LastIndex(call, " = ")
		if i < 0 {
			continue
		}
		what, result := call[:i], call[i+3:]
		if strings.HasPrefix(result, "-1 ") {
			continue
		}
		verb, args, _ := strings.Cut(what, "(")
		switch {
		case verb == "chroot":
			root = quoted(args)
		case root == "":
		case strings.HasPrefix(verb, "open"):
			// The descriptor's own path, which has no links: 3</root/usr/lib/x>.
			_, p, _ := strings.Cut(result, "<")
			p = strings.TrimSuffix(p, ">")
			if rel, ok := strings.CutPrefix(p, root+"/"); ok {
				names[rel] = true
			} else if rel, ok := strings.CutPrefix(p, "/"); ok && !strings.HasPrefix(p, "/dev/") && !strings.HasPrefix(p, "/proc/") {
				names[rel] = true
			}
		case verb == "execve":
			if err := executed(names, mount, quoted(args)); err != nil {
				return nil, err
			}
		default:
			return nil, fmt.Errorf("the trace has %q, which this does not understand", call)
		}
	}
	if root == "" {
		return nil, errors.New("the trace has no chroot")
	}
	var out []string
	for n := range names {
		out = append(out, n)
	}
	slices.Sort(out)
	return out, sc.Err()
}

// quoted is the first string of a call's arguments.
func quoted(args string) string {
	_, s, _ := strings.Cut(args, `"`)
	s, _, _ = strings.Cut(s, `"`)
	return s
}

// executed adds a program and what the kernel opens for it, which no system call
// shows: the interpreter of a script or the loader of a binary.
func executed(names map[string]bool, mount, program string) error {
	for range 4 {
		if !path.IsAbs(program) {
			return fmt.Errorf("%q was executed by a relative path", program)
		}
		rel, err := resolve(mount, program)
		if errors.Is(err, os.ErrNotExist) {
			return nil // made by the workload
		}
		if err != nil {
			return err
		}
		names[rel] = true
		if program, err = interpreter(filepath.Join(mount, rel)); err != nil || program == "" {
			return err
		}
	}
	return nil
}

func interpreter(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	head := make([]byte, 256)
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return "", err
	}
	if line, ok := bytes.CutPrefix(head[:n], []byte("#!")); ok {
		line, _, _ = bytes.Cut(line, []byte("\n"))
		if f := strings.Fields(string(line)); len(f) > 0 {
			return f[0], nil
		}
	}
	e, err := elf.NewFile(f)
	if err != nil {
		return "", nil // no ELF
	}
	for _, p := range e.Progs {
		if p.Type == elf.PT_INTERP {
			b, err := io.ReadAll(p.Open())
			return strings.TrimRight(string(b), "\x00"), err
		}
	}
	return "", nil
}

// resolve follows links as a process with the root dir would.
func resolve(dir, p string) (string, error) {
	done, todo := "", strings.Split(p, "/")
	for hops := 0; len(todo) > 0; {
		n := todo[0]
		todo = todo[1:]
		switch n {
		case "", ".":
			continue
		case "..":
			done = strings.TrimPrefix(path.Dir("/"+done), "/")
			continue
		}
		next := path.Join(done, n)
		st, err := os.Lstat(filepath.Join(dir, next))
		if err != nil {
			return "", err
		}
		if st.Mode()&os.ModeSymlink == 0 {
			done = next
			continue
		}
		if hops++; hops > 40 {
			return "", fmt.Errorf("%s: too many links", p)
		}
		to, err := os.Readlink(filepath.Join(dir, next))
		if err != nil {
			return "", err
		}
		if path.IsAbs(to) {
			done = ""
		}
		todo = append(strings.Split(to, "/"), todo...)
	}
	return done, nil
}

// weigh sums the compressed chunks of files, each taken from the highest layer
// that has the name, by the layers' own TOCs.
func (b *bench) weigh(ctx context.Context, image string, names []string) (t touched, err error) {
	layers, tocs, err := b.readTOCs(ctx, image)
	if err != nil {
		return t, err
	}
	t.names, t.tocs = names, tocs
	seen := map[string]bool{}
	for _, n := range names {
		for i, l := range slices.Backward(layers) {
			e, ok := l.Lookup(n) // the target of a hard link
			if !ok {
				continue
			}
			if key := fmt.Sprint(i, e.Name); e.Type == "reg" && !seen[key] {
				seen[key] = true
				t.files++
				for off := int64(0); off < e.Size; {
					c, ok := l.ChunkEntryForOffset(e.Name, off)
					if !ok || c.ChunkSize <= 0 {
						return t, fmt.Errorf("%s has no chunk at %d", n, off)
					}
					t.bytes += c.NextOffset() - c.Offset
					off = c.ChunkOffset + c.ChunkSize
				}
			}
			break
		}
	}
	b.say("%s: %d names opened or executed, %d of them files of the image, %s MB compressed, TOCs %s MB", image, len(names), t.files, mb(t.bytes), mb(t.tocs))
	return t, nil
}

// readTOCs reads the TOCs of an image's layers, lowest first, and their sizes
// with the footers.
func (b *bench) readTOCs(ctx context.Context, image string) (out []*estargz.Reader, size int64, err error) {
	ref, err := name.ParseReference(b.registry+"/"+image+":"+tagEStargz, name.Insecure)
	if err != nil {
		return nil, 0, err
	}
	img, err := remote.Image(ref, remote.WithContext(ctx))
	if err != nil {
		return nil, 0, err
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, 0, err
	}
	for _, l := range m.Layers {
		blob := io.NewSectionReader(&ranges{ctx, "http://" + b.registry + "/v2/" + image + "/blobs/" + l.Digest.String()}, 0, l.Size)
		off, _, err := estargz.OpenFooter(blob)
		if err != nil {
			return nil, 0, fmt.Errorf("layer %s: %w", l.Digest, err)
		}
		r, err := estargz.Open(blob)
		if err != nil {
			return nil, 0, fmt.Errorf("layer %s: %w", l.Digest, err)
		}
		out, size = append(out, r), size+l.Size-off
	}
	return out, size, nil
}

// ranges reads a blob of a registry, not through the link.
type ranges struct {
	ctx context.Context
	url string
}

func (r *ranges) ReadAt(p []byte, off int64) (int, error) {
	req, err := http.NewRequestWithContext(r.ctx, http.MethodGet, r.url, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+int64(len(p))-1))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusPartialContent {
		return 0, fmt.Errorf("get a range of %s: %s", path.Base(r.url), resp.Status)
	}
	return io.ReadFull(resp.Body, p)
}
